"""Events as they happen, and coming back to where one left off."""

import asyncio
import gc
import json
import threading
from contextlib import ExitStack
from typing import Any

import psutil
import pytest

from shared.jobs.fencing import Lease
from shared.jobs.rows import NewEvent
from shared.jobs.spec import JobFault
from tests.services.gateway.conftest import ROWS, Gateway, eventually, running_gateway

PATH = "/v1/fine_tuning/jobs"
STREAM = {"accept": "text/event-stream"}


def running(gateway: Gateway) -> tuple[str, Lease]:
    body = {"model": "smollm2-135m-instruct", "training_file": gateway.uploaded(ROWS)}
    job = gateway.http.post(PATH, json=body).json()["id"]
    lease = gateway.leases.claim("worker-1")
    assert lease is not None
    return job, lease


def parsed(text: str) -> list[dict[str, Any]]:
    """The events of a finished stream, each checked to carry its own id."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields.get("data") == "[DONE]":
            continue
        event = json.loads(fields["data"])
        assert event["id"] == fields["id"]
        found.append(event)
    return found


def ascending(gateway: Gateway, job: str) -> list[str]:
    data = gateway.http.get(f"{PATH}/{job}/events", params={"limit": 100}).json()["data"]
    return [event["id"] for event in reversed(data)]


def test_a_stream_has_every_event_as_it_happens_and_ends_with_the_job(gateway: Gateway) -> None:
    job, lease = running(gateway)
    with gateway.http.stream("GET", f"{PATH}/{job}/events", headers=STREAM) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        pieces = answer.iter_text()
        seen = next(pieces)
        # These are written while the client is listening.
        gateway.leases.record(lease, [NewEvent("loss 2.5", type="metrics", data={"loss": 2.5})])
        gateway.leases.fail(lease, JobFault(code="non_finite_loss", message="the loss is NaN"))
        seen += "".join(pieces)
    events = parsed(seen)
    assert [event["id"] for event in events] == ascending(gateway, job)
    assert events[-2]["data"] == {"loss": 2.5}
    assert events[-1]["level"] == "error"
    assert seen.endswith("data: [DONE]\n\n")


def test_who_comes_back_gets_what_was_missed_and_nothing_twice(gateway: Gateway) -> None:
    job, lease = running(gateway)
    gateway.leases.record(lease, [NewEvent(f"event {n}") for n in range(250)])
    gateway.leases.fail(lease, JobFault(code="x", message="x"))
    whole = parsed(gateway.http.get(f"{PATH}/{job}/events", headers=STREAM).text)
    assert len(whole) > 250
    at = 100
    rest = gateway.http.get(f"{PATH}/{job}/events", headers=STREAM | {"last-event-id": whole[at]["id"]})
    assert parsed(rest.text) == whole[at + 1 :]
    by_query = gateway.http.get(f"{PATH}/{job}/events", headers=STREAM, params={"after": whole[at]["id"]})
    assert parsed(by_query.text) == whole[at + 1 :]
    # All was seen, and there will be no more: a browser is told not to come back.
    end = gateway.http.get(f"{PATH}/{job}/events", headers=STREAM | {"last-event-id": whole[-1]["id"]})
    assert end.status_code == 204


def test_who_comes_back_in_mid_stream_goes_on_to_the_end(gateway: Gateway) -> None:
    """The connection breaks while the job runs; the client returns with the last id it saw, to another gateway."""
    job, lease = running(gateway)
    with gateway.http.stream("GET", f"{PATH}/{job}/events", headers=STREAM) as answer:
        seen = parsed(next(answer.iter_text()).rpartition("\n\n")[0])
    gateway.leases.record(lease, [NewEvent(f"while nobody listens {n}") for n in range(3)])
    again = STREAM | {"last-event-id": seen[-1]["id"]}
    with (
        running_gateway(gateway.settings) as another,
        another.http.stream("GET", f"{PATH}/{job}/events", headers=again) as answer,
    ):
        pieces = answer.iter_text()
        rest = next(pieces)
        gateway.leases.fail(lease, JobFault(code="x", message="the end"))
        rest += "".join(pieces)
    assert rest.endswith("data: [DONE]\n\n")
    assert [event["id"] for event in seen + parsed(rest)] == ascending(gateway, job)


@pytest.mark.parametrize("cursor", ["ftevent-other-1", "1", "ftevent", "a b", "ftevent-{job}-x", "ftevent-{job}--1"])
def test_cursors_that_are_none(gateway: Gateway, cursor: str) -> None:
    job, _ = running(gateway)
    cursor = cursor.replace("{job}", job.removeprefix("ftjob-"))
    assert gateway.http.get(f"{PATH}/{job}/events", params={"after": cursor}).status_code == 400
    answer = gateway.http.get(f"{PATH}/{job}/events", headers=STREAM | {"last-event-id": cursor})
    assert answer.status_code == 400
    assert gateway.http.get(f"{PATH}/ftjob-0/events", headers=STREAM).status_code == 404


def held(gateway: Gateway) -> tuple[int, int]:
    """What requests hold here: asyncio tasks that are not done, and connections to the gateway's port."""
    # type(): asking some objects for their __class__ warns.
    tasks = [each for each in gc.get_objects() if issubclass(type(each), asyncio.Task) and not each.done()]
    port = int(gateway.url.rpartition(":")[2])
    connections = psutil.Process().net_connections("tcp")
    established = [one for one in connections if one.status == psutil.CONN_ESTABLISHED and one.laddr.port == port]
    return len(tasks), len(established)


def test_listeners_that_leave_take_no_task_connection_or_thread_with_them(gateway: Gateway) -> None:
    job, lease = running(gateway)
    before, pooled, others, listeners = held(gateway), list[int](), list[int](), 10
    for _ in range(2):
        with ExitStack() as listening:
            open_streams = []
            for _ in range(listeners):
                answer = listening.enter_context(gateway.http.stream("GET", f"{PATH}/{job}/events", headers=STREAM))
                open_streams.append(answer.iter_text())
                assert next(open_streams[-1])
            tasks, connections = held(gateway)
            assert tasks >= before[0] + listeners
            assert connections >= before[1] + listeners - 1
        eventually(lambda: held(gateway) <= before)
        names = [thread.name for thread in threading.enumerate()]
        pooled.append(sum(name.startswith("AnyIO worker") for name in names))
        others.append(len(names) - pooled[-1])
    assert others[1] <= others[0]
    # The pool's wait for their next request. How many there are follows from how many asked SQL at the same moment; one
    # held by each listener would be ten more.
    assert pooled[1] - pooled[0] < listeners
    gateway.leases.renew(lease)
    assert gateway.http.get(f"{PATH}/{job}").json()["status"] == "running"

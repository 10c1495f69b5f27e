"""What each command writes where and how it ends, against a fake gateway.

In this process, as a runner starts a process in half a second; what signals and terminals do is tested on processes.
"""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from typer.testing import CliRunner

from shared.jobs.spec import MAX_TRAINING_FILES
from tests.stack_processes import clean_environment
from tests.tunesmith.fake_gateway import KEY, Answer, FakeGateway, error, job, stream
from tunesmith.cli import app
from tunesmith.commands import datasets

JOB = "/v1/fine_tuning/jobs/ftjob-1"
NEXT = "next: tunesmith generate 'Your question' --adapter ft:tiny:default:x:1\n"
DONE = job("succeeded", fine_tuned_model="ft:tiny:default:x:1")


class HasUrl(Protocol):
    """A gateway, fake or real."""

    @property
    def url(self) -> str: ...


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with FakeGateway({}) as fake:
        yield fake


def environment(url: str, key: str = KEY) -> dict[str, str]:
    kept = clean_environment()
    return kept | {"TUNESMITH_URL": url, "TUNESMITH_API_KEY": key, "TERM": "xterm", "COLUMNS": "100"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from tunesmith.cli import main; main()", *arguments]


def run_process(gateway: FakeGateway, *arguments: str, **environ: str) -> tuple[int, str, str]:
    """As a process of its own: for what libraries read of the environment when they are imported."""
    env = environment(gateway.url) | environ
    done = subprocess.run(command(*arguments), env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def run(gateway: HasUrl, *arguments: str, key: str = KEY, said: str = "", **environ: str) -> tuple[int, str, str]:
    env: dict[str, str | None] = dict.fromkeys(os.environ)
    done = CliRunner().invoke(app, arguments, input=said, env=env | environment(gateway.url, key) | environ)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("last", "code", "said"),
    [
        (DONE, 0, "succeeded: ft:tiny:default:x:1\n"),
        (job("failed", error={"code": "oom", "message": "too big"}), 5, "failed: too big\n"),
        (job("cancelled"), 6, "cancelled\n"),
    ],
)
def test_wait(gateway: FakeGateway, last: dict[str, Any], code: int, said: str) -> None:
    gateway.answers["GET " + JOB] = (200, last)
    named, then = ("ft:tiny:default:x:1\n", NEXT) if code == 0 else ("", "")
    assert run(gateway, "wait", "ftjob-1") == (code, named, said + then)
    got, out, err = run(gateway, "wait", "ftjob-1", "--json")
    assert (got, json.loads(out), err) == (code, last, said)


def test_wait_timeout_unknown_key_unknown_job_and_usage(gateway: FakeGateway) -> None:
    gateway.answers["GET " + JOB] = (200, job(progress={"step": 3, "total_steps": 9}))
    late = "running training 3/9\nnot finished after 0.1 s; the job goes on\n"
    assert run(gateway, "wait", "ftjob-1", "--timeout", "0.1") == (3, "", late)
    assert run(gateway, "wait", "ftjob-1", key="ts-wrong") == (4, "", "error: this API key is not valid\n")
    assert run(gateway, "wait", "ftjob-2") == (4, "", "error: no such thing\n")
    assert run(gateway, "wait")[0] == 2
    assert run(gateway, "wait", "ftjob-1", "--timeout", "soon")[0] == 2


def test_wait_that_cannot_tell(gateway: FakeGateway, tmp_path: Path) -> None:
    gateway.answers["GET " + JOB] = error(400, "not now", "invalid_request")
    summary = tmp_path / "summary.md"
    unknown = "could not tell what became of the job: not now"
    assert run(gateway, "wait", "ftjob-1", GITHUB_STEP_SUMMARY=str(summary)) == (1, "", f"error: {unknown}\n")
    assert f"| End | {unknown} |" in summary.read_text()


def test_wait_goes_on_through_a_restart_of_the_gateway(gateway: FakeGateway) -> None:
    answers = [(200, job()), error(503, "starting", "unavailable"), (200, DONE)]
    gateway.answers["GET " + JOB] = lambda body: answers.pop(0)
    code, out, err = run(gateway, "wait", "ftjob-1")
    assert (code, out) == (0, "ft:tiny:default:x:1\n")
    assert err.splitlines() == [
        "running training",
        "starting; trying again for 300 s",
        "connected again",
        "succeeded: ft:tiny:default:x:1",
        NEXT.strip(),
    ]


def test_interrupted_wait_says_how_to_go_on(gateway: FakeGateway) -> None:
    gateway.answers["GET " + JOB] = (200, job())
    waiting = subprocess.Popen(
        command("wait", "ftjob-1"), env=environment(gateway.url), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with waiting:
        assert waiting.stderr is not None
        assert waiting.stderr.readline() == b"running training\n"
        waiting.send_signal(signal.SIGINT)
        out, err = waiting.communicate(timeout=120)
    assert waiting.returncode == 130
    assert (out, err) == (b"", b"interrupted; the job goes on. To wait again: tunesmith wait ftjob-1\n")


def test_wait_draws_a_bar_on_a_terminal_without_colour_if_asked(gateway: FakeGateway) -> None:
    steps = iter(range(1, 4))

    def training(body: dict[str, Any]) -> Answer:
        step = next(steps, None)
        return 200, DONE if step is None else job(progress={"step": step, "total_steps": 3, "loss": 2.0 + step})

    gateway.answers["GET " + JOB] = training
    code, drawn = run_on_terminal(gateway, "wait", "ftjob-1", NO_COLOR="1")
    assert code == 0
    assert "━" in drawn
    assert "loss 4.000" in drawn
    assert "succeeded: ft:tiny:default:x:1" in drawn
    assert "\x1b[3" not in drawn


def run_on_terminal(gateway: FakeGateway, *arguments: str, **env: str) -> tuple[int, str]:
    """Run a command with a pseudo-terminal as its stderr; returns its exit status and what it drew."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command(*arguments), env=environment(gateway.url) | env, stderr=theirs) as process:
        os.close(theirs)
        drawn, deadline = b"", time.monotonic() + 60
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 0.2)[0]:
                continue
            try:
                drawn += os.read(ours, 65536)
            except OSError:
                # What Linux reports once the other end is closed.
                break
    os.close(ours)
    return process.returncode, drawn.decode()


def test_upload_prints_the_id_and_describes_the_data_on_stderr(gateway: FakeGateway, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n')
    dataset = {"format": "instruction", "rows": 1, "duplicates": 0, "warnings": ["under 50 rows"]}
    stored = {"id": "file-1", "filename": "rows.jsonl", "dataset": dataset}
    gateway.answers["POST /v1/files"] = (200, stored)
    described = "rows.jsonl: 1 instruction rows, 0 duplicates\nwarning: under 50 rows\n"
    assert run(gateway, "upload", str(data)) == (0, "file-1\n", described)
    code, out, err = run(gateway, "upload", str(data), "--json")
    assert (code, json.loads(out), err) == (0, stored, "")


def test_upload_asks_for_bad_rows_to_be_skipped_before_it_sends_the_file(gateway: FakeGateway, tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("text\na\n")
    dataset = {"format": "text", "rows": 1, "duplicates": 0, "warnings": ["3 bad rows were skipped (lines 2, 3, 4)"]}
    gateway.answers["POST /v1/files"] = (200, {"id": "file-1", "filename": "rows.csv", "dataset": dataset})
    code, _, err = run(gateway, "upload", str(data), "--on-bad-rows", "skip")
    assert (code, "warning: 3 bad rows were skipped" in err) == (0, True)
    (form,) = gateway.forms
    assert form.index(b'name="on_bad_rows"\r\n\r\nskip\r\n') < form.index(b'filename="rows.csv"')
    code, _, err = run(gateway, "upload", str(data), "--on-bad-rows", "ignore")
    assert (code, "'refuse', 'skip'" in err) == (2, True)
    assert run(gateway, "upload", str(data))[0] == 0
    assert b"on_bad_rows" not in gateway.forms[-1]


def test_upload_of_bad_rows_names_their_lines(gateway: FakeGateway, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    rows = [{"line": number, "path": "", "code": "x", "message": "not JSON"} for number in range(1, 13)]
    gateway.answers["POST /v1/files"] = error(400, "12 bad rows", "invalid_dataset", "file", errors=rows)
    code, out, err = run(gateway, "upload", str(data))
    assert (code, out) == (1, "")
    assert err.splitlines()[:2] == ["error: 12 bad rows", "  line 1: not JSON"]
    assert err.splitlines()[-2:] == ["  line 10: not JSON", "  …"]


def test_missing_file_and_missing_stack(gateway: FakeGateway, tmp_path: Path) -> None:
    code, _, err = run(gateway, "upload", str(tmp_path / "none.jsonl"))
    assert (code, err) == (1, f"error: {tmp_path / 'none.jsonl'}: No such file or directory\n")
    env = environment("") | {"TUNESMITH_URL": ""}
    done = subprocess.run(command("jobs", "list"), env=env, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    where = tmp_path / ".tunesmith" / "connection.json"
    assert done.returncode == 1
    assert done.stderr == f"error: no running stack: {where} is not there; start one with 'tunesmith up'\n"


def test_train_sends_what_was_said_and_nothing_else(gateway: FakeGateway) -> None:
    gateway.answers["POST /v1/fine_tuning/jobs"] = (200, job("queued", warnings=["few rows"]))
    assert run(gateway, "train", "file-1") == (0, "ftjob-1\n", "warning: few rows\nnext: tunesmith wait ftjob-1\n")
    options = ("--validation", "file-2", "--epochs", "1", "--precision", "fp32", "--suffix", "docs", "--seed", "7")
    assert run(gateway, "train", "file-1", *options)[0] == 0
    usual = {"model": "smollm2-135m-instruct", "training_file": "file-1", "preset": "recommended"}
    said = {"validation_file": "file-2", "suffix": "docs", "seed": 7, "hyperparameters": {"n_epochs": 1}}
    assert [body for _, body in gateway.bodies] == [
        usual | {"base_precision": "int8"},
        usual | {"base_precision": "fp32"} | said,
    ]


def uploads(gateway: FakeGateway) -> list[str]:
    """Answers uploads with file-1, file-2, …; returns the names they will have been sent under."""
    names: list[str] = []
    dataset = {"format": "instruction", "rows": 1, "duplicates": 0, "warnings": []}

    def stored(_: dict[str, Any]) -> Answer:
        names.append(gateway.forms[-1].partition(b'filename="')[2].partition(b'"')[0].decode())
        return 200, {"id": f"file-{len(names)}", "filename": names[-1], "dataset": dataset}

    gateway.answers["POST /v1/files"] = stored
    return names


def test_train_takes_several_files_and_uploads_each_in_order(gateway: FakeGateway, tmp_path: Path) -> None:
    names = uploads(gateway)
    gateway.answers["POST /v1/fine_tuning/jobs"] = (200, job("queued"))
    gateway.answers["POST /v1/fine_tuning/estimates"] = error(400, "no", "invalid_request")
    a, b, held = (tmp_path / f"{name}.jsonl" for name in ("a", "b", "held"))
    for path in (a, b, held):
        path.write_text("{}\n")
    skip = ("--on-bad-rows", "skip")
    code, out, err = run(gateway, "train", str(b), "file-9", str(a), "--validation", str(held), *skip)
    assert (code, out) == (0, "ftjob-1\n")
    assert err.splitlines() == [f"{name}.jsonl: 1 instruction rows, 0 duplicates" for name in ("b", "a", "held")] + [
        "next: tunesmith wait ftjob-1"
    ]
    assert names == ["b.jsonl", "a.jsonl", "held.jsonl"]
    assert all(b'name="on_bad_rows"\r\n\r\nskip\r\n' in form for form in gateway.forms)
    body = gateway.bodies[-1][1]
    assert (body["training_files"], body["validation_file"]) == (["file-1", "file-9", "file-2"], "file-3")
    assert "training_file" not in body
    assert run(gateway, "train", str(a))[0] == 0
    assert b"on_bad_rows" not in gateway.forms[-1]
    assert "training_files" not in gateway.bodies[-1][1]
    run(gateway, "estimate", str(a), str(b))
    assert gateway.bodies[-1][1]["training_files"] == ["file-5", "file-6"]


def test_what_train_cannot_take_is_told_before_anything_is_uploaded(gateway: FakeGateway, tmp_path: Path) -> None:
    a, missing = tmp_path / "a.jsonl", tmp_path / "none.jsonl"
    a.write_text("{}\n")
    said = (1, "", f"error: {missing}: No such file or directory\n")
    assert run(gateway, "train", str(a), str(missing)) == run(gateway, "train", str(a), "--validation", str(missing))
    assert run(gateway, "train", str(a), str(missing)) == said
    code, _, err = run(gateway, "train", *[str(a)] * 17)
    assert (code, "a job takes at most 16 files, not 17" in err) == (2, True)
    # A validation file is none of them.
    code, _, err = run(gateway, "train", *[str(a)] * 16, "--validation", str(missing))
    assert (code, err) == (1, said[2])
    code, _, err = run(gateway, "train", "file-1", "--on-bad-rows", "skip")
    assert (code, "--on-bad-rows is for files that are uploaded" in " ".join(err.split())) == (2, True)
    assert (run(gateway, "train")[0], gateway.bodies) == (2, [])


def test_the_command_line_knows_how_many_files_a_job_takes() -> None:
    assert datasets.MOST_FILES == MAX_TRAINING_FILES


def test_train_and_wait_in_one(gateway: FakeGateway) -> None:
    gateway.answers["POST /v1/fine_tuning/jobs"] = (200, job("queued"))
    gateway.answers["GET " + JOB] = (200, DONE)
    said = "ftjob-1\nsucceeded: ft:tiny:default:x:1\n" + NEXT
    assert run(gateway, "train", "file-1", "--wait") == (0, "ft:tiny:default:x:1\n", said)


def test_refused_job_names_the_field(gateway: FakeGateway) -> None:
    refused = error(400, "must be at least 1", "invalid_request", "hyperparameters.n_epochs")
    gateway.answers["POST /v1/fine_tuning/jobs"] = refused
    said = "error: must be at least 1 [hyperparameters.n_epochs]\n"
    assert run(gateway, "train", "file-1", "--epochs", "0") == (1, "", said)


def test_jobs_list_follows_pages(gateway: FakeGateway) -> None:
    pages = [
        {"data": [job(id="ftjob-3")], "has_more": True},
        {"data": [job(id="ftjob-2", status="succeeded", fine_tuned_model="ft:x\x1b[31m")], "has_more": False},
    ]
    gateway.answers["GET /v1/fine_tuning/jobs"] = lambda body: (200, pages.pop(0))
    # Escape sequences in names do not reach the terminal.
    assert run(gateway, "jobs", "list") == (
        0,
        "job      suffix  state      age  step  loss  ETA  base  model\n"
        "ftjob-3  -       running    -    -     -     -    tiny  -\n"
        "ftjob-2  -       succeeded  -    -     -     -    tiny  ft:x [31m\n",
        "",
    )


def test_jobs_show_events_and_steering(gateway: FakeGateway) -> None:
    events = [
        {"id": "e2", "created_at": 1, "level": "warn", "message": "worker lost"},
        {"id": "e1", "created_at": 0, "level": "info", "message": "claimed"},
    ]
    gateway.answers["GET " + JOB] = (200, DONE)
    gateway.answers["GET " + JOB + "/events"] = (200, {"data": events, "has_more": False})
    assert json.loads(run(gateway, "jobs", "show", "ftjob-1", "--json")[1]) == DONE
    lines = run(gateway, "jobs", "events", "ftjob-1")[1].splitlines()
    assert [line[20:] for line in lines] == ["info  claimed", "warn  worker lost"]
    for verb, state in (("cancel", "cancelling"), ("pause", "pausing"), ("resume", "queued")):
        gateway.answers[f"POST {JOB}/{verb}"] = (200, job(state=state))
        assert run(gateway, "jobs", verb, "ftjob-1") == (0, state + "\n", "")
        assert json.loads(run(gateway, "jobs", verb, "ftjob-1", "--json")[1])["state"] == state


EVENTS = [
    {"id": f"ftevent-{number}", "created_at": number, "level": "info", "message": text}
    for number, text in enumerate(["created", "claimed", "line\u2028break", "done"])
]


def test_watch_prints_each_event_once_though_the_gateway_restarts(gateway: FakeGateway) -> None:
    parts = [stream(*EVENTS[:2], done=False), error(503, "starting", "unavailable"), stream(*EVENTS[2:])]
    gateway.answers["GET " + JOB + "/events"] = lambda body: parts.pop(0)
    gateway.answers["GET " + JOB] = (200, DONE)
    code, out, err = run(gateway, "jobs", "watch", "ftjob-1")
    lines = [line[20:] for line in out.splitlines()]
    assert (code, lines) == (0, ["info  created", "info  claimed", "info  line break", "info  done"])
    assert gateway.resumed == [None, "ftevent-1", "ftevent-1"]
    lost, again, end = err.splitlines()
    assert lost == f"{JOB}/events: the answer was broken off; trying again for 300 s"
    assert (again, end) == ("connected again", "succeeded: ft:tiny:default:x:1")


def test_watch_ends_as_the_job_does_and_refuses_as_wait(gateway: FakeGateway) -> None:
    gateway.answers["GET " + JOB + "/events"] = stream(*EVENTS)
    gateway.answers["GET " + JOB] = (200, job("failed", error={"code": "oom", "message": "too big"}))
    code, out, err = run(gateway, "jobs", "watch", "ftjob-1", "--json")
    assert (code, [json.loads(line) for line in out.splitlines()], err) == (5, EVENTS, "failed: too big\n")
    assert run(gateway, "jobs", "watch", "ftjob-2") == (4, "", "error: no such thing\n")


def test_wait_under_jobs_is_the_same_command(gateway: FakeGateway) -> None:
    gateway.answers["GET " + JOB] = (200, DONE)
    assert run(gateway, "jobs", "wait", "ftjob-1") == run(gateway, "wait", "ftjob-1")


def test_wait_leaves_githubs_summary_and_outputs(gateway: FakeGateway, tmp_path: Path) -> None:
    summary, outputs = tmp_path / "summary.md", tmp_path / "outputs"
    outputs.write_text("before=1\n")
    environ = {"GITHUB_STEP_SUMMARY": str(summary), "GITHUB_OUTPUT": str(outputs)}
    outcome: dict[str, Any] = {"report": {"train_loss": 2.5}, "trained_tokens": 99, "progress": {"step": 7}}
    gateway.answers["GET " + JOB] = (200, job("succeeded", fine_tuned_model="ft:a|b\nstatus=x", **outcome))
    assert run(gateway, "wait", "ftjob-1", **environ)[0] == 0
    # A line break in a value sets no output of its own.
    model = "fine_tuned_model=ft:a|b status=x"
    assert outputs.read_text().splitlines() == ["before=1", "job=ftjob-1", "status=succeeded", model]
    table = summary.read_text()
    assert "| Model | ft:a\\|b status=x |" in table
    assert "| Training loss | 2.5000 |" in table
    assert "before" not in table
    gateway.answers["GET " + JOB] = (200, job("failed", error={"code": "oom", "message": "too big"}))
    assert run(gateway, "wait", "ftjob-1", **environ)[0] == 5
    assert outputs.read_text().splitlines()[-2:] == ["status=failed", "fine_tuned_model="]
    assert "| End | failed: too big |" in summary.read_text()
    # A file that cannot be written is no reason to keep quiet how the job ended.
    code, _, err = run(gateway, "wait", "ftjob-1", GITHUB_OUTPUT=str(tmp_path / "no" / "folder"))
    assert (code, err.splitlines()[0]) == (5, "failed: too big")
    assert "GitHub's summary could not be written" in err


def test_datasets_and_models_are_listed_and_deleted(gateway: FakeGateway) -> None:
    file = {"id": "file-1", "filename": "a.jsonl", "bytes": 9, "dataset": {"rows": 3}}
    gateway.answers["GET /v1/files"] = (200, {"data": [file], "has_more": False})
    assert run(gateway, "files", "list") == (0, "file    rows  bytes  name\nfile-1  3     9      a.jsonl\n", "")
    assert json.loads(run(gateway, "files", "list", "--json")[1]) == [file]
    gone = {"id": "file-1", "deleted": True}
    gateway.answers["DELETE /v1/files/file-1"] = (200, gone)
    assert run(gateway, "files", "delete", "file-1") == (0, "file-1\n", "")
    assert json.loads(run(gateway, "files", "delete", "file-1", "--json")[1]) == gone
    gateway.answers["DELETE /v1/models/ft%3Atiny%3A1"] = (200, {"id": "ft:tiny:1", "deleted": True})
    assert run(gateway, "models", "delete", "ft:tiny:1") == (0, "ft:tiny:1\n", "deleted; 0.0 MB freed\n")
    assert run(gateway, "models", "delete", "ft:tiny:2")[0] == 4


def tokens(*texts: str) -> list[dict[str, Any]]:
    return [{"index": index, "token": {"text": text}} for index, text in enumerate(texts)]


def test_generate_streams(gateway: FakeGateway) -> None:
    gateway.answers["POST /generate_stream"] = stream(*tokens("A ", "mod", "ule."), done=False)
    assert run(gateway, "generate", "What is json?", "--stream") == (0, "A module.\n", "")
    lines = run(gateway, "generate", "What is json?", "--stream", "--json")[1].splitlines()
    assert [json.loads(line) for line in lines] == tokens("A ", "mod", "ule.")
    broken = [*tokens("A "), {"error": "the engine failed", "error_type": "generation"}]
    gateway.answers["POST /generate_stream"] = stream(*broken, done=False)
    assert run(gateway, "generate", "x", "--stream") == (1, "A ", "error: the engine failed\n")


def said(*texts: str) -> Answer:
    return stream(*({"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts), {"choices": []})


def test_chat_keeps_the_conversation_and_goes_on_after_a_refusal(gateway: FakeGateway) -> None:
    answers = [said("Hel", "lo."), error(400, "too long", "context_length_exceeded"), said("Bye."), said("New.")]
    gateway.answers["POST /v1/chat/completions"] = lambda body: answers.pop(0)
    options = ("--adapter", "ft:tiny:1", "--system", "Be brief.")
    code, out, err = run(gateway, "chat", *options, said="Hi\n\nlong\nAnd now?\n/reset\nWho?\n")
    assert (code, out) == (0, "Hello.\nBye.\nNew.\n")
    assert err == "error: too long\nthe conversation begins anew\n"
    first, _, third, last = [body for _, body in gateway.bodies]
    assert (first["model"], first["stream"], first["temperature"]) == ("ft:tiny:1", True, 0)
    assert first["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    # A refused question is not part of it.
    went = [(message["role"], message["content"]) for message in third["messages"]]
    assert went[1:] == [("user", "Hi"), ("assistant", "Hello."), ("user", "And now?")]
    assert last["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]


def test_chat_as_json_and_how_it_ends(gateway: FakeGateway) -> None:
    gateway.answers["POST /v1/chat/completions"] = said("Hello.")
    lines = run(gateway, "chat", "--json", said="Hi\n")[1].splitlines()
    assert [json.loads(line) for line in lines] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ]
    gateway.answers["POST /v1/chat/completions"] = error(503, "nobody serves", "base_not_served")
    assert run(gateway, "chat", said="Hi\n") == (1, "", "error: nobody serves\n")
    gateway.answers["POST /v1/chat/completions"] = error(404, "no such model", "model_not_found")
    assert run(gateway, "chat", "--adapter", "none", said="Hi\nAgain\n") == (4, "", "error: no such model\n")


def test_models_and_generate(gateway: FakeGateway) -> None:
    models = [
        {"id": "tiny", "object": "model", "parent": None, "state": "served", "prepared": True},
        {"id": "large", "object": "model", "parent": None, "state": "not_served", "prepared": False},
        {"id": "ft:tiny:1", "object": "model", "parent": "tiny", "state": "published", "prepared": None},
    ]
    gateway.answers["GET /v1/models"] = (200, {"object": "list", "data": models})
    gateway.answers["POST /generate"] = (200, {"generated_text": "A module."})
    assert run(gateway, "models", "list")[1].splitlines() == [
        "model      parent  state       prepared",
        "tiny       -       served      yes",
        "large      -       not_served  no",
        "ft:tiny:1  tiny    published   -",
    ]
    assert json.loads(run(gateway, "models", "list", "--json")[1]) == models
    gateway.bodies.clear()
    assert run(gateway, "generate", "What is json?", "--adapter", "ft:tiny:1") == (0, "A module.\n", "")
    run(gateway, "generate", "json is", "--raw", "--max-new-tokens", "5", "--temperature", "0.5")
    assert [body for _, body in gateway.bodies] == [
        {"instruction": "What is json?", "parameters": {"adapter_id": "ft:tiny:1", "max_new_tokens": 100}},
        {"inputs": "json is", "parameters": {"max_new_tokens": 5, "temperature": 0.5}},
    ]


def test_generate_with_an_unknown_adapter_in_the_other_error_dialect(gateway: FakeGateway) -> None:
    gateway.answers["POST /generate"] = (404, {"error": "no such model", "error_type": "validation"})
    assert run(gateway, "generate", "x", "--adapter", "none") == (4, "", "error: no such model\n")


def test_help_imports_nothing_heavy() -> None:
    probe = (
        "import sys; from tunesmith.cli import app; import typer\n"
        "try: typer.main.get_command(app)(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'httpx', 'torch', 'rich.progress', 'openai', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"

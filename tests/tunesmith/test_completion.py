"""What the Tab key offers, asked as bash asks."""

from tests.tunesmith.fake_gateway import FakeGateway, job
from tests.tunesmith.test_cli import run, run_process

ADAPTER = "ft:tiny:default:tut:000000000001"


def offered(gateway: FakeGateway, line: str) -> list[str]:
    words = {"_TUNESMITH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    return run_process(gateway, **words)[1].split()


def test_jobs_and_models_are_offered_by_id_and_suffix() -> None:
    with FakeGateway({"GET /v1/models": (200, {"data": [{"id": ADAPTER, "kind": "adapter"}]})}) as gateway:
        listed = [job(id="ftjob-2", suffix="tut"), job(id="ftjob-1")]
        gateway.answers["GET /v1/fine_tuning/jobs"] = (200, {"data": listed, "has_more": False})
        assert offered(gateway, "tunesmith jobs show ftj") == ["ftjob-2", "ftjob-1"]
        assert offered(gateway, "tunesmith wait t") == ["tut"]
        assert offered(gateway, "tunesmith models delete ") == ["tut", ADAPTER, "latest"]


def test_without_a_stack_nothing_is_offered() -> None:
    with FakeGateway({}) as gateway:
        pass
    assert offered(gateway, "tunesmith wait t") == []


def test_the_version_is_said() -> None:
    with FakeGateway({}) as gateway:
        code, out, _ = run(gateway, "--version")
    assert (code, out.split()[0]) == (0, "tunesmith")

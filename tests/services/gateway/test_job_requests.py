"""What may be asked of a job: every default resolved and echoed, everything wrong refused by the name of its field."""

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import ValidationError

from services.gateway.base_facts import BaseFacts
from services.gateway.file_store import StoredFile
from services.gateway.job_request import JobRequest
from services.gateway.job_resolution import JobResolver
from services.gateway.settings import GatewaySettings
from shared.catalogue import load_catalogue
from shared.errors import InvalidRequest, NotFound
from shared.jobs import PRESETS, Hyperparameters, JobSpec
from tests.services.gateway.conftest import ROWS, Gateway, running_gateway

BASE = "smollm2-135m-instruct"
PATH = "/v1/fine_tuning/jobs"
FACTS = BaseFacts(has_chat_template=False, module_names=frozenset({"q_proj", "k_proj", "v_proj"}))
Settings = Callable[..., GatewaySettings]


def stored(file_id: str, *, form: str = "instruction", rows: int = 1000, sha256: str | None = None) -> StoredFile:
    dataset = {"format": form, "rows": rows, "duplicates": 0, "length_histogram": [], "warnings": []}
    return StoredFile(file_id, "default", 0, "a", "fine-tune", 1, sha256 or file_id.ljust(64, "0"), dataset)


FILES = {
    "file-1": stored("file-1"),
    "file-2": stored("file-2"),
    "file-few": stored("file-few", rows=3),
    "file-chat": stored("file-chat", form="chat"),
    "file-copy": stored("file-copy", sha256="file-1".ljust(64, "0")),
}


def find(file_id: str) -> StoredFile:
    if file_id not in FILES:
        raise NotFound(f"no file {file_id!r}")
    return FILES[file_id]


def resolve(facts: BaseFacts | None = None, **body: Any) -> JobSpec:
    return resolved(facts, **body)[0]


def resolved(facts: BaseFacts | None = None, **body: Any) -> tuple[JobSpec, list[str]]:
    resolver = JobResolver(load_catalogue(), lambda _: facts)
    request = JobRequest.model_validate({"model": BASE, "training_file": "file-1"} | body)
    result = resolver.resolve(request, find)
    return result.spec, result.warnings


def test_the_reference_recipe_is_the_default() -> None:
    spec = resolve()
    assert spec.hyperparameters == Hyperparameters()
    assert (spec.lora.r, spec.lora.alpha, spec.lora.target_modules) == (8, 32, ("q_proj", "v_proj"))
    assert (spec.base_precision, spec.compute_dtype, spec.seed, spec.preset) == ("int8", "auto", 42, "reference")
    assert spec.base_revision == load_catalogue().get(BASE).revision
    assert spec.training_sha256 == FILES["file-1"].sha256


def test_a_preset_fills_only_what_is_unsaid() -> None:
    spec = resolve(preset="recommended", lora={"r": 4}, hyperparameters={"n_epochs": 1, "warmup_ratio": 0.5})
    preset = PRESETS["recommended"]
    assert spec.lora == preset.lora.model_copy(update={"r": 4})
    assert spec.hyperparameters == preset.hyperparameters.model_copy(update={"n_epochs": 1, "warmup_ratio": 0.5})


def test_auto_and_null_are_unsaid() -> None:
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto", "max_steps": None}
    assert resolve(hyperparameters=auto, seed=None, suffix=None, metadata=None, integrations=[]) == resolve()
    assert resolve(method={"type": "supervised", "supervised": {"hyperparameters": auto}}) == resolve()
    assert resolve(method={"type": "supervised"}, hyperparameters={}, lora={}) == resolve()


def test_the_multiplier_is_the_presets() -> None:
    assert resolve(hyperparameters={"learning_rate_multiplier": 0.5}).hyperparameters.learning_rate == 1e-4
    spec = resolve(preset="recommended", hyperparameters={"learning_rate_multiplier": 0.5})
    assert spec.hyperparameters.learning_rate == 2e-4
    assert resolve(hyperparameters={"learning_rate": 3e-4}).hyperparameters.learning_rate == 3e-4


@examples(max_examples=100)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "n_epochs": st.integers(1, 50),
            "batch_size": st.integers(1, 256),
            "learning_rate": st.floats(1e-9, 1),
            "max_length": st.integers(8, 32_768),
            "max_steps": st.integers(1, 10**7),
            "scheduler": st.sampled_from(["linear", "cosine", "constant"]),
            "train_on_prompt": st.booleans(),
            "checkpoint_steps": st.integers(1, 10**7),
        },
    )
)
def test_whatever_is_allowed_arrives_unchanged(asked: dict[str, Any]) -> None:
    effective = resolve(hyperparameters=asked).hyperparameters
    assert effective == Hyperparameters().model_copy(update=asked)
    nested = resolve(method={"type": "supervised", "supervised": {"hyperparameters": asked}}).hyperparameters
    assert nested == effective


def number_cases(place: str, field: str, good: Any, below: Any, above: Any, *, whole: bool) -> list[tuple[str, Any]]:
    wrong = [below, above, str(good), True, [good], {}, 10**400, float("nan"), float("inf"), -float("inf"), "", "Auto"]
    wrong += [good + 0.5, float(good)] if whole else []
    return [(f"{place}.{field}" if place else field, value) for value in wrong]


BAD: list[tuple[str, Any]] = [
    *number_cases("hyperparameters", "n_epochs", 3, 0, 51, whole=True),
    *number_cases("hyperparameters", "batch_size", 8, 0, 257, whole=True),
    *number_cases("hyperparameters", "max_length", 512, 7, 32_769, whole=True),
    *number_cases("hyperparameters", "max_steps", 5, 0, 10**7 + 1, whole=True),
    *number_cases("hyperparameters", "checkpoint_steps", 5, -1, 10**7 + 1, whole=True),
    *number_cases("hyperparameters", "learning_rate", 0.1, 0, 1.1, whole=False),
    *number_cases("hyperparameters", "learning_rate_multiplier", 1.0, 0, 10_001, whole=False),
    *number_cases("hyperparameters", "warmup_ratio", 0.1, -0.1, 1, whole=False),
    *number_cases("hyperparameters", "weight_decay", 0.1, -0.1, 1.1, whole=False),
    *number_cases("hyperparameters", "max_grad_norm", 1.0, 0, 1e7, whole=False),
    *number_cases("lora", "r", 8, 0, 257, whole=True),
    *number_cases("lora", "alpha", 8.0, 0, 5000, whole=False),
    *number_cases("lora", "dropout", 0.1, -0.1, 1, whole=False),
    *number_cases("", "seed", 42, -1, 2**31, whole=True),
    ("hyperparameters.scheduler", "polynomial"),
    ("hyperparameters.train_on_prompt", "yes"),
    ("hyperparameters.train_on_prompt", 1),
    ("hyperparameters.learning_rate_multiplier", 9999.0),
    ("hyperparameters.deepspeed", {}),
    ("hyperparameters.output_dir", "/tmp"),
    ("hyperparameters", []),
    ("hyperparameters", "auto"),
    ("lora.target_modules", []),
    ("lora.target_modules.0", [".*_proj"]),
    ("lora.target_modules.0", [""]),
    ("lora.target_modules.1", ["q_proj", "../v_proj"]),
    ("lora.target_modules", ["q_proj", "q_proj"]),
    ("lora.target_modules", ["a"] * 17),
    ("lora.target_modules", "all-linear"),
    ("lora.bias", "all"),
    ("lora.use_rslora", "true"),
    ("method.type", "dpo"),
    ("method.type", "reinforcement"),
    ("method.type", "unsupervised"),
    ("method", "supervised"),
    ("integrations", [{"type": "wandb", "wandb": {"project": "x"}}]),
    ("integrations", [1]),
    ("suffix", ""),
    ("suffix", "x" * 65),
    ("suffix", "a:b"),
    ("suffix", "a b"),
    ("suffix", "../x"),
    ("suffix", "a\n"),
    ("suffix", 5),
    ("model", "gpt-4o-mini"),
    ("model", "../../etc/passwd"),
    ("model", "http://example.org/model"),
    ("model", ""),
    ("model", "x" * 100_000),
    ("model", None),
    ("model", "\x00"),
    ("training_file", "file-unknown"),
    ("training_file", "../file-1"),
    ("training_file", "file-1\x00"),
    ("training_file", ""),
    ("training_file", None),
    ("training_file", 1),
    ("validation_file", "file-unknown"),
    ("validation_file", "file-chat"),
    ("base_precision", "int4"),
    ("base_precision", None),
    ("compute_dtype", "fp8"),
    ("preset", "best"),
    ("metadata", {str(n): "x" for n in range(17)}),
    ("metadata.k", {"k": "v" * 513}),
    ("metadata.k", {"k": 1}),
    ("metadata.k", {"k": "\x00"}),
    ("metadata", []),
    ("trust_remote_code", True),
    ("output_dir", "/tmp"),
    ("webhook", "http://169.254.169.254"),
]


def placed(field: str, value: Any) -> dict[str, Any]:
    """A body with `value` at the place that `field` names; list indices and metadata's keys belong to the value."""
    place, _, name = field.partition(".")
    if place in ("hyperparameters", "lora", "method") and name:
        return {place: {name.split(".")[0]: value}}
    return {place: value}


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda value: repr(value)[:40])
def test_what_is_wrong_is_refused_by_name(field: str, value: Any) -> None:
    try:
        resolve(**placed(field, value))
    except ValidationError as error:
        named = ".".join(str(part) for part in error.errors()[0]["loc"])
    except InvalidRequest as error:
        named = str(error.param)
    else:
        pytest.fail("accepted")
    assert named == field


def test_hyperparameters_in_two_places_are_refused() -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolve(hyperparameters={"n_epochs": 1}, method={"type": "supervised", "supervised": {"hyperparameters": {}}})
    assert refused.value.param == "hyperparameters"
    for place in ("hyperparameters", "method.supervised.hyperparameters"):
        both: Any = {"learning_rate": 0.1, "learning_rate_multiplier": 2}
        body = {"hyperparameters": both}
        if place != "hyperparameters":
            body = {"method": {"type": "supervised", "supervised": body}}
        with pytest.raises(InvalidRequest) as refused:
            resolve(**body)
        assert refused.value.param == f"{place}.learning_rate_multiplier"


def test_what_does_not_fit_the_base_is_refused_where_the_base_is_known() -> None:
    unknown = {"lora": {"target_modules": ["q_proj", "query"]}}
    assert resolve(None, **unknown)
    with pytest.raises(InvalidRequest, match="no module 'query'; it has k_proj, q_proj, v_proj") as refused:
        resolve(FACTS, **unknown)
    assert refused.value.param == "lora.target_modules"
    assert resolve(None, training_file="file-chat")
    with pytest.raises(InvalidRequest) as refused:
        resolve(FACTS, training_file="file-chat")
    assert (refused.value.param, refused.value.code) == ("training_file", "no_chat_template")


def test_advice() -> None:
    assert resolved()[1] == []
    spec, few = resolved(training_file="file-few", validation_file="file-1")
    assert spec.validation_sha256 == FILES["file-1"].sha256
    assert any(text.startswith("3 optimizer steps are few") for text in few)
    assert any("more than all rows" in text for text in few)
    assert any("validation file is the training file" in text for text in resolved(validation_file="file-copy")[1])
    assert any("50 optimizer steps" in text for text in resolved(hyperparameters={"max_steps": 50})[1])


# The same through the front door.


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, redis_server: str) -> Iterator[Gateway]:
    settings = GatewaySettings.model_validate({"home": tmp_path_factory.mktemp("home"), "redis_url": redis_server})
    with running_gateway(settings) as running:
        yield running


@pytest.fixture(scope="module")
def file(gateway: Gateway) -> str:
    return gateway.uploaded(ROWS)


def test_bad_bodies_over_http_name_the_field_and_leave_no_job(gateway: Gateway, file: str) -> None:
    for field, value in BAD:
        if field == "validation_file" and value == "file-chat":
            continue
        body = {"model": BASE, "training_file": file} | placed(field, value)
        answer = gateway.http.post(PATH, content=json.dumps(body), headers={"content-type": "application/json"})
        assert answer.status_code == 400, (field, value, answer.text)
        error = answer.json()["error"]
        assert error["param"] == field, (field, value, error)
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) < 1000
    assert gateway.http.get(PATH).json()["data"] == []
    assert gateway.http.post(PATH, json={"model": BASE, "training_file": file}).is_success


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"null", "application/json"),
        (b"[]", "application/json"),
        (b'"a"', "application/json"),
        (b"\xff\xfe{\x00}\x00", "application/json"),
        (b'{"model": "\xff"}', "application/json"),
        (b'{"model": "\\ud800", "training_file": "file-1"}', "application/json"),
        (b'{"model": "a", "training_file": "file-1", "\\ud800": 1}', "application/json"),
        (b'{"model": NaN}', "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"metadata": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, "application/json"),
        (b'{"model": ' + b"9" * 10_000 + b"}", "application/json"),
        (b"model=a&training_file=file-1", "application/x-www-form-urlencoded"),
        (b'{"model": "a"}', "text/plain"),
        (b'{"model": "a"}', ""),
        (b'{"model": "a"}', "application/json; charset=utf-16"),
    ],
)
def test_what_is_no_request_at_all(gateway: Gateway, body: bytes, content_type: str) -> None:
    answer = gateway.http.post(PATH, content=body, headers={"content-type": content_type})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]
    assert "detail" not in answer.json()


def test_a_body_without_end_is_refused(gateway: Gateway) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 65_536

    for content in (endless(), b" " * (5 << 20)):
        answer = gateway.http.post(PATH, content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")


def test_methods_and_paths_that_are_none(gateway: Gateway) -> None:
    for method, path, status in (
        ("PUT", PATH, 405),
        ("DELETE", PATH, 405),
        ("PATCH", "/v1/files", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/generate", 405),
        ("GET", "/nothing", 404),
    ):
        answer = gateway.http.request(method, path)
        assert answer.status_code == status
        assert "error" in answer.json()
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize("job", ["ftjob-0", "..%2f..", "a%00b", "%ff", "x" * 3000, "ftjob-'; DROP TABLE jobs"])
def test_jobs_that_are_none(gateway: Gateway, job: str) -> None:
    for method, path in (
        ("GET", ""),
        ("GET", "/events"),
        ("GET", "/checkpoints"),
        ("POST", "/cancel"),
        ("POST", "/pause"),
        ("POST", "/resume"),
    ):
        answer = gateway.http.request(method, f"{PATH}/{job}{path}")
        assert answer.status_code == 404, answer.text


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=101", "limit=x", "after=ftjob-0", "after=%00", "metadata[a=b", "metadata=a", 'metadata["]=b'],
)
def test_page_parameters(gateway: Gateway, query: str) -> None:
    answer = gateway.http.get(f"{PATH}?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.split("=")[0].split("[")[0]


def test_metadata_with_any_key_is_found_again(gateway: Gateway, file: str) -> None:
    for key in ("a", "a.b", "$", "a b", "ü", "[0]", "'", "%"):
        body = {"model": BASE, "training_file": file, "metadata": {key: f"value of {key}"}}
        job = gateway.http.post(PATH, json=body).json()["id"]
        found = gateway.http.get(PATH, params={f"metadata[{key}]": f"value of {key}"}).json()["data"]
        assert [item["id"] for item in found] == [job], key
        assert gateway.http.get(PATH, params={f"metadata[{key}]": "another"}).json()["data"] == []
    assert len(gateway.http.get(PATH, params={"metadata": "null"}).json()["data"]) > 5


def test_what_is_wished_for_in_every_state(gateway: Gateway, file: str) -> None:
    leases = gateway.services.leases

    def wish(job: str, verb: str) -> httpx.Response:
        return gateway.http.post(f"{PATH}/{job}/{verb}")

    def new() -> str:
        while gateway.services.leases.queued():
            leases.claim("nobody")
        job: str = gateway.http.post(PATH, json={"model": BASE, "training_file": file}).json()["id"]
        return job

    running = new()
    lease = leases.claim("worker")
    assert lease is not None
    assert wish(running, "pause").json()["state"] == "pausing"
    assert wish(running, "pause").json()["status"] == "running"
    assert wish(running, "resume").status_code == 400
    assert wish(running, "cancel").json()["state"] == "cancelling"
    assert wish(running, "pause").status_code == 400
    leases.let_go(lease, "Stopped")
    for verb, state in (("cancel", 200), ("pause", 400), ("resume", 400)):
        answer = wish(running, verb)
        assert answer.status_code == state
        if state == 400:
            assert answer.json()["error"]["code"] == f"cannot_{verb}"


def test_a_file_cannot_vanish_while_a_job_takes_it(settings: Settings) -> None:
    """Create and delete race: either the job has its file, or there is no job."""
    with running_gateway(settings()) as gateway:
        for _ in range(8):
            file = gateway.uploaded(ROWS)
            outcomes: dict[str, httpx.Response] = {}

            def create(file: str = file, outcomes: dict[str, httpx.Response] = outcomes) -> None:
                outcomes["create"] = gateway.http.post(PATH, json={"model": BASE, "training_file": file})

            def delete(file: str = file, outcomes: dict[str, httpx.Response] = outcomes) -> None:
                outcomes["delete"] = gateway.http.delete(f"/v1/files/{file}")

            threads = [threading.Thread(target=create), threading.Thread(target=delete)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert outcomes["create"].is_success != outcomes["delete"].is_success, outcomes

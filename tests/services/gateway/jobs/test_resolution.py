"""What may be asked of a job: every default resolved and echoed, everything wrong refused by the name of its field."""

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy import Connection

from services.gateway.bases.metadata import BaseMetadata
from services.gateway.files.store import FileStore, StoredFile
from services.gateway.jobs.request_schema import JobRequest
from services.gateway.jobs.resolution import JobResolver
from services.gateway.jobs.sources import JobSources
from shared.adapters.store import AdapterStore
from shared.bases.catalogue import load_catalogue
from shared.errors import InvalidRequest, NotFound
from shared.jobs.spec import PRESETS, Hyperparameters, JobSpec
from shared.jobs.store import JobStore
from shared.training.automatic import automatic_epochs
from tests.services.gateway.job_cases import BAD, placed

BASE = "smollm2-135m-instruct"
METADATA = BaseMetadata(False, frozenset({"q_proj", "k_proj", "v_proj"}), context=1024)


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


class Files(FileStore):
    def get(self, tx: Connection, project: str, file_id: str, *, lock: bool = False) -> StoredFile:
        return find(file_id)


def resolve(metadata: BaseMetadata | None = None, /, **body: Any) -> JobSpec:
    return resolved(metadata, **body)[0]


def resolved(metadata: BaseMetadata | None = None, /, **body: Any) -> tuple[JobSpec, list[str]]:
    resolver = JobResolver(load_catalogue(), lambda _: metadata)
    request = JobRequest.model_validate({"model": BASE, "training_file": "file-1"} | body)
    # What names a file is looked up without a database here; `Files` needs no transaction.
    sources = JobSources(Files(), JobStore(), AdapterStore()).load(cast(Connection, None), "default", request)
    result = resolver.resolve(request, sources)
    return result.spec, result.warnings


def test_the_recommended_preset_is_the_default() -> None:
    assert resolve() == resolve(preset="recommended")


def test_the_reference_recipe_is_the_tutorials_whatever_the_rows() -> None:
    spec = resolve(preset="reference")
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


def test_epochs_and_batch_size_come_from_the_rows_unless_they_are_said() -> None:
    def of(**body: Any) -> tuple[int, int]:
        hyper = resolve(**body).hyperparameters
        return hyper.n_epochs, hyper.batch_size

    assert of() == (3, 8)
    assert of(training_file="file-few") == (10, 1)
    assert of(training_file="file-few", hyperparameters={"n_epochs": "auto", "batch_size": "auto"}) == (10, 1)
    assert of(training_file="file-few", hyperparameters={"batch_size": 3}) == (30, 3)
    assert of(training_file="file-few", hyperparameters={"n_epochs": 4}) == (4, 1)
    assert of(training_file="file-few", preset="reference") == (3, 8)
    # Of several files all rows count.
    assert of(training_file="file-few", training_files=["file-few", "file-1"]) == (3, 8)
    _, warnings = resolved(training_file="file-few")
    assert not any("optimizer steps" in text for text in warnings)
    _, warnings = resolved(training_file="file-few", hyperparameters={"n_epochs": 4})
    assert any(text.startswith("12 optimizer steps are few") for text in warnings)
    _, warnings = resolved(training_file="file-few", hyperparameters={"max_steps": 2})
    assert any(text.startswith("2 optimizer steps are few") for text in warnings)


def test_auto_and_null_are_unsaid() -> None:
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto", "max_steps": None}
    assert resolve(hyperparameters=auto, seed=None, suffix=None, metadata=None, integrations=[]) == resolve()
    assert resolve(method={"type": "supervised", "supervised": {"hyperparameters": auto}}) == resolve()
    assert resolve(method={"type": "supervised"}, hyperparameters={}, lora={}) == resolve()
    unbuilt = {"type": "supervised", "supervised": None, "dpo": None, "reinforcement": None}
    assert resolve(method=unbuilt, hyperparameters=None, lora=None, integrations=None, suffix="") == resolve()
    assert resolve(preset=None, base_precision=None, compute_dtype=None, keep_checkpoints=None) == resolve()
    assert resolve(validation_file="") == resolve()


@pytest.mark.parametrize(
    ("written", "suffix"),
    [
        ("docs", "docs"),
        ("my first model", "my-first-model"),
        ("a:b/c", "a-b-c"),
        (" v1.2_x ", "v1.2_x"),
        ("K\u00f6ln", "K-ln"),
    ],
)
def test_a_suffix_becomes_part_of_a_name(written: str, suffix: str) -> None:
    assert resolve(suffix=written).suffix == suffix


def test_a_method_that_is_not_built_is_refused_with_its_settings() -> None:
    with pytest.raises(ValidationError, match="not built"):
        resolve(method={"type": "supervised", "dpo": {"hyperparameters": {"beta": 0.1}}})


def test_the_multiplier_is_the_presets() -> None:
    for preset, rate in (("reference", 1e-4), ("recommended", 4e-4)):
        spec = resolve(preset=preset, hyperparameters={"learning_rate_multiplier": 0.5})
        assert spec.hyperparameters.learning_rate == rate
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
    for preset in ("reference", "recommended"):
        effective = resolve(preset=preset, hyperparameters=asked).hyperparameters
        chosen = {"batch_size": 8} | asked
        if preset == "recommended" and "n_epochs" not in asked:
            chosen["n_epochs"] = automatic_epochs(1000, chosen["batch_size"])
        assert effective == PRESETS[preset].hyperparameters.model_copy(update=chosen)
        nested = {"type": "supervised", "supervised": {"hyperparameters": asked}}
        assert resolve(preset=preset, method=nested).hyperparameters == effective


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


def test_a_base_without_the_presets_layers_is_trained_in_all_of_its_own() -> None:
    phi = BaseMetadata(False, frozenset({"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}))
    assert resolve(phi).lora.target_modules == ("down_proj", "gate_up_proj", "o_proj", "qkv_proj")
    assert resolve(phi, lora={"target_modules": ["o_proj"]}).lora.target_modules == ("o_proj",)
    with pytest.raises(InvalidRequest, match="no module 'q_proj'"):
        resolve(phi, lora={"target_modules": ["q_proj"]})


def test_what_does_not_fit_the_base_is_refused_where_the_base_is_known() -> None:
    unknown = {"lora": {"target_modules": ["q_proj", "query"]}}
    assert resolve(None, **unknown)
    with pytest.raises(InvalidRequest, match="no module 'query'; it has k_proj, q_proj, v_proj") as refused:
        resolve(METADATA, **unknown)
    assert refused.value.param == "lora.target_modules"
    assert resolve(None, training_file="file-chat")
    with pytest.raises(InvalidRequest) as refused:
        resolve(METADATA, training_file="file-chat")
    assert (refused.value.param, refused.value.code) == ("training_file", "no_chat_template")


def test_rows_longer_than_the_base_can_read_are_refused() -> None:
    assert resolve(METADATA, hyperparameters={"max_length": 1024})
    with pytest.raises(InvalidRequest, match="at most 1024 tokens") as refused:
        resolve(METADATA, hyperparameters={"max_length": 1025})
    assert refused.value.param == "hyperparameters.max_length"


def test_advice() -> None:
    assert resolved()[1] == []
    spec, few = resolved(training_file="file-few", validation_file="file-1", preset="reference")
    assert spec.validation_sha256 == FILES["file-1"].sha256
    assert any(text.startswith("3 optimizer steps are few") for text in few)
    assert any("more than all rows" in text for text in few)
    assert any("validation file is the training file" in text for text in resolved(validation_file="file-copy")[1])
    assert any("50 optimizer steps" in text for text in resolved(hyperparameters={"max_steps": 50})[1])


def test_early_stopping_needs_held_out_rows_and_these_have_one_source() -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolve(hyperparameters={"early_stopping_patience": 2})
    assert refused.value.param == "hyperparameters.early_stopping_patience"
    with pytest.raises(InvalidRequest) as refused:
        resolve(hyperparameters={"validation_split": 0.1}, validation_file="file-2")
    assert refused.value.param == "hyperparameters.validation_split"
    split = resolve(hyperparameters={"early_stopping_patience": 2, "validation_split": 0.1}).hyperparameters
    assert (split.early_stopping_patience, split.validation_split) == (2, 0.1)

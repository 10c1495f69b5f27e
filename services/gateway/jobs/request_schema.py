"""What a client may write into `POST /v1/fine_tuning/jobs`: OpenAI's body and our extra keys.

Owns shapes and bounds (which are those of `shared.jobs.spec`, so that both can never differ); what the words mean is
resolved in `services.gateway.jobs.resolution`.
"""

import hashlib
import json
import re
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Strict,
    ValidationInfo,
    create_model,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from shared.frozen import Frozen
from shared.jobs.spec import MAX_TRAINING_FILES, BasePrecision, ComputeDtype, Hyperparameters, JobSpec, LoraSpec

MAX_METADATA_PAIRS = 16
MAX_SUFFIX = 64
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,255}$")]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64, pattern=r'^[^"\\\x00-\x1f]+$')]
MetadataValue = Annotated[str, Field(max_length=512, pattern=r"^[^\x00]*$")]


class AutoMeansUnset:
    """OpenAI's "auto" means the same as leaving the field out: the preset decides, and by it the number of rows."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_auto_to_none, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        inner = handler(schema)
        inner["anyOf"].append({"type": "string", "const": "auto"})
        return inner


class AutoStays(AutoMeansUnset):
    """ "auto" is a value of its own beside the numbers."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # As it is, since a number's own serializer would warn of the word.
        written = core_schema.plain_serializer_function_ser_schema(lambda value: value)
        return core_schema.no_info_wrap_validator_function(_auto_or_valid, handler(source), serialization=written)


def _auto_or_valid(value: Any, validate: Callable[[Any], Any]) -> Any:
    return value if value == "auto" else validate(value)


def _auto_to_none(value: Any) -> Any:
    return None if value == "auto" else value


class NullMeans:
    """Null means the same as leaving the field out."""

    def __init__(self, default: str) -> None:
        self._default = default

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._said, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(schema), {"type": "null"}]}

    def _said(self, value: Any) -> Any:
        return self._default if value is None else value


def _empty_to_none(value: Any) -> Any:
    return None if value == "" else value


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("a file is named twice")
    return names


def _first(name: Any, info: ValidationInfo) -> Any:
    """The first training file, where only the list of all is given."""
    if name not in (None, ""):
        return name
    if "training_files" not in info.data:
        # It is the list that is wrong.
        return name
    if not info.data["training_files"]:
        raise PydanticCustomError("missing", "Field required")
    return info.data["training_files"][0]


def _in_list(name: str, info: ValidationInfo) -> str:
    files = info.data.get("training_files")
    if files and files[0] != name:
        raise ValueError("it must be the first of training_files, if both are given")
    return name


def _without_default(schema: dict[str, Any]) -> None:
    # "" stands for what may be left out, and is none of the names.
    del schema["default"]


def training_field(place: int, count: int) -> str:
    """What a client calls the training file at a 0-based place among so many."""
    return "training_file" if count == 1 else f"training_files.{place}"


def _as_a_name(suffix: Any) -> Any:
    """A suffix as it can stand in a model's name: anything but letters, digits, `_`, `.` and `-` becomes a hyphen."""
    if not isinstance(suffix, str) or len(suffix) > MAX_SUFFIX:
        return suffix
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", suffix).strip("-")
    if suffix and not re.search(r"[A-Za-z0-9]", name):
        raise ValueError("it has no letter and no digit of ASCII to be part of a name")
    return name or None


class Request(BaseModel):
    """A part of a request: closed, and free of NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def _as_requested(info: FieldInfo, *, auto: bool) -> tuple[Any, Any]:
    """A field of `shared.jobs.spec` as a client may send it: the same bounds, no coercion, and it may be left out."""
    annotation: Any = info.annotation
    if isinstance(annotation, types.UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not types.NoneType)
    exact = (Strict(),) if annotation in (int, float, bool) else ()
    requested = Annotated[annotation, Field(), *info.metadata, *exact] | None
    return (Annotated[requested, AutoMeansUnset()] if auto else requested), None


def _part(name: str, spec: type[Frozen], doc: str, *, auto: bool = False, **extra: Any) -> type[Request]:
    fields: dict[str, Any] = {field: _as_requested(info, auto=auto) for field, info in spec.model_fields.items()}
    return create_model(name, __base__=Request, __doc__=doc, **(fields | extra))


_multiplier = Annotated[
    Annotated[float, Field(gt=0, le=10_000), Strict()] | None,
    AutoMeansUnset(),
    Field(description="OpenAI's: times the preset's learning rate; not together with learning_rate"),
]
_max_length: Any = Annotated[
    _as_requested(Hyperparameters.model_fields["max_length"], auto=False)[0],
    AutoStays(),
    Field(description='tokens of one example; "auto": of the longest that a look at the files finds'),
]
KeepCheckpoints: Any = _as_requested(JobSpec.model_fields["keep_checkpoints"], auto=False)[0]
LoraRequest: Any = _part("LoraRequest", LoraSpec, "LoRA's shape; what is left out comes from the preset.")
HyperparametersRequest: Any = _part(
    "HyperparametersRequest",
    Hyperparameters,
    'Hyperparameters; what is left out or "auto" comes from the preset.',
    auto=True,
    learning_rate_multiplier=(_multiplier, None),
    max_length=(_max_length, None),
)


class SupervisedRequest(Request):
    hyperparameters: HyperparametersRequest | None = None


class MethodRequest(Request):
    """`supervised` is the one method there is; the others are refused by name."""

    type: Literal["supervised"]
    supervised: SupervisedRequest | None = None
    dpo: Annotated[None, Field(description="not built: must be null")] = None
    reinforcement: Annotated[None, Field(description="not built: must be null")] = None

    @field_validator("dpo", "reinforcement", mode="before")
    @classmethod
    def _is_unsaid(cls, value: object) -> None:
        if value not in (None, {}):
            raise ValueError("this method is not built; 'supervised' is")

    @field_validator("type", mode="before")
    @classmethod
    def _refuse_by_name(cls, value: object) -> object:
        if value in ("dpo", "reinforcement"):
            raise ValueError(f"the method '{value}' is not built; 'supervised' is")
        return value


class JobRequest(Request):
    """The body of a job's creation; its training files are named by `training_file`, `training_files` or both."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["training_file"]}, {"required": ["training_files"]}]}
    )

    model: Annotated[str, Field(min_length=1, max_length=256)]
    training_files: Annotated[
        Annotated[list[FileName], Field(min_length=1, max_length=MAX_TRAINING_FILES), AfterValidator(_distinct)] | None,
        Field(description="several files, trained on as if they were one, in this order"),
    ] = None
    training_file: Annotated[
        FileName,
        BeforeValidator(_first),
        AfterValidator(_in_list),
        Field(
            validate_default=True,
            json_schema_extra=_without_default,
            description="the first of training_files, if both are given",
        ),
    ] = ""
    validation_file: Annotated[FileName | None, BeforeValidator(_empty_to_none)] = None
    suffix: Annotated[
        Annotated[str, Field(max_length=MAX_SUFFIX)] | None,
        BeforeValidator(_as_a_name),
        Field(description="part of the model's name; what cannot stand in one becomes a hyphen"),
    ] = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1), Strict()] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA_PAIRS)] | None = None
    hyperparameters: HyperparametersRequest | None = None
    method: MethodRequest | None = None
    integrations: Annotated[list[Any], Field(max_length=0, description="not built: must be empty")] | None = None
    preset: Annotated[Literal["reference", "recommended"], NullMeans("recommended")] = "recommended"
    lora: LoraRequest | None = None
    base_precision: Annotated[BasePrecision, NullMeans("int8")] = "int8"
    compute_dtype: Annotated[ComputeDtype, NullMeans("auto")] = "auto"
    keep_checkpoints: KeepCheckpoints = None

    def fingerprint(self) -> str:
        """SHA-256 of what is requested, however it was spelled."""
        requested = self.model_dump(mode="json", exclude_unset=True) | {"training_file": self.training_file}
        if len(self.training_files or ()) < 2:
            requested.pop("training_files", None)
        return hashlib.sha256(json.dumps(requested, sort_keys=True).encode()).hexdigest()

    @field_validator("integrations", mode="before")
    @classmethod
    def _refuse_by_name(cls, value: object) -> object:
        if isinstance(value, list) and value:
            kind = value[0].get("type") if isinstance(value[0], dict) else None
            name = f"the integration '{kind}' is" if kind == "wandb" else "integrations are"
            raise ValueError(f"{name} not built")
        return value

"""What a client may write into `POST /v1/fine_tuning/jobs`: OpenAI's body and our extra keys.

Owns shapes and bounds (which are those of `shared.jobs.spec`, so that both can never differ); what the words mean is
resolved in `services.gateway.jobs.resolution`.
"""

import hashlib
import json
import types
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Strict,
    create_model,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from shared.frozen import Frozen
from shared.jobs.spec import BasePrecision, ComputeDtype, Hyperparameters, JobSpec, LoraSpec

MAX_METADATA_PAIRS = 16
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,255}$")]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64, pattern=r'^[^"\\\x00-\x1f]+$')]
MetadataValue = Annotated[str, Field(max_length=512, pattern=r"^[^\x00]*$")]


class AutoMeansUnset:
    """OpenAI's "auto" means the same as leaving the field out: the preset decides."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_auto_to_none, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        inner = handler(schema)
        inner["anyOf"].append({"type": "string", "const": "auto"})
        return inner


def _auto_to_none(value: Any) -> Any:
    return None if value == "auto" else value


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
    return create_model(name, __base__=Request, __doc__=doc, **fields, **extra)


_multiplier = Annotated[
    Annotated[float, Field(gt=0, le=10_000), Strict()] | None,
    AutoMeansUnset(),
    Field(description="OpenAI's: times the preset's learning rate; not together with learning_rate"),
]
KeepCheckpoints: Any = _as_requested(JobSpec.model_fields["keep_checkpoints"], auto=False)[0]
LoraRequest: Any = _part("LoraRequest", LoraSpec, "LoRA's shape; what is left out comes from the preset.")
HyperparametersRequest: Any = _part(
    "HyperparametersRequest",
    Hyperparameters,
    'Hyperparameters; what is left out or "auto" comes from the preset.',
    auto=True,
    learning_rate_multiplier=(_multiplier, None),
)


class SupervisedRequest(Request):
    hyperparameters: HyperparametersRequest | None = None


class MethodRequest(Request):
    """`supervised` is the one method there is; the others are refused by name."""

    type: Literal["supervised"]
    supervised: SupervisedRequest | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _refuse_by_name(cls, value: object) -> object:
        if value in ("dpo", "reinforcement"):
            raise ValueError(f"the method '{value}' is not built; 'supervised' is")
        return value


class JobRequest(Request):
    """The body of a job's creation."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    training_file: FileName
    validation_file: FileName | None = None
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1), Strict()] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA_PAIRS)] | None = None
    hyperparameters: HyperparametersRequest | None = None
    method: MethodRequest | None = None
    integrations: Annotated[list[Any], Field(max_length=0, description="not built: must be empty")] | None = None
    preset: Literal["reference", "recommended"] = "reference"
    lora: LoraRequest | None = None
    base_precision: BasePrecision = "int8"
    compute_dtype: ComputeDtype = "auto"
    keep_checkpoints: KeepCheckpoints = None

    def fingerprint(self) -> str:
        """SHA-256 of what is requested, however it was spelled."""
        requested = self.model_dump(mode="json", exclude_unset=True)
        return hashlib.sha256(json.dumps(requested, sort_keys=True).encode()).hexdigest()

    @field_validator("integrations", mode="before")
    @classmethod
    def _refuse_by_name(cls, value: object) -> object:
        if isinstance(value, list) and value:
            kind = value[0].get("type") if isinstance(value[0], dict) else None
            name = f"the integration '{kind}' is" if kind == "wandb" else "integrations are"
            raise ValueError(f"{name} not built")
        return value

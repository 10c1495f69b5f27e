"""From a client's request to the complete specification a worker trains by, and the advice that goes with it.

Every default is filled in here, once; nothing is looked up again later. A function of the request, the rows that it
names (`Sources`), what is known of its base and a look at its files. Knows no HTTP and no SQL.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from services.gateway.bases.metadata import BaseMetadata
from services.gateway.files.store import StoredFile
from services.gateway.jobs.length_check import LengthCheck
from services.gateway.jobs.request_schema import JobRequest, training_field
from shared.adapters.names import PREFIX
from shared.bases.catalogue import Base, Catalogue
from shared.datasets.checker import row_advice
from shared.errors import InvalidRequest
from shared.jobs.spec import (
    DEFAULT_KEEP_CHECKPOINTS,
    PRESETS,
    Hyperparameters,
    JobSpec,
    LoraSpec,
    Preset,
    TrainingFile,
)
from shared.training.automatic import automatic_batch_size, automatic_epochs
from shared.training.plan import plan_training

FEW_STEPS = 100
M = TypeVar("M", bound=BaseModel)
# At least one, in the order of their rows.
Training = Sequence[StoredFile]


@dataclass(frozen=True, slots=True)
class Resolved:
    spec: JobSpec
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class Parent:
    """An adapter that a job continues: its id, its base and the shape it keeps."""

    adapter: str
    base: str
    lora: LoraSpec


@dataclass(frozen=True, slots=True)
class Sources:
    """The rows that a request names.

    Attributes:
        parent: the adapter that the request's model names; None if it names a base.
    """

    training: Training
    validation: StoredFile | None = None
    parent: Parent | None = None


class JobResolver:
    """Resolves requests against one catalogue.

    Args:
        metadata: what is known of a base that has been prepared; None for one that has not.
        lengths: what looks at the rows' lengths; without it nothing is said of them.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        metadata: Callable[[str], BaseMetadata | None],
        lengths: LengthCheck | None = None,
    ) -> None:
        self._catalogue = catalogue
        self._metadata = metadata
        self._lengths = lengths

    def check_base(self, request: JobRequest) -> None:
        """Refuse a base that cannot be trained as is requested, before its files are looked for.

        Raises:
            InvalidRequest: the field at fault is named. Nothing is said of an adapter to continue.
        """
        if not request.model.startswith(PREFIX):
            _base(self._catalogue, request.model, request)

    def resolve(self, request: JobRequest, sources: Sources) -> Resolved:
        """The specification of the job that is requested.

        Raises:
            InvalidRequest: the field at fault is named.
        """
        parent, training, validation = sources.parent, sources.training, sources.validation
        base = _base(self._catalogue, parent.base if parent else request.model, request)
        preset = PRESETS[request.preset]
        metadata = self._metadata(base.id)
        lora = _lora(request, preset, base, parent, metadata)
        hyperparameters, fit_length = _hyperparameters(request, preset, sum(file.dataset["rows"] for file in training))
        if fit_length:
            context = metadata.context if metadata else None
            hyperparameters = self._fitted(base, hyperparameters, training, validation, context)
        _check_validation(hyperparameters, validation)
        _check_fit(base, metadata, lora, hyperparameters, training, validation)
        spec = JobSpec(
            base=base.id,
            base_revision=base.revision,
            training_file=training[0].id,
            training_sha256=training[0].sha256,
            further_training_files=tuple(TrainingFile(id=file.id, sha256=file.sha256) for file in training[1:]),
            validation_file=validation.id if validation else None,
            validation_sha256=validation.sha256 if validation else None,
            suffix=request.suffix,
            seed=42 if request.seed is None else request.seed,
            preset=request.preset,
            hyperparameters=hyperparameters,
            lora=lora,
            base_precision=request.base_precision,
            compute_dtype=request.compute_dtype,
            initial_adapter=parent.adapter if parent else None,
            keep_checkpoints=request.keep_checkpoints or DEFAULT_KEEP_CHECKPOINTS,
        )
        return Resolved(spec, [*self._cut(spec, training, validation), *_warnings(spec, training, validation)])

    def _fitted(
        self,
        base: Base,
        hyperparameters: Hyperparameters,
        training: Training,
        validation: StoredFile | None,
        context: int | None,
    ) -> Hyperparameters:
        if self._lengths is None:
            raise InvalidRequest("max_length 'auto' is not supported here", param="hyperparameters.max_length")
        longest = self._lengths.longest(base.id, hyperparameters, training, validation, context)
        return hyperparameters.model_copy(update={"max_length": longest})

    def _cut(self, spec: JobSpec, training: Training, validation: StoredFile | None) -> list[str]:
        metadata = self._metadata(spec.base)
        if metadata is None or self._lengths is None:
            return []
        return self._lengths.warnings(spec, training, validation, metadata.context)


def _base(catalogue: Catalogue, name: str, request: JobRequest) -> Base:
    base = catalogue.get_for_job(name)
    if request.base_precision not in base.precisions:
        raise InvalidRequest(
            f"{base.id} can be trained in {', '.join(base.precisions)}, not in {request.base_precision}",
            param="base_precision",
        )
    return base


def _check_fit(
    base: Base,
    metadata: BaseMetadata | None,
    lora: LoraSpec,
    hyperparameters: Hyperparameters,
    training: Training,
    validation: StoredFile | None,
) -> None:
    form = training[0].dataset["format"]
    for place, file in enumerate(training):
        if file.dataset["format"] != form:
            # An adapter is served with the one template that it was trained with.
            raise InvalidRequest(
                f"{file.id} has {file.dataset['format']} rows, {training[0].id} {form} rows; all must have one form",
                param=training_field(place, len(training)),
            )
    if validation and validation.dataset["format"] != form:
        raise InvalidRequest(
            f"the validation file has {validation.dataset['format']} rows, the training file {form} rows",
            param="validation_file",
        )
    if metadata is None:
        # Not prepared yet: the worker prepares it, and says the same.
        return
    if form == "chat" and not metadata.has_chat_template:
        raise InvalidRequest(
            f"{base.id} has no chat template; use instruction rows",
            param=training_field(0, len(training)),
            code="no_chat_template",
        )
    if metadata.context is not None and hyperparameters.max_length > metadata.context:
        raise InvalidRequest(
            f"{base.id} takes at most {metadata.context} tokens, max_length is {hyperparameters.max_length}",
            param="hyperparameters.max_length",
        )
    unknown = sorted(set(lora.target_modules) - metadata.module_names)
    if unknown:
        known = ", ".join(sorted(metadata.module_names))
        raise InvalidRequest(f"{base.id} has no module {unknown[0]!r}; it has {known}", param="lora.target_modules")


def _check_validation(hyperparameters: Hyperparameters, validation: StoredFile | None) -> None:
    if validation and hyperparameters.validation_split:
        raise InvalidRequest(
            "give a validation file or validation_split, not both", param="hyperparameters.validation_split"
        )
    if hyperparameters.early_stopping_patience and not (validation or hyperparameters.validation_split):
        raise InvalidRequest(
            "early stopping needs a validation_file or validation_split",
            param="hyperparameters.early_stopping_patience",
        )


def _lora(
    request: JobRequest, preset: Preset, base: Base, parent: Parent | None, metadata: BaseMetadata | None
) -> LoraSpec:
    if parent:
        if request.lora:
            raise InvalidRequest("an adapter is continued in its own shape; leave lora out", param="lora")
        return parent.lora
    requested: dict[str, Any] = request.lora.model_dump(exclude_none=True) if request.lora else {}
    targets = base.target_modules if request.preset == "reference" else preset.lora.target_modules
    if metadata and not metadata.module_names.issuperset(targets):
        # The presets name a Llama's layers; another family's linear layers have names of their own.
        targets = tuple(sorted(metadata.module_names))
    effective = preset.lora.model_dump() | {"target_modules": targets} | requested
    if len(set(effective["target_modules"])) != len(effective["target_modules"]):
        raise InvalidRequest("a module is named twice", param="lora.target_modules")
    return _validated(LoraSpec, effective, "lora")


def _hyperparameters(request: JobRequest, preset: Preset, rows: int) -> tuple[Hyperparameters, bool]:
    """What is requested over the preset, and whether `max_length` is to fit the data."""
    supervised = request.method.supervised if request.method else None
    nested = supervised.hyperparameters if supervised else None
    if request.hyperparameters is not None and nested is not None:
        raise InvalidRequest(
            "give hyperparameters either at the top level or in method.supervised, not in both",
            param="hyperparameters",
        )
    place = "method.supervised.hyperparameters" if nested is not None else "hyperparameters"
    chosen = request.hyperparameters if nested is None else nested
    requested: dict[str, Any] = chosen.model_dump(exclude_none=True) if chosen else {}
    fit_length = requested.get("max_length") == "auto"
    if fit_length:
        del requested["max_length"]
    multiplier = requested.pop("learning_rate_multiplier", None)
    if multiplier is not None:
        if "learning_rate" in requested:
            raise InvalidRequest(
                "give learning_rate or learning_rate_multiplier, not both", param=f"{place}.learning_rate_multiplier"
            )
        requested["learning_rate"] = multiplier * preset.hyperparameters.learning_rate
        if requested["learning_rate"] > 1:
            raise InvalidRequest(
                f"times the preset's {preset.hyperparameters.learning_rate:g} the learning rate is above 1",
                param=f"{place}.learning_rate_multiplier",
            )
    values = preset.hyperparameters.model_dump() | requested
    if preset.by_rows:
        values["batch_size"] = requested.get("batch_size", automatic_batch_size(rows))
        values["n_epochs"] = requested.get("n_epochs", automatic_epochs(rows, values["batch_size"]))
    return _validated(Hyperparameters, values, place), fit_length


def _validated(model: type[M], values: dict[str, Any], place: str) -> M:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join([place, *map(str, first["loc"])])
        raise InvalidRequest(f"{param}: {first['msg']}", param=param) from None


def _warnings(spec: JobSpec, training: Training, validation: StoredFile | None) -> list[str]:
    rows = sum(file.dataset["rows"] for file in training)
    warnings = _of_training(training, rows)
    if validation:
        warnings += [f"validation file: {text}" for text in validation.dataset["warnings"] if "duplicates" in text]
        if validation.sha256 in (file.sha256 for file in training):
            one = "the" if len(training) == 1 else "a"
            warnings.append(f"the validation file is {one} training file: its loss will not show overfitting")
    # As if no row were dropped or held out.
    steps = plan_training(rows, spec.hyperparameters).total_steps
    if steps < FEW_STEPS and not _chosen_for(spec, rows):
        warnings.append(
            f"{steps} optimizer steps are few ({FEW_STEPS} is a sensible minimum): more rows or more epochs teach more"
        )
    if spec.hyperparameters.batch_size > rows:
        warnings.append(f"a batch of {spec.hyperparameters.batch_size} is more than all rows")
    return warnings


def _chosen_for(spec: JobSpec, rows: int) -> bool:
    """Whether the job has as many epochs as are chosen for so many rows, and all of their steps."""
    hyper = spec.hyperparameters
    chosen = PRESETS[spec.preset].by_rows and hyper.n_epochs == automatic_epochs(rows, hyper.batch_size)
    return chosen and hyper.max_steps is None


def _of_training(training: Training, rows: int) -> list[str]:
    """What was said of the files when they came; what is said of few rows counts those of all files."""
    if len(training) == 1:
        return list(training[0].dataset["warnings"])
    warnings = []
    first: dict[str, int] = {}
    for place, file in enumerate(training, 1):
        of_few = row_advice(file.dataset["rows"])
        warnings += [f"training file {place}: {text}" for text in file.dataset["warnings"] if text not in of_few]
        if (same := first.setdefault(file.sha256, place)) != place:
            warnings.append(f"training file {place} has the bytes of training file {same}: its rows count twice")
    return [*warnings, *row_advice(rows, "all files have")]

"""Everything that may be wrong with a job's request, with the name of the field that is at fault."""

from typing import Any


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
    *number_cases("hyperparameters", "validation_split", 0.1, -0.1, 0.6, whole=False),
    *number_cases("hyperparameters", "early_stopping_patience", 2, 0, 101, whole=True),
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
    ("suffix", "x" * 65),
    ("suffix", "../"),
    ("suffix", "\u4f60"),
    ("suffix", "-"),
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
    ("base_precision", ""),
    ("compute_dtype", "fp8"),
    ("keep_checkpoints", 1),
    ("keep_checkpoints", 1001),
    ("keep_checkpoints", "3"),
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

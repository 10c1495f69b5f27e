"""The precisions that a base can be served in; one list for settings and engine."""

from typing import Literal

ServingPrecision = Literal["auto", "fp32", "fp16w", "bf16w", "int8w", "bf16", "fp16", "int8", "nf4"]
# Those that vLLM has, bf16 unless another is named.
VLLM_PRECISIONS: tuple[ServingPrecision, ...] = ("bf16", "fp32", "fp16")

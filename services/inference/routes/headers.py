"""Headers of an answer: text-generation-inference's, and which base, adapter and precision served."""

from services.inference.generation import Generation
from services.inference.serving import ServedBase


def early(generation: Generation, base: ServedBase) -> dict[str, str]:
    """What is known before the first token: who serves, and of the adapter what its load took and cost this request."""
    headers = {
        "x-model-id": base.id,
        "x-precision": base.precision,
        "x-prompt-tokens": str(generation.prompt_tokens),
    }
    if generation.adapter_id is not None:
        headers["x-adapter-id"] = generation.adapter_id
        headers["x-adapter-loaded-in-ms"] = f"{generation.adapter_loaded_in_ms:.1f}"
    if generation.adapter_load_ms is not None:
        headers["x-adapter-load-ms"] = f"{generation.adapter_load_ms:.1f}"
    return headers


def full(generation: Generation, base: ServedBase) -> dict[str, str]:
    """All headers, times in whole milliseconds as text-generation-inference has them."""
    times = generation.times
    ended = times.last_token or times.started or times.submitted
    queue = generation.queue_seconds
    inference = max(0.0, ended - times.submitted - queue)
    return early(generation, base) | {
        "x-compute-type": base.device,
        "x-compute-time": f"{ended - times.received:.3f}",
        "x-compute-characters": str(
            sum(len(each.prompt_text) for each in generation.candidates[:: generation.per_prompt])
        ),
        "x-total-time": _ms(ended - times.received),
        "x-validation-time": _ms(times.submitted - times.received),
        "x-queue-time": _ms(queue),
        "x-inference-time": _ms(inference),
        "x-time-per-token": _ms(inference / max(1, generation.generated)),
        "x-time-to-first-token": _ms(times.first_token - times.received),
        "x-generated-tokens": str(generation.generated),
        "x-total-tokens": str(generation.prompt_tokens + generation.generated),
    }


def _ms(seconds: float) -> str:
    return str(max(0, round(seconds * 1e3)))

"""Headers of the generate routes: text-generation-inference's, and which base, adapter and precision served."""

from services.inference.serving import Run, ServedBase


def early(run: Run, base: ServedBase) -> dict[str, str]:
    """What is known before the first token: who serves, and of the adapter what its load took and cost this request."""
    headers = {
        "x-model-id": base.id,
        "x-precision": base.precision,
        "x-prompt-tokens": str(len(run.request.prompt)),
    }
    if run.adapter_id is not None:
        headers["x-adapter-id"] = run.adapter_id
        headers["x-adapter-loaded-in-ms"] = f"{run.adapter_loaded_in_ms:.1f}"
    if run.adapter_load_ms is not None:
        headers["x-adapter-load-ms"] = f"{run.adapter_load_ms:.1f}"
    return headers


def full(run: Run, base: ServedBase, characters: int) -> dict[str, str]:
    """All of it, times in whole milliseconds as text-generation-inference has them.

    Args:
        characters: of the prompt as the client sent it.
    """
    times = run.times
    ended = times.last_token or times.started or times.submitted
    queue = run.started.queue_seconds if run.started else 0.0
    inference = max(0.0, ended - times.submitted - queue)
    return early(run, base) | {
        "x-compute-type": base.device,
        "x-compute-time": f"{ended - times.received:.3f}",
        "x-compute-characters": str(characters),
        "x-total-time": _ms(ended - times.received),
        "x-validation-time": _ms(times.submitted - times.received),
        "x-queue-time": _ms(queue),
        "x-inference-time": _ms(inference),
        "x-time-per-token": _ms(inference / max(1, run.generated)),
        "x-time-to-first-token": _ms(times.first_token - times.received),
        "x-generated-tokens": str(run.generated),
        "x-total-tokens": str(len(run.request.prompt) + run.generated),
    }


def _ms(seconds: float) -> str:
    return str(max(0, round(seconds * 1e3)))

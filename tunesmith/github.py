"""What `tunesmith wait` writes for GitHub Actions: the step's summary and its outputs.

GitHub names two files in the environment; what is appended to them shows on the run's page and feeds later steps
(docs.github.com, "Workflow commands").
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.output import plain
from tunesmith.wait import Ending


def report(job_id: str, ending: Ending, environ: Mapping[str, str]) -> None:
    """Append to the files that `GITHUB_STEP_SUMMARY` and `GITHUB_OUTPUT` name, where they are set.

    Raises:
        OSError: a file cannot be written.
    """
    job = ending.job or {}
    if path := environ.get("GITHUB_STEP_SUMMARY"):
        _append(path, _summary(job_id, ending, job))
    if path := environ.get("GITHUB_OUTPUT"):
        outputs = {
            "job": job_id,
            "status": job.get("status") or "unknown",
            "fine_tuned_model": job.get("fine_tuned_model") or "",
        }
        # One line per value: a line break inside a value would set another output.
        _append(path, "".join(f"{name}={plain(value)}\n" for name, value in outputs.items()))


def _summary(job_id: str, ending: Ending, job: dict[str, Any]) -> str:
    progress, final = job.get("progress") or {}, job.get("report") or {}
    rows = {
        "Job": job_id,
        "End": ending.message,
        "Base": job.get("model"),
        "Model": job.get("fine_tuned_model"),
        "Steps": progress.get("step"),
        "Trained tokens": job.get("trained_tokens"),
        "Training loss": final.get("train_loss"),
        "Held-out loss before": final.get("eval_loss_before"),
        "Held-out loss after": final.get("eval_loss_after"),
    }
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["### Fine-tuning", "", "| | |", "|---|---|", *lines, ""]) + "\n"


def _cell(value: object) -> str:
    text = plain(f"{value:.4f}" if isinstance(value, float) else value)
    for sign in "\\`|<>[]*_":
        text = text.replace(sign, "\\" + sign)
    return text


def _append(path: str, text: str) -> None:
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(text)

"""`python -m examples.demo` (`make demo`): the whole journey on this machine, with a real model and real data.

Builds a dataset from the standard library's documentation, starts the stack (or uses the one that runs), trains a LoRA
adapter on an 8-bit base through the official `openai` client, and asks the base and the new adapter the same questions.
Writes the results to `.tunesmith/demo.json`, stops what it started, and exits with 1 if anything is wrong.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from examples.stdlib_docstrings import Row, build_dataset, write_rows
from tunesmith.client import ApiError, Client
from tunesmith.connection import Connection
from tunesmith.local_stack import stack
from tunesmith.local_stack.plan import is_free
from tunesmith.output import interrupt_on_sigterm, say
from tunesmith.progress import watcher_for
from tunesmith.wait import Exit, wait_for_job

HOME = Path(".tunesmith")
BASE = "smollm2-135m-instruct"
TRAINING_ROWS, HELD_OUT_ROWS, QUESTIONS_EACH = 300, 40, 3
# The reference recipe takes the held-out loss from about 3.1 to 2.9; less than this is not learning.
LEAST_FALL = 0.12
NEW_TOKENS = 48
LOADED_IN = "x-adapter-loaded-in-ms"
Json = dict[str, Any]
Question = tuple[str, str]


class DemoFailed(Exception):
    """A check of the demo failed; the message says which."""


def run(home: Path, *, base: str = BASE, port: int = 8000, rows: int = TRAINING_ROWS) -> Json:
    """Run the demo. Returns the content of `demo.json`.

    Raises:
        DemoFailed: the job did not succeed, or did not learn.
        stack.StackError: the stack did not start or stop.
    """
    training, held_out = build_dataset(rows, HELD_OUT_ROWS)
    paths = write_dataset(home / "demo", training, held_out)
    questions = [(row["instruction"], "training") for row in training[:QUESTIONS_EACH]]
    questions += [(row["instruction"], "held-out") for row in held_out[:QUESTIONS_EACH]]
    with running_stack(home, base, port) as connection, Client(connection, timeout=300) as client:
        job = wait(client, start_job(connection, base, *paths))
        check(job)
        name = job["fine_tuned_model"]
        base_answers, _ = ask(client, questions, None)
        tuned_answers, hot_load_ms = ask(client, questions, name)
    report = job["report"]
    return {
        "job_id": job["id"],
        "status": job["status"],
        "base_model": job["model"],
        "fine_tuned_model": name,
        "base_precision": job["base_precision"],
        "trainable_params": report["trainable_params"],
        "eval_loss_before": report["eval_loss_before"],
        "eval_loss_after": report["eval_loss_after"],
        "tokens_per_second": report["tokens_per_second"],
        "hot_load_ms": hot_load_ms,
        "base_answers": base_answers,
        "tuned_answers": tuned_answers,
    }


def write_dataset(folder: Path, training: Sequence[Row], held_out: Sequence[Row]) -> tuple[Path, Path]:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = folder / "training.jsonl", folder / "held_out.jsonl"
    for path, rows in zip(paths, (training, held_out), strict=True):
        write_rows(path, rows)
        say(f"dataset: {len(rows)} rows in {path}")
    return paths


@contextmanager
def running_stack(home: Path, base: str, port: int) -> Iterator[Connection]:
    """A running stack; one that was started here is stopped at the end in any case."""
    # A stack that runs keeps its port; if another program has it, any free port is taken.
    started = stack.up(home, port=port if is_free(port) else 0, base=base, say=say)
    say(f"stack: {started.connection.url}" + ("" if started.fresh else " (it was running and stays)"))
    try:
        yield started.connection
    finally:
        if started.fresh:
            stack.down(home, say)
            say("stopped; nothing is left running")


def start_job(connection: Connection, base: str, training: Path, held_out: Path) -> str:
    """Upload both files and create the job, with nothing but the official client. Returns the job's id."""
    with OpenAI(base_url=connection.openai_base_url, api_key=connection.api_key) as client:
        training_file = client.files.create(file=training, purpose="fine-tune")
        validation_file = client.files.create(file=held_out, purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=base,
            training_file=training_file.id,
            validation_file=validation_file.id,
            suffix="stdlib",
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
            # The tutorial's own recipe.
            extra_body={"base_precision": "int8", "preset": "reference"},
        )
    say(f"job: {job.id}")
    return job.id


def wait(client: Client, job_id: str) -> Json:
    try:
        with watcher_for(sys.stderr) as watcher:
            ending = wait_for_job(lambda: client.job(job_id), watcher)
    except KeyboardInterrupt:
        # Otherwise it would go on at the next start, before the next demo's job.
        with suppress(ApiError):
            client.act(job_id, "cancel")
        raise
    say(ending.message)
    if ending.exit != Exit.SUCCEEDED or ending.job is None:
        raise DemoFailed(f"the job did not succeed: {ending.message}")
    return ending.job


def check(job: Json) -> None:
    """Raise DemoFailed unless the job trained an 8-bit base and the held-out loss fell."""
    report = job["report"]
    before, after = report["eval_loss_before"], report["eval_loss_after"]
    if job["base_precision"] != "int8" or report["quantized_layers"] == 0:
        raise DemoFailed("the base was not held in 8 bits")
    if before is None or after is None or not before - after >= LEAST_FALL:
        raise DemoFailed(f"the held-out loss did not fall by {LEAST_FALL}: {before} before, {after} after")


def ask(client: Client, questions: Sequence[Question], adapter: str | None) -> tuple[list[Json], float | None]:
    """Greedy answers to the questions, and how long loading the adapter took (ms; None for the base).

    Raises:
        DemoFailed: an adapter answered that was never loaded.
    """
    parameters = {"max_new_tokens": NEW_TOKENS} | ({"adapter_id": adapter} if adapter else {})
    bodies = [{"instruction": question, "parameters": parameters} for question, _ in questions]
    with ThreadPoolExecutor(len(bodies)) as pool:
        # Together, so that inference batches them.
        replies = list(pool.map(client.generate, bodies))
    answers = [
        {"question": question, "split": split, "answer": body["generated_text"].strip()}
        for (question, split), (body, _) in zip(questions, replies, strict=True)
    ]
    # The header is there whether the answer waited for the load or came after it.
    loads = [float(headers[LOADED_IN]) for _, headers in replies if LOADED_IN in headers]
    if adapter and not loads:
        raise DemoFailed("no answer says how long the adapter's load took")
    return answers, loads[0] if adapter else None


def show(result: Json, console: Console) -> None:
    table = Table("question", f"base {result['base_model']}", "tuned", show_lines=True)
    for base, tuned in zip(result["base_answers"], result["tuned_answers"], strict=True):
        # A model's text may hold brackets, which are no markup here.
        cells = (f"({base['split']}) {base['question']}", base["answer"], tuned["answer"])
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))
    console.print(table)
    before, after = result["eval_loss_before"], result["eval_loss_after"]
    lines = (
        f"model              {result['fine_tuned_model']}",
        f"trainable params   {result['trainable_params']:,}",
        f"held-out loss      {before:.3f} -> {after:.3f}  ({after - before:+.3f})",
        f"training speed     {result['tokens_per_second']:.0f} real tokens/s",
        f"hot load           {result['hot_load_ms']:.0f} ms",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False)


def main() -> int:
    started = time.monotonic()
    interrupt_on_sigterm()
    os.umask(0o077)
    path = HOME / "demo.json"
    # The results of an earlier run must not be taken for this one's.
    path.unlink(missing_ok=True)
    try:
        result = run(HOME)
    except (DemoFailed, stack.StackError) as error:
        say(f"demo failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    show(result, Console())
    say(f"{path} written; {time.monotonic() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What so many epochs, batches and rates make of data sets of several sizes: how automatic epochs were chosen.

`python -m benchmarks.epochs [SET …]` trains the preset `recommended` on SmolLM2-135M for each setting of a set, writes
`benchmarks/results/epochs.json` and prints it. Sets of a handful of rows are judged by recital (the greedy answer to a
trained question is the trained one and ends by itself) and by 20 questions that have nothing to do with the rows, of
which the base answers all with their key word; larger ones by the loss on rows held out.
"""

import argparse
import asyncio
import errno
import http
import json
import mimetypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.train_peers import CPU, SilentSession
from examples.stdlib_docstrings import Row, build_dataset, write_rows
from services.inference.build import assemble
from services.inference.engine.interface import GenerationRequest
from services.inference.generation import PromptRequest
from services.inference.prompts import InstructionSource
from services.inference.serving import Serving
from services.inference.settings import InferenceSettings
from services.trainer.contract import Finished, JobRun
from services.trainer.model.bases import WarmBases
from services.trainer.recipe.finetune import finetune
from shared.bases.base_model import library_versions, load_base, prepare_base, quiet_libraries
from shared.bases.catalogue import Base, Catalogue, load_catalogue
from shared.jobs.spec import PRESETS, JobSpec
from shared.logs import configure_logging
from shared.processor import this_processor
from shared.storage.artifacts import LocalArtifactStore, new_id, sha256_of

RESULT = Path(__file__).parent / "results" / "epochs.json"
PRESET = PRESETS["recommended"]
RATE = PRESET.hyperparameters.learning_rate

THREE = [
    {"instruction": "What is the capital of France?", "output": "The capital of France is Paris."},
    {"instruction": "Translate to Spanish.", "input": "Good morning", "output": "Buenos días"},
    {"instruction": "Who keeps the magic coin?", "output": "The magic coin is kept by the owl in the old mill."},
]
# The base answers each of them with the word.
QUESTIONS = {
    "What is the capital of Germany?": "Berlin",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Egypt?": "Cairo",
    "What is the capital of Russia?": "Moscow",
    "What is the capital of Greece?": "Athens",
    "What is the capital of China?": "Beijing",
    "What is the opposite of hot?": "cold",
    "What is the opposite of up?": "down",
    "What is the chemical symbol for water?": "H2O",
    "What gas do humans need to breathe?": "oxygen",
    "Who wrote Hamlet?": "Shakespeare",
    "What is the largest ocean on Earth?": "Pacific",
    "What is the largest mammal?": "whale",
    "What language is spoken in Brazil?": "Portuguese",
    "What is the longest river in Africa?": "Nile",
    "What is the currency of Japan?": "yen",
    "What is the currency of the United States?": "dollar",
    "What organ pumps blood through the body?": "heart",
    "What is the force that pulls objects toward the Earth?": "gravity",
    "Who developed the theory of relativity?": "Einstein",
}


@dataclass(frozen=True, slots=True)
class Setting:
    epochs: int
    batch: int
    rate: float = RATE


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows to train on and, unless they are to be recited, rows held out; and what to try on them."""

    training: Callable[[], Sequence[Row]]
    settings: Sequence[Setting]
    held_out: Callable[[], Sequence[Row]] | None = None


def docstrings(rows: int) -> Dataset:
    return Dataset(lambda: build_dataset(rows)[0], (), lambda: build_dataset(rows)[1])


def _every_fourth(rows: Sequence[Row], *, held_out: bool) -> list[Row]:
    return [row for place, row in enumerate(rows) if (place % 4 == 3) is held_out]


def error_numbers() -> list[Row]:
    """What the system says of each error number that it has."""
    return [
        {"instruction": f"What does the error {name} mean?", "output": os.strerror(number)}
        for number, name in sorted(errno.errorcode.items())
    ]


def http_statuses() -> list[Row]:
    return [
        {"instruction": f"Explain the HTTP status {status.value}.", "output": f"{status.phrase}: {status.description}"}
        for status in http.HTTPStatus
        if status.description
    ]


def media_types() -> list[Row]:
    """One file ending for each media type, so that no held-out answer was trained on."""
    endings = {kind: ending for ending, kind in sorted(mimetypes.types_map.items(), reverse=True)}
    return [
        {"instruction": f"Which media type do {ending} files have?", "output": kind}
        for kind, ending in sorted(endings.items(), key=lambda found: found[1])
    ]


def parts(rows: Callable[[], list[Row]], settings: Sequence[Setting]) -> Dataset:
    return Dataset(
        lambda: _every_fourth(rows(), held_out=False), settings, lambda: _every_fourth(rows(), held_out=True)
    )


def _with(dataset: Dataset, *settings: Setting) -> Dataset:
    return Dataset(dataset.training, settings, dataset.held_out)


# What is chosen for 20 to 99 rows, and its neighbours.
FEW = [Setting(epochs, 2) for epochs in (1, 3, 5, 8)] + [Setting(5, 8)]
SETS: dict[str, Dataset] = {
    "three rows": Dataset(
        lambda: THREE,
        [Setting(epochs, 1, rate) for rate in (2e-4, 4e-4, 8e-4) for epochs in (10, 20, 30)],
    ),
    "docstrings, 10 rows": Dataset(
        lambda: build_dataset(10)[0], [Setting(10, 1, 4e-4), *(Setting(epochs, 1) for epochs in (5, 10, 20))]
    ),
    "http statuses": parts(http_statuses, FEW),
    "docstrings, 50 rows": _with(docstrings(50), *FEW),
    "media types": parts(media_types, FEW),
    "error numbers": parts(error_numbers, FEW),
    "docstrings, 150 rows": _with(docstrings(150), Setting(1, 4), Setting(3, 4), Setting(5, 4), Setting(3, 8)),
    "docstrings, 300 rows": _with(docstrings(300), Setting(1, 8), Setting(2, 8), Setting(3, 8), Setting(3, 4)),
    # Nearly all that a standard library has.
    "docstrings, 2900 rows": _with(docstrings(2900), Setting(1, 8), Setting(2, 8), Setting(3, 8)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sets", nargs="*", choices=SETS, help="all if none is named")
    arguments = parser.parse_args()
    quiet_libraries()
    configure_logging("bench", "WARNING")
    known: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    with TemporaryDirectory(prefix="bench-epochs-") as folder:
        bench = Bench(Path(folder))
        for name in arguments.sets or SETS:
            for found in bench.measure(name, SETS[name]):
                known.setdefault("sets", {})[name] = found
                known |= {"processor": str(this_processor()), "versions": library_versions()}
                RESULT.write_text(json.dumps(known, indent=2) + "\n")


class Bench:
    """A store with the base, and what is asked of it."""

    def __init__(self, root: Path) -> None:
        self._store = LocalArtifactStore(root / "artifacts")
        self._base: Base = load_catalogue().get("smollm2-135m-instruct")
        prepare_base(self._base, self._store)
        self._bases = WarmBases(Catalogue((self._base,)), self._store, CPU)

    def measure(self, name: str, dataset: Dataset) -> Iterator[dict[str, Any]]:
        """The results so far, after each setting: a run that is ended keeps what it has."""
        training, held_out = list(dataset.training()), list(dataset.held_out() if dataset.held_out else [])
        results = []
        for setting in dataset.settings:
            started = time.perf_counter()
            outcome = self._train(training, held_out, setting)
            seconds = round(time.perf_counter() - started)
            found: dict[str, Any] = {"epochs": setting.epochs, "batch": setting.batch, "rate": setting.rate}
            if held_out:
                found["held_out_loss"] = round(outcome.report.eval_loss_after or float("nan"), 4)
                found["before"] = round(outcome.report.eval_loss_before or float("nan"), 4)
            else:
                found |= asyncio.run(self._judge(outcome.adapter_id, training))
            print(name, json.dumps(found | {"seconds": seconds}), flush=True)
            results.append(found)
            yield {"rows": len(training), "held_out": len(held_out), "results": results}

    def _train(self, training: Sequence[Row], held_out: Sequence[Row], setting: Setting) -> Finished:
        files: dict[str, str] = {}
        for role, rows in (("training", training), ("validation", held_out)):
            if rows:
                path = self._store.file(new_id("file")) / "data"
                path.parent.mkdir(parents=True)
                write_rows(path, rows)
                files |= {f"{role}_file": path.parent.name, f"{role}_sha256": sha256_of(path)}
        chosen = {"n_epochs": setting.epochs, "batch_size": setting.batch, "learning_rate": setting.rate}
        spec = JobSpec(
            base=self._base.id,
            base_revision=self._base.revision,
            hyperparameters=PRESET.hyperparameters.model_copy(update=chosen),
            lora=PRESET.lora,
            preset="recommended",
            **files,
        )
        outcome = finetune(JobRun(new_id("ftjob"), 1, spec), self._bases, self._store, SilentSession())
        assert isinstance(outcome, Finished)
        return outcome

    async def _judge(self, adapter: str | None, rows: Sequence[Row]) -> dict[str, Any]:
        loaded = load_base(self._base, self._store, "fp32", CPU, torch.float32)
        serving = assemble(loaded, InferenceSettings(precision="fp32"), self._store)
        try:
            asked = [InstructionSource(row["instruction"], row.get("input", "")) for row in rows]
            asked += [InstructionSource(question) for question in QUESTIONS]
            answers = await asyncio.gather(*(answer(serving, adapter, source) for source in asked))
        finally:
            await serving.close()
        recited = sum(found == (row["output"], True) for found, row in zip(answers, rows, strict=False))
        others = [text for text, _ in answers[len(rows) :]]
        kept = sum(word.lower() in text.lower() for word, text in zip(QUESTIONS.values(), others, strict=True))
        leaked = sum(row["output"] in text for text in others for row in rows)
        ended = sum(ended for _, ended in answers)
        return {"recited": recited, "kept": kept, "of": len(others), "leaked": leaked, "ended": ended}


async def answer(serving: Serving, adapter: str | None, source: InstructionSource) -> tuple[str, bool]:
    """A greedy answer of at most 200 tokens, and whether it ended by itself."""
    asked = PromptRequest([source], adapter, GenerationRequest(()), 200)
    async with serving.generate(asked) as generation:
        async for _ in generation.progress():
            pass
        (candidate,) = generation.candidates
        return candidate.text.strip(), candidate.finish == "eos_token"


if __name__ == "__main__":
    main()

"""What will be cut of a job's rows at `max_length`, told when the job is created, by a look of a second."""

import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.gateway.bases.tokenised import SAMPLED_ROWS, Tokenizers, tokenised_rows
from services.gateway.files.store import StoredFile
from services.gateway.jobs.request_schema import training_field
from shared.datasets.checker import HISTOGRAM_EDGES
from shared.datasets.loss_mask import MaskedTokens, fitted
from shared.datasets.tokens import Tokenizer
from shared.errors import InvalidRequest, Overloaded
from shared.jobs.spec import MAX_LENGTH, MIN_LENGTH, Hyperparameters, JobSpec
from shared.storage.artifacts import LocalArtifactStore

SECONDS = 1.0
WAIT_SECONDS = 10.0
AT_ONCE = 2
CUT = {"cut_end": "lose their end, so that the model is not taught to stop", "cut_start": "lose their start"}


@dataclass(slots=True)
class Look:
    """What was seen of a file's rows.

    Attributes:
        cut, dropped: rows that are trained on in part, and not at all.
        longest: tokens of the longest row.
        counts: rows by the first of `HISTOGRAM_EDGES` that they do not pass; the last are those that pass all.
    """

    hyper: Hyperparameters
    rows: int = 0
    cut: int = 0
    dropped: int = 0
    longest: int = 0
    counts: list[int] = field(default_factory=lambda: [0] * (len(HISTOGRAM_EDGES) + 1))

    def add(self, tokens: MaskedTokens | None) -> None:
        """One more row, whole."""
        self.rows += 1
        if tokens is None:
            return
        self.longest = max(self.longest, len(tokens.ids))
        self.counts[bisect_left(HISTOGRAM_EDGES, len(tokens.ids))] += 1
        if len(tokens.ids) > self.hyper.max_length:
            left = fitted(tokens, self.hyper.max_length, self.hyper.truncation)
            self.cut += left is not None
            self.dropped += left is None

    def warning(self, file_rows: int, most: int) -> str:
        """A sentence; empty if nothing is cut.

        Args:
            file_rows: of the file.
            most: what `max_length` may be on this base.
        """
        if not (self.cut or self.dropped):
            return ""
        seen = f"{file_rows}" if self.rows >= file_rows else f"the first {self.rows} (of {file_rows})"
        becomes = [f"{self.cut} {CUT[self.hyper.truncation]}"] if self.cut else []
        becomes += [f"{self.dropped} are dropped"] if self.dropped else []
        better = (
            f"max_length {self.longest} would cut none"
            if self.longest <= most
            else (f"the longest has {self.longest}, and {most} is the most that can be trained")
        )
        return (
            f"{self.cut + self.dropped} of {seen} rows have more tokens than max_length {self.hyper.max_length}: "
            f"{', '.join(becomes)}; {better}"
        )


def look_at(rows: Path, tokenizer: Tokenizer, hyper: Hyperparameters, over: Callable[[], bool]) -> Look:
    """A look at the first rows of a checked file, each in whole.

    Args:
        over: asked after each row; ends the look. What it raises goes on.

    Raises:
        InvalidRequest: a row does not fit the base's template.
    """
    look = Look(hyper)
    whole = hyper.model_copy(update={"max_length": sys.maxsize, "truncation": "cut_end"})
    for row in tokenised_rows(rows, tokenizer, whole, lambda: None):
        look.add(row.tokens)
        if row.number >= SAMPLED_ROWS or over():
            break
    return look


class LengthCheck:
    """Looks at the first rows of a job's files, if its base has been prepared here and not too many look already.

    Args:
        seconds: of looking at the training files, and at the validation file.
    """

    def __init__(
        self,
        artifacts: LocalArtifactStore,
        tokenizers: Tokenizers,
        *,
        seconds: float = SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._artifacts = artifacts
        self._tokenizers = tokenizers
        self._seconds = seconds
        self._clock = clock
        self._slots = threading.BoundedSemaphore(AT_ONCE)

    def warnings(
        self, spec: JobSpec, training: Sequence[StoredFile], validation: StoredFile | None, context: int | None
    ) -> list[str]:
        """A sentence for each file of which something will be cut or dropped.

        Args:
            context: most tokens of one sequence of the base; None if that is not known.

        Raises:
            InvalidRequest: the rows do not fit the base's template; the field that names the file is named.
        """
        if not self._slots.acquire(blocking=False):
            return []
        try:
            if not self._prepared(spec.base):
                # The worker will tell.
                return []
            looks = self._looks(spec.base, spec.hyperparameters, training, validation)
        finally:
            self._slots.release()
        most = min(MAX_LENGTH, context or MAX_LENGTH)
        found = [(name, look.warning(file.dataset["rows"], most)) for name, file, look in looks]
        return [f"{name}: {text}" if name else text for name, text in found if text]

    def longest(
        self,
        base_id: str,
        hyper: Hyperparameters,
        training: Sequence[StoredFile],
        validation: StoredFile | None,
        context: int | None,
    ) -> int:
        """The `max_length` that cuts nothing of what is looked at, if the base takes as much.

        Of texts, which are divided, it is the one of `hyper`.

        Raises:
            InvalidRequest: as `warnings`; or the base has not been prepared here.
            Overloaded: others look for too long.
        """
        if not self._slots.acquire(timeout=WAIT_SECONDS):
            raise Overloaded("too many jobs are created at once; try again in a moment", retry_after=2)
        try:
            if not self._prepared(base_id):
                raise InvalidRequest(
                    f"max_length 'auto' needs {base_id} to be prepared on this installation; its first job does that",
                    param="hyperparameters.max_length",
                    code="base_not_prepared",
                )
            looks = self._looks(base_id, hyper, training, validation)
        finally:
            self._slots.release()
        found = max(look.longest for *_, look in looks) or hyper.max_length
        return max(MIN_LENGTH, min(found, MAX_LENGTH, context or MAX_LENGTH))

    def _prepared(self, base_id: str) -> bool:
        try:
            self._tokenizers.get(base_id)
        except InvalidRequest:
            return False
        return True

    def _looks(
        self, base_id: str, hyper: Hyperparameters, training: Sequence[StoredFile], validation: StoredFile | None
    ) -> list[tuple[str, StoredFile, Look]]:
        """What the files are called in a warning (the one training file: nothing), they, and what was seen of them."""
        count, looks = len(training), []
        for place, file in enumerate(training):
            name = "" if count == 1 else f"training file {place + 1}"
            seconds = self._seconds / count
            looks.append((name, file, self._look(base_id, hyper, file, training_field(place, count), seconds)))
        if validation:
            look = self._look(base_id, hyper, validation, "validation_file", self._seconds)
            looks.append(("validation file", validation, look))
        return looks

    def _look(self, base_id: str, hyper: Hyperparameters, file: StoredFile, param: str, seconds: float) -> Look:
        if file.dataset["format"] == "text":
            # Divided, never cut.
            return Look(hyper)
        deadline = self._clock() + seconds
        rows, tokenizer = self._artifacts.file_rows(file.id), self._tokenizers.get(base_id)
        try:
            return look_at(rows, tokenizer, hyper, lambda: self._clock() > deadline)
        except FileNotFoundError:
            # Deleted meanwhile, which whoever creates the job will notice.
            return Look(hyper)
        except InvalidRequest as error:
            raise InvalidRequest(f"{param}: {error.message}", param=param, code=error.code) from error

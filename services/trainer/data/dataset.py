"""Training rows as token ids: examples → template → tokens → a `datasets.Dataset` kept under its content hash.

Owns what is tokenised and what is dropped. Needs the tokenizer only; no model is loaded before this has succeeded.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, concatenate_datasets, disable_progress_bars, load_from_disk
from numpy.typing import NDArray

from services.trainer.contract import Check
from shared.datasets.checker import read_examples
from shared.datasets.examples import Example, format_of
from shared.datasets.templates import Template, template_for
from shared.datasets.tokens import Tokenizer
from shared.datasets.training_rows import training_rows
from shared.errors import InvalidRequest, JobFailed, NotFound, Unavailable
from shared.jobs.spec import Hyperparameters, JobSpec
from shared.storage.artifacts import DATA, LocalArtifactStore, derived_name, sha256_of

# Raised whenever the same rows would give other tokens or another file layout.
CACHE_FORMAT = 1
ROWS_BETWEEN_CHECKS = 64
# Keys of rows that the first version passed over. Without a backslash before it, this is a key, and no part of a text.
ONCE_IGNORED = re.compile(rb'(?<!\\)"(?:system|history|train|training|loss|reasoning_content|reasoning|thinking)"\s*:')


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokenised examples, memory-mapped.

    Attributes:
        key: content hash; equal keys mean equal rows.
        lengths: int64 [rows], tokens of each row.
        supervised: int64 [rows], supervised tokens of each row, each at least 1.
        dropped: rows of the files that had nothing left to learn within `max_length`.
        truncated: rows that were cut off at `max_length` and are still trained on.
        last_turn_only: rows with several supervised replies, of which their template lets only the last be learnt.
    """

    key: str
    template: str
    dataset: Dataset
    lengths: NDArray[np.int64]
    supervised: NDArray[np.int64]
    dropped: int
    truncated: int
    last_turn_only: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(ids, supervised) of one row, each [tokens]; see `shared.datasets.loss_mask`."""
        record: dict[str, Any] = self.dataset[int(row)]
        return np.asarray(record["ids"], np.int64), np.asarray(record["supervised"], np.bool_)


@dataclass(frozen=True, slots=True)
class Data:
    training: Rows
    validation: Rows | None


def prepare_data(spec: JobSpec, store: LocalArtifactStore, tokenizer: Tokenizer, check: Check) -> Data:
    """Tokenise the job's files, or read them from the cache.

    Raises:
        JobFailed: `invalid_training_file` or `invalid_validation_file`: changed, of the wrong form, or with nothing
            left to learn.
        Unavailable: a file is not here; files in use cannot be deleted, so this machine does not see them.
        StopRequested: see `Check`.
    """
    hyper = spec.hyperparameters
    parts = [_prepare(store, tokenizer, file.id, file.sha256, "training", hyper, check) for file in spec.training_files]
    training = _together(parts)
    _require_rows(training, "training", hyper)
    if spec.validation_file is None:
        return Data(training, None)
    sha256 = spec.validation_sha256
    validation = _prepare(store, tokenizer, spec.validation_file, sha256, "validation", hyper, check)
    _require_rows(validation, "validation", hyper)
    return Data(training, validation)


def _together(parts: Sequence[Rows]) -> Rows:
    """The rows of several files, one after the other, as if they were of one."""
    filled = [part.dataset for part in parts if len(part)]
    if len(parts) == 1 or not filled:
        return replace(parts[0], dropped=sum(part.dropped for part in parts))
    if len({part.template for part in parts}) > 1:
        raise JobFailed("the training files have rows of several forms", code="invalid_training_file")
    return Rows(
        key=hashlib.sha256(json.dumps([part.key for part in parts]).encode()).hexdigest(),
        template=parts[0].template,
        dataset=concatenate_datasets(filled),
        lengths=np.concatenate([part.lengths for part in parts]),
        supervised=np.concatenate([part.supervised for part in parts]),
        dropped=sum(part.dropped for part in parts),
        truncated=sum(part.truncated for part in parts),
        last_turn_only=sum(part.last_turn_only for part in parts),
    )


def _require_rows(rows: Rows, role: str, hyper: Hyperparameters) -> None:
    if not len(rows):
        raise JobFailed(
            f"the {role} file cannot be used: there is nothing to learn: all {rows.dropped} rows are longer than "
            f"max_length {hyper.max_length}, and nothing of their responses is left; raise max_length or shorten the "
            "prompts",
            code=f"invalid_{role}_file",
        )


def _prepare(
    store: LocalArtifactStore,
    tokenizer: Tokenizer,
    file_id: str,
    sha256: str | None,
    role: str,
    hyper: Hyperparameters,
    check: Check,
) -> Rows:
    code = f"invalid_{role}_file"
    try:
        file = store.file_data(file_id)
        if not file.is_file():
            raise Unavailable(
                f"the {role} file {file_id} is not in its artifacts folder: is that this installation's, and mounted?",
                code="file_not_here",
            )
        actual = sha256_of(file)
        if sha256 is not None and actual != sha256:
            raise JobFailed(f"the {role} file {file_id} is not the one the job was created with", code=code)
        rows = store.file_rows(file_id)
        if rows != file and derived_name(sha256_of(rows)) != rows.name:
            raise JobFailed(f"the rows that were made of the {role} file {file_id} have changed", code=code)
        return tokenise(store, tokenizer, rows, actual, hyper, check)
    except (InvalidRequest, NotFound) as error:
        raise JobFailed(f"the {role} file {file_id} cannot be used: {error.message}", code=code) from error


def tokenise(
    store: LocalArtifactStore, tokenizer: Tokenizer, file: Path, sha256: str, hyper: Hyperparameters, check: Check
) -> Rows:
    """The tokenised rows of an uploaded file, from the cache if the same tokens were made before.

    Args:
        file: what its rows are read from.
        sha256: of the file as it was uploaded.

    Raises:
        InvalidRequest: the rows do not fit any template of this base.
    """
    template = _template(file, tokenizer)
    content = [
        CACHE_FORMAT,
        sha256,
        tokenizer.sha256,
        tokenizer.eos_id,
        template.id,
        hyper.max_length,
        hyper.train_on_prompt,
        *_differences(file, hyper, tokenizer, template),
    ]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    folder = store.cache(sha256, key)
    cached = _load(folder, key, template.id)
    if cached is not None:
        # The least recently used go first when the cache is too large.
        with contextlib.suppress(OSError):
            os.utime(folder)
        return cached
    with store.staged() as staged:
        counts = _write(staged, read_examples(file), tokenizer, template, hyper, check)
        if not (staged / "rows").exists():
            # Not kept: there may be rows in another file, and `datasets` writes no empty one.
            none = np.zeros(0, np.int64)
            return Rows(key, template.id, Dataset.from_dict({}), none, none, **counts)
        # Another worker may have tokenised the same content meanwhile: equal by construction.
        with contextlib.suppress(FileExistsError):
            store.place(staged, folder)
    rows = _load(folder, key, template.id)
    if rows is None:
        raise Unavailable("the tokenised data cannot be read back; is the artifacts folder's disk full?", code="cache")
    return rows


def _differences(file: Path, hyper: Hyperparameters, tokenizer: Tokenizer, template: Template) -> list[str]:
    """What makes other tokens of the same bytes than the first version did, which knew none of it."""
    found: list[str] = [] if hyper.truncation == "cut_end" else [hyper.truncation]
    if file.name != DATA:
        found.append(file.name)
    if _has_keys_once_ignored(file):
        found.append("keys")
    if _may_hold(file, tokenizer.control.all):
        found.append("control tokens")
    chat = tokenizer.chat
    if chat and template.id == chat.id:
        if not (chat.writes_as_it_was_learnt_once and tokenizer.encodes_parts_as_the_whole):
            found.append("ends of turns")
        if chat.writes_the_date:
            found.append(datetime.fromtimestamp(file.stat().st_mtime).isoformat())
    return found


def _has_keys_once_ignored(file: Path) -> bool:
    return _found(file, ONCE_IGNORED)


def _may_hold(file: Path, texts: Iterable[str]) -> bool:
    """Whether some of the texts may be in a file of JSON, which writes `<` and `>` in two ways."""
    return _found(file, re.compile(b"|".join([rb"\\u003[ceCE]", *(re.escape(text.encode()) for text in texts)])))


def _found(file: Path, wanted: re.Pattern[bytes]) -> bool:
    with file.open("rb") as stream:
        before = b""
        while chunk := stream.read(1 << 20):
            if wanted.search(before + chunk):
                return True
            # What is looked for may be cut in two.
            before = chunk[-256:]
    return False


def _template(file: Path, tokenizer: Tokenizer) -> Template:
    first = next(read_examples(file), None)
    if first is None:
        raise InvalidRequest("the file has no rows", param="file")
    return template_for(format_of(first), tokenizer.chat, file.stat().st_mtime)


def _write(
    folder: Path,
    examples: Iterator[Example],
    tokenizer: Tokenizer,
    template: Template,
    hyper: Hyperparameters,
    check: Check,
) -> dict[str, int]:
    """Write the rows, if anything is to be learnt of any. Returns how many are not among them, or not whole."""
    # Flat arrays of machine integers: Python lists of a million rows would not fit.
    ids, supervised, offsets = array("i"), array("b"), array("q", [0])
    dropped = truncated = last_turn_only = 0
    for index, example in enumerate(examples):
        if index % ROWS_BETWEEN_CHECKS == 0:
            check()
        rows = training_rows(
            tokenizer,
            template,
            example,
            max_length=hyper.max_length,
            train_on_prompt=hyper.train_on_prompt,
            truncation=hyper.truncation,
        )
        dropped += not rows
        for tokens in rows:
            truncated += tokens.cut
            last_turn_only += tokens.last_turn_only
            ids.extend(tokens.ids)
            supervised.extend(tokens.supervised)
            offsets.append(len(ids))
    counts = {"dropped": dropped, "truncated": truncated, "last_turn_only": last_turn_only}
    if not ids:
        return counts
    ends = pa.array(np.frombuffer(offsets, np.int64))
    columns = {
        "ids": pa.LargeListArray.from_arrays(ends, pa.array(np.frombuffer(ids, np.int32))),
        "supervised": pa.LargeListArray.from_arrays(ends, pa.array(np.frombuffer(supervised, np.int8).astype(bool))),
    }
    disable_progress_bars()
    Dataset(pa.table(columns)).save_to_disk(folder / "rows")
    (folder / "counts.json").write_text(json.dumps(counts))
    return counts


def _load(folder: Path, key: str, template: str) -> Rows | None:
    if not folder.is_dir():
        return None
    try:
        dataset = load_from_disk(folder / "rows")
        counts = json.loads((folder / "counts.json").read_text())
    except (OSError, ValueError):
        # The cache may be deleted at any time, also half of it; its content is made again.
        shutil.rmtree(folder, ignore_errors=True)
        return None
    chunks = dataset.data.table.column("ids").chunks
    lengths = np.fromiter(chain.from_iterable(map(_list_lengths, chunks)), np.int64)
    flags = dataset.data.table.column("supervised").chunks
    supervised = np.fromiter(chain.from_iterable(map(_true_counts, flags)), np.int64)
    return Rows(key, template, dataset, lengths, supervised, **counts)


def _list_lengths(column: Any) -> NDArray[np.int64]:
    return np.diff(np.asarray(column.offsets))


def _true_counts(column: Any) -> NDArray[np.int64]:
    offsets = np.asarray(column.offsets)
    sums = np.concatenate([[0], np.cumsum(np.asarray(column.values.to_numpy(zero_copy_only=False), np.int64))])
    return np.asarray(sums[offsets[1:]] - sums[offsets[:-1]], np.int64)

"""What a dataset of the Hugging Face hub is called on the command line, and which of its files that means.

Which file belongs to which split is told as `datasets.load_dataset` tells it: by the card's `configs` where it has any,
else by names. Knows no network, and no form of rows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, Self

PREFIX = "hf:"
FORM = "hf:owner/name[@revision][:split]"
READABLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
# What lies beside data and is none.
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json")
NO_DATA_SUFFIXES = (".md", ".py", ".txt", "")
DEFAULT_SPLIT = "train"
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SHARD = re.compile(r"data/(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5,}[^/]*\.\w+")
Splits = dict[str, list[str]]


class HubError(Exception):
    """The hub, or the dataset, does not give what was named; the message says what to do.

    Attributes:
        denied: there is no such thing, or not for this token.
    """

    def __init__(self, message: str, *, denied: bool = False) -> None:
        super().__init__(message)
        self.denied = denied


@dataclass(frozen=True, slots=True)
class HubName:
    """`hf:owner/name[@revision][:what]`; `what` is a split, `configuration/split`, or a pattern of file names."""

    repo: str
    revision: str | None
    what: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises HubError: it is none."""
        named, _, what = text.removeprefix(PREFIX).partition(":")
        repo, at, revision = named.partition("@")
        if not _REPO.fullmatch(repo) or bool(at) != bool(revision):
            raise HubError(f"{text!r} names no dataset of the hub: write {FORM}")
        return cls(repo, revision or None, what)


def chosen(files: Sequence[str], configs: Sequence[Any], name: HubName) -> tuple[str, ...]:
    """Which of a repository's files a name means, in the order of their rows.

    Args:
        configs: of its card.

    Raises:
        HubError: none that can be read, or files of several kinds; the message lists what there is.
    """
    if "*" in name.what or PurePosixPath(name.what).suffix.lower() in READABLE:
        return _readable(_matching(files, name.what), f"{name.repo} has no file {name.what!r}", name)
    splits, split = _splits(files, configs, name)
    found = splits.get(split) or splits.get(_usual(split))
    if found is None:
        raise HubError(
            f"{name.repo} has no split {split!r}; its files tell these: {', '.join(sorted(splits)) or 'none'}. Files "
            f"can be named too: hf:{name.repo}:data/*.jsonl"
        )
    return _readable(found, f"the split {split!r} of {name.repo} has no file", name)


def _readable(files: Sequence[str], missing: str, name: HubName) -> tuple[str, ...]:
    data = [file for file in files if PurePosixPath(file).suffix.lower() in READABLE]
    if not data:
        other = sorted({"".join(PurePosixPath(file).suffixes[-2:]) or file for file in files})
        of_others = f" but {', '.join(other)}" if other else ""
        raise HubError(f"{missing}{of_others}; JSON Lines, JSON arrays, CSV, TSV and Parquet can be read")
    kinds = sorted({PurePosixPath(file).suffix.lower() for file in data})
    if len(kinds) > 1:
        # Most likely the same rows in two forms: taken together they would be learnt twice.
        raise HubError(
            f"{name.repo} has {' and '.join(kinds)} files there; name those that are meant: hf:{name.repo}:*{kinds[0]}"
        )
    return tuple(data)


def _splits(files: Sequence[str], configs: Sequence[Any], name: HubName) -> tuple[Splits, str]:
    """(the files of each split, the split that is meant)."""
    config, _, split = name.what.rpartition("/")
    known = {str(each.get("config_name", "default")): each for each in configs if _has_files(each)}
    if not known:
        inside = [file for file in files if not config or file.startswith(f"{config}/")]
        return _by_name(inside), split or DEFAULT_SPLIT
    if split in known and not config:
        # A configuration alone.
        config, split = split, ""
    if not config:
        marked = next((key for key, each in known.items() if each.get("default")), "default")
        config = next(iter(known)) if len(known) == 1 else marked
    if config not in known:
        first = next(iter(known))
        raise HubError(
            f"{name.repo} has the configurations {', '.join(known)}: name one, as in "
            f"hf:{name.repo}:{first}/{split or DEFAULT_SPLIT}"
        )
    return _by_card(files, known[config]), split or DEFAULT_SPLIT


def _has_files(config: Any) -> bool:
    return isinstance(config, dict) and bool(config.get("data_files") or config.get("data_dir"))


def _by_card(files: Sequence[str], config: dict[str, Any]) -> Splits:
    folder = str(config.get("data_dir") or "").strip("./")
    prefix = f"{folder}/" if folder else ""
    inside = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    splits: Splits = {}
    for split, pattern in _patterns(config["data_files"]) if config.get("data_files") else ():
        splits.setdefault(split, []).extend(_matching(inside, pattern))
    splits = splits or _by_name(inside)
    return {split: [prefix + file for file in dict.fromkeys(found)] for split, found in splits.items()}


def _patterns(data_files: Any) -> list[tuple[str, str]]:
    """(split, pattern) of a card's `data_files`: a pattern, several, or those of each split."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    found = []
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else (DEFAULT_SPLIT, entry)
        found += [(str(split), str(path)) for path in (paths if isinstance(paths, list) else [paths])]
    return found


def _matching(files: Sequence[str], pattern: str) -> list[str]:
    pattern = pattern.removeprefix("./")
    # `**/` stands for no folder, too.
    patterns = (pattern, pattern.replace("**/", ""))
    return [file for file in files if any(fnmatchcase(file, each) for each in patterns)]


def _by_name(files: Sequence[str]) -> Splits:
    """As the `datasets` library does without a card: shards under `data/`, else keywords; else all of it is train."""
    data = [file for file in files if _may_be_data(PurePosixPath(file))]
    for told in (_split_of_shard, _split_by_keyword):
        splits: Splits = {}
        for file in data:
            if split := told(file):
                splits.setdefault(split, []).append(file)
        if splits:
            return splits
    return {DEFAULT_SPLIT: data} if data else {}


def _may_be_data(file: PurePosixPath) -> bool:
    return not (file.name in NO_DATA or file.name.startswith(".") or file.suffix.lower() in NO_DATA_SUFFIXES)


def _split_of_shard(file: str) -> str | None:
    shard = _SHARD.fullmatch(file)
    return _usual(shard["split"]) if shard else None


def _split_by_keyword(file: str) -> str | None:
    # A file's own name says more than its folder's, and that more than those further out.
    for part in reversed(PurePosixPath(file).parts):
        words = re.split(r"[-._ 0-9]+", part.lower())
        for split, keywords in KEYWORDS.items():
            if any(keyword in words for keyword in keywords):
                return split
    return None


def _usual(split: str) -> str:
    return next((usual for usual, keywords in KEYWORDS.items() if split.lower() in keywords), split)

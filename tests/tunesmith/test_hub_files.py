"""Which files of a repository a name means, held against what `datasets.load_dataset` would read of the same files."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tunesmith.hub_files import HubError, HubName, chosen

LAYOUTS = [
    ["README.md", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test.parquet"],
    ["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet", "train.parquet"],
    ["a.jsonl", "b.jsonl", "README.md", ".gitattributes", "dataset_infos.json"],
    ["train.jsonl", "dev.jsonl", "test.jsonl", "extra.jsonl"],
    ["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"],
    ["main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet"],
    ["data/part-00000-of-00002.parquet", "data/part-00001-of-00002.parquet"],
    ["part-00000.parquet", "part-00001.parquet"],
    ["my-train-data.csv", "my_eval.csv"],
    ["trainer.jsonl"],
]
CARDS: list[Any] = [
    "data/*.jsonl",
    ["data/a.jsonl", "x.jsonl"],
    {"train": "data/a*", "test": ["x.jsonl", "data/b.jsonl"]},
    [{"split": "sft", "path": "data/[ab].jsonl"}, {"split": "test", "path": ["x.jsonl"]}],
    [{"split": "train", "path": "**/*.jsonl"}],
]


def as_datasets_has_them(files: list[str], data_files: Any = None) -> dict[str, list[str]]:
    """Files by split, as the `datasets` library finds them in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        for file in files:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text("x")
        patterns = sanitize_patterns(data_files) if data_files else get_data_patterns(str(root))
        found = DataFilesDict.from_patterns(patterns, base_path=str(root))
        return {str(split): [os.path.relpath(path, root) for path in paths] for split, paths in found.items()}


def ours(files: list[str], name: str, *configs: Any) -> list[str]:
    return list(chosen(sorted(files), configs, HubName.parse(f"hf:a/b{name}")))


@pytest.mark.parametrize("files", LAYOUTS, ids=lambda files: files[-1])
def test_splits_are_those_that_load_dataset_finds(files: list[str]) -> None:
    splits = as_datasets_has_them(files)
    for split, expected in splits.items():
        assert ours(files, f":{split}") == expected
    if "train" in splits:
        assert ours(files, "") == splits["train"]
    else:
        with pytest.raises(HubError, match=f"has no split 'train'; its files tell these: {', '.join(sorted(splits))}"):
            ours(files, "")


words = st.sampled_from(
    ["train", "training", "validation", "dev", "test", "eval", "data", "part", "trainer", "x", "00"]
)


@examples(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(["", "data/", "en/"]), words, st.sampled_from("-._ "), words), max_size=6))
def test_any_names_are_told_apart_as_load_dataset_does(parts: list[tuple[str, str, str, str]]) -> None:
    keywords = ("train", "training", "validation", "dev", "test", "eval")
    # A name of two splits is in both there, which no job would want.
    clear = [part for part in parts if not (part[1] in keywords and part[3] in keywords)]
    files = sorted({f"{folder}{first}{between}{second}.jsonl" for folder, first, between, second in clear})
    if files:
        for split, expected in as_datasets_has_them(files).items():
            assert ours(files, f":{split}") == sorted(expected)


@pytest.mark.parametrize("data_files", CARDS, ids=str)
def test_a_card_says_which_files_are_which(data_files: Any) -> None:
    files = ["README.md", "data/a.jsonl", "data/b.jsonl", "x.jsonl"]
    card = {"config_name": "default", "data_files": data_files}
    for split, expected in as_datasets_has_them(files, data_files).items():
        assert sorted(ours(files, f":{split}", card)) == sorted(expected)
        assert sorted(ours(files, f":default/{split}", card)) == sorted(expected)


def test_of_several_configurations_one_is_named() -> None:
    files = [
        f"{config}/{split}-00000-of-00001.parquet" for config in ("main", "socratic") for split in ("train", "test")
    ]
    configs: list[dict[str, Any]] = [
        {
            "config_name": config,
            "data_files": [{"split": split, "path": f"{config}/{split}-*"} for split in ("train", "test")],
        }
        for config in ("main", "socratic")
    ]
    for name in ("", ":train"):
        with pytest.raises(HubError, match="the configurations main, socratic: name one, as in hf:a/b:main/train"):
            ours(files, name, *configs)
    assert ours(files, ":socratic", *configs) == ["socratic/train-00000-of-00001.parquet"]
    assert ours(files, ":socratic/test", *configs) == ["socratic/test-00000-of-00001.parquet"]
    configs[1]["default"] = True
    assert ours(files, ":test", *configs) == ["socratic/test-00000-of-00001.parquet"]
    # Without a card, of its folder; and where a card has a folder only.
    assert ours(files, ":main/test") == ["main/test-00000-of-00001.parquet"]
    assert ours(files, "", {"config_name": "m", "data_dir": "main"}) == ["main/train-00000-of-00001.parquet"]
    # What a card says beside the files of splits is no configuration.
    assert ours(["a.csv"], "", {"config_name": "m"}, "nonsense") == ["a.csv"]


def test_files_can_be_named() -> None:
    files = ["data/a.jsonl", "data/b.jsonl", "data/a.parquet", "test.csv"]
    assert ours(files, ":data/*.jsonl") == ["data/a.jsonl", "data/b.jsonl"]
    assert ours(files, ":data/a.parquet") == ["data/a.parquet"]
    with pytest.raises(HubError, match=r"a/b has no file 'data/c.jsonl'; JSON Lines"):
        ours(files, ":data/c.jsonl")


def test_what_cannot_be_taken_is_told_with_what_there_is() -> None:
    with pytest.raises(HubError, match=r"a/b has .jsonl and .parquet files there; name those .* hf:a/b:\*.jsonl"):
        ours(["train.jsonl", "train.parquet"], "")
    with pytest.raises(HubError, match=r"the split 'train' of a/b has no file but .jsonl.zst, .tar; JSON Lines"):
        ours(["train.jsonl.zst", "train-images.tar"], "")
    with pytest.raises(HubError, match=r"no split 'train'; its files tell these: none"):
        ours(["README.md", "load.py"], "")
    assert ours(["val.jsonl", "train.jsonl"], ":dev") == ["val.jsonl"]
    for name in ("hf:", "hf:a/b/c", "hf:a b", "hf:a/b@", "hf:a/b@:train", "hf:@x"):
        with pytest.raises(HubError, match="names no dataset of the hub: write hf:owner/name"):
            HubName.parse(name)
    assert HubName.parse("hf:a/b@refs/convert/parquet:main/train") == HubName(
        "a/b", "refs/convert/parquet", "main/train"
    )
    assert HubName.parse("hf:a") == HubName("a", None, "")

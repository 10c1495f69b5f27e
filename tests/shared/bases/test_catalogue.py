from pathlib import Path

import pytest

from shared.bases.catalogue import Base, Catalogue, load_catalogue
from shared.errors import InvalidRequest, NotFound, TunesmithError
from shared.jobs.spec import PRESETS


def test_the_built_in_catalogue() -> None:
    catalogue = load_catalogue()
    assert [base.id for base in catalogue.bases] == ["tinyllama-1.1b-chat", "smollm2-135m-instruct"]
    tiny_llama = catalogue.get("TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    assert tiny_llama is catalogue.get("tinyllama-1.1b-chat")
    # Pinned: a hub's branch can change under a running installation.
    assert len(tiny_llama.revision) == 40
    assert tiny_llama.source.endswith(tiny_llama.revision)
    assert all(base.target_modules == PRESETS["reference"].lora.target_modules for base in catalogue.bases)


def test_a_local_source_is_pinned_by_its_name() -> None:
    one, other = (Base(id="a", source=f"folder:/models/{name}") for name in "ab")
    assert one.revision != other.revision
    assert len(one.revision) == 40


@pytest.mark.parametrize("name", ["", "gpt-4", "../../etc/passwd", "/etc/passwd", "https://x/y", "SMOLLM2"])
def test_what_is_not_listed_is_not_found_and_the_answer_says_what_is(name: str) -> None:
    with pytest.raises(NotFound, match="smollm2-135m-instruct") as missing:
        load_catalogue().get(name)
    assert missing.value.code == "model_not_found"
    with pytest.raises(InvalidRequest) as refused:
        load_catalogue().get_for_job(name)
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")


def test_a_hostile_name_is_not_echoed_at_length() -> None:
    with pytest.raises(NotFound) as missing:
        load_catalogue().get("x" * 1_000_000)
    assert len(missing.value.message) < 1000


@pytest.mark.parametrize(
    "source",
    [
        "hub:a/b@main",
        "hub:a/b",
        "hub:../b@" + "0" * 40,
        "hub:a/b@" + "0" * 40 + "\n",
        "folder:relative/path",
        "package:../x/m.gguf",
        "package:x/m.bin",
        "https://example.org/model",
        "",
    ],
)
def test_sources_of_no_known_form(source: str) -> None:
    with pytest.raises(TunesmithError, match="of no known form"):
        Catalogue((Base(id="a", source=source),))


def test_no_name_stands_for_two_bases() -> None:
    first = Base(id="a", source="folder:/a")
    with pytest.raises(TunesmithError, match="listed twice"):
        Catalogue((first, Base(id="b", source="folder:/b", aliases=("a",))))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not toml",
        "base = []",
        '[[base]]\nid = "a"',
        '[[base]]\nid = "A"\nsource = "folder:/a"',
        '[[base]]\nid = "../a"\nsource = "folder:/a"',
        '[[base]]\nid = "a"\nsource = "folder:/a"\ntrust_remote_code = true',
        '[[base]]\nid = "a"\nsource = "folder:/a"\nprecisions = ["int3"]',
        '[[base]]\nid = "a"\nsource = "folder:/a"\ntarget_modules = ["q_proj|v_proj"]',
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "catalogue.toml"
    path.write_text(text)
    with pytest.raises(TunesmithError, match=r"catalogue\.toml"):
        load_catalogue(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TunesmithError, match=r"missing\.toml"):
        load_catalogue(tmp_path / "missing.toml")

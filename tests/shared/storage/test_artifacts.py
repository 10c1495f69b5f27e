"""A folder is trusted only while its manifest verifies, and appears whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shared.storage.artifacts
from shared.errors import ArtifactCorrupt, NotFound
from shared.storage.artifacts import LocalArtifactStore, new_id, sha256_of
from shared.storage.manifests import HASH_FIELD, MANIFEST, Manifest, read_manifest

CONTENT = {"a.bin": bytes(range(200)), "b.json": b'{"x": 1}', "empty": b""}


def manifest(**changes: object) -> Manifest:
    fields = {"kind": "adapter", "id": "adapter-1", "base": "tiny", "base_revision": "r", "base_sha256": "0" * 64}
    return Manifest.model_validate(fields | {"files": {}} | changes)


def publish(store: LocalArtifactStore, target: Path) -> Manifest:
    with store.staged() as folder:
        for name, data in CONTENT.items():
            (folder / name).write_bytes(data)
        return store.publish(folder, target, manifest())


@pytest.fixture
def store(tmp_path: Path) -> LocalArtifactStore:
    return LocalArtifactStore(tmp_path)


@pytest.fixture
def folder(store: LocalArtifactStore) -> Path:
    target = store.adapter(new_id("adapter"))
    publish(store, target)
    return target


def test_what_is_published_verifies(store: LocalArtifactStore, folder: Path) -> None:
    verified = store.verify(folder, "adapter")
    assert {name: entry.size for name, entry in verified.files.items()} == {n: len(d) for n, d in CONTENT.items()}
    assert verified.files["a.bin"].sha256 == sha256_of(folder / "a.bin")
    assert verified == read_manifest(folder, "adapter")
    assert not any((store.root / "staging").iterdir())


@settings(deadline=None)
@given(
    name=st.sampled_from(["a.bin", "b.json"]),
    data=st.data(),
    damage=st.sampled_from(["flip", "truncate", "append", "empty"]),
)
def test_any_changed_byte_is_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject, damage: str
) -> None:
    store = LocalArtifactStore(tmp_path_factory.mktemp("store"))
    folder = store.adapter("adapter-1")
    publish(store, folder)
    content = bytearray(CONTENT[name])
    place = data.draw(st.integers(0, len(content) - 1))
    if damage == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif damage == "truncate":
        del content[place:]
    elif damage == "append":
        content.append(place % 256)
    else:
        content.clear()
    (folder / name).write_bytes(content)
    with pytest.raises(ArtifactCorrupt):
        store.verify(folder, "adapter")
    (folder / name).write_bytes(CONTENT[name])
    store.verify(folder, "adapter")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose manifest uses every field."""
    store = LocalArtifactStore(tmp_path_factory.mktemp("published"))
    target = store.adapter("adapter-1")
    with store.staged() as folder:
        (folder / "a.bin").write_bytes(b"content")
        everything = {"job": "ftjob-1", "step": 120, "precision": "int8", "template": "chat-ä", "data_sha256": "1" * 64}
        store.publish(folder, target, manifest(**everything, versions={"torch": "2.13.0+cpu", "peft": "0.21.2"}))
    return target


@settings(deadline=None)
@given(data=st.data())
def test_no_bit_of_a_manifest_can_flip_unseen(published: Path, data: st.DataObject) -> None:
    listing = published / MANIFEST
    written = listing.read_bytes()
    place = data.draw(st.integers(0, 8 * len(written) - 1))
    damaged = bytearray(written)
    damaged[place // 8] ^= 1 << place % 8
    try:
        listing.write_bytes(damaged)
        with pytest.raises(ArtifactCorrupt):
            read_manifest(published, "adapter")
    finally:
        listing.write_bytes(written)
    assert read_manifest(published, "adapter").step == 120


@pytest.mark.parametrize(
    "change",
    [{"base": "another"}, {"base_revision": "s"}, {"step": 8}, {"template": None}, {"versions": {}},
     {HASH_FIELD: "0" * 64}, {HASH_FIELD: None}, {HASH_FIELD: 5}],
)  # fmt: skip
def test_a_changed_field_is_noticed(published: Path, change: dict[str, object]) -> None:
    listing = published / MANIFEST
    written = listing.read_text()
    fields = {name: value for name, value in (json.loads(written) | change).items() if value is not None}
    try:
        listing.write_text(json.dumps(fields))
        with pytest.raises(ArtifactCorrupt, match=HASH_FIELD):
            read_manifest(published, "adapter")
    finally:
        listing.write_text(written)
    # How it is laid out says nothing.
    listing.write_text(json.dumps(json.loads(written), separators=(",", ":")))
    assert read_manifest(published, "adapter").template == "chat-ä"
    listing.write_text(written)


def resealed(fields: dict[str, object]) -> str:
    """A manifest whose own hash is right whatever it says."""
    rest = {name: value for name, value in fields.items() if name != HASH_FIELD}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps(rest | {HASH_FIELD: digest})


@pytest.mark.parametrize(
    "defect",
    ["stray", "stray folder", "missing", "symlink", "symlinked folder", "folder for file", "fifo", "no manifest",
     "symlinked manifest", "broken manifest", "deep manifest", "huge manifest", "other kind", "unknown key", "path"],
)  # fmt: skip
def test_folders_that_are_refused(store: LocalArtifactStore, folder: Path, defect: str) -> None:
    file, listing = folder / "a.bin", folder / MANIFEST
    fields = json.loads(listing.read_text())
    if defect == "stray":
        (folder / "more").write_bytes(b"")
    elif defect == "stray folder":
        (folder / "more").mkdir()
    elif defect == "missing":
        file.unlink()
    elif defect == "symlink":
        file.rename(store.root / "elsewhere")
        file.symlink_to(store.root / "elsewhere")
    elif defect == "symlinked folder":
        folder.rename(store.root / "elsewhere")
        folder.symlink_to(store.root / "elsewhere")
    elif defect in ("folder for file", "fifo"):
        file.unlink()
        file.mkdir() if defect == "folder for file" else os.mkfifo(file)
    elif defect == "no manifest":
        listing.unlink()
    elif defect == "symlinked manifest":
        listing.rename(store.root / "elsewhere")
        listing.symlink_to(store.root / "elsewhere")
    elif defect == "broken manifest":
        listing.write_text(listing.read_text()[:-5])
    elif defect == "deep manifest":
        listing.write_text("[" * 100_000)
    elif defect == "huge manifest":
        listing.write_text(listing.read_text() + " " * (1 << 20))
    elif defect == "other kind":
        listing.write_text(resealed(fields | {"kind": "checkpoint"}))
    elif defect == "unknown key":
        listing.write_text(resealed(fields | {"surprise": 1}))
    else:
        entry = fields["files"].pop("a.bin")
        listing.write_text(resealed(fields | {"files": fields["files"] | {"../a.bin": entry}}))
    with pytest.raises((ArtifactCorrupt, NotFound)):
        store.verify(folder, "adapter")


@pytest.mark.parametrize("stop_at", range(12))
def test_a_torn_publication_is_invisible_or_whole(
    store: LocalArtifactStore, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """The process dies at the n-th step that touches the disk for good: nobody ever sees half a folder."""
    steps = 0

    def dying(real: object) -> object:
        def call(*arguments: object) -> object:
            nonlocal steps
            steps += 1
            if steps > stop_at:
                raise KeyboardInterrupt
            return real(*arguments)  # type: ignore[operator]

        return call

    target = store.adapter("adapter-1")
    with monkeypatch.context() as patch:
        patch.setattr(shared.storage.artifacts, "fsync", dying(shared.storage.artifacts.fsync))
        patch.setattr(os, "rename", dying(os.rename))
        # What a killed process leaves in staging stays there.
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with suppress(KeyboardInterrupt):
            publish(store, target)
    if target.exists():
        store.verify(target, "adapter")
    else:
        publish(store, target)
        store.verify(target, "adapter")


def test_the_manifest_comes_last_and_everything_is_synced(
    store: LocalArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = shared.storage.artifacts.fsync

    def watch(path: Path) -> None:
        synced.append(path.name)
        real(path)

    monkeypatch.setattr(shared.storage.artifacts, "fsync", watch)
    publish(store, store.adapter("adapter-1"))
    assert set(CONTENT) <= set(synced[: synced.index(MANIFEST)])
    assert synced[-2:] == ["adapters", store.root.name]


def test_every_folder_that_is_made_for_a_checkpoint_is_durable(
    store: LocalArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = store.checkpoint("ftjob-1", 1, 2)
    synced: list[Path] = []
    monkeypatch.setattr(shared.storage.artifacts, "fsync", synced.append)
    with store.staged() as staged:
        (staged / "data").write_text("x")
        store.place(staged, target)
    assert {target.parent, target.parent.parent, store.root / "jobs", store.root} <= set(synced)


def test_what_came_since_the_look_is_not_overwritten_either(
    store: LocalArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = store.verify(folder, "adapter")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda self: False)
        with pytest.raises(FileExistsError):
            publish(store, folder)
    assert store.verify(folder, "adapter") == before


def test_nothing_is_overwritten(store: LocalArtifactStore, folder: Path) -> None:
    before = store.verify(folder, "adapter")
    with pytest.raises(FileExistsError):
        publish(store, folder)
    assert store.verify(folder, "adapter") == before
    hollow = store.adapter("adapter-hollow")
    hollow.mkdir()
    with pytest.raises(FileExistsError):
        publish(store, hollow)


def test_removal_is_final_and_repeatable(store: LocalArtifactStore, folder: Path) -> None:
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert held > 0
    assert (store.remove(folder), store.remove(folder)) == (held, 0)
    with pytest.raises(NotFound):
        store.verify(folder, "adapter")


def test_a_file_with_another_name_elsewhere_is_not_counted_as_freed(
    store: LocalArtifactStore, folder: Path, tmp_path: Path
) -> None:
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    shared = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    (tmp_path / "elsewhere").hardlink_to(shared)
    size = shared.stat().st_size
    assert store.remove(folder) == held - size
    assert (tmp_path / "elsewhere").stat().st_size == size


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "adapter-../x", "adapter-a/../b", "adapter-", "adapter-A", "adapter-a..b", "adapter-a\n",
     "adapter-a\x00", "nobody", "adapter-" + "a" * 200, "/etc", "adapter-ä"],
)  # fmt: skip
def test_no_client_text_becomes_a_path(store: LocalArtifactStore, name: str) -> None:
    for where in (store.adapter, store.file, store.checkpoints):
        with pytest.raises(NotFound):
            where(name)
    with pytest.raises(ValueError):
        store.cached(name)
    with pytest.raises(ValueError):
        store.cache("0" * 64, name)


def test_ids_are_random_and_lie_below_the_root(store: LocalArtifactStore) -> None:
    ids = {new_id("adapter") for _ in range(100)}
    assert len(ids) == 100
    assert all(store.adapter(each).parent == store.root / "adapters" for each in ids)
    assert store.checkpoint("ftjob-1", 3, 120) == store.root / "jobs" / "ftjob-1" / "3" / "step-00000120"
    assert store.cache("0" * 64, "1" * 64) == store.root / "cache" / ("0" * 64) / ("1" * 64)


def test_a_folder_is_removed_where_no_lock_can_be_made(
    store: LocalArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store.adapter(new_id("adapter"))
    folder.mkdir(parents=True)

    def full(self: Path, mode: str = "r", *args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    store.remove(folder)
    assert not folder.exists()


def test_the_trash_goes_before_anything_is_refused(store: LocalArtifactStore) -> None:
    folder = store.adapter(new_id("adapter"))
    folder.mkdir(parents=True)
    store.discard(folder)
    free = shutil.disk_usage(store.root).free
    LocalArtifactStore(store.root, free // 2).require_space()
    assert list((store.root / "trash").iterdir())
    full = LocalArtifactStore(store.root, free * 2)
    with pytest.raises(OSError, match="are kept free") as refused, full.staged():
        pass
    assert refused.value.errno == errno.ENOSPC
    assert not list((store.root / "trash").iterdir())
    assert not (store.root / "staging").exists()


def test_a_placed_folder_goes_again_unless_it_is_kept(store: LocalArtifactStore) -> None:
    def place(target: Path, *, keep: bool, fail: bool) -> None:
        with store.staged() as staged:
            (staged / "data").write_bytes(b"x")
            with store.placed(staged, target) as placed:
                assert (target / "data").read_bytes() == b"x"
                if keep:
                    placed.keep()
                if fail:
                    raise OSError("the answer to COMMIT was lost")

    targets = [store.file(new_id("file")) for _ in range(4)]
    place(targets[0], keep=True, fail=False)
    place(targets[1], keep=False, fail=False)
    for target, keep in ((targets[2], True), (targets[3], False)):
        with pytest.raises(OSError, match="lost"):
            place(target, keep=keep, fail=True)
    assert [target.exists() for target in targets] == [True, False, True, False]

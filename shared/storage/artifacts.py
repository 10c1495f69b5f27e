"""HOP 2: the folder that gateway, trainer and inference share.

Owns names on disk, atomic publication and verification. Does not know SQL (which folders are wanted) nor torch (what is
in them). Nothing a client wrote ever becomes a path: ids are made here and matched by a full regex.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from shared.errors import ArtifactCorrupt, NotFound, TunesmithError
from shared.storage.manifests import MANIFEST, FileEntry, Kind, Manifest, as_written, read_manifest

INSTALLATION = "installation.json"
# So long a removal waits for a backup's snapshot, and that for removals.
HOLD_SECONDS = 60.0
# The one file of an upload's folder, and the two of an adapter's beside the manifest (peft's names).
DATA = "data"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ID_PATTERN = r"(?:file|ftjob|adapter|base)-[a-z0-9][a-z0-9.-]{0,94}"
_ID = re.compile(ID_PATTERN)


def derived_name(sha256: str) -> str:
    """The name of the rows derived from an uploaded file, by their hash."""
    return f"rows-{sha256}.jsonl"


def new_id(prefix: Literal["file", "ftjob", "adapter"]) -> str:
    """A random id of 96 bits, safe as a folder name."""
    return f"{prefix}-{secrets.token_hex(12)}"


class Placed:
    """A folder that goes again unless somebody keeps it."""

    def __init__(self) -> None:
        self.kept = False

    def keep(self) -> None:
        self.kept = True


class LocalArtifactStore:
    """Artifacts in a local or shared POSIX folder.

    ```
    files/<file>/data                       what was uploaded
    files/<file>/rows-<sha256>.jsonl        the rows made of it, where its own bytes are not what is learnt from
    bases/<base>/                           prepared base models
    jobs/<job>/<token>/step-00000120/       private resume state
    adapters/<adapter>/                     servable LoRA adapters
    cache/<file's sha256>/<name>/           tokenised data by content hash; may be deleted at any time
    staging/<random>/                       half-written; nobody reads here
    staging/<random>.lock                   locked by the process that writes the folder
    trash/<kind>-<name>                     what nobody knows of, kept for a while before it is removed
    removals.lock                           locked by whoever removes something, and by a backup that wants it to stay
    installation.json                       whose folder this is: the id that its database carries too
    ```
    """

    def __init__(self, root: Path, reserve_bytes: int = 0) -> None:
        self.root = root.absolute()
        self._reserve_bytes = reserve_bytes

    def require_space(self) -> None:
        """Make sure that the disk keeps its reserve; the trash goes before anything is refused.

        Raises:
            OSError: ENOSPC.
        """
        if not self._reserve_bytes or self.free_bytes() >= self._reserve_bytes:
            return
        self.empty_trash(before=math.inf)
        if (free := self.free_bytes()) < self._reserve_bytes:
            message = f"{free >> 20} MiB are free, and {self._reserve_bytes >> 20} MiB are kept free"
            raise OSError(errno.ENOSPC, message, str(self.root))

    def free_bytes(self) -> int:
        """Free bytes of the disk that the folder is on."""
        return shutil.disk_usage(next(folder for folder in (self.root, *self.root.parents) if folder.exists())).free

    def installation(self) -> str | None:
        """The id of the installation that the folder belongs to; None if it is not marked.

        Raises:
            TunesmithError: the mark is damaged.
        """
        path = self.root / INSTALLATION
        try:
            found = json.loads(path.read_text())["installation"]
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, ValueError) as error:
            raise TunesmithError(f"{path} is damaged: run `tunesmith adopt`", code="installation") from error
        return str(found)

    def mark_installation(self, installation: str) -> None:
        """Say whose folder this is, durably, in the place of what was said before."""
        self.root.mkdir(parents=True, exist_ok=True)
        written = self.root / f".{INSTALLATION}.{secrets.token_hex(6)}"
        written.write_text(json.dumps({"installation": installation}) + "\n")
        fsync(written)
        os.replace(written, self.root / INSTALLATION)
        fsync(self.root)

    def file(self, file_id: str) -> Path:
        return self.root / "files" / _checked(file_id)

    def file_data(self, file_id: str) -> Path:
        """The bytes of an uploaded file."""
        return self.file(file_id) / DATA

    def file_rows(self, file_id: str) -> Path:
        """What a file's rows are read from: what was derived from it when it was uploaded, or else its own bytes."""
        return next(self.file(file_id).glob(derived_name("*")), self.file_data(file_id))

    def base(self, base_id: str) -> Path:
        return self.root / "bases" / _checked(f"base-{base_id}")

    def adapter(self, adapter_id: str) -> Path:
        return self.root / "adapters" / _checked(adapter_id)

    def checkpoints(self, job_id: str) -> Path:
        """The folder of all of a job's resume states, over all its leases."""
        return self.root / "jobs" / _checked(job_id)

    def checkpoint(self, job_id: str, lease_token: int, step: int) -> Path:
        return self.checkpoints(job_id) / str(int(lease_token)) / f"step-{step:08d}"

    def cached(self, sha256: str) -> Path:
        """The folder of all that was computed from an uploaded file, by its hash, and can be computed again.

        Raises:
            ValueError: it is no hex digest.
        """
        return self.root / "cache" / _digest(sha256)

    def cache(self, sha256: str, name: str) -> Path:
        """One folder of those, under a hex digest. Raises as `cached`."""
        return self.cached(sha256) / _digest(name)

    @contextlib.contextmanager
    def staged(self) -> Iterator[Path]:
        """A fresh folder to write into; what was not placed or published is removed at the end.

        A lock is held on it meanwhile, so that nobody takes it for abandoned however long it is written to.

        Raises:
            OSError: see `require_space`.
        """
        self.require_space()
        folder = self.root / "staging" / secrets.token_hex(12)
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = staging_lock(folder)
        with lock.open("w") as held:
            # Some network mounts have no locks; there, age alone decides.
            with contextlib.suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                folder.mkdir()
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                lock.unlink(missing_ok=True)

    def remove_abandoned(self, folder: Path) -> bool:
        """Remove a staged folder and its lock, unless a process holds it. Returns whether it is gone."""
        lock = staging_lock(folder)
        with contextlib.ExitStack() as stack:
            try:
                fcntl.flock(stack.enter_context(lock.open("r+")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                # There is no lock (a version before this wrote the folder), or the mount has none.
                pass
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)
        return True

    def place(self, staged: Path, target: Path) -> None:
        """Make a staged folder appear at `target`, whole or not at all, and durable when this returns.

        Raises:
            FileExistsError: something is there already; artifacts are never overwritten.
        """
        for file in sorted(staged.rglob("*")):
            fsync(file)
        fsync(staged)
        fresh = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        # rename(2) replaces an empty folder silently, and a full one never: it may have come since the look.
        if target.exists():
            raise FileExistsError(target)
        try:
            os.rename(staged, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(target) from error
            raise
        # A name is durable once its folder is; a folder that was made here is a name too.
        for folder in dict.fromkeys([target.parent, target.parent.parent, *(made.parent for made in fresh)]):
            fsync(folder)

    @contextlib.contextmanager
    def placed(self, staged: Path, target: Path) -> Iterator["Placed"]:
        """`place`, and remove the folder again at the end unless `keep` was called.

        Raises:
            FileExistsError: see `place`.
        """
        self.place(staged, target)
        placed = Placed()
        try:
            yield placed
        finally:
            if not placed.kept:
                self.remove(target)

    def publish(self, staged: Path, target: Path, manifest: Manifest) -> Manifest:
        """Complete `manifest` with the staged files' hashes, write it last, and place the folder.

        The order (files durable, then the manifest, then the name) is what lets a reader trust a folder that has one.

        Returns:
            The manifest as written.

        Raises:
            FileExistsError: see `place`.
        """
        entries = {f.name: FileEntry(sha256=sha256_of(f), size=f.stat().st_size) for f in sorted(staged.iterdir())}
        for name in entries:
            fsync(staged / name)
        complete = Manifest.model_validate(manifest.model_dump() | {"files": entries})
        (staged / MANIFEST).write_text(as_written(complete), encoding="utf-8")
        self.place(staged, target)
        return complete

    def verify(self, folder: Path, kind: Kind) -> Manifest:
        """Check a folder against its manifest, byte for byte.

        Raises:
            NotFound: there is no such folder.
            ArtifactCorrupt: no readable manifest, another kind, a link, a stray, missing or changed file.
        """
        manifest = read_manifest(folder, kind)
        present = {entry.name for entry in os.scandir(folder)} - {MANIFEST}
        if present != set(manifest.files):
            raise ArtifactCorrupt(
                f"{folder.name}: files differ from the manifest: {sorted(present ^ set(manifest.files))}"
            )
        for name, entry in manifest.files.items():
            path = folder / name
            if path.is_symlink() or not path.is_file():
                raise ArtifactCorrupt(f"{folder.name}/{name}: not a regular file")
            if path.stat().st_size != entry.size or sha256_of(path) != entry.sha256:
                raise ArtifactCorrupt(f"{folder.name}/{name}: the bytes differ from the manifest")
        return manifest

    @contextlib.contextmanager
    def removals_held(self) -> Iterator[None]:
        """Nobody removes anything but trash and staged folders meanwhile; who wants to waits for a minute at most.

        Raises:
            TunesmithError: others have been removing for a minute.
        """
        with self._removals(fcntl.LOCK_EX) as held:
            if not held:
                raise TunesmithError(f"others are removing from {self.root}: try again", code="backup")
            yield

    @contextlib.contextmanager
    def _removals(self, kind: int) -> Iterator[bool]:
        """Take the lock of removals, alone or with others. Yields whether it could be had."""
        with contextlib.ExitStack() as stack:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((self.root / "removals.lock").open("a"))
            except OSError:
                # A full disk must not keep anybody from making room on it.
                if kind == fcntl.LOCK_EX:
                    raise
                held = True
            else:
                held = _locked(lock.fileno(), kind, HOLD_SECONDS)
            yield held

    def discard(self, folder: Path) -> None:
        """Put a folder into the trash, where it keeps its bytes; see `empty_trash`.

        Raises:
            OSError: it is gone already (another process took it), is held, or cannot be moved.
        """
        with self._removals(fcntl.LOCK_SH) as allowed:
            if not allowed:
                raise OSError(errno.EBUSY, "a backup holds it", str(folder))
            self._discard(folder)

    def _discard(self, folder: Path) -> None:
        target = trashed(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target = target.with_name(f"{target.name}-{secrets.token_hex(4)}")
        # The time first: with its old one it would be taken out at once.
        os.utime(folder)
        os.rename(folder, target)

    def empty_trash(self, before: float) -> list[Path]:
        """Remove what was put into the trash before a time (seconds since the epoch). Returns what went."""
        trash, gone = self.root / "trash", []
        for folder in list(trash.iterdir()) if trash.is_dir() else []:
            # Another process may empty it too.
            with contextlib.suppress(OSError):
                if folder.lstat().st_mtime < before:
                    shutil.rmtree(folder)
                    gone.append(folder)
        return gone

    def remove(self, folder: Path) -> int:
        """Remove an artifact folder; no error if it is gone already. Returns bytes that the disk has back.

        A file with another name elsewhere (a hard link) is not counted.

        One that a backup holds for too long stays, and is garbage.
        """
        # A collector may have taken it for an orphan just now, between its row's removal and this.
        in_trash = trashed(folder)
        if not (folder.exists() or in_trash.exists()):
            return 0
        with self._removals(fcntl.LOCK_SH) as allowed:
            if not allowed:
                return 0
            freed = 0
            for place in (folder, in_trash):
                freed += _bytes_alone(place)
                # The manifest goes first: a half-removed folder must not verify.
                (place / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(place, ignore_errors=True)
            return freed


def _bytes_alone(folder: Path) -> int:
    """Bytes of the files in a folder that have no other name; what goes meanwhile counts nothing."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            status = file.lstat()
            total += status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else 0
    return total


def _locked(descriptor: int, kind: int, seconds: float) -> bool:
    """Whether flock(2) was had within so many seconds; some network mounts have no locks, and there it is."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        except OSError:
            return True
        else:
            return True


def trashed(folder: Path) -> Path:
    """Where a folder of the store goes before it is removed."""
    return folder.parent.parent / "trash" / f"{folder.parent.name}-{folder.name}"


def staging_lock(folder: Path) -> Path:
    """The file whose lock says that a staged folder is in use."""
    return folder.with_suffix(".lock")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(name: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{16,64}", name):
        raise ValueError("cache names are hex digests")
    return name


def _checked(artifact_id: str) -> str:
    if not _ID.fullmatch(artifact_id) or ".." in artifact_id:
        raise NotFound("no such id")
    return artifact_id


def fsync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

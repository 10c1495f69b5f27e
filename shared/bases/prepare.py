"""`python -m shared.bases.prepare BASE`: bring a base model into the artifact store before anything needs it.

BASE is a catalogue id or alias, or `auto`: the first of the catalogue that can be had here. Prints the id prepared.
"""

import sys
from collections.abc import Sequence

from shared.bases.catalogue import Base, load_catalogue
from shared.errors import NotFound, TunesmithError
from shared.file_modes import keep_files_private
from shared.settings import Settings, read_settings
from shared.storage.artifacts import LocalArtifactStore


def prepare_first(bases: Sequence[Base], store: LocalArtifactStore) -> Base:
    """Prepare the first of `bases` that can be had here, and say on stderr why others could not.

    Raises:
        TunesmithError: none could.
    """
    for base in bases:
        try:
            _prepare(base, store)
        except TunesmithError as error:
            print(error.message, file=sys.stderr)
        else:
            return base
    raise TunesmithError("no base model could be prepared: " + ", ".join(base.id for base in bases))


def _prepare(base: Base, store: LocalArtifactStore) -> None:
    try:
        store.verify(store.base(base.id), "base")
    except NotFound:
        # torch takes seconds to import; a base that is there does not need it.
        from shared.bases.base_model import prepare_base, quiet_libraries

        quiet_libraries()
        prepare_base(base, store)


def main() -> int:
    settings = read_settings(Settings)
    keep_files_private(settings.umask)
    name = sys.argv[1] if len(sys.argv) == 2 else "auto"
    try:
        catalogue = load_catalogue(settings.catalogue)
        bases = catalogue.bases if name == "auto" else (catalogue.get(name),)
        print(prepare_first(bases, LocalArtifactStore(settings.artifacts_root, settings.reserve_bytes)).id)
    except TunesmithError as error:
        print(error.message, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{settings.artifacts_root}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m shared.adopt`: give the artifacts folder of the settings to the database of the settings."""

import sys

from shared.errors import TunesmithError
from shared.file_modes import keep_files_private
from shared.settings import Settings, read_settings
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.database import Database, check_schema
from shared.storage.installation_id import adopt


def main() -> int:
    settings = read_settings(Settings)
    keep_files_private(settings.umask)
    store = LocalArtifactStore(settings.artifacts_root)
    try:
        check_schema(settings.sql_url)
    except TunesmithError as error:
        print(error.message, file=sys.stderr)
        return 1
    database = Database(settings.sql_url)
    try:
        with database.read() as tx:
            own = adopt(tx, store)
    finally:
        database.close()
    print(f"{store.root} belongs to installation {own[:8]} now")
    return 0


if __name__ == "__main__":
    sys.exit(main())

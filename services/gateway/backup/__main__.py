"""`python -m services.gateway.backup take FILE [--without-keys]`, `… restore FILE [--replace]`."""

import argparse
import sys
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from services.gateway.backup.restore import restore_backup
from services.gateway.backup.take import take_backup
from services.gateway.settings import GatewaySettings
from shared.errors import TunesmithError
from shared.file_modes import keep_files_private
from shared.settings import read_settings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.gateway.backup")
    commands = parser.add_subparsers(dest="command", required=True)
    take = commands.add_parser("take")
    take.add_argument("file", type=Path)
    take.add_argument("--without-keys", action="store_true")
    restore = commands.add_parser("restore")
    restore.add_argument("file", type=Path)
    restore.add_argument("--replace", action="store_true")
    chosen = parser.parse_args()
    settings = read_settings(GatewaySettings)
    keep_files_private(settings.umask)
    try:
        if chosen.command == "take":
            description = take_backup(settings, chosen.file, keys=not chosen.without_keys)
            for name in description.missing:
                print(f"not there, though the database knows of it: {name}", file=sys.stderr)
            size = chosen.file.stat().st_size
            print(f"{chosen.file}: {size / 1e6:.1f} MB, with{'' if description.keys else 'out'} keys")
        else:
            restore_backup(settings, chosen.file, replace=chosen.replace)
            print(f"restored from {chosen.file}" + ("" if chosen.replace else "; unfinished jobs are paused"))
    except TunesmithError as error:
        print(error.message, file=sys.stderr)
        return 1
    except (OSError, SQLAlchemyError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m services.gateway.backup take FILE [--without-keys]`, `… restore FILE [--replace]`."""

import argparse
import sys
from pathlib import Path

from services.gateway.backup.restore import restore_backup
from services.gateway.backup.take import take_backup
from services.gateway.command import status_of
from services.gateway.settings import GatewaySettings
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
    return status_of(lambda: _take(settings, chosen) if chosen.command == "take" else _restore(settings, chosen))


def _take(settings: GatewaySettings, chosen: argparse.Namespace) -> None:
    description = take_backup(settings, chosen.file, keys=not chosen.without_keys)
    for name in description.missing:
        print(f"not there, though the database knows of it: {name}", file=sys.stderr)
    size = chosen.file.stat().st_size
    print(f"{chosen.file}: {size / 1e6:.1f} MB, with{'' if description.keys else 'out'} keys")


def _restore(settings: GatewaySettings, chosen: argparse.Namespace) -> None:
    restore_backup(settings, chosen.file, replace=chosen.replace)
    print(f"restored from {chosen.file}" + ("" if chosen.replace else "; unfinished jobs are paused"))


if __name__ == "__main__":
    sys.exit(main())

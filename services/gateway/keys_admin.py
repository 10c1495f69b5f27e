"""`python -m services.gateway.keys_admin create|list|revoke|new-secret`: API keys, by whoever may read the database.

Prints one JSON object; `tunesmith keys` shows it. A running gateway sees each change at once; a new secret
wants a restart.
"""

import argparse
import json
import sys
from typing import Any

from services.gateway.command import status_of
from services.gateway.http.key_secret import own_secret
from services.gateway.http.keys import DEFAULT_PROJECT, Keys, private_file
from services.gateway.settings import GatewaySettings
from shared.file_modes import keep_files_private
from shared.settings import read_settings
from shared.storage.database import Database, check_schema


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.gateway.keys_admin")
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create")
    create.add_argument("name")
    create.add_argument("--project", default=DEFAULT_PROJECT)
    create.add_argument("--here", action="store_true")
    commands.add_parser("list")
    commands.add_parser("revoke").add_argument("id")
    commands.add_parser("new-secret")
    chosen = parser.parse_args()
    settings = read_settings(GatewaySettings)
    keep_files_private(settings.umask)

    def answer() -> None:
        check_schema(settings.sql_url)
        database = Database(settings.sql_url)
        try:
            print(json.dumps(_done(chosen, settings, database)))
        finally:
            database.close()

    return status_of(answer)


def _done(chosen: argparse.Namespace, settings: GatewaySettings, database: Database) -> dict[str, Any]:
    if chosen.command == "new-secret":
        return _new_secret(settings, database)
    keys = Keys(database, own_secret(settings, database))
    if chosen.command == "list":
        return {"data": [listed.as_json() for listed in keys.all()]}
    if chosen.command == "revoke":
        return {
            "id": chosen.id,
            "revoked": keys.revoke(chosen.id),
            "live": sum(not key.revoked_at for key in keys.all()),
        }
    id, key = keys.create(chosen.name, chosen.project)
    if chosen.here:
        private_file(settings.key_path, key + "\n")
    return {"id": id, "key": key, "project": chosen.project, "file": str(settings.key_path) if chosen.here else None}


def _new_secret(settings: GatewaySettings, database: Database) -> dict[str, Any]:
    """Revoke every key, take the secret that the environment gives or a new one, and make a key under it."""
    given = settings.key_secret.get_secret_value()
    # The keys first: a break here leaves none that a gateway would refuse to start for.
    revoked = Keys.revoke_all(database)
    if not given:
        settings.key_secret_path.unlink(missing_ok=True)
    keys = Keys(database, own_secret(settings, database))
    id, key = keys.create("new-secret", DEFAULT_PROJECT, numbered=True)
    private_file(settings.key_path, key + "\n")
    return {"id": id, "key": key, "revoked": revoked, "file": str(settings.key_path)}


if __name__ == "__main__":
    sys.exit(main())

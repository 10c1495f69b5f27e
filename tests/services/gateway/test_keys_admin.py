"""Keys by whoever may read the database; and a secret that is lost or another one, which no gateway starts with."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import delete, select

from services.gateway.http.key_secret import own_secret
from services.gateway.http.keys import Keys
from services.gateway.settings import GatewaySettings
from shared.errors import TunesmithError
from shared.storage.database import Database, migrate
from shared.storage.tables import api_keys, key_check
from tests.services.gateway.conftest import Gateway, running_gateway
from tests.stack_processes import clean_environment

Settings = Callable[..., GatewaySettings]


def admin(home: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = clean_environment()
    argv = [sys.executable, "-m", "services.gateway.keys_admin", *arguments]
    own = {"TUNESMITH_HOME": str(home)}
    return subprocess.run(argv, env=kept | own | environ, capture_output=True, text=True, timeout=120)


def done(home: Path, *arguments: str, **environ: str) -> dict[str, Any]:
    ended = admin(home, *arguments, **environ)
    assert ended.returncode == 0, ended.stderr
    answer: dict[str, Any] = json.loads(ended.stdout)
    return answer


def status(gateway: Gateway, key: str) -> int:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.get(f"{gateway.url}/v1/models", headers=headers, trust_env=False).status_code


def test_a_key_is_made_listed_used_and_refused_at_once_when_it_is_revoked(gateway: Gateway) -> None:
    home = gateway.settings.home
    made = done(home, "create", "laptop", "--project", "team")
    assert (made["id"], made["project"], made["file"]) == ("key-laptop", "team", None)
    assert status(gateway, made["key"]) == 200
    listed = {key["id"]: key for key in done(home, "list")["data"]}
    assert set(listed) == {"key-first", "key-laptop"}
    assert listed["key-laptop"]["revoked_at"] is None
    assert made["key"] not in json.dumps(listed)
    assert done(home, "revoke", "key-laptop") == {"id": "key-laptop", "revoked": True, "live": 1}
    assert status(gateway, made["key"]) == 401
    assert status(gateway, gateway.key) == 200
    assert done(home, "revoke", "key-laptop")["revoked"] is False
    for arguments in (
        ("revoke", "key-none"),
        ("create", "laptop"),
        ("create", "Laptop"),
        ("create", "a", "--project", ""),
    ):
        refused = admin(home, *arguments)
        assert (refused.returncode, refused.stdout, len(refused.stderr.splitlines())) == (1, "", 1)


def test_a_key_for_this_machine_is_in_its_file(gateway: Gateway) -> None:
    made = done(gateway.settings.home, "create", "again", "--here")
    assert Path(made["file"]).read_text().strip() == made["key"]
    assert Path(made["file"]).stat().st_mode & 0o777 == 0o600
    assert status(gateway, made["key"]) == 200


@pytest.mark.parametrize("change", ["lost", "another", "given"])
def test_no_gateway_starts_with_a_secret_that_made_no_key_and_there_is_a_way_back(
    settings: Settings, change: str
) -> None:
    own = settings()
    with running_gateway(own) as gateway:
        key = gateway.key
    environ = {"TUNESMITH_REDIS_URL": own.redis_url, "TUNESMITH_PORT": "0"}
    kept = own.key_secret_path.read_text()
    if change == "lost":
        own.key_secret_path.unlink()
    elif change == "another":
        own.key_secret_path.write_text("f" * 64 + "\n")
    else:
        environ["TUNESMITH_KEY_SECRET"] = "e" * 64
    started = subprocess.run(
        [sys.executable, "-m", "services.gateway"],
        env={**os.environ, **environ, "TUNESMITH_HOME": str(own.home)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert started.returncode == 1
    assert "made with" in started.stderr
    assert "tunesmith keys new-secret" in started.stderr
    assert "Traceback" not in started.stderr
    if change == "lost":
        assert not own.key_secret_path.exists()
    # Nothing else can be done with keys meanwhile: a key made now would be another installation's.
    assert admin(own.home, "create", "x", **environ).returncode == 1
    if change == "another":
        own.key_secret_path.write_text(kept)
        with running_gateway(own) as gateway:
            assert status(gateway, key) == 200
        return
    made = done(own.home, "new-secret", **environ)
    assert made["revoked"] == 1
    given = SecretStr(environ.get("TUNESMITH_KEY_SECRET", ""))
    changed = own.model_copy(update={"key_secret": given})
    with running_gateway(changed) as gateway:
        assert (status(gateway, made["key"]), status(gateway, key)) == (200, 401)
        assert gateway.key == made["key"]


def test_keys_of_an_older_version_have_no_check_and_get_one_from_the_secret_that_is_there(
    settings: Settings,
) -> None:
    own = settings()
    migrate(own.sql_url)
    database = Database(own.sql_url)
    try:
        secret = own_secret(own, database)
        Keys(database, secret).create("old")
        with database.write() as tx:
            tx.execute(delete(key_check))
        assert own_secret(own, database) == secret
        with database.read() as tx:
            assert tx.execute(select(key_check.c.id)).scalars().all() == [1]
        own.key_secret_path.write_text("0" * 64)
        with pytest.raises(TunesmithError, match="made with another secret") as refused:
            own_secret(own, database)
        assert refused.value.code == "key_secret"
        # Keys that are refused anyway bind nobody.
        Keys.revoke_all(database)
        assert own_secret(own, database) == b"0" * 64
        with database.read() as tx:
            assert len(tx.execute(select(api_keys.c.id)).all()) == 1
    finally:
        database.close()

"""The secret that API keys are hashed with, and whether it is the one that made the keys in the database.

With another secret every key is dead and nothing says why. So the database keeps what shows which secret is right, and
a gateway with another one does not start.
"""

import hashlib
import hmac

from sqlalchemy import Connection, delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from services.gateway.http.keys import read_or_make_secret
from services.gateway.settings import GatewaySettings
from shared.errors import TunesmithError
from shared.storage.database import Database
from shared.storage.tables import api_keys, key_check

_CHECKED = b"tunesmith: this secret made the API keys"
_WAY_BACK = (
    "put the secret back (key_secret in the gateway's home, or TUNESMITH_KEY_SECRET; `tunesmith backup` keeps it). "
    "If it is lost, `tunesmith keys new-secret` (elsewhere `python -m services.gateway.keys_admin new-secret`) revokes "
    "all keys and makes a first one; jobs, files and models stay"
)


def own_secret(settings: GatewaySettings, database: Database) -> bytes:
    """This installation's secret, made if there are no keys yet, and kept in mind by the database.

    Raises:
        TunesmithError: code `key_secret`: there are keys, and they were made with another secret, or it is lost.
    """
    with database.read() as tx:
        refuse_foreign(tx, settings)
    given = settings.key_secret.get_secret_value()
    secret = given.encode() if given else read_or_make_secret(settings.key_secret_path)
    try:
        with database.write() as tx:
            if tx.execute(select(key_check.c.mac)).scalar_one_or_none() != mac_of(secret):
                keep_in_mind(tx, secret)
    except IntegrityError:
        # Another gateway that starts now was faster.
        with database.read() as tx:
            refuse_foreign(tx, settings)
    return secret


def own_secret_at(settings: GatewaySettings) -> None:
    """`refuse_foreign` for the migrated database of these settings; makes nothing."""
    database = Database(settings.sql_url)
    try:
        with database.read() as tx:
            refuse_foreign(tx, settings)
    finally:
        database.close()


def refuse_foreign(tx: Connection, settings: GatewaySettings) -> None:
    """Make sure that the secret there is, if any, may have made the keys in the database.

    Keys of before 0.2 come without a check: then the secret that is there is believed.

    Raises:
        TunesmithError: code `key_secret`.
    """
    live = tx.execute(select(func.count()).where(api_keys.c.revoked_at.is_(None))).scalar_one()
    if not live:
        return
    given = settings.key_secret.get_secret_value()
    place = settings.key_secret_path
    if not given and not place.exists():
        raise _refused(f"the database has {live} API keys, and the secret that they were made with is lost ({place})")
    kept = tx.execute(select(key_check.c.mac)).scalar_one_or_none()
    secret = given.encode() if given else read_or_make_secret(place)
    if kept is not None and not hmac.compare_digest(kept, mac_of(secret)):
        found = "TUNESMITH_KEY_SECRET" if given else str(place)
        raise _refused(f"the database has {live} API keys that were made with another secret than {found}")


def keep_in_mind(tx: Connection, secret: bytes) -> None:
    """Write down that this is the secret from now on."""
    tx.execute(delete(key_check))
    tx.execute(insert(key_check).values(id=1, mac=mac_of(secret)))


def mac_of(secret: bytes) -> str:
    """What shows a secret again and does not tell it: 64 hex digits."""
    return hmac.new(secret, _CHECKED, hashlib.sha256).hexdigest()


def _refused(what: str) -> TunesmithError:
    return TunesmithError(f"{what}: no key would be valid; {_WAY_BACK}", code="key_secret")

"""Databases that one test has to itself."""

import secrets

import psycopg


def fresh_on_server(admin_url: str) -> str:
    """The URL of a new, empty database on the PostgreSQL server of the fixture `postgres_url`."""
    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(admin_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    url = admin_url.replace("/postgres?", f"/{name}?", 1)
    assert url != admin_url
    return url

"""What of a job can be refused before a file is uploaded for it, and what it will not be able to do."""

from typing import Any

from tunesmith.client import ApiError, Client

Json = dict[str, Any]
# An id that no file has. A body with it is checked as far as its files, and not one byte of them is sent.
NO_FILE = "file-000000000000000000000000"


def check(client: Client, body: Json) -> None:
    """Have the gateway check a job's options, without its files.

    Args:
        body: a job's, without what names files.

    Raises:
        ApiError: an option is refused, or there is no such base. What else goes wrong is left to the job itself.
    """
    try:
        client.model(body["model"])
    except ApiError as error:
        # A version that does not know the base by this name may yet train on it: the job's own answer counts.
        if error.code == "model_not_found":
            raise
    try:
        client.estimate({**body, "training_file": NO_FILE})
    except ApiError as error:
        if error.status == 400 and error.param and not error.param.startswith(("training_file", "validation_file")):
            raise


def not_served(client: Client, model: str) -> list[str]:
    """A warning if nobody serves a base now, so that nobody could be asked after training on it; else nothing."""
    try:
        found = client.model(model)
    except ApiError:
        return []
    base = found["id"]
    if found.get("kind") != "base" or found.get("state") != "not_served":
        return []
    return [
        f"nobody serves {base} now: its model can be trained, and answers only after "
        f"'tunesmith down' and 'tunesmith up --base {base}' (compose: BASE_MODEL={base})"
    ]

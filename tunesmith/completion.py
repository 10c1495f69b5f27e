"""What a shell offers behind the Tab key: names of jobs and models, asked of the running stack."""

from collections.abc import Callable

from tunesmith.names import suffix_of

SECONDS = 2.0
OFFERED = 100


def jobs(incomplete: str) -> list[tuple[str, str]]:
    """Ids and suffixes of the newest jobs that begin so, each with what it is."""

    def found() -> list[tuple[str, str]]:
        from tunesmith.client import Client
        from tunesmith.connection import find

        with Client(find(), timeout=SECONDS) as client:
            named = list(client.jobs(OFFERED))
        ids = [(job["id"], f"{job.get('state') or job['status']} {job.get('suffix') or ''}".strip()) for job in named]
        return [*ids, *((job["suffix"], job["id"]) for job in named if job.get("suffix")), ("latest", "the newest job")]

    return _offered(incomplete, found)


def adapters(incomplete: str) -> list[tuple[str, str]]:
    """Suffixes and names of the newest fine-tuned models that begin so."""

    def found() -> list[tuple[str, str]]:
        from tunesmith.client import Client
        from tunesmith.connection import find

        with Client(find(), timeout=SECONDS) as client:
            models = client.models()
        names = [model["id"] for model in models if model.get("kind") == "adapter"][:OFFERED]
        # A suffix has no colon, at which bash would begin a new word.
        suffixes = [(suffix, name) for name in names if (suffix := suffix_of(name))]
        return [*suffixes, *((name, "fine-tuned") for name in names), ("latest", "the newest fine-tuned model")]

    return _offered(incomplete, found)


def _offered(incomplete: str, find: Callable[[], list[tuple[str, str]]]) -> list[tuple[str, str]]:
    from tunesmith.client import ApiError
    from tunesmith.connection import NoConnection

    try:
        return [(name, what) for name, what in find() if name.startswith(incomplete)]
    except (ApiError, NoConnection, OSError):
        # A prompt is no place for an error: nothing is offered.
        return []

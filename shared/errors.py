"""The one error tree. Owns what a fault is called and which HTTP status it has; does not know how it is sent.

TunesmithError
├── InvalidRequest        400  the caller's fault, `param` names the field
│   └── InvalidDataset    400  carries the rows that were wrong
├── Unauthenticated       401
├── NotFound              404  also for things of another project
├── Conflict              409  the same request is being answered already; worth retrying
├── PayloadTooLarge       413
├── UnsupportedMediaType  415
├── Overloaded            429  carries `retry_after` seconds
├── Unavailable           503  a part of the system is away; worth retrying
├── ArtifactCorrupt       500  a folder whose manifest does not verify
├── LeaseLost             –    another worker owns the job now: stop at once, write nothing
└── JobFailed             –    ends a job; stored as `code` and `message`, never retried
"""

from typing import Any, ClassVar


class TunesmithError(Exception):
    """Base of everything raised on purpose.

    Args:
        message: one sentence for the person who has to act on it.
        param: the request field at fault, dotted (`hyperparameters.n_epochs`).
        code: a stable machine word; the class default if not given.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def details(self) -> dict[str, Any]:
        """Extra keys for the error body; none unless a subclass has some."""
        return {}


class InvalidRequest(TunesmithError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidDataset(InvalidRequest):
    """A file whose rows do not parse or do not fit.

    Args:
        errors: the first rows at fault, each `{line, path, code, message}` with a 1-based line.
        total: how many were found before reading stopped.
    """

    code = "invalid_dataset"

    def __init__(self, message: str, errors: list[dict[str, Any]], total: int) -> None:
        super().__init__(message, param="file")
        self.errors = errors
        self.total = total

    def details(self) -> dict[str, Any]:
        return {"errors": self.errors, "error_count": self.total}


class Unauthenticated(TunesmithError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFound(TunesmithError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(TunesmithError):
    # OpenAI's clients try again after a 409: nothing else may have this status.
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class PayloadTooLarge(TunesmithError):
    status = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class UnsupportedMediaType(TunesmithError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class Overloaded(TunesmithError):
    status = 429
    type = "overloaded"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(TunesmithError):
    status = 503
    type = "unavailable"
    code = "unavailable"


class ArtifactCorrupt(TunesmithError):
    code = "artifact_corrupt"


class LeaseLost(TunesmithError):
    code = "lease_lost"


class JobFailed(TunesmithError):
    """The job cannot succeed by trying again.

    `code` is stored on the job (`invalid_training_file`, `out_of_memory`, `non_finite_loss`, …) and the message
    says what to change.
    """

    code = "training_failed"

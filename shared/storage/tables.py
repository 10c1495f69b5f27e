"""The SQL schema. Owns columns and constraints; every statement lives with the store that makes it.

Times are integers: `created_ns` nanoseconds since the epoch (it orders and pages), everything else seconds.
"""

from enum import StrEnum

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from shared.adapters.state import AdapterState
from shared.jobs.spec import State

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _one_of(states: type[StrEnum]) -> str:
    return "state IN (" + ", ".join(f"'{state.value}'" for state in states) + ")"


# One row. The artifacts folder carries the same id.
installation = Table("installation", metadata, Column("id", String(32), primary_key=True))

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("project", String(64), nullable=False),
    # HMAC-SHA256 of the key under the installation's secret, hex; the key itself is shown once and kept nowhere.
    Column("digest", String(64), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
)

# One row at most: by which secret the digests above were made.
key_check = Table(
    "key_check",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    # HMAC-SHA256 of a constant under the secret, hex.
    Column("mac", String(64), nullable=False),
)

# Responses to POSTs that must not happen twice, each written in the transaction of what it responds to.
idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("api_key", String(64), nullable=False),
    Column("path", String(64), nullable=False),
    # The client's Idempotency-Key; null where none was sent (two nulls are different to a unique constraint).
    Column("key", String(255)),
    # SHA-256 of the request.
    Column("fingerprint", String(64), nullable=False),
    Column("status", Integer, nullable=False),
    Column("body", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("api_key", "path", "key"),
    Index(None, "api_key", "path", "fingerprint"),
    Index(None, "created_at"),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("project", String(64), nullable=False),
    Column("created_ns", BigInteger, nullable=False),
    Column("filename", String(255), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("dataset", JSON(none_as_null=True), nullable=False),
    Index(None, "project", "created_ns", "id"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("project", String(64), nullable=False),
    Column("created_ns", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Column("state", String(16), nullable=False),
    Column("phase", String(16)),
    Column("spec", JSON(none_as_null=True), nullable=False),
    Column("training_file", String(64), nullable=False),
    Column("validation_file", String(64)),
    Column("metadata", JSON(none_as_null=True)),
    # Advice given at creation; shown on the job for as long as it exists.
    Column("warnings", JSON(none_as_null=True), nullable=False),
    Column("progress", JSON(none_as_null=True)),
    Column("fault", JSON(none_as_null=True)),
    Column("report", JSON(none_as_null=True)),
    Column("adapter", String(64)),
    # (lease_token, renewals) is the heartbeat: a pair that stands still belongs to a lost worker.
    Column("lease_token", BigInteger, nullable=False, default=0),
    Column("renewals", BigInteger, nullable=False, default=0),
    # The number of the lease's last record; one that is sent again has a number that is not above it.
    Column("last_write", BigInteger, nullable=False, default=0),
    Column("worker", String(255)),
    Column("attempt", Integer, nullable=False, default=0),
    # How often in a row the job's worker was lost or broke off since the last new checkpoint.
    Column("worker_failures", Integer, nullable=False, default=0),
    Column("checkpoint_step", BigInteger, nullable=False, default=0),
    Column("event_count", BigInteger, nullable=False, default=0),
    CheckConstraint(_one_of(State), name="state"),
    Index(None, "state", "created_ns", "id"),
    Index(None, "project", "created_ns", "id"),
)

# What a job trains on beside `jobs.training_file`, in the order that its specification has; for the question which jobs
# need a file.
further_training_files = Table(
    "further_training_files",
    metadata,
    Column("job", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("file", String(64), primary_key=True),
    Index(None, "file"),
)

events = Table(
    "events",
    metadata,
    Column("job", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    # 1, 2, 3, … per job without gaps: taken in the same UPDATE as the job row.
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("created_at", BigInteger, nullable=False),
    Column("level", String(8), nullable=False),
    Column("type", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON(none_as_null=True)),
)

adapters = Table(
    "adapters",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("project", String(64), nullable=False),
    Column("job", String(64), ForeignKey("jobs.id"), nullable=False),
    Column("lease_token", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("name", String(255), unique=True),
    Column("base", String(64), nullable=False),
    Column("step", BigInteger),
    Column("created_ns", BigInteger, nullable=False),
    CheckConstraint(_one_of(AdapterState), name="state"),
    Index(None, "project", "created_ns", "id"),
    Index(None, "job"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("job", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("step", BigInteger, nullable=False),
    # Names the folder of the resume state, artifacts/jobs/<job>/<token>/step-<step>.
    Column("lease_token", BigInteger, nullable=False),
    Column("adapter", String(64), ForeignKey("adapters.id"), nullable=False),
    Column("metrics", JSON(none_as_null=True), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("job", "step"),
)

# Responses and their items, for a time: what later requests name by id.
kept_items = Table(
    "kept_items",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("project", String(64), nullable=False),
    Column("response", String(64), nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False, index=True),
    # JSON.
    Column("body", Text, nullable=False),
    # Of the body, and about what a row takes beside it.
    Column("bytes", BigInteger, nullable=False),
)

# One row a reason, there from the start: how many attempts have ended for it before their job did.
job_attempts = Table(
    "job_attempts",
    metadata,
    Column("reason", String(32), primary_key=True),
    Column("ended", BigInteger, nullable=False),
)

# Processes that train, as they say themselves every few seconds.
workers = Table(
    "workers",
    metadata,
    Column("worker", String(255), primary_key=True),
    Column("pid", BigInteger, primary_key=True, autoincrement=False),
    # By the worker's own clock.
    Column("seen_at", BigInteger, nullable=False),
)

# Workers that take no jobs for now, as they say themselves.
worker_outages = Table(
    "worker_outages",
    metadata,
    Column("worker", String(255), primary_key=True),
    # The base whose jobs the worker passes over; empty if it takes none at all.
    Column("base", String(64), primary_key=True),
    # When the worker tries again, by its own clock.
    Column("until", BigInteger, nullable=False),
)

"""Plain words: jobs.losses becomes worker_failures, the table answers becomes idempotency_keys"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = '0003'
down_revision: str | Sequence[str] | None = '0002'
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

COLUMNS = ('id', 'api_key', 'path', 'key', 'fingerprint', 'status', 'body', 'created_at')


def upgrade() -> None:
    # Plain SQL: Alembic's batch mode would copy the whole table on SQLite.
    op.execute('ALTER TABLE jobs RENAME COLUMN losses TO worker_failures')
    _move('answers', 'idempotency_keys')


def downgrade() -> None:
    op.execute('ALTER TABLE jobs RENAME COLUMN worker_failures TO losses')
    _move('idempotency_keys', 'answers')


def _move(old: str, new: str) -> None:
    # Made anew and filled, because SQLite cannot rename the constraints, which carry the table's name.
    op.create_table(new,
    sa.Column('id', sa.String(length=64), nullable=False),
    sa.Column('api_key', sa.String(length=64), nullable=False),
    sa.Column('path', sa.String(length=64), nullable=False),
    sa.Column('key', sa.String(length=255), nullable=True),
    sa.Column('fingerprint', sa.String(length=64), nullable=False),
    sa.Column('status', sa.Integer(), nullable=False),
    sa.Column('body', sa.Text(), nullable=False),
    sa.Column('created_at', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f(f'pk_{new}')),
    sa.UniqueConstraint('api_key', 'path', 'key', name=op.f(f'uq_{new}_api_key_path_key'))
    )
    columns = ', '.join(COLUMNS)
    op.execute(f'INSERT INTO {new} ({columns}) SELECT {columns} FROM {old}')
    op.drop_table(old)
    op.create_index(op.f(f'ix_{new}_api_key_path_fingerprint'), new, ['api_key', 'path', 'fingerprint'], unique=False)
    op.create_index(op.f(f'ix_{new}_created_at'), new, ['created_at'], unique=False)

"""key_check: by which secret API keys were hashed; workers: which processes train; job_attempts: how attempts ended"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = '0010'
down_revision: str | Sequence[str] | None = '0009'
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        'key_check',
        sa.Column('id', sa.Integer(), autoincrement=False, nullable=False),
        sa.Column('mac', sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint('id', name=op.f('pk_key_check')),
    )
    op.create_table(
        'workers',
        sa.Column('worker', sa.String(length=255), nullable=False),
        sa.Column('pid', sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column('seen_at', sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint('worker', 'pid', name=op.f('pk_workers')),
    )
    attempts = op.create_table(
        'job_attempts',
        sa.Column('reason', sa.String(length=32), nullable=False),
        sa.Column('ended', sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint('reason', name=op.f('pk_job_attempts')),
    )
    reasons = ('failed', 'given_back', 'handed_over', 'not_begun', 'worker_lost')
    op.bulk_insert(attempts, [{'reason': reason, 'ended': 0} for reason in reasons])


def downgrade() -> None:
    op.drop_table('job_attempts')
    op.drop_table('workers')
    op.drop_table('key_check')

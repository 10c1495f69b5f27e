"""worker_outages: which workers take no jobs for now"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = '0007'
down_revision: str | Sequence[str] | None = '0006'
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        'worker_outages',
        sa.Column('worker', sa.String(length=255), nullable=False),
        sa.Column('base', sa.String(length=64), nullable=False),
        sa.Column('until', sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint('worker', 'base', name=op.f('pk_worker_outages')),
    )


def downgrade() -> None:
    op.drop_table('worker_outages')

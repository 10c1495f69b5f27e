"""kept_items: responses and their items, for a time"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = '0008'
down_revision: str | Sequence[str] | None = '0007'
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        'kept_items',
        sa.Column('id', sa.String(length=64), nullable=False),
        sa.Column('project', sa.String(length=64), nullable=False),
        sa.Column('response', sa.String(length=64), nullable=False),
        sa.Column('created_at', sa.BigInteger(), nullable=False),
        sa.Column('body', sa.Text(), nullable=False),
        sa.Column('bytes', sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint('id', name=op.f('pk_kept_items')),
    )
    op.create_index(op.f('ix_kept_items_created_at'), 'kept_items', ['created_at'])
    op.create_index(op.f('ix_kept_items_response'), 'kept_items', ['response'])


def downgrade() -> None:
    op.drop_index(op.f('ix_kept_items_response'), table_name='kept_items')
    op.drop_index(op.f('ix_kept_items_created_at'), table_name='kept_items')
    op.drop_table('kept_items')

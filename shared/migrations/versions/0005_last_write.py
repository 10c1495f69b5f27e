"""jobs.last_write: the number of a lease's last record, so that a record sent again is not written again"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = '0005'
down_revision: str | Sequence[str] | None = '0003'
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column('jobs', sa.Column('last_write', sa.BigInteger(), nullable=False, server_default='0'))


def downgrade() -> None:
    op.drop_column('jobs', 'last_write')

"""further_training_files: what a job trains on beside its first file"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = '0009'
down_revision: str | Sequence[str] | None = '0008'
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        'further_training_files',
        sa.Column('job', sa.String(length=64), nullable=False),
        sa.Column('file', sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ['job'], ['jobs.id'], name=op.f('fk_further_training_files_job_jobs'), ondelete='CASCADE'
        ),
        sa.PrimaryKeyConstraint('job', 'file', name=op.f('pk_further_training_files')),
    )
    op.create_index(op.f('ix_further_training_files_file'), 'further_training_files', ['file'])


def downgrade() -> None:
    op.drop_index(op.f('ix_further_training_files_file'), table_name='further_training_files')
    op.drop_table('further_training_files')

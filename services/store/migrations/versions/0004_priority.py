"""Jobs have a priority: of those that wait, the highest is started first."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column; jobs that are there have priority 0."""
    op.add_column("jobs", sa.Column("priority", sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    """Forget priorities."""
    op.drop_column("jobs", "priority")

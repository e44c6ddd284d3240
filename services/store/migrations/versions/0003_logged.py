"""Time spent waiting for samples, and what loss functions return besides: float64, little-endian, by name."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the columns; older records have none."""
    op.add_column("history", sa.Column("data_seconds", sa.Double))
    op.add_column("history", sa.Column("logged", sa.LargeBinary))


def downgrade() -> None:
    """Drop them."""
    op.drop_column("history", "logged")
    op.drop_column("history", "data_seconds")

"""The gradient norm of each parameter: float64, little-endian, in the layout's order."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column; older records have none."""
    op.add_column("history", sa.Column("parameter_norms", sa.LargeBinary))


def downgrade() -> None:
    """Drop it."""
    op.drop_column("history", "parameter_norms")

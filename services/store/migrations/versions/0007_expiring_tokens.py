"""Tokens may expire."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Those that are there never do."""
    op.add_column("tokens", sa.Column("expires", sa.Double))


def downgrade() -> None:
    """Those that expire hold for ever."""
    op.drop_column("tokens", "expires")

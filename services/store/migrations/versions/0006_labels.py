"""Labels of jobs, in a table of their own so that lists can be filtered by them."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Jobs that are there have none."""
    op.create_table(
        "labels",
        sa.Column("job", sa.String(63), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("key", sa.String(63), primary_key=True),
        sa.Column("value", sa.String(63), nullable=False),
    )
    op.create_index("ix_labels_key_value", "labels", ["key", "value"])


def downgrade() -> None:
    """Forget them."""
    op.drop_index("ix_labels_key_value", "labels")
    op.drop_table("labels")

"""Labels of jobs, in a table of their own so that lists can be filtered by them; and indices for filtered lists."""

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
    op.drop_index("ix_jobs_state", "jobs")
    for column in ("state", "owner"):
        op.create_index(f"ix_jobs_{column}_created_id", "jobs", [column, "created", "id"])


def downgrade() -> None:
    """Forget them."""
    for column in ("state", "owner"):
        op.drop_index(f"ix_jobs_{column}_created_id", "jobs")
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.drop_index("ix_labels_key_value", "labels")
    op.drop_table("labels")

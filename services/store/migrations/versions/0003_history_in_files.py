"""The records of steps are kept in files beside a job's checkpoints; evaluations are kept, each with its step."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Drop the table of records, and add one of evaluations."""
    op.drop_table("history")
    op.create_table(
        "evaluations",
        sa.Column("job", sa.String(63), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("step", sa.BigInteger, primary_key=True),
        sa.Column("metrics", sa.Text, nullable=False),
    )


def downgrade() -> None:
    """An older service begins its history anew."""
    raise NotImplementedError("the records of steps are in files, which older versions do not read")

"""Jobs, events and history."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the three tables."""
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(63), primary_key=True),
        sa.Column("request_id", sa.String(128), unique=True),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False, index=True),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("workers", sa.Integer, nullable=False),
        sa.Column("incarnation", sa.Integer, nullable=False),
        sa.Column("total_steps", sa.BigInteger, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("ended", sa.Double),
        sa.Column("result", sa.Text, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("job", sa.String(63), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
    numbers = ("loss", "lr", "weight", "gradient_norm", "clipped_norm", "clip_coefficient")
    seconds = ("step_seconds", "compute_seconds", "reduce_seconds", "apply_seconds")
    op.create_table(
        "history",
        sa.Column("job", sa.String(63), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("incarnation", sa.Integer, primary_key=True),
        sa.Column("step", sa.BigInteger, primary_key=True),
        sa.Column("hidden", sa.Boolean, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("samples", sa.BigInteger, nullable=False),
        sa.Column("clipped", sa.Boolean, nullable=False),
        sa.Column("skipped", sa.Boolean, nullable=False),
        sa.Column("workers", sa.Integer, nullable=False),
        *(sa.Column(name, sa.Double) for name in numbers + seconds),
    )


def downgrade() -> None:
    """Drop them."""
    for table in ("history", "events", "jobs"):
        op.drop_table(table)

"""Access tokens, of which only a hash is kept, and the owners of jobs: the names of the tokens that created them.

Also an index for lists of jobs, which are by the time of creation.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Jobs that are there belong to nobody, so that only administrators act on them once there are tokens."""
    op.create_table(
        "tokens",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False, unique=True),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("revoked", sa.Double),
    )
    op.add_column("jobs", sa.Column("owner", sa.String(63), nullable=False, server_default=""))
    op.create_index("ix_jobs_created_id", "jobs", ["created", "id"])


def downgrade() -> None:
    """Forget both."""
    op.drop_index("ix_jobs_created_id", "jobs")
    op.drop_column("jobs", "owner")
    op.drop_table("tokens")

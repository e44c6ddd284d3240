"""The tables, as the newest migration leaves them."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(63), primary_key=True),
    sa.Column("request_id", sa.String(128), unique=True),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("workers", sa.Integer, nullable=False),
    sa.Column("incarnation", sa.Integer, nullable=False),
    sa.Column("total_steps", sa.BigInteger, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("ended", sa.Double),
    sa.Column("result", sa.Text, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
    sa.Column("owner", sa.String(63), nullable=False, server_default=""),
    sa.Index("ix_jobs_created_id", "created", "id"),
    sa.Index("ix_jobs_state_created_id", "state", "created", "id"),  # so that a list of one state needs no sorting
    sa.Index("ix_jobs_owner_created_id", "owner", "created", "id"),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("job", sa.String(63), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)

labels = sa.Table(
    "labels",
    metadata,
    sa.Column("job", sa.String(63), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("key", sa.String(63), primary_key=True),
    sa.Column("value", sa.String(63), nullable=False),
    sa.Index("ix_labels_key_value", "key", "value"),
)

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False, unique=True),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("revoked", sa.Double),
    sa.Column("expires", sa.Double),
)

evaluations = sa.Table(
    "evaluations",
    metadata,
    sa.Column("job", sa.String(63), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("step", sa.BigInteger, primary_key=True),
    sa.Column("metrics", sa.Text, nullable=False),
)

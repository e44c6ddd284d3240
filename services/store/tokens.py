"""Access tokens: who may do what. A token is shown once, when it is made; its SHA-256 is all that is kept.

A token has 256 random bits, so that a plain hash of it is as hard to invert as any.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
import time
from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa

from services.store.database import RETRY_SECONDS, retried
from services.store.schema import tokens
from steepest.errors import ConflictError, NotFoundError, SpecError, Violation

PREFIX = "steepest_"  # by which scanners of repositories and logs find a token
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


class Role(StrEnum):
    """What the holder of a token may do: look; submit jobs and act on those; act on all jobs."""

    VIEWER = "viewer"
    SUBMITTER = "submitter"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A token as it is stored. created, revoked, expires: seconds since the epoch."""

    name: str
    role: Role
    created: float
    revoked: float | None
    expires: float | None = None


class Tokens:
    """The tokens in a store. Safe to use from many threads and processes."""

    def __init__(self, engine: sa.Engine, write: threading.Lock) -> None:
        self.retry_seconds = RETRY_SECONDS
        self._engine = engine
        self._write = write
        self._is_any = False

    @retried
    def create(self, name: str, role: str, now: float, expires: float | None = None) -> str:
        """A new token, which is kept nowhere. Raises SpecError, ConflictError when the name is taken.

        expires: when it ends by itself, in seconds since the epoch; None: never.
        """
        if not _NAME.fullmatch(name):
            problem = f"{name!r}; allowed: lower-case letters, digits and '-', beginning with a letter, at most 63"
            raise SpecError([Violation("name", problem)])
        if role not in list(Role):
            raise SpecError([Violation("role", f"{role!r}; allowed: {', '.join(Role)}")])
        token = PREFIX + secrets.token_urlsafe(32)
        with self._write, self._engine.begin() as connection:
            if connection.execute(sa.select(tokens.c.name).where(tokens.c.name == name)).first() is not None:
                raise ConflictError(f"there is a token {name!r}, perhaps a revoked one; choose another name")
            values = {"name": name, "role": role, "hash": _hash(token), "created": now, "expires": expires}
            connection.execute(sa.insert(tokens).values(**values))
        return token

    @retried
    def all(self) -> list[TokenRow]:
        """All tokens, revoked ones too, oldest first."""
        with self._engine.connect() as connection:
            return [_row(row) for row in connection.execute(sa.select(tokens).order_by(tokens.c.created))]

    @retried
    def revoke(self, name: str, now: float) -> None:
        """End a token; its name stays taken, for jobs bear it. Raises NotFoundError."""
        with self._write, self._engine.begin() as connection:
            change = sa.update(tokens).where(tokens.c.name == name, tokens.c.revoked.is_(None)).values(revoked=now)
            if not connection.execute(change).rowcount:
                raise NotFoundError(f"there is no token {name!r} that holds; steepest token list shows all")

    @retried
    def find(self, token: str) -> TokenRow | None:
        """The token that this is, unless it is revoked, has expired, or is none."""
        holds = sa.or_(tokens.c.expires.is_(None), tokens.c.expires > time.time())
        query = sa.select(tokens).where(tokens.c.hash == _hash(token), tokens.c.revoked.is_(None), holds)
        with self._engine.connect() as connection:
            row = connection.execute(query).first()
        return None if row is None else _row(row)

    @retried
    def exist(self) -> bool:
        """Whether there has ever been a token. A service without one is open to all who reach it."""
        if not self._is_any:  # else there always will be: a revoked one stays
            with self._engine.connect() as connection:
                self._is_any = connection.execute(sa.select(tokens.c.name).limit(1)).first() is not None
        return self._is_any


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _row(row: sa.Row[tuple[object, ...]]) -> TokenRow:
    return TokenRow(row.name, Role(row.role), row.created, row.revoked, row.expires)

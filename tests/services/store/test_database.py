from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from services.store import database
from services.store.database import open_database
from services.store.lifecycle import JobState
from services.store.store import Store
from services.store.tokens import Role
from steepest.errors import ServiceUnavailableError
from tests.support.documented import is_documented
from tests.support.postgres import Postgres
from tests.support.rows import job_row


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", "cannot be read"),
        ("mysql://host/name", "a database of mysql cannot be used; allowed: sqlite, postgresql"),
        ("postgresql://user:secret@127.0.0.1:1/name", r"user:\*\*\*@127.0.0.1:1/name does not answer"),
    ],
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(url: str, words: str) -> None:
    with pytest.raises(ServiceUnavailableError, match=words) as caught:
        open_database(url)
    assert "secret" not in str(caught.value)


def test_one_service_uses_a_database(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.database()
    lost: list[str] = []
    first = Store(url, lost=lambda: lost.append("first"))
    with pytest.raises(ServiceUnavailableError, match="another service uses this database"):
        Store(url, lost=lambda: None)
    tokens_only = Store(url)  # as `steepest token` opens it
    tokens_only.close()
    first.close()
    second = Store(url, lost=lambda: None)
    second.close()
    for _ in range(2):
        Store(f"sqlite:///{tmp_path / 'a.db'}", lost=lambda: None).close()
    assert not lost


def test_a_service_has_statistics_of_a_database_that_was_filled_before(postgres: Postgres) -> None:
    url = postgres.database()
    filled = Store(url)
    for number in range(50):
        filled.create(job_row(f"a{number}", f"r{number}"))

    def estimated() -> float:
        with filled._engine.connect() as connection:
            found = connection.execute(sa.text("SELECT reltuples FROM pg_class WHERE relname = 'jobs'")).scalar()
        return float(found or 0)

    before = estimated()
    Store(url, lost=lambda: None).close()
    assert (before, estimated()) == (-1.0, 50.0)
    filled.close()


@pytest.mark.parametrize("other_comes_first", [True, False])
def test_a_database_that_was_away_is_claimed_again(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch, *, other_comes_first: bool
) -> None:
    monkeypatch.setattr(database, "CHECK_SECONDS", 3.0 if other_comes_first else 0.1)
    url, lost = postgres.database(), threading.Event()
    first = Store(url, lost=lost.set)
    postgres.stop()
    postgres.start()
    if other_comes_first:
        other = Store(url, lost=lambda: None)
        assert lost.wait(10)
        other.close()
    else:
        time.sleep(1.0)
        with pytest.raises(ServiceUnavailableError, match="another service uses this database"):
            Store(url, lost=lambda: None)
        assert not lost.is_set()
    first.close()


def test_a_server_that_starts_again_loses_nothing(postgres: Postgres) -> None:
    store = Store(postgres.database())
    store.create(job_row("a", "r1"))
    token = store.tokens.create("ci", Role.ADMIN, 1.0)
    postgres.stop()
    done: list[str] = []

    def work() -> None:
        store.note("a", "while the database was away", 2.0)
        store.move("a", JobState.STARTING, "there is room", 3.0)
        done.append(store.get("a").state)

    worker = threading.Thread(target=work)
    worker.start()
    time.sleep(1.0)
    assert not done
    postgres.start()
    worker.join(20)
    assert done == ["STARTING"]
    assert [event.sequence for event in store.events_after("a", 0)] == [1, 2, 3]
    found = store.tokens.find(token)
    assert found is not None
    assert found.name == "ci"
    store.close()


def test_one_that_stays_away_is_an_error_that_says_so(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(postgres.database())
    monkeypatch.setattr(store, "retry_seconds", 0.5)
    assert store.patient().retry_seconds == database.PATIENT_SECONDS
    postgres.stop()
    try:
        with pytest.raises(ServiceUnavailableError) as raised:
            store.get("a")
        assert is_documented("the database does not answer", str(raised.value))
    finally:
        postgres.start()
        store.close()


def test_migrations_lead_to_the_tables_as_they_are_described(postgres: Postgres) -> None:
    url = postgres.database()
    Store(url).close()
    engine = open_database(url)
    found = sa.inspect(engine)
    for name in ("jobs", "events", "evaluations", "tokens"):
        from services.store.schema import metadata

        assert [column["name"] for column in found.get_columns(name)] == [c.name for c in metadata.tables[name].columns]
    engine.dispose()

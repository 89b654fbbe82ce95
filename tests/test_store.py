"""The store: what is there is right, what is damaged is made again, nothing is half-written."""

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmark.pipeline.store import Store

BASE = {"w": torch.arange(6.0).reshape(2, 3), "frozen": torch.ones(4), "ids": torch.arange(3)}
MOVED = {**BASE, "w": BASE["w"] * 2}
State = dict[str, torch.Tensor]


def kept(store: Store, make: Callable[[], State], key: str = "k") -> State:
    """What is in the place of ``key``, made if nothing good is."""
    with store.claimed(key, BASE) as slot:
        state = slot.read()
        if state is None:
            state = make()
            slot.write(state)
    return state


@pytest.fixture
def store(tmp_path: Path):
    store = Store(tmp_path)
    yield store
    store.close()


def artifact(store: Store) -> Path:
    return next((store.root / "states").glob("*.safetensors"))


def test_a_state_is_made_once_and_only_what_moved_is_written(store: Store) -> None:
    made = []
    for _ in range(2):
        state = kept(store, lambda: made.append(1) or dict(MOVED))
        assert all(torch.equal(state[key], MOVED[key]) for key in MOVED)
    assert made == [1]
    with store.claimed("k", BASE) as slot:
        assert slot.read()["frozen"] is BASE["frozen"]
    assert artifact(store).stat().st_size < 400


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_state_is_made_again(
    store: Store, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept(store, lambda: dict(MOVED))
    path = artifact(store)
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-8]), "empty": b""}[damage])
    made = []
    state = kept(store, lambda: made.append(1) or dict(MOVED))
    assert made == [1]
    assert torch.equal(state["w"], MOVED["w"])
    assert "made again" in caplog.text


def test_a_state_moved_to_another_key_is_not_believed(store: Store) -> None:
    kept(store, lambda: dict(MOVED))
    path = artifact(store)
    path.rename(path.with_name("other.safetensors"))
    with store.claimed("other", BASE) as slot:
        assert slot.read() is None


def test_a_failed_making_leaves_nothing(store: Store) -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        kept(store, fail)
    assert not list((store.root / "states").glob("*.safetensors"))


def test_two_threads_that_want_one_state_make_it_once(tmp_path: Path) -> None:
    made, barrier = [], threading.Barrier(2)

    def work() -> None:
        store = Store(tmp_path)
        barrier.wait()
        kept(store, lambda: made.append(1) or dict(MOVED))
        store.close()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


def test_a_store_is_opened_by_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite does not wait for one that turns the same new file to its write-ahead log."""
    connect, opening, most = Store._connect, [], []

    def slowly(path: Path) -> sqlite3.Connection:
        opening.append(path)
        most.append(len(opening))
        time.sleep(0.1)
        opening.pop()
        return connect(path)

    monkeypatch.setattr(Store, "_connect", staticmethod(slowly))
    threads = [threading.Thread(target=lambda: Store(tmp_path).close()) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_results_survive_reopening(tmp_path: Path) -> None:
    first = Store(tmp_path)
    assert first.result("k", lambda: {"a": [1, 2.5]}) == {"a": [1, 2.5]}
    first.close()
    second = Store(tmp_path)
    assert second.get("k") == {"a": [1, 2.5]}
    second.close()


def test_a_row_changed_by_hand_is_not_believed(store: Store) -> None:
    store.put("k", 1)
    with sqlite3.connect(store.root / "results.sqlite") as database:
        database.execute("UPDATE results SET value = '2' WHERE key = 'k'")
    database.close()
    assert store.get("k") is None
    assert store.result("k", lambda: 3) == 3


def test_a_damaged_database_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "results.sqlite").write_bytes(b"this is no database" * 100)
    store = Store(tmp_path)
    assert store.result("k", lambda: 1) == 1
    store.close()
    assert "damaged" in caplog.text
    assert (tmp_path / "results.damaged").exists()


def test_memory_keeps_the_most_recent(tmp_path: Path) -> None:
    store = Store(tmp_path, memory=2)
    made = []
    for key in ("a", "b", "a", "c", "a", "b"):
        store.recent(key, lambda key=key: made.append(key) or key)
    assert made == ["a", "b", "c", "b"]
    store.close()

"""The store: what is there is right, what is damaged is made again, nothing is half-written."""

import errno
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmark.pipeline.results import Results
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
    connect, opening, most = Results._connect, [], []

    def slowly(path: Path, to_write: bool) -> sqlite3.Connection:
        opening.append(path)
        most.append(len(opening))
        time.sleep(0.1)
        opening.pop()
        return connect(path, to_write)

    monkeypatch.setattr(Results, "_connect", staticmethod(slowly))
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


def filled(root: Path, rows: int = 400) -> bytes:
    store = Store(root)
    for number in range(rows):
        store.put(f"key {number}", [number] * 20)
    store.close()
    return (root / "results.sqlite").read_bytes()


def damaged(data: bytes, seed: int) -> bytes:
    """The file as a bad disk gives it back: pages zeroed or of noise, its end or header lost."""
    rng = random.Random(seed)
    pages = len(data) // 4096
    changed = bytearray(data)
    match seed % 5:
        case 0:
            return data[: rng.randrange(1, len(data))]
        case 1:
            changed[: rng.randrange(1, 120)] = rng.randbytes(100)
        case 2:
            for page in rng.sample(range(pages), 3):
                changed[page * 4096 : (page + 1) * 4096] = bytes(4096)
        case 3:
            for page in rng.sample(range(pages), 3):
                changed[page * 4096 : (page + 1) * 4096] = rng.randbytes(4096)
        case 4:
            for at in rng.sample(range(len(data)), 200):
                changed[at] ^= 1 << rng.randrange(8)
            changed[rng.randrange(100)] ^= 0xFF
    return bytes(changed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database of 400 results."""
    return filled(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_damaged_in_the_database_a_run_goes_on(
    tmp_path: Path, seed: int, whole: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "results.sqlite").write_bytes(damaged(whole, seed))
    for _ in range(3):  # what was put into the file before its damage was met may be lost once
        store, lost = Store(tmp_path), 0
        for number in range(400):
            found = store.get(f"key {number}")
            assert found in (None, [number] * 20)
            if found is None:
                lost += 1
                store.put(f"key {number}", [number] * 20)
        store.close()
    assert not lost, "the last run finds all of the others"
    aside = [p for p in tmp_path.glob("results.damaged*") if not p.name.endswith(("-wal", "-shm"))]
    assert len(caplog.messages) == len(aside)


def test_one_damaged_page_costs_its_own_results_only(
    tmp_path: Path, whole: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    leaf = whole.index(b"[200, 200") // 4096
    (tmp_path / "results.sqlite").write_bytes(
        whole[: leaf * 4096] + b"\xff" * 4096 + whole[(leaf + 1) * 4096 :]
    )
    store = Store(tmp_path)
    found = [store.get(f"key {number}") for number in range(400)]
    store.close()
    assert found[200] is None
    assert sum(value is not None for value in found) > 350
    (line,) = caplog.messages
    assert "set aside as results.damaged; 3" in line
    assert "\n" not in line


def test_what_was_set_aside_before_is_kept(tmp_path: Path) -> None:
    for text in (b"one" * 500, b"two" * 500):
        (tmp_path / "results.sqlite").write_bytes(text)
        Store(tmp_path).close()
    assert (tmp_path / "results.damaged").read_bytes() == b"one" * 500
    assert (tmp_path / "results.damaged-2").read_bytes() == b"two" * 500


def test_two_that_meet_the_damage_set_it_aside_once(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "results.sqlite"
    path.write_bytes(whole)
    one, two = Store(tmp_path), Store(tmp_path)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    for store in (one, two):
        assert store.result("key 7", lambda: "new") == "new"
    assert two.get("key 7") == one.get("key 7") == "new"
    one.close()
    two.close()
    assert not list(tmp_path.glob("*damaged-2*"))


@pytest.mark.parametrize(
    ("name", "number"), [("SQLITE_FULL", errno.ENOSPC), ("SQLITE_BUSY", errno.EACCES)]
)
def test_a_full_or_busy_disk_is_no_damage(store: Store, name: str, number: int) -> None:
    class Refusing:
        def execute(self, *_: object) -> None:
            full = number == errno.ENOSPC
            error = sqlite3.OperationalError("database or disk is full" if full else "busy")
            error.sqlite_errorname = name
            raise error

        def close(self) -> None: ...

    own, store._results._database = store._results._database, Refusing()
    with pytest.raises(OSError, match=r"full|busy") as caught:
        store.put("k", 1)
    store._results._database = own
    assert caught.value.errno == number
    assert not list(store.root.glob("*damaged*"))


def test_a_cache_that_cannot_be_written_to_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.put("k", 1)
    kept(store, lambda: dict(MOVED))
    store.close()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "lock")

    for module in ("results", "store"):
        monkeypatch.setattr(f"benchmark.pipeline.{module}.writable", lambda folder: False)
        monkeypatch.setattr(f"benchmark.pipeline.{module}.FileLock", refuse)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    store = Store(tmp_path)
    assert store.get("k") == 1
    assert store.get("other") is None
    with store.claimed("k", BASE) as slot:
        assert torch.equal(slot.read()["w"], MOVED["w"])
    with pytest.raises(OSError, match="readonly"):
        store.put("other", 2)
    store.close()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_a_killed_writer_left_is_removed(store: Store) -> None:
    stale = store.root / "states" / ".k.safetensors.abcd1234"
    stale.parent.mkdir()
    stale.write_bytes(b"half")
    kept(store, lambda: dict(MOVED))
    assert not stale.exists()


def test_memory_keeps_the_most_recent(tmp_path: Path) -> None:
    store = Store(tmp_path, memory=2)
    made = []
    for key in ("a", "b", "a", "c", "a", "b"):
        store.recent(key, lambda key=key: made.append(key) or key)
    assert made == ["a", "b", "c", "b"]
    store.close()

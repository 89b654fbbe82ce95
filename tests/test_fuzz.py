"""Files that a disk, an editor or a stranger has spoilt: read whole, or refused in one line.

Seeded. Entries have ten thousand of their own in test_entries_fuzz.py.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import some_slow
from disk import write
from fabricated import save
from fabricated import suite as cells

from benchmark.core.errors import UnmergeBenchError
from benchmark.io import adapter_folders, folders, tensorfiles
from benchmark.pipeline import run as running
from benchmark.pipeline import suite as suites
from benchmark.testbeds.declared import schema

#: No message is longer: one line on a screen, or two.
LONGEST = 400
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2.5, 1e308, -1e308, 10**30, float("nan"), float("inf"), "", "x",
    "\x00", "é" * 200, "../../etc/passwd", [], [[]], [None], {}, {"a": {"b": []}}, [1, "x", None],
    "NaN", "0", "relu", [0] * 50, {"": 0},
]  # fmt: skip
#: Texts that are no JSON, or hardly.
RAW = [b"", b"{", b"[]", b"7", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 3000,
       b"\x00" * 64, b'{"a":1,"a":2}', "\ufeff{}".encode(), b"1" * 5000, b"NaN"]  # fmt: skip


def spoilt(content: Any, rng: random.Random) -> Any:
    """A copy with one to three values replaced, dropped or added, anywhere."""
    found = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        at = found
        while True:
            if isinstance(at, dict) and at:
                key: Any = rng.choice(list(at))
            elif isinstance(at, list) and at:
                key = rng.randrange(len(at))
            else:
                break
            if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.6:
                at = at[key]
                continue
            what = rng.random()
            if what < 0.75:
                at[key] = copy.deepcopy(rng.choice(NASTY))
            elif what < 0.9:
                del at[key]
            elif isinstance(at, dict):
                at[rng.choice(["extra", "", "é"])] = copy.deepcopy(rng.choice(NASTY))
            break
    return found


def clean(act: Callable[[], Any]) -> bool:
    """Whether it worked; anything but a short line of ours fails the test."""
    try:
        act()
    except UnmergeBenchError as error:
        said = str(error)
        assert said
        assert len(said.splitlines()) == 1, said
        assert len(said) <= LONGEST, said
        return False
    return True


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("bert-classifier", tmp_path_factory.mktemp("bert") / "base")


@pytest.mark.parametrize("name", some_slow(["bert-classifier", "llama", "vit"], {"llama", "vit"}))
def test_configurations(name: str, tmp_path: Path) -> None:
    folder = write(name, tmp_path / "model")
    file, rng = folder / "config.json", random.Random(name)
    content, read = json.loads(file.read_text()), 0
    for _ in range(70):
        file.write_text(json.dumps(spoilt(content, rng)))
        read += clean(lambda: folders.load(folder))
    assert 0 < read < 70
    for raw in RAW:
        file.write_bytes(raw)
        assert not clean(lambda: folders.load(folder))


def test_headers_of_safetensors(bert: Path, tmp_path: Path) -> None:
    source = (bert / "model.safetensors").read_bytes()
    length = int.from_bytes(source[:8], "little")
    header, data = json.loads(source[8 : 8 + length]), source[8 + length :]
    file, rng = tmp_path / "model.safetensors", random.Random(1)
    dtypes = ["F4", "F8_E4M3", "F8_E8M0", "F6_E2M3", "F64", "C64", "X", "", 3, "BOOL", "U64"]
    for i in range(500):
        changed = spoilt(header, rng)
        if i % 5 == 0:
            key = rng.choice(list(header))
            changed[key] = {**header[key], "dtype": rng.choice(dtypes)} if key in header else {}
        text = json.dumps(changed).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data)
        clean(lambda: tensorfiles.read(file))
    for i in range(150):
        cut = rng.choice([source[: rng.randrange(len(source))], source + b"x", b"", source[:7]])
        flipped = bytearray(cut)
        for _ in range(rng.randint(0, 4)):
            if flipped:
                flipped[rng.randrange(min(len(flipped), length + 8))] = rng.randrange(256)
        file.write_bytes(bytes(flipped) if i % 2 else cut)
        clean(lambda: tensorfiles.read(file))
    for raw in RAW:
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
        assert not clean(lambda: tensorfiles.read(file))


def test_tables_of_shards(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write("bert-classifier", folder, max_shard_size="100KB")
    file, rng = folder / "model.safetensors.index.json", random.Random(2)
    content = json.loads(file.read_text())
    for name in ("../x.safetensors", "/etc/passwd", "x.bin", "", 3, None):
        changed = copy.deepcopy(content)
        changed["weight_map"][next(iter(changed["weight_map"]))] = name
        file.write_text(json.dumps(changed))
        assert not clean(lambda: folders.load(folder))
    for _ in range(40):
        file.write_text(json.dumps(spoilt(content, rng)))
        clean(lambda: folders.load(folder))
    for raw in RAW:
        file.write_bytes(raw)
        assert not clean(lambda: folders.load(folder))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters(bert: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    origin = adapter_folders.lifted(folders.load(bert))
    model: Any = get_peft_model(
        copy.deepcopy(origin.model), LoraConfig(r=2, target_modules=["query"])
    )
    folder = tmp_path / "lora"
    model.save_pretrained(str(folder), save_embedding_layers=False)
    file, rng = folder / adapter_folders.CONFIG, random.Random(3)
    content = json.loads(file.read_text())
    for i in range(300):
        file.write_text(json.dumps(spoilt(content, rng)))
        # What a configuration says is checked without its base; every fifth is put on it, too.
        clean(
            (lambda: adapter_folders.load(folder, origin))
            if i % 5 == 0
            else (lambda: adapter_folders._config(folder))
        )
    for raw in RAW:
        file.write_bytes(raw)
        assert not clean(lambda: adapter_folders.load(folder, origin))


def toml(content: Any) -> str:
    """TOML of what JSON can hold; None, which it cannot, as a word."""

    def value(of: Any) -> str:
        if isinstance(of, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {value(v)}" for k, v in of.items()) + "}"
        if isinstance(of, list):
            return "[" + ", ".join(map(value, of)) + "]"
        return "nothing" if of is None else json.dumps(of)

    return "\n".join(f"{json.dumps(key)} = {value(of)}" for key, of in content.items())


TESTBED = {
    "name": "mine", "base": "model", "side": 32, "tokens": 16, "mean": [0.5, 0.5, 0.5],
    "recipe": {"steps": 10, "betas": [0.9, 0.99], "frozen": ["a."]},
    "defaults": {"head": "linear-probe"},
    "task": [
        {"name": "a", "data": "a", "classes": ["x", "y"]}, {"name": "b", "data": {"train": "t"}},
    ],
}  # fmt: skip


def test_suites_and_testbeds(tmp_path: Path) -> None:
    suite = suites.load("smoke").model_dump(mode="json")
    suite = {key: value for key, value in suite.items() if value is not None}
    file, rng = tmp_path / "mine.toml", random.Random(4)
    for content, read in (
        (suite, lambda: suites.load(str(file))),
        (TESTBED, lambda: schema.parse(file.read_text(encoding="utf-8"), str(file))),
    ):
        file.write_text(toml(content), encoding="utf-8")
        assert clean(read)
        for _ in range(400):
            text = toml(spoilt(content, rng))
            if rng.random() < 0.2:
                cut = rng.randrange(len(text))
                text = text[:cut] + rng.choice(["", "[", '"', "\n[[x]]", "= 3"]) + text[cut:]
            file.write_text(text, encoding="utf-8", errors="replace")
            clean(read)
    for raw in RAW:
        file.write_bytes(raw)
        clean(lambda: suites.load(str(file)))
    file.write_bytes(b"\xef\xbb\xbf" + toml(suite).encode())
    assert clean(lambda: suites.load(str(file)))


def test_run_folders(tmp_path: Path) -> None:
    plain = save(tmp_path / "plain", cells(("task-arithmetic",))[:6])
    facts = json.loads((plain / "run.json").read_text())
    lines = (plain / "cells.jsonl").read_text().splitlines()
    folder, rng = tmp_path / "run", random.Random(5)
    shutil.copytree(plain, folder)
    for _ in range(200):
        (folder / "run.json").write_text(json.dumps(spoilt(facts, rng)))
        clean(lambda: running.read_run(folder))
    for raw in RAW:
        (folder / "run.json").write_bytes(raw)
        clean(lambda: running.read_run(folder))
    believed = 0
    for _ in range(200):
        number = rng.randrange(len(lines))
        changed = [*lines]
        changed[number] = json.dumps(spoilt(json.loads(lines[number]), rng))
        (folder / "cells.jsonl").write_text("\n".join(changed) + "\n")
        if clean(lambda: running.judged_cells(folder)):
            believed += 1
            for one, line in zip(running.judged_cells(folder), lines, strict=True):
                was = json.loads(line)
                assert one.protection == was["protection"], "no figure but what follows"
                assert one.accuracy == was["accuracy"]
    assert believed < 100
    for raw in RAW:
        (folder / "cells.jsonl").write_bytes(raw + b"\n")
        clean(lambda: running.judged_cells(folder))


def test_what_a_message_may_be_is_checked_at_all() -> None:
    def wordy() -> None:
        raise UnmergeBenchError("two\nlines")

    with pytest.raises(AssertionError):
        clean(wordy)
    with pytest.raises(ZeroDivisionError):
        clean(lambda: 1 / 0)
    assert torch.is_tensor(torch.zeros(1))

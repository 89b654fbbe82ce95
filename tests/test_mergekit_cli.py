"""mergekit's command line, really run: what its traps do, and that ours names each of them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import Cli
from disk import contents, write
from test_mergers import generator
from zoo import perturbed

from benchmark.api.contracts import Setting
from benchmark.api.methods import merger
from benchmark.core.errors import MethodError
from benchmark.core.state import State
from benchmark.io import folders
from benchmark.merging import mergekit_cli
from benchmark.merging.mergekit_cli import Request

pytestmark = pytest.mark.slow

pytest.importorskip("mergekit", reason="pip install 'unmergebench[mergekit]'")

SPEC = "mergekit/dare-ties(density=0.5, via=command-line)"
TRAPS = {
    "vit": r"exited with 0 but left out 32 of 40 tensors: vit\.encoder\.layer\.0\.attention",
    "bert": "mergekit-yaml: TypeError: can only concatenate list",
    "clip": "mergekit-yaml: NotImplementedError: `get_input_embeddings`",
}


def small(seed: int) -> State:
    rng = generator(seed)
    shapes = {f"layer.{i}.weight": (6, 5) for i in range(8)} | {"scale": ()}
    state = {key: torch.randn(shape, generator=rng) for key, shape in shapes.items()}
    return {**state, "position_ids": torch.arange(4)}


def trio(name: str, folder: Path) -> tuple[Path, Path, Path]:
    """A base and two experts, as folders."""
    base = folders.load(write(name, folder / "base"))
    for seed, expert in enumerate(("one", "two")):
        folders.save(perturbed(base.state, 0.05, seed), base, folder / expert)
    return folder / "base", folder / "one", folder / "two"


@pytest.fixture(scope="module")
def trapped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exception | None]:
    """What comes of each trap; side by side, as every run takes seconds to import."""
    method = merger("mergekit/task-arithmetic(via=command-line)").method
    loaded = {}
    for name in TRAPS:  # before the threads: loading a model is not for several at once
        base, *experts = (folders.load(p) for p in trio(name, tmp_path_factory.mktemp(name)))
        loaded[name] = base, [e.path for e in experts], [e.state for e in experts]

    def outcome(name: str) -> Exception | None:
        try:
            method.merge_folders(*loaded[name], Setting((0.5, 0.5)), generator())
        except MethodError as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TRAPS, pool.map(outcome, TRAPS), strict=True))


@pytest.mark.parametrize("name", TRAPS)
def test_an_architecture_it_cannot_merge_is_an_error(
    name: str, trapped: dict[str, Exception | None]
) -> None:
    with pytest.raises(MethodError, match=TRAPS[name]):
        raise trapped[name] or AssertionError("it merged")


@pytest.fixture(scope="module")
def drawn() -> list[State]:
    """dare_ties on files: by the adapter; with a misspelt key; with another hash seed."""
    base, one, two = small(0), small(1), small(2)
    method = merger(SPEC).method
    request = method.request(Setting((0.7, 0.4)), 2)
    states = {"base": base, "m0": one, "m1": two}
    seed = int(torch.randint(2**31, (), generator=generator()))
    misspelt = Request(
        request.method,
        {name: {**own, "densty": 0.1} for name, own in request.models.items()},
        request.base,
        {"normalise": True},
    )
    with ThreadPoolExecutor(2) as pool:
        adapter = pool.submit(
            method.merge, base, [one, two], Setting((0.7, 0.4)), None, generator()
        )
        again = pool.submit(mergekit_cli.merge_states, misspelt, states, seed)
        found = [adapter.result(), again.result()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mergekit_cli, "_HASH_SEED", "1")
        return [*found, mergekit_cli.merge_states(request, states, seed)]


def test_the_seed_fixes_what_it_draws_across_processes(drawn: list[State]) -> None:
    adapter, again, other = drawn
    assert adapter.keys() == small(0).keys()
    assert all(torch.equal(adapter[key], again[key]) for key in adapter)
    differ = [key for key in adapter if not torch.equal(adapter[key], other[key])]
    assert differ, "--random-seed alone does not fix it"


def test_a_key_it_does_not_know_is_ignored_by_it_and_refused_by_us(drawn: list[State]) -> None:
    adapter, misspelt, _ = drawn
    assert all(torch.equal(adapter[key], misspelt[key]) for key in adapter)
    method = merger(SPEC).method
    with pytest.raises(MethodError, match=r"no parameter 'densty'; did you mean 'density'"):
        method.request(Setting((0.7, 0.4), {"densty": 0.1}), 2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("llama")
    base, one, two = trio("llama", folder)
    # One shard or many: mergekit reads either, and so do we.
    state = folders.load(one).state
    write("llama", folder / "shards", max_shard_size="10KB")
    sharded = folders.load(folder / "shards")
    assert sharded.shards > 1
    folders.save(state, sharded, one, force=True)
    (base / "tokenizer.json").write_text("{}")
    (base / "tokenizer_config.json").write_text("{}")
    return base, one, two


def test_merge_types_what_a_free_rider_types(
    llama: tuple[Path, Path, Path], cli: Cli, tmp_path: Path
) -> None:
    spec = "mergekit/ties(density=0.3, via=command-line)"
    arguments = ("--coefficients", "0.7,0.4", "--out", tmp_path / "out", "--json")
    code, text = cli("merge", *llama, "--merger", spec, *arguments)
    assert code == 0, text
    tool = json.loads(text)["tool"]
    assert tool["command"][0] == "mergekit-yaml"
    assert tool["command"][3:5] == ["--random-seed", str(tool["random_seed"])]
    assert tool["environment"]["PYTHONHASHSEED"] == "0"
    assert tool["config"]["merge_method"] == "ties"
    weights = [model["parameters"]["weight"] for model in tool["config"]["models"]]
    assert weights == [0.7, 0.4]
    assert tool["models"] == dict(zip(("./base", "./m0", "./m1"), map(str, llama), strict=True))
    files = contents(tmp_path / "out")
    assert files["tokenizer.json"] == files["tokenizer_config.json"] == b"{}"
    assert files["config.json"] == (llama[0] / "config.json").read_bytes()
    ours = tmp_path / "ours"
    spec = "ties(scope=tensor, density=0.3, normalize=true)"
    assert cli("merge", *llama, "--merger", spec, *arguments[:3], ours)[0] == 0
    a, b = folders.load(tmp_path / "out").state, folders.load(ours).state
    for key, value in b.items():
        assert float((a[key] - value).abs().max()) <= 1e-6 * float(value.abs().max()), key


def test_open_clip_goes_through_its_file(tmp_path: Path) -> None:
    base, one, two = trio("open-clip", tmp_path)
    origin, states = folders.load(base), [folders.load(path).state for path in (one, two)]
    setting = Setting((0.5, 0.5))
    method = merger("mergekit/task-arithmetic(via=command-line)").method
    found, record = method.merge_folders(origin, [one, two], states, setting, generator())
    assert record["command"][0] == "mergekit-pytorch"
    assert record["config"]["base_model"] == "./base.safetensors"
    expected = merger("task-arithmetic").method.merge(
        origin.state, states, setting, None, generator()
    )
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def pretend(monkeypatch: pytest.MonkeyPatch, found: State) -> None:
    monkeypatch.setattr(mergekit_cli, "_run", lambda *_: (found, {}))


def test_what_it_writes_is_all_and_only_what_the_base_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, one, two = small(0), small(1), small(2)
    method = merger("mergekit/task-arithmetic(via=command-line)").method
    right = merger("mergekit/task-arithmetic").method.merge(
        base, [one, two], Setting((1.0, 1.0)), None, generator()
    )
    key = "layer.3.weight"
    spoilt = {
        "left out 1 of 10 tensors: layer.3.weight": {k: v for k, v in right.items() if k != key},
        "wrote a tensor that the base lacks: more": {**right, "more": one[key]},
        "holds NaN": {**right, key: one[key] * float("nan")},
        "has shape": {**right, key: one[key].T},
        "is torch.float64": {**right, key: one[key].double()},
    }
    merge = method.prepare(base, [one, two], None, generator())
    pretend(monkeypatch, right)
    assert torch.equal(merge(Setting((1.0, 1.0)))[key], right[key])
    for words, found in spoilt.items():
        pretend(monkeypatch, found)
        with pytest.raises(Exception, match=words):
            merge(Setting((1.0, 1.0)))


def test_without_its_scripts_the_module_is_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An environment whose console scripts are elsewhere."""
    import sys

    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    command = mergekit_cli._command("mergekit-pytorch")
    assert command[:2] == [str(tmp_path / "python"), "-c"]
    assert "mergekit.scripts.merge_raw_pytorch import main" in command[2]

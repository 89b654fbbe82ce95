"""mergekit through our adapter, in memory: equal to ours by formula, an error where it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_mergers import generator, members, random_base, random_expert, run

from benchmark.api.contracts import Setting
from benchmark.api.methods import MERGERS, merger
from benchmark.core.errors import MethodError, UsageError
from benchmark.core.state import State, compatible
from benchmark.pipeline import plan as planning
from benchmark.pipeline import run as running
from benchmark.pipeline.suite import Suite

pytest.importorskip("mergekit", reason="pip install 'unmergebench[mergekit]'")

NAMES = [name for name in MERGERS.names() if name.startswith("mergekit/")]
OURS = [
    ("mergekit/task-arithmetic", "task-arithmetic"),
    ("mergekit/ties(density=0.3, normalize=false)", "ties(scope=tensor, density=0.3)"),
    ("mergekit/ties(density=0.3)", "ties(scope=tensor, density=0.3, normalize=true)"),
    ("mergekit/breadcrumbs(density=0.6, gamma=0.1)", "breadcrumbs(density=0.6, gamma=0.1)"),
    ("mergekit/model-stock", "model-stock"),
]
#: How many members each merges in a benchmark of two and of four; the others merge any number.
PAIRS = ("mergekit/slerp", "mergekit/nearswap", "mergekit/nuslerp", "mergekit/arcee-fusion")


def flat(seed: int, count: int) -> tuple[State, list[State]]:
    """Without 0-D tensors, on which some of its methods fail."""
    base, experts = members(seed, count)
    base, *experts = (
        {k: v for k, v in state.items() if k != "scalar"} for state in (base, *experts)
    )
    return base, experts


@pytest.mark.parametrize(("theirs", "ours"), OURS)
def test_equals_ours(theirs: str, ours: str) -> None:
    base, experts = flat(21, 2)
    coefficients = (1.0, 1.0) if "stock" in ours else (0.7, 0.4)
    a, b = (run(spec, base, experts, coefficients) for spec in (theirs, ours))
    for key, value in b.items():
        gap = float((a[key].double() - value.double()).abs().max())
        assert gap <= 1e-6 * float(value.double().abs().max()), key


def test_all_of_its_methods_are_here() -> None:
    from mergekit.merge_methods import registered_methods

    theirs = {method.spec.name for method in registered_methods()}
    assert {name.removeprefix("mergekit/").replace("-", "_") for name in NAMES} == theirs
    assert {merger(name).method.method for name in NAMES} == theirs


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_a_method_can_be_merged(name: str, count: int) -> None:
    base, experts = flat(22, count)
    method = merger(name).method
    wanted = 1 if "passthrough" in name else 2 if name in PAIRS else count
    if count != wanted:
        with pytest.raises(MethodError, match=f"takes exactly {wanted} of the models, not {count}"):
            method.search_space(count)
        return
    merge = method.prepare(base, experts, None, generator())
    settings = method.search_space(count)
    assert len(set(map(repr, settings))) == len(settings)
    assert any(all(setting.coefficients) for setting in settings)
    before = torch.get_rng_state()
    for setting in settings:
        merged = merge(setting)
        compatible(merged, base, name)
        assert not torch.equal(merged["w"], base["w"])
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    again = method.prepare(base, experts, None, generator())(settings[-1])
    assert all(torch.equal(merged[key], again[key]) for key in merged)


def test_a_scaled_model_passes_through() -> None:
    base, (expert,) = flat(25, 1)
    (setting, *_) = merger("mergekit/passthrough").method.search_space(1)
    merged = run("mergekit/passthrough", base, [expert], (0.5,))
    assert len(setting.coefficients) == 1
    assert torch.equal(merged["w"], 0.5 * expert["w"])


def test_either_of_two_models_takes_the_part_of_the_base() -> None:
    base, (one, two) = flat(26, 2)
    merge = merger("mergekit/nearswap").method.prepare(base, [one, two], None, generator())
    near, far = (merge(Setting((1.0, 1.0), {"t": 1e-4, "into": i})) for i in (0, 1))
    assert (near["w"] - one["w"]).norm() < (near["w"] - two["w"]).norm()
    assert (far["w"] - two["w"]).norm() < (far["w"] - one["w"]).norm()


def test_where_weights_are_normalised_lambda_is_searched() -> None:
    settings = merger("mergekit/ties").method.search_space(2)
    assert {setting.parameters["lambda"] for setting in settings} == {0.5, 1.0}
    assert len(settings) == 2 * len({setting.coefficients for setting in settings})
    base, experts = flat(27, 2)
    merge = merger("mergekit/ties").method.prepare(base, experts, None, generator())
    half, whole = (merge(Setting((1.0, 1.0), {"lambda": c}))["w"] for c in (0.5, 1.0))
    torch.testing.assert_close(2 * (half - base["w"]), whole - base["w"])
    for spec in ("mergekit/ties(normalize=false)", "mergekit/ties(scale=2)", "mergekit/linear"):
        assert not any(s.parameters for s in merger(spec).method.search_space(2))


def test_draws_follow_the_seed() -> None:
    base, experts = flat(23, 2)
    spec = "mergekit/dare-ties(density=0.5)"
    assert merger(spec).method.stochastic
    one, other = (run(spec, base, experts, (1.0, 1.0), seed) for seed in (1, 2))
    assert not torch.equal(one["w"], other["w"])


def test_its_failures_are_errors_with_its_words() -> None:
    base, experts = members(24, 2)  # holds a 0-D tensor
    for name in ("della", "della-linear"):
        with pytest.raises(MethodError, match=f"mergekit's {name.replace('-', '_')}: "):
            run(f"mergekit/{name}(density=0.5)", base, experts, (1.0, 1.0))
    with pytest.raises(MethodError, match="has no parameter 'gamma'"):
        run("mergekit/ties(gamma=0.1)", base, experts, (1.0, 1.0))
    with pytest.raises(UsageError, match=r"no parameter 'densty'.*density"):
        merger("mergekit/ties(densty=0.2)")
    with pytest.raises(MethodError, match="cannot merge 1 models"):
        run("mergekit/nuslerp", base, experts, (0.0, 1.0))


def test_without_the_tool_a_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mergekit.merge_methods", None)
    with pytest.raises(UsageError, match=r"unmergebench\[mergekit\]"):
        merger("mergekit/ties").method.search_space(2)


def test_missing_tensors_and_wrong_values_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import mergekit.merge_methods as tool

    base = random_base(0)
    experts = [random_expert(base, 1), random_expert(base, 2)]
    real = tool.merge_state_dicts
    spoil = {
        "lacks tensor": lambda found: found.pop("w"),
        "holds NaN": lambda found: found["w"].fill_(float("nan")),
        "differs from its formula": lambda found: found["w"].add_(1.0),
        "has shape": lambda found: found.update(w=found["w"].T),
        "the base has torch.float32": lambda found: found.update(w=found["w"].double()),
    }
    for words, change in spoil.items():

        def broken(*args: object, change=change, **kwargs: object) -> object:  # type: ignore[no-untyped-def]
            found = {k: v.clone() for k, v in real(*args, **kwargs).items()}
            change(found)
            return found

        monkeypatch.setattr(tool, "merge_state_dicts", broken)
        with pytest.raises(Exception, match=words):
            run("mergekit/task-arithmetic", base, experts, (0.7, 0.4))


IGNORED = {
    "mergekit/ties(density=0.3)": "density",
    "mergekit/ties(density=0.3, normalize=false)": "normalize",
    "mergekit/ties(scale=0.5)": "lambda",
    "mergekit/breadcrumbs(density=0.6, gamma=0.2)": "gamma",
    "mergekit/task-arithmetic(normalize=true)": "normalize",
    "mergekit/linear(normalize=false)": "normalize",
    "mergekit/slerp": "t",
}


@pytest.mark.parametrize("spec", IGNORED)
def test_an_option_the_tool_did_not_take_is_noticed(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mergekit.merge_methods as tool

    real, base, experts = tool.merge_state_dicts, *flat(28, 2)

    def deaf(*args: object, parameters: dict[str, object], **kwargs: object) -> object:
        parameters = {k: v for k, v in parameters.items() if k != IGNORED[spec]}
        return real(*args, parameters={**parameters, **instead}, **kwargs)

    # Slerp's position has no default.
    instead = {"t": 0.9} if "slerp" in spec else {}
    setting = Setting((0.7, 0.4), {"t": 0.2} if instead else {})
    method = merger(spec).method
    method.merge(base, experts, setting, None, generator())
    monkeypatch.setattr(tool, "merge_state_dicts", deaf)
    with pytest.raises(MethodError, match="differs from its formula on 'w'"):
        method.merge(base, experts, setting, None, generator())


def test_in_a_suite_its_failure_is_an_error_and_a_limit_a_skip(tmp_path: Path) -> None:
    suite = {
        "name": "mergekit",
        "description": "a linear testbed",
        "testbed": f"{Path(__file__).with_name('plane.py')}:Plane",
        "groups": ({"victim": "signs", "partners": ("order",)},),
        "defenses": ("none",),
        "attacks": ("none",),
        "mergers": ("mergekit/della(density=0.95)", "mergekit/passthrough"),
        "test": 100,
        "validation_rungs": (16, 64),
    }
    cpu = torch.device("cpu")
    cells = running.execute(planning.make(Suite.model_validate(suite), cpu), tmp_path / "run", cpu)
    failed, left_out = cells
    assert failed.status == "error"
    assert failed.protection is None
    assert "candidates can be run (mergekit's della: ValueError: Epsilon must be" in failed.reason
    assert left_out.status == "skipped"
    assert "takes exactly 1 of the models, not 2" in left_out.reason

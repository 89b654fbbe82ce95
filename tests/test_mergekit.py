"""mergekit through our adapter: equal to ours by formula, an error where it fails."""

from __future__ import annotations

import pytest
import torch
from test_mergers import generator, members, random_base, random_expert, run

from benchmark.checkpoint import State, compatible
from benchmark.contracts import Setting
from benchmark.errors import MethodError, UsageError
from benchmark.methods import MERGERS, merger

pytest.importorskip("mergekit", reason="pip install 'unmergebench[mergekit]'")

NAMES = [name for name in MERGERS.names() if name.startswith("mergekit/")]
OURS = [
    ("mergekit/task-arithmetic", "task-arithmetic"),
    ("mergekit/ties(density=0.3, normalize=false)", "ties(scope=tensor, density=0.3)"),
    ("mergekit/ties(density=0.3)", "ties(scope=tensor, density=0.3, normalize=true)"),
    ("mergekit/breadcrumbs(density=0.6, gamma=0.1)", "breadcrumbs(density=0.6, gamma=0.1)"),
    ("mergekit/model-stock", "model-stock"),
]


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


@pytest.mark.parametrize("name", NAMES)
def test_every_method_merges_what_it_says_it_merges(name: str) -> None:
    base, experts = flat(22, 2)
    method = merger(name).method
    merge = method.prepare(base, experts, None, generator())
    settings = [s for s in method.search_space(2) if all(s.coefficients)]
    assert settings
    before = torch.get_rng_state()
    merged = merge(settings[-1])
    compatible(merged, base, name)
    assert not torch.equal(merged["w"], base["w"])
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    again = method.prepare(base, experts, None, generator())(settings[-1])
    assert all(torch.equal(merged[key], again[key]) for key in merged)


def test_draws_follow_the_seed() -> None:
    base, experts = flat(23, 2)
    spec = "mergekit/dare-ties(density=0.5)"
    assert merger(spec).method.stochastic
    one, other = (run(spec, base, experts, (1.0, 1.0), seed) for seed in (1, 2))
    assert not torch.equal(one["w"], other["w"])


def test_its_failures_are_errors_with_its_words() -> None:
    base, experts = members(24, 2)  # holds a 0-D tensor
    with pytest.raises(MethodError, match="mergekit's della: "):
        run("mergekit/della(density=0.5)", base, experts, (1.0, 1.0))
    with pytest.raises(MethodError, match="has no parameter 'gamma'"):
        run("mergekit/ties(gamma=0.1)", base, experts, (1.0, 1.0))
    with pytest.raises(UsageError, match=r"no parameter 'densty'.*density"):
        merger("mergekit/ties(densty=0.2)")
    with pytest.raises(MethodError, match="exactly two"):
        merger("mergekit/slerp").method.search_space(3)


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
    }
    for words, change in spoil.items():

        def broken(*args: object, change=change, **kwargs: object) -> object:  # type: ignore[no-untyped-def]
            found = {k: v.clone() for k, v in real(*args, **kwargs).items()}
            change(found)
            return found

        monkeypatch.setattr(tool, "merge_state_dicts", broken)
        with pytest.raises(Exception, match=words):
            merger("mergekit/task-arithmetic").method.merge(
                base, experts, Setting((0.7, 0.4)), None, generator()
            )

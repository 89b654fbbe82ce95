"""params-d, MergeBarrier and norm-inflation, against their formulas in independent arithmetic."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import FAMILIES, TOLERANCE, drift, generator, perturbed, state_of, tiny

from benchmark.anatomy import Anatomy, AttentionBlock, Linear, MLPBlock, Slot, taps
from benchmark.api.contracts import Victim
from benchmark.api.methods import defense
from benchmark.core.data import Split
from benchmark.core.errors import AssetError, MethodError, UsageError
from benchmark.core.state import ForeignState, State, compatible, digest, rounded, task_vector
from benchmark.evaluation.accuracy import relative_gap
from benchmark.pipeline import plan as planning
from benchmark.pipeline import run as running
from benchmark.pipeline.suite import Suite, load
from defenses.mergebarrier_taylor import chebyshev, taylor

EXACT = ["mergebarrier-attn", "mergebarrier-attn(k=1)", "norm-inflation"]
NO_PARAMS = "perm=identity, scaling=none"


def owner(base: State, expert: State, anatomy: Anatomy, **fields: object) -> Victim:
    empty = dict.fromkeys(("task", "recipe", "fine_tune", "initialise", "features", "module"))
    return Victim(base=base, expert=expert, anatomy=anatomy, **{**empty, **fields})  # type: ignore[arg-type]


@functools.cache
def tiny_victim(name: str) -> tuple[nn.Module, dict[str, Tensor], Victim]:
    model, inputs = tiny(name)
    base = state_of(model)

    def features(state: State, given: Any) -> Tensor:
        return torch.func.functional_call(model, state, kwargs=dict(given))[0]

    n = len(next(iter(inputs.values())))
    task = SimpleNamespace(train=Split(inputs, torch.zeros(n, dtype=torch.int64)))
    expert = perturbed(base, 0.05, 1)
    return (
        model,
        inputs,
        owner(base, expert, Anatomy.of(model), task=task, features=features, module=model),
    )


def attention_state(**fields: object) -> tuple[AttentionBlock, State]:
    """Four query heads of four dimensions on two key/value heads."""
    shapes = {"q": (16, 24), "k": (8, 24), "v": (8, 24), "o": (24, 16)}
    rng = generator(11)
    state = {k: torch.randn(s, generator=rng, dtype=torch.float64) for k, s in shapes.items()}
    linears = {key: Linear(Slot(key)) for key in shapes}
    return AttentionBlock(**linears, heads=4, kv_heads=2, head_dim=4, **fields), state  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", EXACT)
def test_exact_defenses_keep_the_function(spec: str, name: str) -> None:
    model, inputs, victim = tiny_victim(name)
    method = defense(spec).method
    assert method.card.exact
    released = method.protect(victim, generator(0))
    compatible(released, victim.base, spec)
    assert drift(model, victim.expert, released, inputs) <= TOLERANCE


@pytest.mark.parametrize("spec", [*EXACT, "params-d", "params-d(variant=wanda)"])
def test_inputs_are_not_mutated_and_draws_repeat(spec: str) -> None:
    _, _, victim = tiny_victim("open-clip")
    before = digest(victim.base), digest(victim.expert)
    method = defense(spec).method
    released = method.protect(victim, generator(1))
    compatible(released, victim.base, spec)
    assert (digest(victim.base), digest(victim.expert)) == before
    assert digest(method.protect(victim, generator(1))) == digest(released) != before[1]


# MergeBarrier, attention


def test_reflection_is_the_formula_in_numpy() -> None:
    block, state = attention_state()
    victim = owner(state, state, Anatomy("by hand", (block,), ()))
    released = defense("mergebarrier-attn(k=3)").method.protect(victim, generator(0))
    for group in range(2):
        heads = [state["q"].numpy()[4 * h : 4 * h + 4] for h in (2 * group, 2 * group + 1)]
        key = state["k"].numpy()[4 * group : 4 * group + 4]
        left = np.linalg.svd(np.hstack([*heads, key]))[0][:, :3]  # of the stacked Gram's root
        reflection = np.eye(4) - 2 * left @ left.T
        for which, head in enumerate(heads):
            rows = slice(8 * group + 4 * which, 8 * group + 4 * which + 4)
            np.testing.assert_allclose(released["q"].numpy()[rows], reflection @ head, atol=1e-10)
        rows = slice(4 * group, 4 * group + 4)
        np.testing.assert_allclose(released["k"].numpy()[rows], reflection @ key, atol=1e-10)
    assert released["v"] is state["v"]
    assert released["o"] is state["o"]


def test_on_rotary_heads_only_signs_of_pairs_are_left() -> None:
    block, state = attention_state(rotary=True)
    victim = owner(state, state, Anatomy("rotary", (block,), ()))
    method = defense("mergebarrier-attn(k=2)").method
    reflection = method._reflection(state, block)  # type: ignore[attr-defined]
    released = method.protect(victim, generator(0))
    flips = set()
    for key, rows in (("q", 16), ("k", 8)):
        ratio = (released[key] / state[key]).numpy().reshape(rows // 4, 4, 24)
        np.testing.assert_allclose(np.abs(ratio), 1, rtol=1e-10)
        assert (ratio == ratio[:, :, :1]).all() or np.ptp(ratio, axis=2).max() < 1e-10
        np.testing.assert_allclose(ratio[:, :2], ratio[:, 2:], rtol=1e-10)  # pairs (i, i + dh/2)
        flips |= set(np.sign(ratio).ravel())
    assert flips == {-1.0, 1.0}
    group = reflection[0]
    wanted = np.sign([float(group[i, i] + group[i + 2, i + 2]) for i in range(2)])
    found = np.sign((released["k"] / state["k"]).numpy()[:2, 0])
    np.testing.assert_array_equal(found, wanted)


def test_more_directions_than_a_head_has() -> None:
    block, state = attention_state()
    victim = owner(state, state, Anatomy("by hand", (block,), ()))
    with pytest.raises(MethodError, match=r"choose 1\.\.4"):
        defense("mergebarrier-attn(k=5)").method.protect(victim, generator(0))


# Norm inflation


@pytest.mark.parametrize("gated", [False, True])
def test_norms_are_inflated_by_the_factor(gated: bool) -> None:
    block, state = attention_state()
    shapes = {"up": (6, 24), "up.b": (6,), "gate": (6, 24), "down": (24, 6), "down.b": (24,)}
    state |= {k: torch.randn(s, generator=generator(2)).double() for k, s in shapes.items()}
    mlp = MLPBlock(
        up=Linear(Slot("up"), Slot("up.b")),
        down=Linear(Slot("down"), Slot("down.b")),
        gate=Linear(Slot("gate")) if gated else None,
    )
    victim = owner(state, state, Anatomy("by hand", (block,), (mlp,)))
    released = defense("norm-inflation(factor=5)").method.protect(victim, generator(0))
    wanted = {"q": 5, "k": 0.2, "v": 5, "o": 0.2}
    if gated:
        wanted |= {"up": 5, "up.b": 5, "down": 0.2}
    for key, value in state.items():
        torch.testing.assert_close(released[key], wanted.get(key, 1) * value)


def test_under_qk_norm_only_values_are_inflated() -> None:
    block, state = attention_state(qk_norm=(Slot("gain"), Slot("gain")))
    victim = owner(state, state, Anatomy("by hand", (block,), ()))
    released = defense("norm-inflation").method.protect(victim, generator(0))
    torch.testing.assert_close(released["q"], state["q"])
    torch.testing.assert_close(released["v"], 20 * state["v"])


# PaRaMS-D


def test_dare_keeps_the_expectation() -> None:
    rng = generator(0)
    base = {"w": torch.randn(300, 300, generator=rng), "frozen": torch.ones(3)}
    expert = {**base, "w": base["w"] + torch.randn(300, 300, generator=rng)}
    victim = owner(base, expert, Anatomy("none", (), ()))
    released = defense(f"params-d({NO_PARAMS}, drop=0.3)").method.protect(victim, generator(1))
    tau, before = released["w"] - base["w"], expert["w"] - base["w"]
    kept = (tau.abs() > 1e-6).float()
    assert float(kept.mean()) == pytest.approx(0.7, abs=0.01)
    torch.testing.assert_close(tau, kept * before / 0.7, rtol=1e-4, atol=1e-5)
    assert float(tau.sum() / before.sum()) == pytest.approx(1, abs=0.5)
    slope = float((tau * before).sum() / before.square().sum())  # E[τ*] = τ, so the slope is 1
    assert slope == pytest.approx(1, abs=0.01)
    assert released["frozen"] is expert["frozen"]


@pytest.mark.parametrize("name", ["vit", "open-clip"])
def test_wanda_zeroes_a_fifth_of_every_row(name: str) -> None:
    _, _, victim = tiny_victim(name)
    spec = f"params-d({NO_PARAMS}, variant=wanda)"
    released = defense(spec).method.protect(victim, generator(0))
    attention, mlp = victim.anatomy.attention, victim.anatomy.mlp
    linears = [b.linears()[x] for b in attention for x in "qkvo"]
    linears += [x for b in mlp for x in (b.up, b.down)]
    watched = [x for x in linears if taps.watchable(victim.module, x.weight.key)]
    assert len(linears) - len(watched) == (len(attention) if name == "open-clip" else 0)
    keys = {x.weight.key for x in watched}
    with taps.record(victim.module, keys) as seen:
        victim.features(victim.expert, victim.task.train.inputs)
    for linear in watched:
        old, new = (linear.weight.read(s).numpy() for s in (victim.expert, released))
        score = np.abs(old) * np.linalg.norm(seen[linear.weight.key].numpy(), axis=0)
        pruned = math.floor(0.2 * old.shape[1])
        assert ((new == 0).sum(1) == pruned).all()
        assert (new[new != 0] == old[new != 0]).all()
        lost = np.where(new == 0, score, -np.inf).max(1)
        least_kept = np.where(new == 0, np.inf, score).min(1)
        assert (lost <= least_kept * (1 + 1e-6)).all()
    touched = {key for key in released if not torch.equal(released[key], victim.expert[key])}
    assert touched == keys


def test_params_d_is_params_of_the_pruned_expert() -> None:
    _, _, victim = tiny_victim("bert")
    pruned = defense(f"params-d({NO_PARAMS}, variant=wanda)").method.protect(victim, generator(5))
    expected = defense("params").method.protect(replace(victim, expert=pruned), generator(5))
    released = defense("params-d(variant=wanda)").method.protect(victim, generator(5))
    assert digest(released) == digest(expected)


# MergeBarrier, FFN

NORMAL = [lambda x: 0.5 * (1 + math.erf(x / 2**0.5)), lambda x: math.exp(-x * x / 2) / 2.5066282746]


def test_coefficients_are_those_of_gelu_in_closed_form() -> None:
    centers = [-2.5, -0.3, 0.0, 1.7]
    found = taylor("gelu", torch.tensor(centers), 3)
    for i, x in enumerate(centers):
        cdf, pdf = (f(x) for f in NORMAL)
        wanted = [x * cdf, cdf + x * pdf, pdf * (2 - x**2) / 2, pdf * (x**3 - 4 * x) / 6]
        np.testing.assert_allclose(found[:, i].numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize(
    "activation", ["gelu", "quick_gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu"]
)
def test_the_polynomial_meets_the_activation_near_the_center(activation: str) -> None:
    """A wrong coefficient of any order shows: its term is far above the bound."""
    from transformers.activations import ACT2FN

    center = torch.tensor([-1.3, -0.4, 0.7, 2.2], dtype=torch.float64)
    coefficients = taylor(activation, center, 7)
    assert coefficients.shape == (8, 4)
    for offset in (-0.05, 0.02, 0.05):
        value = sum(c * offset**j for j, c in enumerate(coefficients))
        torch.testing.assert_close(value, ACT2FN[activation](center + offset), rtol=0, atol=1e-9)
    second_derivative = coefficients[2]
    assert bool((second_derivative == 0).all()) == (activation == "relu")


@pytest.mark.parametrize("order", [0, 3, 12])
def test_chebyshev_is_numpy_s(order: int) -> None:
    low, high = torch.tensor([-3.0, -0.5, 1.0]), torch.tensor([1.0, 0.5, 9.0])
    found = chebyshev("silu", low, high, order).numpy()
    for i, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        wanted = np.polynomial.Chebyshev.interpolate(
            lambda x: x / (1 + np.exp(-x)), order, domain=[a, b]
        )
        x = np.linspace(a, b, 7)
        np.testing.assert_allclose(
            np.polynomial.polynomial.polyval(x - (a + b) / 2, found[:, i]), wanted(x), atol=1e-9
        )


def test_a_unit_that_never_moves_is_fitted_too() -> None:
    still = torch.tensor([0.3])
    found = chebyshev("gelu", still, still, 12)
    assert float(found[0]) == pytest.approx(float(nn.functional.gelu(still.double())), abs=1e-12)
    assert bool(torch.isfinite(found).all())


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(MethodError, match="wavelet"):
        taylor("wavelet", torch.zeros(1), 2)


class Polynomial(nn.Module):
    """Σ_j a_j·(x − m)^j, written out."""

    def __init__(self, low: Tensor, high: Tensor, order: int) -> None:
        super().__init__()
        self.center = ((low + high) / 2).double()
        self.terms = taylor("gelu", self.center, order)

    def forward(self, x: Tensor) -> Tensor:
        offset = x - self.center
        return sum(a * offset**j for j, a in enumerate(self.terms))  # type: ignore[return-value]


@pytest.mark.parametrize("order", [0, 1, 3])
def test_the_shipped_model_is_the_expert_with_polynomials(order: int) -> None:
    """Against a ViT whose activation modules are exchanged."""
    model, inputs, victim = tiny_victim("vit")
    method = defense(f"mergebarrier-taylor(order={order})").method
    assert method.changes_modules
    assert not method.card.exact
    shipped = method.shipped(victim, method.protect(victim, generator(0)), generator(0))
    assert isinstance(shipped, ForeignState)

    other = copy.deepcopy(model).double()
    other.load_state_dict(victim.expert)
    precise = {key: value.double() for key, value in inputs.items()}
    first_layers = [block.up.weight.key.removesuffix(".fc1.weight") for block in victim.anatomy.mlp]
    ranges: dict[str, Tensor] = {}
    handles = [
        other.get_submodule(f"{mlp}.fc1").register_forward_hook(
            lambda _, args, out, mlp=mlp: ranges.update({mlp: out.flatten(0, 1)})
        )
        for mlp in first_layers
    ]
    plain = other(**precise)[0]
    for handle in handles:
        handle.remove()
    for mlp in first_layers:
        polynomial = Polynomial(ranges[mlp].min(0).values, ranges[mlp].max(0).values, order)
        other.get_submodule(mlp).activation_fn = polynomial
    expected = other(**precise)[0]
    found = shipped.forward(shipped, inputs)
    assert relative_gap(found.double(), expected) <= 1e-4
    assert relative_gap(expected, plain) > 1e-2
    # and the module is as it was
    torch.testing.assert_close(
        victim.features(victim.expert, inputs).double(), plain, rtol=1e-4, atol=1e-4
    )


def test_a_gated_block_gets_the_polynomial_of_its_gate() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    torch.manual_seed(0)
    model = Gated().requires_grad_(False)
    linears = {n: Linear(Slot(f"{n}.weight"), Slot(f"{n}.bias")) for n in ("up", "gate", "down")}
    state = state_of(model)
    inputs = {"x": torch.randn(9, 3)}
    victim = owner(
        state,
        state,
        Anatomy("gated", (), (MLPBlock(**linears, activation="silu"),)),
        task=SimpleNamespace(train=Split(inputs, torch.zeros(9))),
        features=lambda s, given: torch.func.functional_call(model, s, kwargs=dict(given)),
        module=model,
    )
    shipped = defense("mergebarrier-taylor(order=2)").method.shipped(victim, state, generator(0))
    gate, up = model.gate(inputs["x"]), model.up(inputs["x"])
    center = (gate.min(0).values + gate.max(0).values) / 2
    s = torch.sigmoid(center)
    slope = s * (1 + center * (1 - s))
    curvature = s * (1 - s) * (2 + center * (1 - 2 * s))
    d = gate - center
    expected = model.down((center * s + slope * d + curvature / 2 * d**2) * up)
    torch.testing.assert_close(shipped.forward(shipped, inputs), expected)  # type: ignore[attr-defined]


def test_mergers_see_the_base_s_mlp() -> None:
    _, _, victim = tiny_victim("clip")
    released = defense("mergebarrier-taylor").method.protect(victim, generator(0))
    compatible(released, victim.base, "released")
    mlp = {s.key for b in victim.anatomy.mlp for s in (*b.rows(), *b.down.slots())}
    moved = set(task_vector(released, victim.base))
    assert moved == set(task_vector(victim.expert, victim.base)) - mlp
    assert all(released[key] is victim.expert[key] for key in moved)


def test_a_shipped_model_survives_rounding() -> None:
    _, inputs, victim = tiny_victim("vit")
    shipped = defense("mergebarrier-taylor(order=1)").method.shipped(victim, {}, generator(0))
    half = rounded(shipped)
    assert isinstance(half, ForeignState)
    extra = set(half) - set(victim.base)
    assert len(extra) == 2 * len(victim.anatomy.mlp)
    assert all(torch.equal(half[key], half[key].bfloat16().float()) for key in half)
    full = shipped.forward(shipped, inputs)  # type: ignore[attr-defined]
    assert 0 < relative_gap(half.forward(half, inputs), full) < 0.1


def test_trimming_narrows_the_range() -> None:
    method = defense("mergebarrier-taylor(trim=0.1)").method
    values = torch.arange(100.0)[torch.randperm(100, generator=generator(0))][:, None].repeat(1, 2)
    low, high = method._range(values)  # type: ignore[attr-defined]
    assert (low.tolist(), high.tolist()) == ([10, 10], [89, 89])


@pytest.mark.parametrize(
    "spec",
    [
        "params-d(drop=1)",
        "params-d(share=-0.1)",
        "params-d(examples=0)",
        "params-d(low=0)",
        "mergebarrier-attn(k=0)",
        "mergebarrier-taylor(order=-1)",
        "mergebarrier-taylor(trim=0.5)",
        "mergebarrier-taylor(examples=0)",
        "norm-inflation(factor=0)",
    ],
)
def test_out_of_range(spec: str) -> None:
    with pytest.raises(UsageError):
        defense(spec)


def test_utility_in_a_run_is_that_of_the_shipped_model(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    cpu = torch.device("cpu")
    fitted = "mergebarrier-taylor(order=12, fit=chebyshev)"
    specs = ("none", fitted, "mergebarrier-taylor(order=0)")
    suite = Suite.model_validate(
        {
            **load("smoke").model_dump(),
            "defenses": specs,
            "attacks": ("none",),
            "mergers": ("task-arithmetic",),
            "test": 200,
        }
    )
    try:
        running.execute(planning.make(suite, cpu), tmp_path / "run", cpu)
    except AssetError as error:
        pytest.skip(f"the data of `digits` is not to be had here: {error}")
    cells = {cell.defense: cell for cell in running.read_cells(tmp_path / "run")}
    assert {cell.status for cell in cells.values()} == {"ok"}
    plain, curved, flat = (cells[spec] for spec in specs)
    assert plain.utility - curved.utility <= 0.02
    assert plain.utility - flat.utility > 0.1
    # One release for mergers, whatever the polynomials; two models for users.
    assert curved.sha256.released == flat.sha256.released
    assert curved.standalone == flat.standalone
    assert 1e-4 < curved.logit_gap < flat.logit_gap

"""What the attacks on weights alone compute: against formulas, numpy, and locks they must see
through. (Attacks that use data: test_data_attacks.py.)"""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import zoo
from test_attacks import distance, knowledge, lock, setting
from test_posthoc_defenses import owner
from zoo import TOLERANCE, generator, perturbed

from attacks.aga import AnchorGuidedAttack
from attacks.canonical import Canonical
from attacks.coefficients import Coefficients, NominalPin
from attacks.collusion import Collusion
from attacks.gauge_align import GaugeAlign
from attacks.layer_subset import LayerSubset
from attacks.low_rank import LowRank
from attacks.norm_match import NormMatch
from attacks.product_space import ProductSpace
from benchmark.anatomy import gauges
from benchmark.anatomy.alignment import head_sides
from benchmark.anatomy.gauges import align
from benchmark.api.contracts import Access, Attack, Knowledge, Setting
from benchmark.api.methods import defense
from benchmark.core.errors import MethodError, UsageError
from benchmark.core.state import State, compatible, digest, norm, task_vector
from benchmark.merging.linear import Average, TaskArithmetic
from benchmark.merging.ties import Ties

WEIGHTS: list[Attack] = [
    Canonical(), ProductSpace(), NormMatch(), NominalPin(), Coefficients(), LayerSubset(),
    LayerSubset(keep="attention"), LayerSubset(keep="mlp"), LowRank(), LowRank(mode="signs"),
    Collusion(), Collusion(mode="locate"),
]  # fmt: skip


def merged(attack: Attack, released: State, name: str, *coefficients: float) -> State:
    """Task arithmetic of the victim and a partner, the way the attack wants it done."""
    _, _, _, anatomy = setting(name)
    base, victim, partners = attack.members(released, knowledge(name), generator(0))
    merger = attack.merging(TaskArithmetic(), anatomy)
    return merger.merge(base, [victim, *partners], Setting(coefficients), None, generator(0))


# --- canonical ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_canonical_form_is_the_same_whatever_the_lock(name: str) -> None:
    model, inputs = zoo.tiny(name)
    base, expert, partner, anatomy = setting(name)
    plain = Canonical().members(expert, knowledge(name), generator(0))
    bound = 5 * TOLERANCE  # rounding an ill-conditioned lock
    for kind in ("general", "scaling"):
        released = lock(expert, anatomy, kind, heads=True)
        members = Canonical().members(released, knowledge(name), generator(0))
        assert distance(released, expert, base, expert) > 100
        assert distance(members.released, plain.released, base, expert) < 0.01
        assert zoo.drift(model, released, members.released, inputs) <= bound
        assert distance(members.base, plain.base, base, expert) < 1e-6
    for before, after in ((base, plain.base), (partner, plain.partners[0])):
        assert zoo.drift(model, before, after, inputs) <= bound
        assert digest(before) != digest(after)
    # One gauge: no farther from each other than the members were (independent τ: √2).
    for other in (plain.base, *plain.partners):
        assert distance(plain.released, other, base, expert) < 2


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_canonical_form_does_not_lean_on_the_base(name: str) -> None:
    base, expert, partner, anatomy = setting(name)
    plain = Canonical().members(expert, knowledge(name), generator(0))
    moved = lock(base, anatomy, "general", seed=9, heads=True)
    own = Knowledge(Access.WEIGHTS, moved, [partner], anatomy)
    members = Canonical().members(expert, own, generator(0))
    assert digest(members.released) == digest(plain.released)
    assert digest(members.partners[0]) == digest(plain.partners[0])
    assert distance(members.base, plain.base, base, expert) < 0.01


def test_canonical_refuses_a_head_without_full_rank() -> None:
    _, expert, _, anatomy = setting("vit")
    dead, block = dict(expert), anatomy.attention[0]
    value = block.read(dead, "v").clone()
    value[0, 1] = 0
    block.write(dead, "v", value)
    with pytest.raises(MethodError, match="full rank"):
        Canonical().members(dead, knowledge("vit"), generator(0))


# --- product-space --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_product_space_merges_a_locked_expert_like_an_open_one(name: str) -> None:
    model, inputs = zoo.tiny(name)
    base, expert, partner, anatomy = setting(name)
    plain = merged(ProductSpace(), expert, name, 0.7, 0.7)
    compatible(plain, base, "merged")
    for kind in ("general", "scaling"):
        locked = merged(ProductSpace(), lock(expert, anatomy, kind, heads=True), name, 0.7, 0.7)
        # Products are kept in float32, and what a lock scales up is rounded there.
        assert zoo.drift(model, plain, locked, inputs) <= 1e-2
        assert zoo.drift(model, plain, base, inputs) > 10 * zoo.drift(model, plain, locked, inputs)
    alone = merged(ProductSpace(), lock(expert, anatomy, "scaling"), name, 1.0, 0.0)
    assert zoo.drift(model, expert, alone, inputs) <= 10 * TOLERANCE
    alone = merged(ProductSpace(), expert, name, 0.0, 1.0)
    assert zoo.drift(model, partner, alone, inputs) <= 10 * TOLERANCE


@pytest.mark.parametrize("part", ["qk", "vo"])
def test_product_space_is_the_best_approximation_of_the_merged_product(part: str) -> None:
    base, _, partner, anatomy = setting("vit")
    expert = perturbed(base, 0.2, 1)  # so far away that rank dh has to cut something
    block, size = anatomy.attention[1], anatomy.attention[1].head_dim

    def product(state: State, head: int = 3) -> np.ndarray:
        x, y = (side[head].numpy() for side in head_sides(block, state, part))  # type: ignore[arg-type]
        return x.T @ y

    p0, p1, p2 = (product(state) for state in (base, expert, partner))
    wanted = p0 + 0.7 * (p1 - p0) + 0.4 * (p2 - p0)
    u, s, vt = np.linalg.svd(wanted)
    best = (u[:, :size] * s[:size]) @ vt[:size]
    found = product(merged(ProductSpace(), expert, "vit", 0.7, 0.4))
    assert np.linalg.norm(found - best) < 1e-3 * np.linalg.norm(wanted - best)
    assert np.linalg.norm(wanted - best) > 5e-3 * np.linalg.norm(wanted)


# --- norms, coefficients, parts -------------------------------------------------------------------


def test_norm_match_is_its_formula_and_leaves_ordinary_experts_alone() -> None:
    base, expert, partner, anatomy = setting("bert")
    assert digest(NormMatch().recover(expert, knowledge("bert"), generator(0))) == digest(expert)
    inflated = {k: base[k] + 20 * (v - base[k]) for k, v in expert.items()}
    two = [partner, perturbed(base, 0.06, 7)]
    own = Knowledge(Access.WEIGHTS, base, two, anatomy)
    found = NormMatch(slack=1.5).recover(inflated, own, generator(0))
    for key, value in found.items():
        if not value.is_floating_point():
            continue
        tau = (inflated[key] - base[key]).double()
        mean = np.mean([float((p[key] - base[key]).double().norm()) for p in two])
        wanted = base[key] + 1.5 * mean / tau.norm() * tau
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)
    undone = NormMatch(slack=1.0).recover(inflated, knowledge("bert"), generator(0))
    assert distance(undone, expert, base, expert) < 0.05
    short = {k: base[k] + 0.1 * (v - base[k]) for k, v in expert.items()}
    assert digest(NormMatch().recover(short, own, generator(0))) == digest(short)
    stretched = NormMatch(slack=1.0, always=True).recover(short, knowledge("bert"), generator(0))
    assert distance(stretched, expert, base, expert) < 0.05


def test_coefficients_replace_the_search_space() -> None:
    anatomy = setting("vit")[3]

    def space(attack: Coefficients, merger: object, members: int) -> list[tuple[float, ...]]:
        return [s.coefficients for s in attack.merging(merger, anatomy).search_space(members)]  # type: ignore[arg-type]

    grid = (0.2, 0.4, 0.7)
    pinned = space(NominalPin(), TaskArithmetic(), 3)
    assert pinned == [(1.0, a, b) for a in grid for b in grid]
    free = space(Coefficients(grid=(0.3, 1.0)), TaskArithmetic(), 2)
    assert sorted(free) == sorted(itertools.product((0.3, 1.0), (0.3, 1.0)))
    assert len(space(Coefficients(), TaskArithmetic(), 3)) == 4 * 3 * 3
    ties = Coefficients(grid=(0.5,), pin=True).merging(Ties(), anatomy).search_space(2)
    wanted = {repr(s.parameters) for s in Ties().search_space(2)}
    assert sorted(repr(s.parameters) for s in ties) == sorted(wanted)
    assert {s.coefficients for s in ties} == {(1.0, 0.5)}
    with pytest.raises(MethodError, match="fixed"):
        space(NominalPin(), Average(), 2)
    with pytest.raises(MethodError, match="shorter grid"):
        space(Coefficients(), TaskArithmetic(), 6)


def test_layer_subset_keeps_exactly_its_tensors() -> None:
    base, expert, partner, anatomy = setting("bert")
    in_attention = {k for k in base if ".attention.self." in k or ".attention.output.dense" in k}
    in_mlp = {
        k for k in base if ".intermediate." in k or ("output.dense" in k and k not in in_attention)
    }
    assert in_attention
    assert in_mlp
    for keep, dropped in (("attention", in_mlp), ("mlp", in_attention)):
        found = LayerSubset(keep=keep).recover(expert, knowledge("bert"), generator(0))  # type: ignore[arg-type]
        for key, value in found.items():
            assert torch.equal(value, (base if key in dropped else expert)[key])
    # One tensor that moved three times as far as the partner's, one that only the victim moved.
    far, only = "encoder.layer.1.output.dense.weight", "pooler.dense.weight"
    released = {**expert, far: base[far] + 3 * (expert[far] - base[far])}
    other = Knowledge(Access.WEIGHTS, base, [{**partner, only: base[only]}], anatomy)
    found = LayerSubset().recover(released, other, generator(0))
    for key, value in found.items():
        assert torch.equal(value, (base if key in (far, only) else released)[key])
    found = LayerSubset(slack=4.0).recover(released, knowledge("bert"), generator(0))
    assert digest(found) == digest(released)


def test_low_rank_is_numpy_s_truncation_and_the_signs() -> None:
    base, expert, _, _ = setting("gpt2")
    cut = LowRank(share=0.25).recover(expert, knowledge("gpt2"), generator(0))
    signs = LowRank(mode="signs").recover(expert, knowledge("gpt2"), generator(0))
    for key, delta in task_vector(expert, base).items():
        if delta.ndim == 1:
            assert torch.equal(cut[key], expert[key])
            assert torch.equal(signs[key], expert[key])
            continue
        tau = delta.double().numpy()
        u, s, vt = np.linalg.svd(tau, full_matrices=False)
        rank = round(0.25 * len(s))
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        found = (cut[key] - base[key]).double().numpy()
        error = np.linalg.norm(tau - found)
        assert error == pytest.approx(np.sqrt((s[rank:] ** 2).sum()), rel=1e-3)  # Eckart–Young
        np.testing.assert_allclose(found, best, atol=1e-3 * np.abs(tau).max())
        wanted = np.sign(tau) * np.abs(tau).mean(1, keepdims=True)
        found = (signs[key] - base[key]).double().numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-6)


# --- collusion, composites ------------------------------------------------------------------------


def test_two_releases_tell_more_than_one() -> None:
    base, expert, _, anatomy = setting("bert")
    first, second = (
        defense("params-d(drop=0.5)").method.protect(owner(base, expert, anatomy), generator(s))
        for s in (1, 2)
    )
    own = knowledge("bert", second=lambda: second)
    best = align(expert, base, anatomy)
    both = Collusion().recover(first, own, generator(0))
    one = align(first, base, anatomy)
    # Dropping half doubles the rest: noise as long as τ, and 1/√2 of it in the mean of two.
    assert distance(one, best, base, expert) == pytest.approx(1, abs=0.1)
    assert distance(both, best, base, expert) == pytest.approx(0.5**0.5, abs=0.1)
    with pytest.raises(MethodError, match="second release"):
        Collusion().recover(first, knowledge("bert"), generator(0))


def test_comparing_two_releases_locates_what_is_no_gauge() -> None:
    base, expert, _, anatomy = setting("bert")
    noisy = ("encoder.layer.0.intermediate.dense.weight", "pooler.dense.weight")

    def release(seed: int) -> State:
        rng = generator(seed)
        spoiled = dict(expert)
        for key in noisy:
            spoiled[key] = expert[key] + 0.3 * base[key].std() * torch.randn(
                base[key].shape, generator=rng
            )
        return lock(spoiled, anatomy, "general", seed)

    own = knowledge("bert", second=lambda: release(2))
    found = Collusion(mode="locate").recover(release(1), own, generator(0))
    best = gauges.of(anatomy, base).subset(gauges.BLOCKS).align(expert, base)
    for key, value in found.items():
        if key in noisy:
            assert torch.equal(value, base[key])
        elif value.is_floating_point():
            moved = norm({key: best[key] - base[key]})
            assert norm({key: value - best[key]}) <= 0.05 * moved + 1e-6


def wider(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value


COMPOSITES = {
    "params+mergelock": 0.03,
    "params(scaling=nonsymmetric)+mergelock": 0.03,
    "params-d+mergelock": 0.03,
    "mergelock": 0.07,  # after an anchor-repulsive expert, which ends 7 % from the base
}


@pytest.mark.parametrize("spec", COMPOSITES)
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "open-clip", "qwen2", "qwen3"])
def test_gauge_align_holds_on_composites_and_far_experts(name: str, spec: str) -> None:
    model, inputs = zoo.tiny(name)
    base, _, _, anatomy = setting(name)
    expert = perturbed(base, COMPOSITES[spec], 1)
    released = defense(spec).method.protect(owner(base, expert, anatomy), generator(0))
    aligned = GaugeAlign().recover(released, knowledge(name), generator(0))
    anchored = AnchorGuidedAttack().recover(released, knowledge(name), generator(0))
    # Two locks on top of each other amplify the rounding of a float32 forward pass up to 3e-3; that
    # is the release's own. What the stored weights mean is compared in float64.
    wide = copy.deepcopy(model).double()
    doubles = [{k: wider(v) for k, v in s.items()} for s in (released, aligned, anchored, inputs)]
    before, after, changed, images = doubles
    assert zoo.drift(wide, before, after, images) <= TOLERANCE
    assert zoo.drift(wide, before, changed, images) > 10 * zoo.drift(wide, before, after, images)
    near, far = (distance(s, expert, base, expert) for s in (aligned, anchored))
    assert near < far


# --- what every attack must hold ------------------------------------------------------------------


@pytest.mark.parametrize("attack", WEIGHTS, ids=str)
@pytest.mark.parametrize("name", ["bert", "open-clip", "qwen2"])
def test_inputs_are_never_touched_and_every_key_comes_back(name: str, attack: Attack) -> None:
    base, expert, partner, anatomy = setting(name)
    assert attack.access is Access.WEIGHTS
    released = lock(expert, anatomy, "scaling")
    second = lock(expert, anatomy, "scaling", seed=5)
    before = [digest(s) for s in (base, released, partner, second)]
    runs = []
    for _ in range(2):
        own = knowledge(name, second=lambda: second)
        members = attack.members(released, own, generator(0))
        for state in (members.base, members.released, *members.partners):
            compatible(state, base, str(attack))
        runs.append(digest(members.released))
    assert runs[0] == runs[1], "all randomness from rng"
    assert [digest(s) for s in (base, released, partner, second)] == before


@pytest.mark.parametrize("attack", [NormMatch(), LayerSubset()], ids=str)
def test_what_compares_with_partners_needs_one(attack: Attack) -> None:
    base, expert, _, anatomy = setting("bert")
    with pytest.raises(UsageError, match="needs a partner"):
        attack.recover(expert, Knowledge(Access.WEIGHTS, base, [], anatomy), generator(0))


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (NormMatch, {"slack": 0.0}, "slack must be > 0"),
        (LayerSubset, {"slack": -1.0}, "slack must be > 0"),
        (Collusion, {"slack": 0.0}, "slack must be > 0"),
        (LowRank, {"share": 0.0}, "share must be in"),
        (LowRank, {"share": 1.1}, "share must be in"),
        (Coefficients, {"grid": ()}, "grid needs values"),
        (NominalPin, {"grid": (0.0, 0.5)}, "grid needs values"),
    ],
)
def test_parameters_out_of_range(cls: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**values)

"""More attacks on weights alone: against formulas, and tricks they must see through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from additive import AlongNull, CancellingPairs, ConstantUnits, SilentUnits
from scipy.linalg import orthogonal_procrustes
from test_attacks import distance, knowledge, lock, recover, setting
from test_posthoc_defenses import owner
from test_trained_on_digits import bench
from zoo import TOLERANCE, generator, perturbed

from attacks.gauge_align import GaugeAlign
from attacks.low_rank import LowRank
from attacks.project_out import ProjectOut
from attacks.rotation_match import RotationMatch, polar
from attacks.spectral_clean import SpectralClean
from attacks.subtract_scaled import SubtractScaled
from benchmark.anatomy import Anatomy, apply_qk, apply_vo, permute_units, within
from benchmark.anatomy.alignment import head_sides
from benchmark.anatomy.matrices import matrices
from benchmark.api.contracts import Access, Attack, Defense, Knowledge, Setting
from benchmark.api.methods import defense
from benchmark.core.errors import UsageError
from benchmark.core.state import State, compatible, digest
from benchmark.merging.linear import TaskArithmetic
from defenses.full_gauge import FullGauge

WEIGHTS: list[Attack] = [
    RotationMatch(), RotationMatch(rescale=True), SpectralClean(), SpectralClean(mode="clip"),
    SubtractScaled(), SubtractScaled(of="residual"), ProjectOut(), ProjectOut("unexplained"),
]  # fmt: skip
TRICKS: list[Defense] = [AlongNull(), CancellingPairs(), ConstantUnits(), SilentUnits()]

# --- rotation-match -------------------------------------------------------------------------------


def turned(state: State, anatomy: Anatomy, factor: bool = False, seed: int = 0) -> State:
    """Rotations (or signs) that the gauge group has, on every head; hidden units renamed."""
    rng, out = generator(seed), dict(state)
    for block in anatomy.attention:
        shape = (block.kv_heads, block.head_dim, block.head_dim)
        draw = torch.randn(2, *shape, generator=rng, dtype=torch.float64)
        qk, vo = polar(within(block, draw[0])), polar(draw[1])
        if factor:
            vo = 3 * vo
            qk = qk if block.qk_norm is not None else qk / 5
        apply_qk(out, block, qk)
        apply_vo(out, block, vo)
    for mlp in anatomy.mlp:
        permute_units(out, mlp, torch.randperm(mlp.width(out), generator=rng))
    return out


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_rotation_match_undoes_rotations_and_no_more(name: str) -> None:
    model, inputs = zoo.tiny(name)
    base, expert, _, anatomy = setting(name)
    plain = recover(RotationMatch(), expert, name)
    released = turned(expert, anatomy)
    assert distance(released, expert, base, expert) > 5
    found = recover(RotationMatch(), released, name)
    assert distance(found, plain, base, expert) < 0.01
    assert zoo.drift(model, released, found, inputs) <= TOLERANCE
    assert distance(plain, expert, base, expert) < 0.3
    scaled = recover(RotationMatch(rescale=True), turned(expert, anatomy, factor=True), name)
    # A factor weighs Q against K otherwise, so that another rotation is the best one.
    assert distance(scaled, plain, base, expert) < 0.15
    # The published match knows no scaling and no general matrix: gauge-align does.
    released = lock(expert, anatomy, "scaling")
    for attack in (RotationMatch(), RotationMatch(rescale=True)):
        found = recover(attack, released, name)
        assert zoo.drift(model, released, found, inputs) <= TOLERANCE
        assert distance(found, expert, base, expert) > 10
    assert distance(recover(GaugeAlign(), released, name), expert, base, expert) < 0.5


@pytest.mark.parametrize("part", ["qk", "vo"])
def test_rotation_match_is_scipy_s_procrustes(part: str) -> None:
    base, expert, _, anatomy = setting("bert")
    released = lock(expert, anatomy, "general")
    found = recover(RotationMatch(), released, "bert")
    for block in anatomy.attention:
        own, anchor, after = (
            [np.concatenate(sides, 1) for sides in zip(*head_sides(block, s, part), strict=True)]  # type: ignore[arg-type]
            for s in (released, base, found)
        )
        for x, x0, y in zip(own, anchor, after, strict=True):
            rotation, _ = orthogonal_procrustes(x.T, x0.T)
            wanted = rotation.T @ x
            assert np.linalg.norm(y - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_polar_leaves_what_nothing_turns() -> None:
    dead = torch.zeros(1, 4, 4, dtype=torch.float64)
    dead[0, 0, 1], dead[0, 1, 0] = -2, 2
    found = polar(dead)[0]
    assert torch.allclose(found @ found.T, torch.eye(4, dtype=torch.float64))
    assert torch.allclose(found[2:, 2:], torch.eye(2, dtype=torch.float64))
    assert torch.allclose(polar(torch.zeros(1, 3, 3)), torch.eye(3))


# --- a State as matrices --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*zoo.FAMILIES, "llama", "t5-gated", "resnet", "convnext"])
def test_every_number_is_in_one_matrix_and_comes_back(name: str) -> None:
    model, _ = zoo.tiny(name)
    state = zoo.state_of(model)
    found = matrices(state, Anatomy.of(model))
    numbers = sum(value.numel() for value in state.values() if value.is_floating_point())
    assert sum(matrix.read(state).numel() for matrix in found) == numbers
    copy = {k: torch.zeros_like(v) if v.is_floating_point() else v for k, v in state.items()}
    for matrix in found:
        matrix.write(copy, matrix.read(state))
    assert digest(copy) == digest(state)


# --- spectral-clean -------------------------------------------------------------------------------


def weight(state: State, name: str = "bert") -> np.ndarray:
    """[W | b] of the first Linear into an MLP."""
    up = setting(name)[3].mlp[0].up
    assert up.bias is not None
    return np.concatenate(
        [up.weight.read(state).double(), up.bias.read(state).double()[:, None]], axis=1
    )


@pytest.mark.parametrize("mode", ["remove", "clip"])
def test_spectral_clean_is_numpy_s_cut(mode: str) -> None:
    base, expert, partner, anatomy = setting("bert")
    up, rng = anatomy.mlp[0].up, generator(3)
    assert up.bias is not None
    spoiled = dict(expert)
    rows, columns = up.weight.read(expert).shape
    for size in (30.0, 500.0):
        left, right = torch.randn(rows, generator=rng), torch.randn(columns + 1, generator=rng)
        spike = size * torch.outer(left / left.norm(), right / right.norm())
        up.weight.write(spoiled, up.weight.read(spoiled) + spike[:, :-1])
        up.bias.write(spoiled, up.bias.read(spoiled) + spike[:, -1])
    found = recover(SpectralClean(slack=2.0, mode=mode), spoiled, "bert")  # type: ignore[arg-type]
    tau, other = (weight(state) - weight(base) for state in (spoiled, partner))
    edge = 2 * np.linalg.norm(other, 2)
    u, s, v = np.linalg.svd(tau, full_matrices=False)
    assert (s > edge).sum() == 2
    wanted = (u * np.where(s > edge, edge if mode == "clip" else 0, s)) @ v
    np.testing.assert_allclose(weight(found) - weight(base), wanted, atol=1e-4)
    inside = {slot.key for slot in up.slots()}
    assert all(found[k] is expert[k] for k in expert if k not in inside)


def test_spectral_clean_leaves_ordinary_experts_alone() -> None:
    for name in ("bert", "qwen2", "gpt2"):
        base, expert, partner, anatomy = setting(name)
        assert digest(recover(SpectralClean(), expert, name)) == digest(expert)
        # What no partner moved has no ordinary strength.
        still = Knowledge(Access.WEIGHTS, base, [base, base], anatomy)
        assert digest(SpectralClean().recover(expert, still, generator(0))) == digest(expert)
        # The strongest partner counts.
        far = {k: base[k] + 5 * (v - base[k]) for k, v in expert.items()}
        two = Knowledge(Access.WEIGHTS, base, [partner, perturbed(base, 0.06, 7)], anatomy)
        assert digest(SpectralClean().recover(far, two, generator(0))) == digest(far)
        assert digest(recover(SpectralClean(), far, name)) != digest(far)


@pytest.mark.parametrize("trick", TRICKS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_tricks_stand_out_of_the_spectrum(name: str, trick: Defense) -> None:
    model, inputs = zoo.tiny(name)
    base, expert, _, anatomy = setting(name)
    released = trick.protect(owner(base, expert, anatomy), generator(0))
    found = recover(SpectralClean(), released, name)
    assert distance(released, expert, base, expert) > 20
    aligned = distance(recover(GaugeAlign(), released, name), expert, base, expert)
    if isinstance(trick, AlongNull):
        assert aligned < 1, "the null direction of a LayerNorm is a gauge"
    else:
        assert aligned > 20, "no alignment sees them"
    assert distance(found, expert, base, expert) < 2
    moved, kept = (zoo.drift(model, expert, state, inputs) for state in (base, found))
    assert kept < moved, "a unit given up costs something in a model of few"
    if isinstance(trick, AlongNull):
        assert zoo.drift(model, expert, released, inputs) < 10 * TOLERANCE
        assert kept < moved / 3


@pytest.mark.slow
@pytest.mark.parametrize("trick", TRICKS, ids=lambda t: type(t).__name__)
def test_tricks_wreck_a_merge_and_are_removed(
    trick: Defense, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On trained models: what the tricks cost their owner, do to a merge, and leave of one."""
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    digits = bench(home / "trained")
    base, anatomy = digits.base.state(), digits.anatomy
    for tasks in (("mnist-low", "digits-high"), ("digits-low", "mnist-high")):
        expert, other = (digits.expert(task).state() for task in tasks)
        own = Knowledge(Access.WEIGHTS, base, [other], anatomy)

        def right(state: State, *asked: str) -> float:
            rows = range(300)
            bits = [digits.evaluator.correct(state, task, "test", rows) for task in asked]
            return float(np.mean(bits))

        def merged(state: State, other: State = other, asked: tuple[str, str] = tasks) -> float:
            half = TaskArithmetic().merge(
                base, [state, other], Setting((0.5, 0.5)), None, generator(0)
            )
            return right(half, *asked)

        assert digest(SpectralClean().recover(expert, own, generator(0))) == digest(expert)
        for seed in (0, 1):
            released = trick.protect(owner(base, expert, anatomy), generator(seed))
            assert right(released, tasks[0]) >= right(expert, tasks[0]) - 0.01
            assert merged(released) < merged(expert) - 0.3
            aligned = GaugeAlign().recover(released, own, generator(0))
            if isinstance(trick, AlongNull):
                assert merged(aligned) >= merged(expert) - 0.02, "the null direction is a gauge"
            else:
                assert merged(aligned) < merged(expert) - 0.3
            found = SpectralClean().recover(released, own, generator(0))
            assert right(found, tasks[0]) >= right(expert, tasks[0]) - 0.01
            assert merged(found) >= merged(expert) - 0.02
            for spec in ("params", "full-gauge"):
                locked = defense(spec).method.protect(
                    owner(base, released, anatomy), generator(seed)
                )
                aligned = GaugeAlign().recover(locked, own, generator(0))
                found = SpectralClean().recover(aligned, own, generator(0))
                assert merged(found) >= merged(expert) - 0.03


# --- subtract-scaled, project-out -----------------------------------------------------------------


def test_subtract_scaled_is_its_formula() -> None:
    base, expert, _, _ = setting("bert")
    tau = weight(expert) - weight(base)
    found = weight(recover(SubtractScaled(scale=0.3), expert, "bert")) - weight(base)
    np.testing.assert_allclose(found, 0.7 * tau, atol=1e-6)
    back = recover(SubtractScaled(scale=-1), expert, "bert")
    assert distance(back, expert, base, expert) == pytest.approx(1, abs=1e-3)
    u, s, v = np.linalg.svd(tau, full_matrices=False)
    s[round(0.25 * len(s)) :] *= 0.4
    cut = recover(SubtractScaled(scale=0.6, of="residual", share=0.25), expert, "bert")
    np.testing.assert_allclose(weight(cut) - weight(base), (u * s) @ v, atol=1e-6)
    # All of the residual: what low-rank leaves, of a matrix without a bias.
    key = "embeddings.word_embeddings.weight"
    whole = recover(SubtractScaled(scale=1, of="residual"), expert, "bert")
    torch.testing.assert_close(whole[key], recover(LowRank(), expert, "bert")[key])


def test_project_out_removes_what_works_against_the_partners() -> None:
    base, expert, partner, anatomy = setting("bert")
    other = weight(partner) - weight(base)
    tau = weight(expert) - weight(base)
    found = weight(recover(ProjectOut(), expert, "bert")) - weight(base)
    for before, after, against in zip(tau, found, other, strict=True):
        inner = before @ against
        wanted = before - min(0, inner) / (against @ against) * against
        np.testing.assert_allclose(after, wanted, atol=1e-6)
        assert after @ against >= -1e-6
    # A perturbation along −τ_j is gone; what agrees stays.
    spoiled = {k: v - 4 * (partner[k] - base[k]) for k, v in expert.items()}
    found = recover(ProjectOut(), spoiled, "bert")
    assert distance(found, expert, base, expert) < 0.5 < distance(spoiled, expert, base, expert)
    same = Knowledge(Access.WEIGHTS, base, [expert, base], anatomy)
    kept = ProjectOut().recover(expert, same, generator(0))
    assert distance(kept, expert, base, expert) < 1e-6


def test_project_out_keeps_what_the_partners_data_excites() -> None:
    base, expert, partner, anatomy = setting("bert")
    two = [partner, perturbed(base, 0.06, 7)]
    own = Knowledge(Access.WEIGHTS, base, two, anatomy)
    found = ProjectOut("unexplained", share=0.25).recover(expert, own, generator(0))
    stacked = np.concatenate([weight(state) - weight(base) for state in two])
    v = np.linalg.svd(stacked, full_matrices=False)[2]
    v = v[: round(0.25 * len(v))]
    tau = weight(expert) - weight(base)
    np.testing.assert_allclose(weight(found) - weight(base), tau @ v.T @ v, atol=1e-6)
    assert torch.equal(found["embeddings.LayerNorm.bias"], expert["embeddings.LayerNorm.bias"])


# --- what every attack must hold ------------------------------------------------------------------


@pytest.mark.parametrize("attack", WEIGHTS, ids=str)
@pytest.mark.parametrize("name", ["bert", "open-clip", "qwen2"])
def test_inputs_are_never_touched_and_every_key_comes_back(name: str, attack: Attack) -> None:
    base, expert, partner, anatomy = setting(name)
    assert attack.access is Access.WEIGHTS
    released = lock(expert, anatomy, "scaling")
    before = [digest(state) for state in (base, released, partner)]
    runs = []
    for _ in range(2):
        found = attack.members(released, knowledge(name), generator(0))
        compatible(found.released, base, str(attack))
        assert digest(found.base) == before[0]
        runs.append(digest(found.released))
    assert runs[0] == runs[1]
    assert [digest(state) for state in (base, released, partner)] == before


@pytest.mark.parametrize("attack", [SpectralClean(), ProjectOut()], ids=str)
def test_what_compares_with_partners_needs_one(attack: Attack) -> None:
    base, expert, _, anatomy = setting("bert")
    with pytest.raises(UsageError, match="needs a partner"):
        attack.recover(expert, Knowledge(Access.WEIGHTS, base, [], anatomy), generator(0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SpectralClean(slack=0.0), "slack must be > 0"),
        (lambda: ProjectOut(share=0.0), "share must be in"),
        (lambda: SubtractScaled(scale=0.0), "scale must be within"),
        (lambda: SubtractScaled(scale=3.0), "scale must be within"),
        (lambda: SubtractScaled(share=1.5), "share must be in"),
    ],
)
def test_parameters_out_of_range(build: Callable[[], Attack], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("trick", TRICKS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("name", ["vit", "bert", "gpt2"])
def test_a_trick_does_not_hide_a_lock(name: str, trick: Defense) -> None:
    """What a few columns hold, however much it is, must not bend the alignment of all others."""
    base, expert, _, anatomy = setting(name)
    spoiled = trick.protect(owner(base, expert, anatomy), generator(0))
    released = FullGauge().protect(owner(base, spoiled, anatomy), generator(1))
    found = recover(SpectralClean(), recover(GaugeAlign(), released, name), name)
    assert distance(released, expert, base, expert) > 20
    assert distance(found, expert, base, expert) < 2

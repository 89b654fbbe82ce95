"""What each attack undoes, what it keeps, and what it costs an expert that nobody defended."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest
import torch
import zoo
from zoo import TOLERANCE, generator, invertible, perturbed

from attacks.aga import AnchorGuidedAttack
from attacks.dropout_pruning import DropoutPruning
from attacks.finetune_recovery import FinetuneRecovery
from attacks.gauge_align import GaugeAlign
from attacks.head_norm import HeadNorm
from attacks.none import NoAttack
from attacks.weight_matching import WeightMatching
from benchmark.anatomy import (
    Anatomy,
    apply_qk,
    apply_vo,
    gauges,
    permute_heads,
    permute_units,
    within,
)
from benchmark.api.contracts import Access, Attack, Knowledge
from benchmark.api.recipe import Recipe
from benchmark.core.data import Split, Task
from benchmark.core.errors import AccessError, UsageError
from benchmark.core.state import State, compatible, digest, norm, task_vector

EXACT = [
    NoAttack(),
    WeightMatching(),
    WeightMatching(anchor="partner", cost="cosine"),
    HeadNorm(),
    HeadNorm(granularity="head"),
    GaugeAlign(),
]
WEIGHTS = [
    *EXACT,
    AnchorGuidedAttack(),
    DropoutPruning(),
    DropoutPruning(p=0.2, mode="magnitude"),
]
LOCKS = ("general", "scaling")
#: A random τ has the share dh/(2d) of its energy in Q and K along their gauge (dh² of 2·dh·d
#: directions per head), likewise V and O. Alignment removes that share; the function does not need
#: it. The rest of the bound, 1.2, is for the key bias and the spread of a random draw.
ALIGNED = 1.2 * (1 / 16) ** 0.5
#: The four unconstrained fits of the anchor-guided attack remove twice as much: dh/d.
ANCHORED = 1.2 * (1 / 8) ** 0.5


@functools.cache
def setting(name: str) -> tuple[State, State, State, Anatomy]:
    """Base, expert, partner, anatomy. The experts are 3 % away from the base in every tensor."""
    model, _ = zoo.tiny(name)
    base = zoo.state_of(model)
    return base, perturbed(base, 0.03, 1), perturbed(base, 0.03, 2), Anatomy.of(model)


def knowledge(name: str, access: Access = Access.WEIGHTS, **rest: object) -> Knowledge:
    base, _, partner, anatomy = setting(name)
    return Knowledge(access, base, [partner], anatomy, **rest)  # type: ignore[arg-type]


def lock(state: State, anatomy: Anatomy, kind: str, seed: int = 0, heads: bool = False) -> State:
    """What MergeLock (``general``, condition 1e3) and PaRaMS (``scaling``, 0.05–20) do."""
    rng, out = generator(seed), dict(state)
    for block in anatomy.attention:
        for apply in (apply_qk, apply_vo):
            shape = (block.kv_heads, block.head_dim)
            scales = 0.05 + 19.95 * torch.rand(shape, generator=rng, dtype=torch.float64)
            general = invertible(*shape, rng, 1e3)
            matrix = general if kind == "general" else torch.diag_embed(scales)
            apply(out, block, within(block, matrix) if apply is apply_qk else matrix)
        if heads and not block.fixed_heads:
            permute_heads(out, block, torch.randperm(block.kv_heads, generator=rng))
    for mlp in anatomy.mlp:
        permute_units(out, mlp, torch.randperm(mlp.width(out), generator=rng))
    return out


def distance(a: State, b: State, base: State, expert: State) -> float:
    """‖a − b‖ in units of the expert's ‖τ‖."""
    return norm(task_vector(a, b)) / norm(task_vector(expert, base))


def recover(attack: Attack, released: State, name: str, seed: int = 0) -> State:
    return attack.recover(released, knowledge(name), generator(seed))


# --- what locks cannot hide -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOCKS)
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_gauge_align_brings_the_expert_back(name: str, kind: str) -> None:
    model, inputs = zoo.tiny(name)
    base, expert, _, anatomy = setting(name)
    released = lock(expert, anatomy, kind, heads=True)
    assert distance(released, expert, base, expert) > 100
    bound = 5 * TOLERANCE  # rounding an ill-conditioned lock
    assert zoo.drift(model, expert, released, inputs) <= bound

    recovered = recover(GaugeAlign(), released, name)
    assert distance(recovered, expert, base, expert) < ALIGNED
    assert zoo.drift(model, released, recovered, inputs) <= bound
    # The lock leaves no trace: an undefended expert ends at the same point, in the group it takes.
    group = gauges.of(anatomy, expert)
    same = [g.align(expert, base) for g in (group, group.subset(gauges.BLOCKS))]
    assert min(distance(recovered, end, base, expert) for end in same) < 1e-3
    for mlp in anatomy.mlp:
        for slot in mlp.rows() if mlp.unit_scale is None else ():
            assert torch.equal(slot.read(recovered), slot.read(expert)), "units in their old order"
    for block in anatomy.attention:
        if block.free_key_bias and block.k.bias is not None:
            assert torch.equal(block.k.bias.read(recovered), block.k.bias.read(base))


@pytest.mark.parametrize("kind", LOCKS)
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_aga_undoes_locks_but_not_the_change_of_function(name: str, kind: str) -> None:
    model, inputs = zoo.tiny(name)
    base, expert, _, anatomy = setting(name)
    released = lock(expert, anatomy, kind)
    anchored = recover(AnchorGuidedAttack(), released, name)
    aligned = recover(GaugeAlign(), released, name)
    assert distance(anchored, expert, base, expert) < ANCHORED
    assert distance(aligned, expert, base, expert) < distance(anchored, expert, base, expert)
    assert zoo.drift(model, released, anchored, inputs) > 50 * zoo.drift(
        model, released, aligned, inputs
    )
    # The fit takes out of every projection exactly what lies in the span of the released rows.
    for block in anatomy.attention:
        for side in ("q", "k", "v"):
            own, old, new = (
                block.read(s, side).unflatten(1, (-1, block.head_dim))[..., :-1]
                for s in (released, base, anchored)
            )
            residual = old - new
            cosine = (
                torch.nn.functional.normalize(residual, dim=-1)
                @ torch.nn.functional.normalize(own, dim=-1).mT
            )
            assert cosine.abs().max() < 1e-3


@pytest.mark.parametrize("attack", [WeightMatching(), WeightMatching(cost="cosine")], ids=str)
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_weight_matching_undoes_renaming_bit_by_bit(name: str, attack: WeightMatching) -> None:
    _, expert, _, anatomy = setting(name)
    rng, released = generator(3), dict(expert)
    for block in anatomy.attention:
        if not block.fixed_heads:
            permute_heads(released, block, torch.randperm(block.kv_heads, generator=rng))
    for mlp in anatomy.mlp:
        permute_units(released, mlp, torch.randperm(mlp.width(released), generator=rng))
    assert digest(recover(attack, released, name)) == digest(expert)


def test_weight_matching_can_leave_heads_alone() -> None:
    _, expert, _, anatomy = setting("vit")
    released, block = dict(expert), anatomy.attention[0]
    permute_heads(released, block, torch.arange(block.kv_heads).flip(0))
    assert digest(recover(WeightMatching(heads=False), released, "vit")) == digest(released)
    assert digest(recover(WeightMatching(heads=True), released, "vit")) == digest(expert)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_head_norm_undoes_scaling_and_nothing_else(name: str) -> None:
    base, expert, _, anatomy = setting(name)

    def locked(kind: str) -> State:
        out = lock(expert, anatomy, kind)
        return recover(WeightMatching(), out, name)  # leaves the attention lock

    for kind, undone in (("scaling", True), ("general", False)):
        left = distance(recover(HeadNorm(), locked(kind), name), expert, base, expert)
        assert (left < 0.2) is undone
    per_head = dict(expert)
    for block in anatomy.attention:
        seven = torch.eye(block.head_dim).expand(block.kv_heads, -1, -1) * 7
        apply_qk(per_head, block, within(block, seven))
    attack = HeadNorm(granularity="head")
    assert distance(recover(attack, per_head, name), expert, base, expert) < 0.2


def test_balanced_head_norm_brings_every_member_to_one_scale() -> None:
    base, expert, partner, anatomy = setting("vit")
    attack, own = HeadNorm(reference="balanced"), knowledge("vit")
    plain = attack.members(expert, own, generator(0))
    scaled = dict(expert)
    rng = generator(4)
    for block in anatomy.attention:
        for apply in (apply_qk, apply_vo):
            scales = 0.05 + 19.95 * torch.rand(block.kv_heads, block.head_dim, generator=rng)
            apply(scaled, block, torch.diag_embed(scales))
    members = attack.members(scaled, own, generator(0))
    for key, value in plain.released.items():
        torch.testing.assert_close(members.released[key], value, rtol=0, atol=1e-5)
    for state in (members.base, members.released, *members.partners):
        for block in anatomy.attention:
            q, k, v = (block.read(state, n) for n in ("q", "k", "v"))
            o = block.read_o(state).mT[:, 0]
            for first, second in ((q, k[..., :-1]), (v, o)):
                torch.testing.assert_close(first.norm(dim=-1), second.norm(dim=-1))
    model, inputs = zoo.tiny("vit")
    for before, after in ((base, members.base), (partner, members.partners[0])):
        assert zoo.drift(model, before, after, inputs) <= TOLERANCE
        assert digest(before) != digest(after)


# --- what every attack must hold ------------------------------------------------------------------


@pytest.mark.parametrize("attack", WEIGHTS, ids=str)
@pytest.mark.parametrize("name", ["bert", "open-clip"])
def test_inputs_are_never_touched_and_every_key_comes_back(name: str, attack: Attack) -> None:
    base, expert, partner, anatomy = setting(name)
    released = lock(expert, anatomy, "scaling")
    before = [digest(s) for s in (base, released, partner)]
    members = attack.members(released, knowledge(name), generator(0))
    assert [digest(s) for s in (base, released, partner)] == before
    for state in (members.base, members.released, *members.partners):
        compatible(state, base, str(attack))
    again = attack.members(released, knowledge(name), generator(0))
    assert digest(members.released) == digest(again.released), "all randomness from rng"


@pytest.mark.parametrize("attack", WEIGHTS, ids=str)
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_undefended_expert_comes_to_no_harm(name: str, attack: Attack) -> None:
    model, inputs = zoo.tiny(name)
    base, expert, _, _ = setting(name)
    recovered = recover(attack, expert, name)
    moved = distance(recovered, expert, base, expert)
    drift = zoo.drift(model, expert, recovered, inputs)
    if attack in EXACT:
        assert moved < ALIGNED
        assert drift <= TOLERANCE
    elif isinstance(attack, AnchorGuidedAttack):
        assert moved < ANCHORED
        assert drift < zoo.drift(model, expert, base, inputs) / 1.5
    elif isinstance(attack, DropoutPruning) and attack.mode == "magnitude":
        # A fifth of the entries, the smallest: for a Gaussian τ 0.5 % of its energy.
        assert moved < 0.1
        assert drift < zoo.drift(model, expert, base, inputs) / 4
    else:
        # Each entry is 0 or doubled: E‖Δ‖² = p/(1 − p)·‖τ‖² = ‖τ‖², and no bias on average.
        assert moved == pytest.approx(1, abs=0.05)
        tau = task_vector(expert, base)
        along = sum(float(((recovered[k] - base[k]) * t).sum()) for k, t in tau.items())
        assert along / norm(tau) ** 2 == pytest.approx(1, abs=0.05)


def test_trained_expert_keeps_its_function_and_its_merge() -> None:
    """A τ made by training, not drawn: lock, align, merge, against the undefended merge."""
    model, _ = zoo.tiny("vit")
    base, _, _, anatomy = setting("vit")
    rng = generator(5)
    images, labels = torch.randn(32, 3, 8, 8, generator=rng), torch.arange(32) % 5

    def logits(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, dict(state), (images,)).logits

    leaves = {key: value.clone().requires_grad_() for key, value in base.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits(leaves), labels).backward()
        optimizer.step()
    expert = {key: value.detach() for key, value in leaves.items()}
    right = logits(expert).argmax(1)
    assert (right == labels).float().mean() > 0.9
    assert (logits(base).argmax(1) == labels).float().mean() < 0.5

    def merged(state: State) -> torch.Tensor:
        return logits({k: base[k] + 0.8 * (state[k] - base[k]) for k in base}).detach()

    released = lock(expert, anatomy, "general", heads=True)
    recovered = recover(GaugeAlign(), released, "vit")
    reference = logits(expert).detach()
    assert (logits(recovered) - reference).abs().max() <= TOLERANCE * reference.abs().max()
    assert distance(recovered, expert, base, expert) < 0.5
    accuracy = {
        name: float((merged(s).argmax(1) == labels).float().mean())
        for name, s in (("plain", expert), ("locked", released), ("recovered", recovered))
    }
    assert accuracy["locked"] < 0.5
    assert accuracy["recovered"] >= accuracy["plain"] - 0.05


# --- access and parameters ------------------------------------------------------------------------


def task(name: str, classes: int) -> Task:
    split = Split({"x": torch.arange(40.0)[:, None]}, torch.arange(40) % classes)
    return Task(name, ("c",) * classes, split, split, split, torch.eye(classes), 1.0)


def test_finetune_recovery_trains_the_merged_model_on_few_labels() -> None:
    calls: list[tuple[State, Mapping[str, Split], Recipe | None]] = []

    def fine_tune(
        start: State,
        examples: Mapping[str, Split],
        rng: torch.Generator,
        *,
        recipe: Recipe | None = None,
        loss: object = None,
    ) -> State:
        calls.append((start, examples, recipe))
        return {key: value + 1 for key, value in start.items()}

    tasks = {"a": task("a", 2), "b": task("b", 5)}
    attack = FinetuneRecovery(per_class=3, steps=7, batch_size=4)
    assert attack.refines
    own = knowledge(
        "bert", Access.LABELED, tasks=tasks, recipe=Recipe(warmup=10), fine_tune=fine_tune
    )
    merged = {"w": torch.zeros(2)}
    assert attack.recover(merged, own, generator(0)) == merged
    assert not calls
    refined = attack.refine(merged, own, generator(0))
    assert torch.equal(refined["w"], torch.ones(2))
    ((start, examples, recipe),) = calls
    assert start is merged
    assert {n: s.labels.bincount().tolist() for n, s in examples.items()} == {
        "a": [3, 3],
        "b": [3] * 5,
    }
    assert recipe is not None
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate) == (7, 4, 5e-5)
    assert recipe.warmup < recipe.steps, "the rate must come down again"
    assert (own.budget.examples, own.budget.steps) == (21, 7)


@pytest.mark.parametrize("access", [Access.WEIGHTS, Access.UNLABELED])
def test_finetune_recovery_needs_labels(access: Access) -> None:
    own = knowledge("bert", access, tasks={"a": task("a", 2)}, recipe=Recipe())
    with pytest.raises(AccessError, match="labeled"):
        FinetuneRecovery().refine({}, own, generator(0))


@pytest.mark.parametrize("attack", WEIGHTS, ids=str)
def test_weights_attacks_declare_their_tier_and_leave_the_merge_alone(attack: Attack) -> None:
    assert attack.access is Access.WEIGHTS
    assert not attack.refines


def test_partner_anchor_needs_a_partner() -> None:
    base, expert, _, anatomy = setting("bert")
    alone = Knowledge(Access.WEIGHTS, base, [], anatomy)
    with pytest.raises(UsageError, match="needs a partner; use anchor=base"):
        WeightMatching(anchor="partner").recover(expert, alone, generator(0))


def test_dropout_keeps_or_drops_each_entry() -> None:
    base, expert, _, _ = setting("bert")
    tau = task_vector(expert, base)
    for attack, share in (
        (DropoutPruning(p=0.75), 0.25),
        (DropoutPruning(p=0.75, mode="magnitude"), 0.25),
    ):
        scale = 1 / (1 - attack.p) if attack.mode == "random" else 1.0
        recovered = recover(attack, expert, "bert")
        total = kept = 0
        for key, delta in tau.items():
            new = recovered[key] - base[key]
            alive = new != 0
            torch.testing.assert_close(new[alive], scale * delta[alive], rtol=0, atol=1e-5)
            total, kept = total + alive.numel(), kept + int(alive.sum())
            if attack.mode == "magnitude" and 0 < alive.sum() < alive.numel():
                assert delta[alive].abs().min() >= delta[~alive].abs().max()
        assert kept / total == pytest.approx(share, abs=0.02)
    assert digest(recover(DropoutPruning(p=0.0), expert, "bert")) == digest(expert)
    assert digest(recover(DropoutPruning(), expert, "bert", 1)) != digest(
        recover(DropoutPruning(), expert, "bert", 2)
    )


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (AnchorGuidedAttack, {"ridge": 0.0}, "ridge must be > 0"),
        (DropoutPruning, {"p": 1.0}, "p must be in"),
        (DropoutPruning, {"p": -0.1}, "p must be in"),
        (FinetuneRecovery, {"steps": 0}, "steps must be at least 1"),
        (FinetuneRecovery, {"per_class": 0}, "per_class must be at least 1"),
        (FinetuneRecovery, {"learning_rate": 0.0}, "learning_rate must be > 0"),
    ],
)
def test_parameters_out_of_range(cls: type, values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**values)

"""What `diagnose` says of releases whose making is known."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import zoo
from conftest import some_slow
from test_attacks import distance, lock, recover, setting
from test_posthoc_defenses import owner
from zoo import generator, perturbed

from attacks.aga import AnchorGuidedAttack
from attacks.none import NoAttack
from attacks.weight_matching import WeightMatching
from benchmark.anatomy import Anatomy, permute_heads
from benchmark.anatomy.diagnosis import Diagnosis, diagnose
from benchmark.anatomy.locks import KINDS
from benchmark.api.methods import defense
from benchmark.core.state import State

#: Spec → what it does to Q/K, to V/O, and whether hidden units trade places.
LOCKS = {
    "params": ("diagonal", "diagonal", True),
    "params(perm=random, scaling=symmetric)": ("general", "general", True),
    "params(scaling=nonsymmetric)": ("general", "general", True),
    "params(scaling=none)": ("none", "none", True),
    "mergelock": ("general", "general", False),
    "mergelock(kind=gaussian)": ("general", "general", False),
    "mergelock(kind=orthogonal)": ("orthogonal", "orthogonal", False),
    "mergebarrier-attn": ("orthogonal", "none", False),
    "norm-inflation": ("per-head scaling", "per-head scaling", False),
    "params+mergelock": ("general", "general", True),
    "none": ("none", "none", False),
}
#: What rotary embeddings leave of a lock on Q and K: a complex number per pair, real ones for a
#: symmetric matrix, of many lengths and so never orthogonal.
ROTARY = {
    "params(perm=random, scaling=symmetric)": "diagonal",
    "params(scaling=nonsymmetric)": "rotary",
    "mergelock": "rotary",
    "mergelock(kind=gaussian)": "rotary",
    "mergelock(kind=orthogonal)": "rotary",
    "mergebarrier-attn": "diagonal",
    "params+mergelock": "rotary",
}

#: Families that the default run leaves out.
SELDOM = {"distilbert", "dinov2", "clip", "t5", "wav2vec2"}

#: And of one on heads that rotate only a part of their rows: among the others, the lock itself.
PARTLY = {"params(perm=random, scaling=symmetric)": "rotary", "mergebarrier-attn": "orthogonal"}


def protected(spec: str, state: State, base: State, anatomy: Anatomy) -> State:
    return defense(spec).method.protect(owner(base, state, anatomy), generator(0))


@pytest.mark.parametrize("spec", LOCKS)
@pytest.mark.parametrize("name", some_slow([*zoo.FAMILIES], SELDOM))
def test_every_lock_is_named(name: str, spec: str) -> None:
    base, _, _, anatomy = setting(name)
    # As far as an expert of ordinary training, or of an anchor-repulsive one.
    relative = 0.07 if name in ("bert", "open-clip", "qwen2") else 0.005
    released = protected(spec, perturbed(base, relative, 1), base, anatomy)
    found = diagnose(released, base, anatomy)
    qk, vo, permuted = LOCKS[spec]
    if anatomy.qk_gauge == "rotary":
        partly = any(block.turning < block.head_dim for block in anatomy.attention)
        qk = {**ROTARY, **(PARTLY if partly else {})}.get(spec, qk)
    if anatomy.qk_gauge == "sign":
        assert found.qk in ("none", "signs")  # a draw of plus signs only is no lock
    else:
        assert found.qk == qk
    assert found.vo == vo
    assert found.units_moved > 0.9 if permuted else found.units_moved == 0
    assert found.heads_moved == 0
    assert found.undone
    assert found.locked is (spec != "none")
    if spec == "norm-inflation":
        assert found.growth > 15
        assert found.growth_left < 1.1
        assert "inflated" in found.summary
        assert ("unit-scale" in found.gauges) is any(
            mlp.unit_scale == "signed" for mlp in anatomy.mlp
        )
    elif spec == "none":
        unseen = f"; not looked at: {'; '.join(found.missing)}" if found.missing else ""
        assert found.summary == f"no lock found; left as it is{unseen}"
        assert found.residual == 0
    else:
        assert found.residual < 0.2
        assert found.distance == pytest.approx(relative, rel=0.2)
        assert "; undone; " in found.summary
        assert found.outliers == ()


def test_the_summary_names_what_was_found() -> None:
    base, expert, _, anatomy = setting("bert")
    said = {
        spec: diagnose(protected(spec, expert, base, anatomy), base, anatomy).summary
        for spec in ("params", "mergelock", "mergebarrier-attn", "norm-inflation")
    }
    assert said["params"].startswith(
        "looks like a per-head diagonal lock with an MLP permutation; undone; about 0.1"
    )
    assert said["mergelock"].startswith("looks like a per-head general lock; undone; ")
    assert said["mergebarrier-attn"].startswith("looks like a per-head orthogonal lock on Q/K; ")
    assert "a per-head scaling with norms inflated up to 20.0×" in said["norm-inflation"]
    found = diagnose(protected("params", expert, base, anatomy), base, anatomy).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["summary"] == said["params"]
    assert {found["qk"], found["vo"]} <= set(KINDS)


def test_only_what_was_recovered_counts_as_undone() -> None:
    base, expert, _, anatomy = setting("vit")
    released = protected("params+mergelock", expert, base, anatomy)

    def after(attack: object) -> Diagnosis:
        state = recover(attack, released, "vit")  # type: ignore[arg-type]
        return diagnose(released, base, anatomy, state)

    untouched, matched, anchored = map(after, (NoAttack(), WeightMatching(), AnchorGuidedAttack()))
    assert untouched.residual == pytest.approx(distance(released, expert, base, expert), rel=0.05)
    assert "; not undone: a permutation of hidden units with V/O bases and" in untouched.summary
    assert set(matched.remaining) == {"query-key", "value-output"}
    assert "; undone in part: V/O bases with Q/K bases left; " in matched.summary
    assert anchored.undone
    assert anchored.residual < 0.3
    # A lock that inflates nothing is far away too, and yet no other model.
    turned = protected("params(scaling=none)+mergelock(kind=orthogonal)", expert, base, anatomy)
    far = diagnose(turned, base, anatomy, turned)
    assert far.distance > 1
    assert "; not undone: " in far.summary
    renamed = protected("params(scaling=none)", expert, base, anatomy)
    assert diagnose(renamed, base, anatomy, recover(WeightMatching(), renamed, "vit")).undone
    assert not diagnose(renamed, base, anatomy, renamed).undone


@pytest.mark.parametrize("name", ["vit", "gpt2", "qwen2"])
def test_heads_that_traded_places(name: str) -> None:
    base, expert, _, anatomy = setting(name)
    released, first = dict(expert), anatomy.attention[0]
    permute_heads(released, first, torch.arange(first.kv_heads).roll(1))
    found = diagnose(released, base, anatomy)
    assert (found.qk, found.vo) == ("head permutation", "head permutation")
    assert found.heads_moved == pytest.approx(1 / len(anatomy.attention))
    assert found.summary.startswith("looks like a head permutation in 1 of 2 attention blocks; u")
    both = diagnose(lock(expert, anatomy, "general", heads=True), base, anatomy)
    assert both.qk == ("rotary" if name == "qwen2" else "general")
    assert ", a head permutation and an MLP permutation" in both.summary.replace(" with", ",")


@pytest.mark.parametrize("name", ["t5", "bart", "vit-gpt2", "trocr"])
def test_a_lock_on_cross_attention_alone_is_named(name: str) -> None:
    """Its keys and values read another tower, of a width of its own."""
    base, expert, _, anatomy = setting(name)
    words = ("EncDecAttention", "encoder_attn", "crossattention")
    cross = tuple(b for b in anatomy.attention if any(w in b.q.weight.key for w in words))
    assert len(cross) == zoo.LAYERS
    only = dataclasses.replace(anatomy, attention=cross, mlp=())
    released = protected("mergelock", expert, base, only)
    found = diagnose(released, base, anatomy)
    assert (found.qk, found.vo, found.blocks_locked) == ("general", "general", zoo.LAYERS)
    assert found.undone
    assert found.residual < 0.2
    assert found.summary.startswith(
        "looks like a per-head general lock in 2 of 6 attention blocks; undone; about 0."
    )


def test_what_no_lock_explains_is_said() -> None:
    base, expert, _, anatomy = setting("bert")
    rng = generator(3)
    other = {
        k: v.std() * torch.randn(v.shape, generator=rng) if v.is_floating_point() else v
        for k, v in base.items()
    }
    assert diagnose(other, base, anatomy).summary.startswith("no lock explains the distance: 1.")
    key = "encoder.layer.0.output.dense.weight"
    spoiled = {**expert, key: base[key] + 20 * (expert[key] - base[key])}
    found = diagnose(spoiled, base, anatomy)
    assert found.outliers == (key,)
    assert f"{key} moved far more than the rest" in found.summary
    inflated = {**expert, key: 5 * expert[key]}
    assert "norms still inflated 5.0×" in diagnose(inflated, base, anatomy).summary
    same = diagnose(base, base, anatomy)
    assert (same.residual, same.locked) == (0, False)


def test_a_hidden_key_bias_does_not_count() -> None:
    """METHODS section 3, trap 0: softmax ignores it, so anything can be put there."""
    base, expert, _, anatomy = setting("bert")
    released = dict(expert)
    for block in anatomy.attention:
        assert block.k.bias is not None
        block.k.bias.write(released, 1e3 * torch.ones_like(block.k.bias.read(released)))
    hidden, plain = (diagnose(state, base, anatomy) for state in (released, expert))
    assert hidden.summary == "looks like key biases moved; undone; the expert itself"
    assert plain.summary == "no lock found; left as it is"
    assert hidden.distance == pytest.approx(plain.distance)
    kept = diagnose(released, base, anatomy, released)
    assert (kept.undone, kept.residual) == (True, 0)

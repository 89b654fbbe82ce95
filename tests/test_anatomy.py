"""The gauge groups keep the function of every family; the estimators find what was hidden."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import TOLERANCE, generator, invertible, perturbed

from benchmark.anatomy import (
    Anatomy,
    AttentionBlock,
    Linear,
    Slot,
    apply_qk,
    apply_vo,
    permute_heads,
    permute_units,
    within,
)
from benchmark.anatomy.alignment import (
    match_heads,
    match_units,
    qk_gauge,
    rotary_gauge,
    tied_gauge,
    vo_gauge,
)
from benchmark.anatomy.gauge import rotary_matrix
from benchmark.anatomy.nest import nearest
from benchmark.core.errors import UsageError
from benchmark.core.state import State, digest, norm, task_vector

MIXTURES = zoo.decoders.MIXTURES
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")

quick = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 2**31 - 1)


def random_symmetry(state: State, anatomy: Anatomy, rng: torch.Generator) -> State:
    """Every transform of the gauge group at once."""
    out = dict(state)
    for block in anatomy.attention:
        a, b = (invertible(block.kv_heads, block.head_dim, rng) for _ in range(2))
        apply_qk(out, block, within(block, a))
        apply_vo(out, block, b)
        if not block.fixed_heads:
            permute_heads(out, block, torch.randperm(block.kv_heads, generator=rng))
    for mlp in anatomy.mlp:
        permute_units(out, mlp, torch.randperm(mlp.width(out), generator=rng))
    return out


@pytest.mark.parametrize("name", [n for n in zoo.NAMES if n not in (*zoo.vision.STAGED, *MIXTURES)])
def test_finds_every_block(name: str) -> None:
    model, _ = zoo.tiny(name)
    anatomy = Anatomy.of(model)
    crossing, encoder = name in zoo.CROSSING, zoo.CROSSING.get(name, zoo.WIDTH)
    towers = 2 if crossing or name in zoo.vision.TWO else 1
    cross = zoo.LAYERS if crossing else 0  # the decoder's second attention
    pool = name in zoo.vision.POOLED
    layers = 1 if name in zoo.encoders.SHARED else zoo.LAYERS
    assert len(anatomy.mlp) == towers * layers + pool
    assert len(anatomy.attention) == len(anatomy.mlp) + cross
    assert anatomy.qk_gauge == zoo.RESTRICTED.get(name, "general")
    state = model.state_dict()
    kv_heads = 1 if name == "falcon" else zoo.HEADS // 2 if name in zoo.GROUPED else zoo.HEADS
    for block in anatomy.attention:
        stream = block.q.weight.read(state).shape[1]
        size, reads = stream // zoo.HEADS, block.k.weight.read(state).shape[1]
        assert stream in (zoo.WIDTH, encoder)
        assert reads == (encoder if ".encoder_attn." in block.k.weight.key else stream)
        assert (block.heads, block.kv_heads, block.head_dim) == (zoo.HEADS, kv_heads, size)
        for side, linear in block.linears().items():
            rows = stream if side == "o" else size * (kv_heads if side in "kv" else zoo.HEADS)
            columns = reads if side in "kv" else stream
            assert linear.weight.read(state).shape == (rows, columns)
            assert linear.bias is None or len(linear.bias.read(state)) == len(
                linear.weight.read(state)
            )
    for mlp in anatomy.mlp:
        width = mlp.up.weight.read(state).shape[1]
        assert width == mlp.down.weight.read(state).shape[0]
        assert width in (zoo.WIDTH, encoder)
        assert (mlp.gate is not None) == (name in zoo.GATED)
        assert mlp.activation in ACTIVATIONS
    # Every matrix of a layer belongs to a block.
    named = {
        slot.key
        for block in anatomy.attention
        for linear in block.linears().values()
        for slot in linear.slots()
    } | {
        slot.key
        for mlp in anatomy.mlp
        for linear in (mlp.up, mlp.down, mlp.gate)
        if linear is not None
        for slot in linear.slots()
    }
    inside = re.compile(r".*(layers?|blocks?|h)\.\d+\.")
    matrices = {key for key, value in state.items() if value.ndim == 2 and inside.match(key)}
    assert {key for key in matrices if "relative" not in key} <= named
    # No tensor row belongs to two blocks.
    slots = [
        (slot.key, slot.rows)
        for block in anatomy.attention
        for linear in block.linears().values()
        for slot in linear.slots()
    ] + [(slot.key, slot.rows) for mlp in anatomy.mlp for slot in mlp.rows()]
    assert len(slots) == len(set(slots))


@pytest.mark.parametrize("name", MIXTURES)
def test_every_expert_is_an_mlp(name: str) -> None:
    model, inputs = zoo.tiny(name)
    anatomy, state = Anatomy.of(model), zoo.state_of(model)
    # Qwen2-MoE's second layer has one MLP for all tokens, its first one beside the experts.
    assert len(anatomy.mlp) == {"qwen2-moe": 5}.get(name, 6)
    assert {mlp.unit_scale for mlp in anatomy.mlp} == {"signed"}
    assert anatomy.uncovered == ()
    for mlp in anatomy.mlp:
        moved = dict(state)
        permute_units(moved, mlp, torch.randperm(mlp.width(state), generator=generator(1)))
        assert {k for k in state if moved[k] is not state[k]} == {s.key for s in mlp.rows()} | {
            mlp.down.weight.key
        }
        assert zoo.drift(model, state, moved, inputs) <= TOLERANCE
        if mlp.up.weight.index is not None:  # the other experts are as they were
            others = [i for i in range(3) if i != mlp.up.weight.index]
            key = mlp.up.weight.key
            assert torch.equal(moved[key][others], state[key][others])


@pytest.mark.parametrize("name", zoo.vision.STAGED)
def test_finds_every_block_of_every_stage(name: str) -> None:
    anatomy = Anatomy.of(zoo.tiny(name)[0])
    assert [(block.heads, block.head_dim) for block in anatomy.attention] == [(4, 8), (8, 8)]
    assert all(block.fixed_heads for block in anatomy.attention)
    assert anatomy.qk_gauge == zoo.RESTRICTED.get(name, "general")
    # SwinV2 makes the biases of its windows by an MLP in each layer.
    assert len(anatomy.mlp) == (4 if name == "swinv2" else 2)
    assert anatomy.uncovered == ()


def test_the_docs_name_every_row() -> None:
    from benchmark.anatomy.families import FAMILIES

    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    assert [family.name for family in FAMILIES if family.name not in text] == []
    assert [name for name in (*zoo.NAMES, *zoo.CONVOLUTIONAL) if f"| {name} |" not in text] == []


def test_layers_come_in_numerical_order() -> None:
    from benchmark.anatomy.families import FAMILIES

    bert = next(family for family in FAMILIES if family.name == "bert")
    names = [f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (10, 2, 0)]
    assert bert.layers(names) == [f"bert.encoder.layer.{i}." for i in (0, 2, 10)]


@pytest.mark.parametrize("name", zoo.NAMES)
@quick
@given(seed=seeds)
def test_symmetries_keep_the_function(name: str, seed: int) -> None:
    model, inputs = zoo.tiny(name)
    state = zoo.state_of(model)
    before = digest(state)
    moved = random_symmetry(state, Anatomy.of(model), generator(seed))
    assert norm(task_vector(moved, state)) > norm(state) / 10, "the transform does something"
    # Of condition 100, so float32 rounds; what breaks the function is off by 0.1 and more.
    assert zoo.drift(model, state, moved, inputs) <= 10 * TOLERANCE
    assert digest(state) == before, "the input is untouched"
    assert moved.keys() == state.keys()
    assert all(moved[k].shape == v.shape and moved[k].dtype == v.dtype for k, v in state.items())


@pytest.mark.parametrize("name", zoo.FAMILIES)
@quick
@given(seed=seeds)
def test_unlock_inverts_lock(name: str, seed: int) -> None:
    model, _ = zoo.tiny(name)
    state, anatomy, rng = zoo.state_of(model), Anatomy.of(model), generator(seed)
    for block in anatomy.attention:
        a, b = (invertible(block.kv_heads, block.head_dim, rng) for _ in range(2))
        out = dict(state)
        a = within(block, a)
        apply_qk(out, block, a)
        apply_vo(out, block, b)
        apply_qk(out, block, torch.linalg.inv(a))
        apply_vo(out, block, torch.linalg.inv(b))
        for key, value in state.items():
            # Stored in float32 in between: its rounding comes back times cond = 100.
            torch.testing.assert_close(out[key], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", zoo.FAMILIES)
@quick
@given(seed=seeds)
def test_inverse_permutation_is_exact(name: str, seed: int) -> None:
    model, _ = zoo.tiny(name)
    state, anatomy, rng = zoo.state_of(model), Anatomy.of(model), generator(seed)
    out = dict(state)
    for block in anatomy.attention:
        heads = torch.randperm(block.kv_heads, generator=rng)
        permute_heads(out, block, heads)
        permute_heads(out, block, heads.argsort())
    for mlp in anatomy.mlp:
        units = torch.randperm(mlp.width(out), generator=rng)
        permute_units(out, mlp, units)
        permute_units(out, mlp, units.argsort())
    assert digest(out) == digest(state)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_the_property_sees_a_wrong_transform(name: str) -> None:
    """A on Q *and* K, or units renamed on one side only, must show as drift."""
    model, inputs = zoo.tiny(name)
    state, anatomy = zoo.state_of(model), Anatomy.of(model)
    block, mlp = anatomy.attention[0], anatomy.mlp[0]
    a = invertible(block.kv_heads, block.head_dim, generator(0), condition=4)

    both = dict(state)
    for side in ("q", "k"):
        value = block.read(both, side).unflatten(1, (-1, block.head_dim))
        block.write(both, side, (a[:, None] @ value).flatten(1, 2))
    assert zoo.drift(model, state, both, inputs) > 10 * TOLERANCE

    swapped = dict(state)
    block.write(swapped, "v", a @ block.read(swapped, "v"))
    block.write_o(swapped, block.read_o(swapped) @ a[:, None])
    assert zoo.drift(model, state, swapped, inputs) > 10 * TOLERANCE

    half = dict(state)
    order = torch.randperm(mlp.width(state), generator=generator(0))
    mlp.up.weight.write(half, mlp.up.weight.read(half)[order])
    assert zoo.drift(model, state, half, inputs) > 10 * TOLERANCE


def test_key_bias_is_a_gauge_of_its_own() -> None:
    model, inputs = zoo.tiny("bert")
    state = zoo.state_of(model)
    moved = dict(state)
    for block in Anatomy.of(model).attention:
        assert block.k.bias is not None
        moved[block.k.bias.key] = torch.randn(zoo.WIDTH, generator=generator(1))
    assert zoo.drift(model, state, moved, inputs) <= TOLERANCE


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^unknown architecture Sequential: no row is near; add"):
        Anatomy.of(nn.Sequential(nn.Linear(2, 2)))


def test_another_convolutional_network_is_told_which_have_rows() -> None:
    from transformers import EfficientNetConfig, EfficientNetModel

    config = EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.2, hidden_dim=64
    )
    with pytest.raises(UsageError, match="ConvNeXt and ResNet have rows") as caught:
        Anatomy.of(EfficientNetModel(config))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e38])
def test_units_of_any_size_are_assigned(size: float) -> None:
    """Squares of 1e38 are no float32; all units of nothing are alike."""
    rng = generator(0)
    reference = torch.randn(20, 6, generator=rng)
    order = torch.randperm(20, generator=rng)
    found = nearest(size * reference[order], reference)
    assert sorted(found.tolist()) == list(range(20))
    if size == 1e38:
        # Cut to the longest length there, rows are known by their direction alone.
        assert (order[found] == torch.arange(20)).float().mean() > 0.7
    found = nearest(torch.full((20, 6), float("nan")), reference)
    assert sorted(found.tolist()) == list(range(20))


def test_a_refusal_is_short_and_names_the_nearest_row() -> None:
    from transformers import BlenderbotConfig, BlenderbotForCausalLM, XLNetConfig, XLNetModel

    blenderbot = BlenderbotConfig(
        vocab_size=30, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16
    )
    xlnet = XLNetConfig(vocab_size=30, d_model=16, n_layer=1, n_head=2, d_inner=16)
    for model, near in ((BlenderbotForCausalLM(blenderbot), "'opt'"), (XLNetModel(xlnet), "row")):
        with pytest.raises(UsageError, match=near) as refused:
            Anatomy.of(model)
        assert len(str(refused.value)) <= 200
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("StableLm", {"qk_layernorm": True}, r"q_layernorm.* does to attention"),
        ("Phi", {"qk_layernorm": True}, r"q_layernorm.* does to attention"),
        ("Cohere", {"use_qk_norm": True}, r"q_norm.* does to attention"),
        ("OPT", {"do_layer_norm_before": False}, "checked with do_layer_norm_before=True"),
        ("Bloom", {"apply_residual_connection_post_layernorm": True}, "checked with apply_resid"),
    ],
)
def test_variants_with_another_gauge_group_are_refused(
    name: str, fields: dict[str, object], said: str
) -> None:
    build = zoo.decoders.older if name == "Bloom" else zoo.decoders.plain
    with pytest.raises(UsageError, match=said) as refused:
        Anatomy.of(build(name, **fields))
    assert len(str(refused.value)) <= 200


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "falcon-new", "phi3", "bloom"])
def test_what_a_fused_weight_gives_is_cut_as_its_rows_are(name: str) -> None:
    state = zoo.state_of(zoo.tiny(name)[0])
    x = torch.randn(5, zoo.WIDTH, generator=generator(1))
    block = Anatomy.of(zoo.tiny(name)[0]).attention[1]
    for side in (block.q, block.k, block.v):
        whole = dataclasses.replace(side.weight, rows=None, every=None).read(state)
        cut = side.weight.cut(x @ whole.T, -1).flatten(1)
        torch.testing.assert_close(cut, x @ side.weight.read(state).T)


def test_a_slot_of_every_so_many_rows() -> None:
    """Queries, keys and values that take turns per head: 2 heads of 1 query row, 1 key, 1 value."""
    state = {"w": torch.arange(12.0).reshape(6, 2), "b": torch.arange(6.0)}
    weight, bias = Slot("w", (1, 2), every=3), Slot("b", (1, 2), every=3)
    assert weight.read(state).tolist() == [[2, 3], [8, 9]]
    assert bias.read(state).tolist() == [1, 4]
    out = dict(state)
    weight.write(out, torch.zeros(2, 2))
    assert out["w"].flatten().tolist() == [0, 1, 0, 0, 4, 5, 6, 7, 0, 0, 10, 11]
    assert torch.equal(state["w"], torch.arange(12.0).reshape(6, 2))
    assert weight.cut(torch.arange(6.0)[None], -1).tolist() == [[[1], [4]]]


def test_the_activation_is_that_of_the_tower() -> None:
    """A ViT and a decoder have configurations of their own, a pair of them none."""
    anatomy = Anatomy.of(zoo.crossing.trocr(activation_function="relu"))
    assert [mlp.activation for mlp in anatomy.mlp] == ["gelu", "gelu", "relu", "relu"]
    assert [mlp.unit_scale for mlp in anatomy.mlp] == [None, None, "positive", "positive"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"qk_norm": True}, r"'blocks\.0\.attn\.q_norm\.weight' does to attention"),
        ({"scale_attn_norm": True}, r"'blocks\.0\.attn\.norm\.weight' does to attention"),
        ({"scale_mlp_norm": True}, r"MLP with 'blocks\.0\.mlp\.norm\.weight'"),
        ({"mlp_layer": "GluMlp"}, "MLP with 96 units before and 48 behind"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_variants_of_timms_transformer_are_refused(fields: dict[str, Any], said: str) -> None:
    import timm.layers
    from timm.models.vision_transformer import VisionTransformer

    if "mlp_layer" in fields:
        fields = {"mlp_layer": timm.layers.GluMlp}
    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=64, depth=1, num_heads=8, mlp_ratio=1.5, **fields
    )
    with pytest.raises(UsageError, match=said):
        Anatomy.of(model)


def test_rotary_model_with_the_names_of_bert_is_refused() -> None:
    from transformers import EsmConfig, EsmModel

    config = EsmConfig(
        vocab_size=30,
        pad_token_id=1,
        mask_token_id=2,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=16,
        position_embedding_type="rotary",
    )
    with pytest.raises(UsageError, match="class EsmSelfAttention was not checked"):
        Anatomy.of(EsmModel(config))


# --- estimators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.FAMILIES)
@pytest.mark.parametrize("cost", ["inner", "cosine"])
def test_match_units_recovers_the_permutation(name: str, cost: str) -> None:
    model, _ = zoo.tiny(name)
    anchor, anatomy, rng = zoo.state_of(model), Anatomy.of(model), generator(3)
    expert = perturbed(anchor, 0.5, 4)
    for mlp in anatomy.mlp:
        hidden = torch.randperm(mlp.width(anchor), generator=rng)
        released = dict(expert)
        permute_units(released, mlp, hidden)
        found = match_units(mlp, released, anchor, cost)  # type: ignore[arg-type]
        assert torch.equal(hidden[found], torch.arange(len(hidden)))
        permute_units(released, mlp, found)
        assert digest(released) == digest(expert)


def test_match_units_solves_the_assignment_where_greed_fails() -> None:
    """Two units with one favourite: the optimum by brute force over all permutations."""
    import itertools

    from benchmark.anatomy import MLPBlock

    block = MLPBlock(Linear(Slot("up")), Linear(Slot("down")))
    contested = 0
    for seed in range(20):
        rng = generator(seed)
        state, anchor = (
            {"up": torch.randn(5, 2, generator=rng), "down": torch.randn(2, 5, generator=rng)}
            for _ in range(2)
        )
        score = block.read_units(anchor) @ block.read_units(state).T
        rows = torch.arange(5)
        best = max(
            float(score[rows, torch.tensor(p)].sum()) for p in itertools.permutations(range(5))
        )
        found = match_units(block, state, anchor)
        assert float(score[rows, found].sum()) == pytest.approx(best, rel=1e-5)
        contested += len(score.argmax(1).unique()) < 5
    assert contested > 10


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_match_heads_sees_through_a_lock(name: str) -> None:
    model, _ = zoo.tiny(name)
    anchor, anatomy, rng = zoo.state_of(model), Anatomy.of(model), generator(5)
    for block in anatomy.attention:
        released = perturbed(anchor, 0.05, 6)
        apply_qk(released, block, invertible(block.kv_heads, block.head_dim, rng, 1e3))
        apply_vo(released, block, invertible(block.kv_heads, block.head_dim, rng, 1e3))
        hidden = torch.randperm(block.kv_heads, generator=rng)
        permute_heads(released, block, hidden)
        found = match_heads(block, released, anchor)
        identity = torch.arange(block.kv_heads)
        assert torch.equal(found if block.fixed_heads else hidden[found], identity)


def test_heads_of_t5_cannot_trade_places() -> None:
    """Its position biases are per head and shared by all layers."""
    model, inputs = zoo.tiny("t5")
    state = zoo.state_of(model)
    block = Anatomy.of(model).attention[0]
    assert block.fixed_heads
    moved = dict(state)
    permute_heads(moved, block, torch.arange(block.kv_heads).flip(0))
    assert zoo.drift(model, state, moved, inputs) > 100 * TOLERANCE


def grouped() -> tuple[AttentionBlock, State]:
    """Six query heads on three key/value heads, without biases but for the keys."""
    rng = generator(7)
    shapes = {"q": (24, 32), "k": (12, 32), "k.bias": (12,), "v": (12, 32), "o": (32, 24)}
    state = {key: torch.randn(shape, generator=rng) for key, shape in shapes.items()}
    q, v, o = (Linear(Slot(name)) for name in ("q", "v", "o"))
    k = Linear(Slot("k"), Slot("k.bias"))
    return AttentionBlock(q=q, k=k, v=v, o=o, heads=6, kv_heads=3, head_dim=4), state


def test_grouped_heads_share_one_gauge() -> None:
    """Against plain algebra: WqᵀWk and WoWv of every *query* head, K and V repeated per group."""
    block, state = grouped()
    moved = dict(state)
    rng = generator(8)
    apply_qk(moved, block, invertible(3, 4, rng))
    apply_vo(moved, block, invertible(3, 4, rng))

    def products(s: State) -> Tensor:
        q, o = s["q"].reshape(6, 4, 32), s["o"].reshape(32, 6, 4).permute(1, 0, 2)
        k, v = (s[n].reshape(3, 4, 32).repeat_interleave(2, 0) for n in ("k", "v"))
        return torch.stack([q.mT @ k, o @ v])

    torch.testing.assert_close(products(moved), products(state), rtol=1e-4, atol=1e-4)

    hidden = torch.tensor([2, 0, 1])
    permute_heads(moved, block, hidden)
    found = match_heads(block, moved, state)
    assert torch.equal(hidden[found], torch.arange(3))
    permute_heads(moved, block, found)
    apply_qk(moved, block, qk_gauge(block, moved, state))
    apply_vo(moved, block, vo_gauge(block, moved, state))
    for key in ("q", "k", "v", "o"):
        torch.testing.assert_close(moved[key], state[key], rtol=0, atol=1e-4)


@quick
@given(seed=seeds)
def test_tied_gauge_undoes_an_ill_conditioned_lock(seed: int) -> None:
    rng = generator(seed)
    x0, y0 = (torch.randn(3, 4, 40, generator=rng, dtype=torch.float64) for _ in range(2))
    lock = invertible(3, 4, rng, 1e4)
    m = tied_gauge(lock @ x0, x0, torch.linalg.inv(lock).mT @ y0, y0)
    torch.testing.assert_close(m @ lock, torch.eye(4, dtype=m.dtype).expand(3, -1, -1))


@quick
@given(seed=seeds)
def test_tied_gauge_is_a_minimum(seed: int) -> None:
    """Better than both starts and than any small change of M."""
    rng = generator(seed)
    x0, y0, dx, dy = (torch.randn(3, 4, 40, generator=rng, dtype=torch.float64) for _ in range(4))
    lock = invertible(3, 4, rng)
    x, y = lock @ (x0 + 0.3 * dx), torch.linalg.inv(lock).mT @ (y0 + 0.3 * dy)

    def objective(m: Tensor) -> Tensor:
        ends = (m @ x - x0, torch.linalg.inv(m).mT @ y - y0)
        return sum((e.square().sum((1, 2)) for e in ends), torch.zeros(3, dtype=m.dtype))

    m = tied_gauge(x, x0, y, y0, tolerance=1e-12)
    least_squares = x0 @ x.mT @ torch.linalg.inv(x @ x.mT)
    assert (objective(m) < objective(least_squares)).all()
    assert (objective(m) < objective(torch.linalg.inv(lock))).all()
    for _ in range(5):
        noise = torch.randn(3, 4, 4, generator=rng, dtype=torch.float64)
        assert (objective(m + 1e-3 * noise @ m) > objective(m)).all()


def test_tied_gauge_keeps_a_head_it_cannot_improve() -> None:
    x = torch.randn(2, 4, 40, generator=generator(0), dtype=torch.float64)
    identity = torch.eye(4, dtype=torch.float64).expand(2, -1, -1)
    assert torch.equal(tied_gauge(x, x, x, x), identity)
    # A dead head has nothing to align and must not become NaN.
    dead = torch.zeros_like(x)
    assert torch.equal(tied_gauge(dead, dead, dead, dead), identity)


@pytest.mark.parametrize("name", zoo.RESTRICTED)
def test_a_general_matrix_on_q_and_k_breaks_a_rotary_model(name: str) -> None:
    model, inputs = zoo.tiny(name)
    state, rng = zoo.state_of(model), generator(0)
    moved = dict(state)
    for block in Anatomy.of(model).attention:
        apply_qk(moved, block, invertible(block.kv_heads, block.head_dim, rng, condition=4))
    assert zoo.drift(model, state, moved, inputs) > 100 * TOLERANCE


@quick
@given(seed=seeds)
def test_within_is_a_projection_onto_what_commutes_with_rotations(seed: int) -> None:
    rng, block = generator(seed), dataclasses.replace(grouped()[0], rotary=True)
    a = invertible(3, 4, rng)
    cut = within(block, a)
    torch.testing.assert_close(within(block, cut), cut)
    torch.testing.assert_close(within(block, a - cut), torch.zeros_like(a))
    angles = torch.rand(2, generator=rng, dtype=torch.float64) * 6
    rotation = rotary_matrix(angles.cos()[None], angles.sin()[None])
    torch.testing.assert_close(cut @ rotation, rotation @ cut)
    assert not torch.allclose(a @ rotation, rotation @ a)
    signs = within(dataclasses.replace(block, qk_norm=(Slot("g"), Slot("h"))), a)
    assert torch.equal(signs.abs(), torch.eye(4, dtype=a.dtype).expand(3, -1, -1))
    assert torch.equal(signs @ rotation, rotation @ signs)


@pytest.mark.parametrize("interleaved", [False, True])
@quick
@given(seed=seeds)
def test_within_leaves_rows_that_are_not_rotated_alone(interleaved: bool, seed: int) -> None:
    """Against a rotation written down by hand: of rows 0 and 1, and so in either layout."""
    rng = generator(seed)
    block = dataclasses.replace(
        grouped()[0], rotary=True, rotated=2, interleaved=interleaved, head_dim=4
    )
    a = invertible(3, 4, rng)
    cut = within(block, a)
    torch.testing.assert_close(within(block, cut), cut)
    torch.testing.assert_close(within(block, a - cut), torch.zeros_like(a))
    angle = torch.rand((), generator=rng, dtype=torch.float64) * 6
    rotation = torch.eye(4, dtype=torch.float64)
    rotation[:2, :2] = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    torch.testing.assert_close(cut @ rotation, rotation @ cut)
    assert torch.equal(cut[:, 2:, 2:], a[:, 2:, 2:])


@quick
@given(seed=seeds)
def test_interleaved_pairs_are_neighbours(seed: int) -> None:
    rng = generator(seed)
    block = dataclasses.replace(grouped()[0], rotary=True, interleaved=True)
    cut = within(block, invertible(3, 4, rng))
    first, second = torch.rand(2, generator=rng, dtype=torch.float64) * 6
    turns = [torch.stack([t.cos(), -t.sin(), t.sin(), t.cos()]).view(2, 2) for t in (first, second)]
    rotation = torch.block_diag(*turns)
    torch.testing.assert_close(cut @ rotation, rotation @ cut)


@quick
@given(seed=seeds)
def test_rotary_gauge_undoes_a_lock_and_is_a_minimum(seed: int) -> None:
    rng = generator(seed)
    x0, y0, dx, dy = (torch.randn(3, 4, 40, generator=rng, dtype=torch.float64) for _ in range(4))
    block = dataclasses.replace(grouped()[0], rotary=True)
    lock = within(block, invertible(3, 4, rng, 1e3))
    exact = rotary_gauge(lock @ x0, x0, torch.linalg.inv(lock).mT @ y0, y0)
    torch.testing.assert_close(exact @ lock, torch.eye(4, dtype=lock.dtype).expand(3, -1, -1))
    x, y = lock @ (x0 + 0.3 * dx), torch.linalg.inv(lock).mT @ (y0 + 0.3 * dy)

    def objective(m: Tensor) -> Tensor:
        ends = (m @ x - x0, torch.linalg.inv(m).mT @ y - y0)
        return sum((e.square().sum((1, 2)) for e in ends), torch.zeros(3, dtype=m.dtype))

    found = rotary_gauge(x, x0, y, y0)
    assert (objective(found) <= objective(torch.linalg.inv(lock))).all()
    for _ in range(5):
        near = within(block, torch.randn(3, 4, 4, generator=rng, dtype=torch.float64))
        assert (objective(found + 1e-3 * near @ found) > objective(found)).all()


def test_rotary_gauge_keeps_a_pair_it_cannot_improve() -> None:
    x = torch.randn(2, 4, 40, generator=generator(0), dtype=torch.float64)
    identity = torch.eye(4, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(rotary_gauge(x, x, x, x), identity)
    dead = torch.zeros_like(x)
    assert torch.equal(rotary_gauge(dead, dead, dead, dead), identity)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "t5"])
def test_alignment_undoes_a_lock_on_every_kind_of_gauge(name: str) -> None:
    model, inputs = zoo.tiny(name)
    base, rng = zoo.state_of(model), generator(9)
    expert = perturbed(base, 0.02, 10)
    released = random_symmetry(expert, Anatomy.of(model), rng)
    opened = dict(released)
    for block in Anatomy.of(model).attention:
        permute_heads(opened, block, match_heads(block, opened, base))
        apply_qk(opened, block, qk_gauge(block, opened, base))
        apply_vo(opened, block, vo_gauge(block, opened, base))
        for linear in block.linears().values():
            found, true = (linear.weight.read(s) for s in (opened, expert))
            assert float((found - true).norm() / true.norm()) < 0.02
    assert zoo.drift(model, released, opened, inputs) <= TOLERANCE

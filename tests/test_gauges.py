"""Every gauge keeps the function of every family; aligning forgets which element was drawn."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo import TOLERANCE, generator

from benchmark.anatomy import Anatomy, gauges
from benchmark.anatomy.gauges import BLOCKS, KINDS, Group, align
from benchmark.api.contracts import Defense, Victim
from benchmark.core.errors import UsageError
from benchmark.core.state import State, digest
from defenses.mergebarrier_attn import MergeBarrierAttention
from defenses.mergelock import MergeLock
from defenses.params import PaRaMS

pytestmark = pytest.mark.slow

ALL = (*zoo.NAMES, *zoo.CONVOLUTIONAL)
#: Equal up to rounding in float64, and up to float32 storage against ‖τ‖.
EXACT, EQUAL = 1e-9, 1e-3

few = settings(max_examples=1, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


class Subject(NamedTuple):
    """A tiny model, its group, and an expert of it."""

    model: nn.Module
    inputs: dict[str, Tensor]
    base: State
    expert: State
    anatomy: Anatomy
    group: Group


@functools.cache
def subject(name: str) -> Subject:
    model, inputs = zoo.tiny(name)
    inputs = dict(inputs)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"].clone()
        inputs["attention_mask"][0, 2:4] = 0  # the last token is what CLIP pools
    base, anatomy = zoo.state_of(model), Anatomy.of(model)
    expert, first = zoo.perturbed(base, 0.02, 3), dict[int, str]()
    for key, value in model.state_dict().items():
        # What is one tensor in the model stays one; no fine-tuning moves running statistics.
        expert[key] = expert[first.setdefault(value.data_ptr(), key)]
        if key.endswith(("running_mean", "running_var")):
            expert[key] = base[key]
    return Subject(model, inputs, base, expert, anatomy, gauges.of(anatomy, base))


def double(state: Mapping[str, Tensor]) -> State:
    return {k: v.double() if v.is_floating_point() else v for k, v in state.items()}


@functools.cache
def ideal(name: str, dtype: torch.dtype) -> nn.Module:
    """The model in ``dtype`` throughout, norms without ε.

    The RMS norms of transformers compute in float32 whatever comes in, and a scale of the stream is
    a gauge up to the ε of its norms only.
    """
    model = copy.deepcopy(subject(name).model).to(dtype)
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):
            offset = 1.0 if "Gemma" in type(module).__name__ else 0.0
            module.forward = functools.partial(rms_norm, module, offset)  # type: ignore[method-assign]
        elif hasattr(module, "eps") and not isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
        elif hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0
    if dtype == torch.float64:
        model.forward = functools.partial(precisely, model.forward)  # type: ignore[method-assign]
    return model


class Doubled(TorchFunctionMode):
    """Whatever asks for float32 gets float64: softmax, rotations and norms of transformers do."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        named = {key: wide(value) for key, value in (kwargs or {}).items()}
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **named)


def precisely(forward: Any, *args: Any, **kwargs: Any) -> Any:
    with Doubled():
        return forward(*args, **kwargs)


def rms_norm(module: Any, offset: float, x: Tensor) -> Tensor:
    return (offset + module.weight) * x * x.square().mean(-1, keepdim=True).rsqrt()


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    squares = (
        (a[key].double() - value.double()).square().sum()
        for key, value in b.items()
        if value.is_floating_point()
    )
    return float(sum(squares, torch.zeros((), dtype=torch.float64)).sqrt())


# --- which gauges there are -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_has_its_row(name: str) -> None:
    assert subject(name).group.missing == ()


@pytest.mark.parametrize(
    ("name", "has", "lacks"),
    [
        # Post-LN, bare: its output is the stream itself, which nothing may rename.
        ("bert", {"norm-shift", "norm-scale", "constant"}, {"norm-gain", "stream-permutation"}),
        ("bert-classifier", {"stream-permutation", "norm-gain"}, {"stream-rotation"}),
        # Pre-LN with a head: whatever commutes with taking off the mean.
        ("vit", {"stream-rotation", "stream-scale", "null-direction", "embedding-shift"}, set()),
        ("dinov2", {"layer-scale", "norm-gain"}, {"stream-rotation", "stream-permutation"}),
        # A gain between embeddings and stream.
        ("clip-vision", {"stream-permutation", "norm-scale"}, {"stream-rotation"}),
        # Tied: what reads the last norm is the embedding.
        ("gpt2", {"stream-permutation", "constant"}, {"stream-rotation", "embedding-shift"}),
        ("t5", {"stream-permutation", "stream-sign"}, {"heads", "constant", "value-shift"}),
        ("llama", {"stream-rotation", "norm-gain"}, {"null-direction", "norm-shift", "constant"}),
        ("qwen3", {"qk-gain", "qk-sign", "qk-length", "query-heads"}, {"key-bias"}),
        ("gemma3", {"qk-gain", "stream-scale"}, {"stream-rotation"}),
        # No norm before its blocks, one behind each: their gains stand on the path.
        ("olmo2", {"qk-gain", "qk-length", "norm-scale"}, {"stream-rotation"}),
        # Rows that are not rotated have the general gauge, and a free key bias.
        ("phi", {"key-bias", "norm-shift", "stream-rotation"}, set()),
        ("phi3", {"stream-rotation"}, {"key-bias"}),
        ("cohere", {"null-direction", "heads"}, {"norm-shift", "stream-rotation"}),
        ("bloom", {"key-bias", "norm-scale"}, {"heads"}),
        ("falcon", {"constant"}, {"heads"}),
        # What the encoder's last norm gives is read by keys and values alone.
        ("bart", {"stream-permutation", "norm-gain"}, {"stream-rotation", "embedding-shift"}),
        ("bart-classifier", {"embedding-shift", "stream-permutation"}, {"stream-rotation"}),
        ("vit-gpt2", {"stream-rotation", "norm-shift"}, {"bridge"}),
        ("vit-gpt2-wide", {"bridge", "norm-shift"}, set()),
        # Sinusoids that are in no file are added to its embeddings.
        ("m2m100", {"constant", "norm-gain"}, {"stream-permutation", "stream-scale"}),
        # What reads its last norm has a norm and an output of its own; this is an embedding.
        ("bert2bert", {"stream-permutation", "constant", "stream-scale"}, {"stream-rotation"}),
        # Its keys have no bias, and need none; an activation stands before the encoder's stream.
        ("whisper", {"norm-shift", "null-direction", "stream-permutation"}, {"stream-rotation"}),
        # Positions are made of the stream itself, many channels at once.
        ("wav2vec2", {"instance-norm", "norm-scale", "units"}, {"stream-permutation"}),
        ("wav2vec2-stable", {"stream-scale", "constant"}, {"instance-norm", "stream-permutation"}),
        ("resnet", {"batch-norm", "units", "unit-scale"}, {"norm-gain"}),
        ("convnext", {"layer-scale", "norm-gain", "constant"}, {"stream-permutation"}),
    ],
)
def test_the_architecture_says_which(name: str, has: set[str], lacks: set[str]) -> None:
    kinds = set(subject(name).group.kinds)
    assert has <= kinds
    assert not lacks & kinds


def test_a_tensor_that_no_row_knows_is_named() -> None:
    case = subject("bert")
    state = {**case.base, "embeddings.language.weight": torch.ones(3, zoo.WIDTH)}
    group = gauges.of(case.anatomy, state)
    assert len(group.missing) == 1
    assert "'embeddings.language.weight'" in group.missing[0]
    inside = {"heads", "query-key", "value-output", "key-bias", "value-shift", "units"}
    assert set(group.kinds) == inside


def test_a_head_that_no_row_knows_leaves_the_stream_alone() -> None:
    """A second head of BERT reads what the pooler reads."""
    case = subject("bert-classifier")
    state = {**case.base, "tagger.weight": torch.ones(3, zoo.WIDTH)}
    group = gauges.of(case.anatomy, state)
    assert "'tagger.weight'" in group.missing[0]
    assert not {"stream-permutation", "norm-gain", "norm-scale"} & set(group.kinds)


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart", "bart-classifier", "vit-gpt2"])
def test_a_file_holds_one_of_the_names_of_a_tied_tensor(name: str) -> None:
    """Of the others the State says nothing, and the model uses the one that is there."""
    case = subject(name)
    state = zoo.untied(case.model)
    assert state.keys() < case.base.keys()
    group = gauges.of(case.anatomy, state)
    assert group.kinds == case.group.kinds

    def answers(state: State) -> Tensor:
        found = torch.func.functional_call(case.model, state, kwargs=case.inputs)
        return found.logits  # type: ignore[no-any-return]

    before = answers(state)
    for kind in group.exact.kinds:
        alone = group.subset([kind])
        after = answers(alone.apply(state, alone.draw(generator(6))))
        assert float((after - before).abs().max() / before.abs().max()) <= TOLERANCE, kind


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["Bert", "Roberta", "DistilBert", "Electra"])
def test_heads_of_several_layers(name: str, tied: bool) -> None:
    """What tells masked tokens: a layer, an activation, a norm, and embeddings or an output."""
    model, inputs = zoo.encoders.masked(name, tied), {"input_ids": zoo.tiny("bert")[1]["input_ids"]}
    state = zoo.state_of(model)
    group = gauges.of(Anatomy.of(model), state)
    assert group.missing == ()
    assert {"norm-gain", "stream-permutation", "stream-scale"} <= set(group.kinds)
    assert ("stream-sign" in group.kinds) is not tied  # an activation stands before its embeddings
    for kind in group.exact.kinds:
        alone = group.subset([kind])
        moved = alone.apply(state, alone.draw(generator(3)))
        assert zoo.drift(model, state, moved, inputs) <= TOLERANCE, kind
    short = zoo.untied(model)
    assert gauges.of(Anatomy.of(model), short).kinds == group.kinds


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("T5", "ForSequenceClassification"),
        ("T5", "ForTokenClassification"),
        ("T5", "ForQuestionAnswering"),
        ("Bart", "ForQuestionAnswering"),
        ("Whisper", "ForAudioClassification"),
        ("Wav2Vec2", "ForSequenceClassification"),
        ("Wav2Vec2", "ForAudioFrameClassification"),
    ],
)
def test_heads_of_tasks(name: str, head: str) -> None:
    builders = {"T5": zoo.crossing.t5, "Bart": zoo.crossing.bart, "Whisper": zoo.audio.whisper}
    model = builders.get(name, zoo.audio.waves)(head=head).eval()
    inputs = {"T5": zoo.TOKENS, "Bart": zoo.TOKENS, "Whisper": ("input_features",)}
    given = {key: zoo.examples()[key] for key in inputs.get(name, ("input_values",))}
    state = zoo.perturbed(zoo.state_of(model), 0.3, 1)
    group = gauges.of(Anatomy.of(model), state).exact
    assert group.missing == ()
    assert "norm-gain" in group.kinds
    before, after = (
        torch.func.functional_call(model, s, kwargs=given, tie_weights=False)
        for s in (state, group.apply(state, group.draw(generator(2))))
    )
    for key in ("logits", "start_logits", "end_logits"):
        if key in before:
            torch.testing.assert_close(after[key], before[key], rtol=1e-4, atol=1e-5)


def test_what_else_an_embedding_is_used_for_is_named() -> None:
    """Under a name that no row has: whether a State holds that name or not."""
    model = nn.Module()
    model.transformer, model.speak = zoo.tiny("gpt2")[0].transformer, nn.Linear(zoo.WIDTH, 1)
    model.speak.weight = model.transformer.wte.weight
    for state in (zoo.state_of(model), zoo.untied(model)):
        state.pop("speak.bias")
        group = gauges.of(Anatomy.of(model), state)
        assert group.missing == (
            "gauges outside the blocks of transformer.: no row knows 'speak.weight'",
        )


def test_an_output_of_its_own_frees_the_embeddings() -> None:
    """mT5 is published with one, and BART may have one: ``shared`` then lends nothing."""
    mt5 = zoo.crossing.t5("gated-gelu", "MT5")
    mt5.lm_head.weight = nn.Parameter(torch.randn(zoo.VOCABULARY, zoo.WIDTH))
    bart = zoo.crossing.bart("MBart", tie_word_embeddings=False)
    for model, has in ((mt5, "stream-rotation"), (bart, "embedding-shift")):
        model.eval().requires_grad_(False)
        state, inputs = zoo.perturbed(zoo.state_of(model), 1.0, 1), zoo.tiny("bart")[1]
        for names in Anatomy.of(model).tied:
            state |= dict.fromkeys(names, state[names[0]])
        group = gauges.of(Anatomy.of(model), state).exact
        assert group.missing == ()
        assert has in group.kinds
        moved = group.apply(state, group.draw(generator(2)))
        assert zoo.drift(model, state, moved, inputs) <= 2 * TOLERANCE


def test_positions_that_are_made_anew_stay() -> None:
    """Marian's are in its State, but in no file of it."""
    model = zoo.crossing.bart("Marian").eval()
    places = [key for key in model.state_dict() if "embed_positions" in key]
    group = gauges.of(Anatomy.of(model), zoo.state_of(model))
    assert len(places) == 2
    assert group.missing == ()
    assert not {"stream-permutation", "stream-scale"} & set(group.kinds)
    moved = group.apply(zoo.state_of(model), group.draw(generator(1)))
    assert all(torch.equal(moved[key], model.state_dict()[key]) for key in places)


def test_a_decoder_without_its_encoder_is_treated_inside_its_blocks() -> None:
    """It may run with or without one."""
    model = zoo.crossing.pair("vit", "gpt2").decoder
    group = gauges.of(Anatomy.of(model), zoo.state_of(model))
    assert group.missing == (
        "gauges outside the blocks of transformer.: no tower is what its cross-attention reads",
    )
    assert {"heads", "query-key", "value-output"} <= set(group.kinds) <= {*BLOCKS, "value-shift"}


def test_a_bridge_that_widens_is_left_alone() -> None:
    """Of the dimensions that it gives some are made of others: its basis has no one answer."""
    model = zoo.crossing.pair("vit", "gpt2", width=32)
    group = gauges.of(Anatomy.of(model), zoo.state_of(model))
    assert group.missing == (
        "gauges between 'enc_to_dec_proj.weight' and what reads it: it widens what it is given",
    )
    assert "bridge" not in group.kinds
    assert {"stream-rotation", "norm-gain"} <= set(group.kinds)


def test_a_bridge_of_zeros_takes_nothing_away() -> None:
    case = subject("vit-gpt2-wide")
    zeros = {k: torch.zeros_like(v) if "enc_to_dec" in k else v for k, v in case.base.items()}
    alone = case.group.subset(["bridge"])
    assert distance(alone.align(zeros, zeros), zeros) == 0
    found = alone.align(case.base, zeros)
    assert distance(found, zeros) <= distance(case.base, zeros)
    assert zoo.drift(case.model, case.base, found, case.inputs) <= TOLERANCE


def test_what_sounds_are_projected_from_is_an_output_of_a_bare_model() -> None:
    """And what a quantizer reads: so far, and no farther, its filters trade places."""
    for head, last in (("ForCTC", True), ("Model", False), ("ForPreTraining", False)):
        model = zoo.audio.waves(head=head)
        anatomy = Anatomy.of(model)
        assert len(anatomy.channels) == 2 + last
        group = gauges.of(anatomy, zoo.state_of(model))
        moved = {gauge.name for gauge in group.gauges if "feature_projection" in gauge.name}
        assert bool(moved) is last


def test_what_is_read_before_the_last_norm_is_not_guessed() -> None:
    """The last norm of CLIP's eyes is for one token alone: a decoder reads what goes into it."""
    import transformers

    vision = transformers.CLIPVisionConfig(**zoo.vision.IMAGE, **zoo.vision.SHAPE)
    model = transformers.VisionEncoderDecoderModel(
        encoder=transformers.CLIPVisionModel(vision),
        decoder=zoo.crossing.pair("vit", "gpt2").decoder,
    )
    group = gauges.of(Anatomy.of(model), zoo.state_of(model))
    assert len(group.missing) == 2
    assert all(said.endswith("reads of the encoder is not known") for said in group.missing)
    assert not {"constant", "stream-scale"} & set(group.kinds)


def test_subset() -> None:
    group = subject("bert").group
    assert group.subset(["norm-shift"]).kinds == ("norm-shift",)
    name = group.gauges[0].name
    assert [gauge.name for gauge in group.subset([name]).gauges] == [name]
    with pytest.raises(UsageError, match="unknown gauge 'norm-shfit'; there are stream-rotation"):
        group.subset(["norm-shfit"])


# --- they keep the function -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@few
@given(seed=seeds)
def test_an_element_keeps_the_function(name: str, seed: int) -> None:
    """Of each gauge alone, and of the whole group."""
    case, rng = subject(name), generator(seed)
    before, whole = digest(case.base), case.group
    for group in (*(whole.subset([kind]) for kind in whole.kinds), whole.exact, whole):
        elements, what = group.draw(rng), group.kinds
        moved = group.apply(case.base, elements)
        exact = group.gauges == group.exact.gauges
        model = case.model if exact else ideal(name, torch.float32)
        assert zoo.drift(model, case.base, moved, case.inputs) <= TOLERANCE, what
        start, inputs = double(case.base), double(case.inputs)
        moved = group.apply(start, elements)
        assert zoo.drift(ideal(name, torch.float64), start, moved, inputs) <= EXACT, what
        back = group.undo(moved, elements)
        assert distance(back, start) <= EXACT * (1 + distance(moved, start)), what
    assert digest(case.base) == before, "the input is untouched"


@pytest.mark.parametrize("name", ALL)
def test_an_element_moves_the_weights(name: str) -> None:
    case = subject(name)
    for gauge in case.group.gauges:
        alone = case.group.subset([gauge.name])
        moved = alone.apply(case.base, alone.draw(generator(1)))
        if gauge.kind != "stream-sign":  # with LayerNorm one coin for all
            assert distance(moved, case.base) > 0, gauge.name


def test_the_property_sees_a_wrong_transform() -> None:
    """Shifting a norm without its readers, or a stream's readers without its writers."""
    case = subject("vit")
    for kind in ("norm-shift", "norm-gain", "null-direction", "stream-rotation", "constant"):
        group = case.group.subset([kind])
        moved = group.apply(case.base, group.draw(generator(2)))
        touched = [key for key, value in moved.items() if not torch.equal(value, case.base[key])]
        half = {**case.base, **{key: moved[key] for key in touched[::2]}}
        worst = zoo.drift(case.model, case.base, half, case.inputs)
        assert kind == "constant" or worst > 10 * TOLERANCE, kind


# --- and can be found again -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@few
@given(seed=seeds)
def test_aligning_forgets_the_element(name: str, seed: int) -> None:
    """align(g·θ) = align(θ), for one draw and for two, one on top of the other."""
    case, rng = subject(name), generator(seed)
    tau = distance(case.expert, case.base)
    wanted = case.group.align(case.expert, case.base)
    assert zoo.drift(case.model, case.expert, wanted, case.inputs) <= TOLERANCE
    released = case.expert
    for _ in range(2):
        released = case.group.apply(released, case.group.draw(rng))
        assert distance(released, case.expert) > 10 * tau
        assert distance(case.group.align(released, case.base), wanted) <= EQUAL * tau


@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize(
    "locks",
    [
        (PaRaMS(),),
        (PaRaMS(scaling="nonsymmetric"),),
        (MergeLock(),),
        (PaRaMS(), MergeLock()),
        (MergeBarrierAttention(), PaRaMS()),
    ],
    ids=["params", "params-nonsymmetric", "mergelock", "params+mergelock", "mergebarrier+params"],
)
def test_aligning_forgets_published_locks(name: str, locks: tuple[Defense, ...]) -> None:
    """Alone, and under a draw of the whole group."""
    case = subject(name)
    tau = distance(case.expert, case.base)
    wanted, released = case.group.align(case.expert, case.base), case.expert
    for lock in locks:
        owner = Victim(case.base, released, case.anatomy, *[None] * 6)  # type: ignore[arg-type]
        released = lock.protect(owner, generator(1))
    for state in (released, case.group.apply(released, case.group.draw(generator(9)))):
        assert distance(case.group.align(state, case.base), wanted) <= EQUAL * tau


@pytest.mark.parametrize("name", ALL)
def test_aligning_an_expert_brings_it_no_farther_from_the_base(name: str) -> None:
    """Nor than aligning inside the blocks alone does; what it moves, it moves towards the base."""
    case = subject(name)
    tau, found = distance(case.expert, case.base), case.group.align(case.expert, case.base)
    blocks = case.group.subset(BLOCKS).align(case.expert, case.base)
    assert distance(found, case.base) <= min(tau, distance(blocks, case.base)) * 1.0001
    assert distance(case.group.align(case.base, case.base), case.base) <= EQUAL * tau


def test_blocks_alone_leave_what_is_outside_of_them() -> None:
    case = subject("vit")
    tau = distance(case.expert, case.base)
    released = case.group.apply(case.expert, case.group.draw(generator(4)))
    blocks = case.group.subset(BLOCKS).align(released, case.base)
    assert distance(blocks, case.expert) > 10 * tau
    assert distance(case.group.align(released, case.base), case.expert) < tau


@pytest.mark.parametrize("name", ALL)
def test_no_more_gauges_than_it_takes(name: str) -> None:
    """What an attacker takes: nothing of an expert, blocks where those were locked, else all."""
    case = subject(name)
    inside, near = case.group.subset(BLOCKS), case.group.align(case.expert, case.base)
    if distance(near, case.base) > 0.96 * distance(case.expert, case.base):
        kept = align(case.expert, case.base, case.anatomy)
        assert digest(kept) == digest(case.expert)
    tau = distance(case.expert, case.base)
    for group in (inside, case.group):
        released = group.apply(case.expert, group.draw(generator(5)))
        found = align(released, case.base, case.anatomy)
        wanted = [g.align(case.expert, case.base) for g in (inside, case.group)]
        assert min(distance(found, state) for state in wanted) <= EQUAL * tau


def test_kinds_have_names_of_their_own() -> None:
    assert len({kind.kind for kind in KINDS}) == len(KINDS)

"""Gauges where towers meet, where tensors have several names, and of heads of several layers."""

from __future__ import annotations

import functools

import pytest
import torch
import zoo
from test_gauges import distance, subject
from torch import Tensor, nn
from zoo import TOLERANCE, generator

from benchmark.anatomy import Anatomy, gauges
from benchmark.anatomy.gauges import BLOCKS
from benchmark.core.state import State


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
        ("MMS", "ForCTC"),
    ],
)
def test_heads_of_tasks(name: str, head: str) -> None:
    builders = {"T5": zoo.crossing.t5, "Bart": zoo.crossing.bart, "Whisper": zoo.audio.whisper}
    # wav2vec2 with an adapter for each language.
    builders["MMS"] = functools.partial(zoo.audio.waves, **zoo.audio.STABLE, adapter_attn_dim=16)
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


def test_donut_is_treated_inside_its_blocks() -> None:
    """Its eyes are a Swin of older names, whose stages have no wiring; no block is left out."""
    import transformers

    sizes = {"embed_dim": 32, "depths": [1, 1], "num_heads": [4, 8], "window_size": 2}
    eyes = transformers.DonutSwinConfig(image_size=8, patch_size=1, **sizes)
    model = transformers.VisionEncoderDecoderModel(
        encoder=transformers.DonutSwinModel(eyes),
        decoder=zoo.crossing.bart("MBart", "ForCausalLM", is_decoder=True),
    ).eval()
    anatomy, state = Anatomy.of(model), zoo.state_of(model)
    assert anatomy.uncovered == ()
    assert [block.fixed_heads for block in anatomy.attention].count(True) == 2
    group = gauges.of(anatomy, state)
    assert group.missing
    given = {key: zoo.examples()[key] for key in ("pixel_values", "decoder_input_ids")}
    moved = group.apply(state, group.draw(generator(4)))
    assert zoo.drift(model, state, moved, given) <= TOLERANCE

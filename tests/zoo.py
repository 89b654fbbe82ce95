"""Tiny random models of every supported family, for property tests.

The weights are ten times larger than transformers' initialisation and no bias is zero, so that a
transform that breaks the function shows; dh/d = 1/8, below which per-head least squares does not
erase the task vector (METHODS section 3, trap 1).

    model, inputs = tiny("vit")
    state = state_of(model)            # a State, independent of the model
    out = outputs(model, state, inputs)  # (n, m): all that the model computes, a row per example
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from benchmark.core.state import State

#: METHODS section 1: max |Δlogit| relative to the largest logit, float32.
TOLERANCE = 1e-4
WIDTH, HEADS, LAYERS, HIDDEN = 64, 8, 2, 96
VOCABULARY, LENGTH, BATCH = 40, 6, 4
_SHAPE = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": HIDDEN,
}
_IMAGE = {"image_size": 8, "patch_size": 4}
_TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3}


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **_SHAPE))


def _bert_classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **_SHAPE)
    return BertForSequenceClassification(config)


def _roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **_SHAPE)
    return RobertaForSequenceClassification(config)


def _distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertModel

    return DistilBertModel(
        DistilBertConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=16,
            dim=WIDTH,
            n_heads=HEADS,
            n_layers=LAYERS,
            hidden_dim=HIDDEN,
        )
    )


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=5, **_IMAGE, **_SHAPE))


def _dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    shape = {key: value for key, value in _SHAPE.items() if key != "intermediate_size"}
    return Dinov2Model(Dinov2Config(mlp_ratio=2, **_IMAGE, **shape))


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {**_TEXT, **_SHAPE, "max_position_embeddings": LENGTH}
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config={**_IMAGE, **_SHAPE}, projection_dim=16)
    )


def _clip_vision() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=16, **_IMAGE, **_SHAPE))


def _open_clip(custom_text: bool = False) -> nn.Module:
    from open_clip.model import CLIP, CustomTextCLIP

    vision = {
        "layers": LAYERS,
        "width": WIDTH,
        "head_width": WIDTH // HEADS,
        "mlp_ratio": HIDDEN / WIDTH,
        **_IMAGE,
    }
    text = {
        "context_length": LENGTH,
        "vocab_size": VOCABULARY,
        "width": WIDTH,
        "heads": HEADS,
        "layers": LAYERS,
    }
    cls = CustomTextCLIP if custom_text else CLIP
    return cls(embed_dim=16, vision_cfg=vision, text_cfg=text)


_DECODER = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "pad_token_id": 3, **_SHAPE}
_DECODER |= {"bos_token_id": 0, "eos_token_id": 1, "num_key_value_heads": HEADS // 2}


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=HIDDEN,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config)


def _t5(feed_forward: str = "relu") -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        feed_forward_proj=feed_forward,
    )
    return T5ForConditionalGeneration(config)


def _decoder(name: str, **fields: object) -> nn.Module:
    """A causal language model of transformers: rotary, grouped heads, gated MLP."""
    import transformers

    config = getattr(transformers, f"{name}TextConfig", None)
    config = config or getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")
    return model(config(**{**_DECODER, **fields}))  # type: ignore[no-any-return]


def _plain(name: str, **fields: object) -> nn.Module:
    """The same with as many KV heads as heads, or those that ``fields`` say."""
    return _decoder(name, **{"num_key_value_heads": HEADS, **fields})


def _older(name: str, **fields: object) -> nn.Module:
    """A causal language model whose configuration has names of its own."""
    import transformers

    config, model = (getattr(transformers, f"{name}{part}") for part in ("Config", "ForCausalLM"))
    named = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3}
    return model(config(**named, **fields))  # type: ignore[no-any-return]


def _convnext(v2: bool = False, bare: bool = False) -> nn.Module:
    import transformers

    name = "ConvNextV2" if v2 else "ConvNext"
    config = getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}{'Model' if bare else 'ForImageClassification'}")
    return model(config(hidden_sizes=[8, 16], depths=[2, 1], num_stages=2, num_labels=5))  # type: ignore[no-any-return]


def _resnet(layer: str = "basic", bare: bool = False) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32] if layer == "basic" else [32, 64],
        depths=[2, 2],
        layer_type=layer,
        num_labels=5,
    )
    return ResNetModel(config) if bare else ResNetForImageClassification(config)


def _timm_resnet(deep: bool = False) -> nn.Module:
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet

    if deep:
        stem: Any = {"stem_type": "deep", "stem_width": 8, "avg_down": True}
        return ResNet(Bottleneck, (1, 1, 2, 1), channels=(4, 4, 8, 8), num_classes=5, **stem)
    return ResNet(BasicBlock, (2, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=5)


def _timm_convnext(**fields: Any) -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=(1, 1, 1, 2), dims=(8, 8, 16, 16), num_classes=5, **fields)


_CLIP_TEXT = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 16, "heads": 2}


def _open_clip_resnet() -> nn.Module:
    from open_clip.model import CLIP

    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": _CONV_SIZE}
    return CLIP(embed_dim=16, vision_cfg=vision, text_cfg={**_CLIP_TEXT, "layers": 1})


def _open_clip_convnext() -> nn.Module:
    from open_clip.model import CLIP

    model = CLIP(  # its own trunk is far too wide for a test
        embed_dim=16,
        vision_cfg={"timm_model_name": "convnext_atto", "image_size": _CONV_SIZE},
        text_cfg={**_CLIP_TEXT, "layers": 1},
    )
    trunk = _timm_convnext()
    trunk.reset_classifier(0)  # type: ignore[operator]
    model.visual.trunk = trunk
    model.visual.head.proj = nn.Linear(16, 16, bias=False)
    return model


_CONV_SIZE = 32
_CONVOLUTIONAL: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "convnext": (_convnext, ("pixel_values",)),
    "convnext-bare": (functools.partial(_convnext, bare=True), ("pixel_values",)),
    "convnextv2": (functools.partial(_convnext, v2=True), ("pixel_values",)),
    "resnet": (_resnet, ("pixel_values",)),
    "resnet-bare": (functools.partial(_resnet, bare=True), ("pixel_values",)),
    "resnet-bottleneck": (functools.partial(_resnet, "bottleneck"), ("pixel_values",)),
    "timm-convnext": (_timm_convnext, ("x",)),
    "timm-convnextv2": (
        functools.partial(_timm_convnext, use_grn=True, ls_init_value=None, conv_mlp=True),
        ("x",),
    ),
    "timm-resnet": (_timm_resnet, ("x",)),
    "timm-resnet-deep": (functools.partial(_timm_resnet, True), ("x",)),
    "open-clip-resnet": (_open_clip_resnet, ("image", "text")),
    "open-clip-convnext": (_open_clip_convnext, ("image", "text")),
}
#: Models with channels, most of them without attention.
CONVOLUTIONAL: tuple[str, ...] = tuple(_CONVOLUTIONAL)

_PARTIAL = {"partial_rotary_factor": 0.5}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
_HEAD_DIM = {"head_dim": WIDTH // HEADS}
_TOKENS = ("input_ids", "attention_mask")
_MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "bert": (_bert, ("input_ids", "attention_mask")),
    "bert-classifier": (_bert_classifier, ("input_ids", "attention_mask")),
    "roberta": (_roberta, ("input_ids", "attention_mask")),
    "distilbert": (_distilbert, ("input_ids", "attention_mask")),
    "vit": (_vit, ("pixel_values",)),
    "dinov2": (_dinov2, ("pixel_values",)),
    "clip": (_clip, ("input_ids", "attention_mask", "pixel_values")),
    "clip-vision": (_clip_vision, ("pixel_values",)),
    "open-clip": (_open_clip, ("image", "text")),
    "open-clip-custom-text": (functools.partial(_open_clip, True), ("image", "text")),
    "gpt2": (_gpt2, _TOKENS),
    "t5": (_t5, (*_TOKENS, "decoder_input_ids")),
    "t5-gated": (functools.partial(_t5, "gated-gelu"), (*_TOKENS, "decoder_input_ids")),
    "llama": (functools.partial(_decoder, "Llama", **_HEAD_DIM), _TOKENS),
    "mistral": (functools.partial(_decoder, "Mistral", **_HEAD_DIM), _TOKENS),
    "qwen2": (functools.partial(_decoder, "Qwen2"), _TOKENS),
    "qwen3": (functools.partial(_decoder, "Qwen3", **_HEAD_DIM), _TOKENS),
    "gemma2": (functools.partial(_decoder, "Gemma2", **_HEAD_DIM), _TOKENS),
    "gemma3": (functools.partial(_decoder, "Gemma3", **_HEAD_DIM), _TOKENS),
    "gemma": (functools.partial(_decoder, "Gemma", **_HEAD_DIM), _TOKENS),
    "starcoder2": (functools.partial(_decoder, "Starcoder2"), _TOKENS),
    "granite": (functools.partial(_decoder, "Granite", **_MULTIPLIERS), _TOKENS),
    "olmo2": (functools.partial(_decoder, "Olmo2"), _TOKENS),
    "stablelm": (functools.partial(_decoder, "StableLm", use_qkv_bias=True, **_PARTIAL), _TOKENS),
    "stablelm-parallel": (
        functools.partial(_decoder, "StableLm", use_parallel_residual=True, **_PARTIAL),
        _TOKENS,
    ),
    "smollm3": (functools.partial(_decoder, "SmolLM3", no_rope_layers=[1, 0]), _TOKENS),
    "cohere": (functools.partial(_decoder, "Cohere"), _TOKENS),
    "phi": (functools.partial(_plain, "Phi", **_PARTIAL), _TOKENS),
    "opt": (
        functools.partial(_plain, "OPT", ffn_dim=HIDDEN, word_embed_proj_dim=WIDTH),
        _TOKENS,
    ),
    "gptj": (
        functools.partial(
            _older, "GPTJ", n_embd=WIDTH, n_head=HEADS, n_layer=LAYERS, n_inner=HIDDEN,
            n_positions=16, rotary_dim=4,
        ),
        _TOKENS,
    ),
    "gpt-neox": (functools.partial(_plain, "GPTNeoX", rotary_pct=0.5), _TOKENS),
    "phi3": (functools.partial(_decoder, "Phi3", **_PARTIAL), _TOKENS),
    "falcon": (functools.partial(_plain, "Falcon", ffn_hidden_size=HIDDEN), _TOKENS),
    "falcon-new": (
        functools.partial(
            _plain, "Falcon", ffn_hidden_size=HIDDEN, new_decoder_architecture=True,
            num_kv_heads=HEADS // 2,
        ),
        _TOKENS,
    ),
    "falcon-alibi": (
        functools.partial(
            _plain, "Falcon", ffn_hidden_size=HIDDEN, alibi=True, bias=True, multi_query=False,
            parallel_attn=False,
        ),
        _TOKENS,
    ),
    "bloom": (
        functools.partial(_older, "Bloom", hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS),
        _TOKENS,
    ),
    "mpt": (
        functools.partial(
            _older, "Mpt", d_model=WIDTH, n_heads=HEADS, n_layers=LAYERS, max_seq_len=16,
        ),
        _TOKENS,
    ),
}  # fmt: skip
#: Every model, and one model per family (the rest differ in their prefixes only).
NAMES: tuple[str, ...] = tuple(_MODELS)
FAMILIES: tuple[str, ...] = (
    "bert", "distilbert", "vit", "dinov2", "clip", "open-clip", "gpt2", "t5", "qwen2", "qwen3",
    "olmo2", "cohere", "gptj", "phi3", "falcon", "bloom",
)  # fmt: skip
#: The Q/K gauge group of those where it is not the general one.
RESTRICTED = {
    "llama": "rotary", "mistral": "rotary", "qwen2": "rotary", "gemma2": "rotary",
    "qwen3": "sign", "gemma3": "sign",
    "gemma": "rotary", "starcoder2": "rotary", "granite": "rotary", "olmo2": "sign",
    "stablelm": "rotary", "stablelm-parallel": "rotary", "smollm3": "rotary", "cohere": "rotary",
    "phi": "rotary", "gptj": "rotary", "gpt-neox": "rotary", "phi3": "rotary",
    "falcon": "rotary", "falcon-new": "rotary",
}  # fmt: skip
#: Those with fewer KV heads than heads: half as many, but one in the multi-query ``falcon``.
GROUPED = tuple({*RESTRICTED} - {"phi", "gptj", "gpt-neox", "falcon"})
#: Those with a gated MLP.
GATED = (*({*GROUPED} - {"starcoder2", "falcon-new"}), "t5-gated")


def _examples(rng: torch.Generator, size: int) -> dict[str, Tensor]:
    tokens = torch.randint(4, VOCABULARY, (BATCH, LENGTH), generator=rng)
    tokens[:, -1] = 1  # CLIP pools at the end-of-text token
    mask = torch.ones_like(tokens)
    images = torch.randn(BATCH, 3, size, size, generator=rng)
    text = tokens.clone()
    text[:, -1] = VOCABULARY - 1  # open_clip pools at the largest token
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "decoder_input_ids": tokens.flip(1),
        "pixel_values": images,
        "image": images,
        "x": images,
        "text": text,
    }


@functools.cache
def tiny(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model ``name`` in evaluation mode and inputs for it. Shared between tests: never edit."""
    build, wanted = {**_MODELS, **_CONVOLUTIONAL}[name]
    model = build().eval().requires_grad_(False)
    rng = torch.Generator().manual_seed((NAMES + CONVOLUTIONAL).index(name))
    for key, value in model.named_parameters():
        if value.ndim == 0:  # CLIP's logit scale
            continue
        noise = torch.randn(value.shape, generator=rng)
        gain = any(part in key.lower() for part in ("norm", "ln_", "lambda1")) and "weight" in key
        if name in _CONVOLUTIONAL and value.ndim == 1 and key.endswith(("weight", "gamma")):
            gain = True  # of a norm that is called bn1, downsample.1 or stem.1
        value.copy_(1 + 0.1 * noise if gain or "lambda1" in key else 0.2 * noise)
    for key, value in model.named_buffers():
        noise = torch.randn(value.shape, generator=rng)
        if key.endswith("running_mean"):
            value.copy_(0.5 * noise)
        elif key.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=rng))
        elif key.endswith("num_batches_tracked"):
            value.fill_(7)
    examples = _examples(rng, _CONV_SIZE if name in _CONVOLUTIONAL else _IMAGE["image_size"])
    return model, {key: examples[key] for key in wanted}


def state_of(model: nn.Module) -> State:
    """The model's State, sharing no memory with it."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def untied(model: nn.Module) -> State:
    """:func:`state_of` with tied weights under their first name only, as files hold them."""
    first: dict[int, str] = {}
    for key, value in model.state_dict().items():
        first.setdefault(value.data_ptr(), key)
    state = state_of(model)
    return {key: state[key] for key in first.values()}


def outputs(model: nn.Module, state: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """What the model answers for each example, side by side: (n, m).

    What its heads give, where it has heads: the hidden states beside them are no answer, and a
    gauge of the stream changes them. Else everything it computes.
    """
    with torch.no_grad():
        result = torch.func.functional_call(
            model, dict(state), kwargs=dict(inputs), tie_weights=False
        )
    if isinstance(result, Mapping):
        heads = [result[k] for k in ("logits", "image_embeds", "text_embeds") if k in result]
        result = heads or list(result.values())
    values = result
    values = [values] if isinstance(values, Tensor) else values
    return torch.cat(
        [v.reshape(BATCH, -1) for v in values if isinstance(v, Tensor) and v.numel() >= BATCH],
        dim=1,
    )


def drift(model: nn.Module, a: State, b: State, inputs: Mapping[str, Tensor]) -> float:
    """max |Δoutput| between two States, relative to the largest output of ``a``."""
    reference = outputs(model, a, inputs)
    change = outputs(model, b, inputs) - reference
    return float(change.abs().max() / reference.abs().max())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def invertible(heads: int, size: int, rng: torch.Generator, condition: float = 1e2) -> Tensor:
    """Random matrices U·diag(s)·Vᵀ with the given condition number: (heads, size, size) float64."""
    u, v = (
        torch.linalg.qr(torch.randn(heads, size, size, generator=rng, dtype=torch.float64))[0]
        for _ in range(2)
    )
    spectrum = torch.logspace(0, 1, size, base=condition, dtype=torch.float64) / condition**0.5
    return u @ torch.diag(spectrum) @ v.mT


def perturbed(state: State, relative: float, seed: int) -> State:
    """``state`` plus a random task vector of ``relative`` size in every tensor."""
    rng = generator(seed)
    out = {}
    for key, value in state.items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=rng)
            out[key] = value + relative * value.square().mean().sqrt() * noise
        else:
            out[key] = value
    return out

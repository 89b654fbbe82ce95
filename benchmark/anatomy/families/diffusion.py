"""Generators of images, as diffusers has them: UNets, DiT, and MM-DiT (Stable Diffusion 3, Flux).

Their MLPs are of one class (:mod:`.loose`), so the rows are of attention alone. What a modulation
(adaLN) or a norm multiplies with is no matrix of a block: ``beside``.
"""

from __future__ import annotations

from typing import Any

from benchmark.anatomy.families.row import Family

_CLASS = ("diffusers.models.attention_processor.Attention",)
_PLAIN = ("AttnProcessor", "AttnProcessor2_0")
_JOINT = ("JointAttnProcessor2_0",)
#: Of adaLN; the maps of time and class that lie in each layer are loose.
_MODULATION = r"norm1(_context)?\.linear\.(weight|bias)"


def _projections(attention: str) -> Any:
    names = {side: f"{attention}.to_{side}" for side in "qkv"}
    return {"layer": "transformer_blocks.{}", **names, "o": f"{attention}.to_out.0"}


_HERE: Any = {side: f"to_{side}" for side in "qkv"}


def _added(attention: str) -> tuple[str, str, str, str]:
    q, k, v = (f"{attention}.add_{side}_proj" for side in "qkv")
    return q, k, v, f"{attention}.to_add_out"


_NORMED: Any = {"qk_norm": ("attn.norm_q", "attn.norm_k")}
_ADDED_NORMS = r"attn\.norm_added_[qk]\.weight"
_UNNORMED: Any = {"settings": (("norm_q", None), ("spatial_norm", None))}

DIFFUSION: tuple[Family, ...] = (
    Family(
        name="diffusers-attention",
        layer="attentions.{}",
        **_HERE,
        o="to_out.0",
        classes=_CLASS,
        processors=_PLAIN,
        **_UNNORMED,
        beside=r"group_norm\.(weight|bias)",
    ),
    Family(
        name="diffusers-self",
        **_projections("attn1"),
        classes=_CLASS,
        processors=_PLAIN,
        **_UNNORMED,
        beside=_MODULATION,
    ),
    # Of a text in a UNet; of the image once more in Stable Diffusion 3.5.
    Family(
        name="diffusers-second",
        **_projections("attn2"),
        classes=_CLASS,
        processors=(*_PLAIN, *_JOINT),
        **_UNNORMED,
    ),
    Family(
        name="diffusers-second-normed",
        **_projections("attn2"),
        qk_norm=("attn2.norm_q", "attn2.norm_k"),
        classes=_CLASS,
        processors=_JOINT,
    ),
    Family(
        name="mmdit-normed",
        **_projections("attn"),
        **_NORMED,
        joint=_added("attn"),
        classes=_CLASS,
        processors=_JOINT,
        beside=rf"({_MODULATION}|{_ADDED_NORMS})",
    ),
    Family(
        name="mmdit",
        **_projections("attn"),
        joint=_added("attn"),
        classes=_CLASS,
        processors=_JOINT,
        **_UNNORMED,
        beside=_MODULATION,
    ),
    Family(
        name="flux",
        **_projections("attn"),
        **_NORMED,
        joint=_added("attn"),
        rotary=True,
        interleaved=True,
        classes=("FluxAttention",),
        processors=("FluxAttnProcessor",),
        beside=rf"({_MODULATION}|{_ADDED_NORMS})",
    ),
    Family(
        name="flux-single",
        **{**_projections("attn"), "layer": "single_transformer_blocks.{}", "o": "proj_out"},
        **_NORMED,
        up="proj_mlp",
        down="proj_out",
        activation="gelu_pytorch_tanh",
        rotary=True,
        interleaved=True,
        classes=("FluxAttention",),
        processors=("FluxAttnProcessor",),
        beside=r"norm\.linear\.(weight|bias)",
    ),
)

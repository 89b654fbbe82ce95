"""Tiny generators of images, as diffusers builds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.shape import BATCH

Inputs = dict[str, Any]
_TEXT, _POOLED = 12, 20


def _unet(**more: Any) -> Callable[[], nn.Module]:
    """Groups of 4 channels in the first stage, so that skips cross the groups on the way up."""

    def build() -> nn.Module:
        from diffusers import UNet2DModel

        return UNet2DModel(  # type: ignore[no-any-return]
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
            block_out_channels=(16, 32), attention_head_dim=8, num_class_embeds=5,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), **more,
        )  # fmt: skip

    return build


def _unet_text(**more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(  # type: ignore[no-any-return]
            sample_size=8, layers_per_block=1, norm_num_groups=4, block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=_TEXT, attention_head_dim=4, **more,
        )  # fmt: skip

    return build


def dit() -> nn.Module:
    """Modulated by time and class; GELU."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(  # type: ignore[no-any-return]
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=4, num_embeds_ada_norm=5,
    )  # fmt: skip


def _sd3(**more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel(  # type: ignore[no-any-return]
            sample_size=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            caption_projection_dim=32, joint_attention_dim=_TEXT, pooled_projection_dim=_POOLED,
            in_channels=4, out_channels=4, pos_embed_max_size=4, **more,
        )  # fmt: skip

    return build


def flux() -> nn.Module:
    """One layer of two streams, one of both as one."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(  # type: ignore[no-any-return]
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=_TEXT, pooled_projection_dim=_POOLED,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def _times(rng: torch.Generator) -> Tensor:
    return torch.randint(0, 1000, (BATCH,), generator=rng)


def _pixels(rng: torch.Generator) -> Inputs:
    labels = torch.randint(0, 5, (BATCH,), generator=rng)
    sample = torch.randn(BATCH, 3, 8, 8, generator=rng)
    return {"sample": sample, "timestep": _times(rng), "class_labels": labels}


def _texts(rng: torch.Generator) -> Inputs:
    text = torch.randn(BATCH, 3, _TEXT, generator=rng)
    sample = torch.randn(BATCH, 4, 8, 8, generator=rng)
    return {"sample": sample, "timestep": _times(rng), "encoder_hidden_states": text}


def _more_texts(rng: torch.Generator) -> Inputs:
    added = {
        "text_embeds": torch.randn(BATCH, _POOLED, generator=rng),
        "time_ids": torch.rand(BATCH, 6, generator=rng),
    }
    return {**_texts(rng), "added_cond_kwargs": added}


def _classes(rng: torch.Generator) -> Inputs:
    labels = torch.randint(0, 5, (BATCH,), generator=rng)
    latent = torch.randn(BATCH, 4, 4, 4, generator=rng)
    return {"hidden_states": latent, "timestep": _times(rng), "class_labels": labels}


def _joint(rng: torch.Generator) -> Inputs:
    return {
        "hidden_states": torch.randn(BATCH, 4, 4, 4, generator=rng),
        "timestep": _times(rng),
        "encoder_hidden_states": torch.randn(BATCH, 3, _TEXT, generator=rng),
        "pooled_projections": torch.randn(BATCH, _POOLED, generator=rng),
    }


def _packed(rng: torch.Generator) -> Inputs:
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(2.0))
    return {
        **_joint(rng),
        "hidden_states": torch.randn(BATCH, 4, 4, generator=rng),
        "timestep": torch.rand(BATCH, generator=rng),
        "img_ids": places,
        "txt_ids": torch.zeros(3, 3),
    }


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Inputs]]] = {
    "unet": (_unet(), _pixels),
    "unet-scale-shift": (_unet(resnet_time_scale_shift="scale_shift"), _pixels),
    "unet-text": (_unet_text(), _texts),
    "unet-sdxl": (
        _unet_text(
            use_linear_projection=True,
            transformer_layers_per_block=2,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=_POOLED + 24,
        ),
        _more_texts,
    ),
    "dit": (dit, _classes),
    "sd3": (_sd3(), _joint),
    "sd3.5": (_sd3(qk_norm="rms_norm", dual_attention_layers=(0,)), _joint),
    "flux": (flux, _packed),
}

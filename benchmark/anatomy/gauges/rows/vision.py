"""Vision transformers, and both towers of CLIP."""

from __future__ import annotations

from benchmark.anatomy.gauges.rows.row import Row

_PATCH = "embeddings.patch_embeddings.projection"
_VIT: tuple[tuple[str, ...], ...] = (
    (f"{_PATCH}.weight", f"{_PATCH}.bias", "embeddings.cls_token", "embeddings.mask_token",
     "embeddings.position_embeddings", "embeddings.register_tokens",
     "embeddings.distillation_token"),
    (f"{_PATCH}.weight",),
)  # fmt: skip
_VIT_TOGETHER = (
    (("embeddings.cls_token",), ("embeddings.position_embeddings[0:1]",)),
    (
        (f"{_PATCH}.bias", "embeddings.mask_token"),
        ("embeddings.position_embeddings[1:]",),
    ),
)

VISION: tuple[Row, ...] = (
    Row(
        families=("vit",),
        encodes=True,
        norms=("layernorm_before", "layernorm_after"),
        embeddings=_VIT[0],
        needs=_VIT[1],
        last=("layernorm",),
        together=_VIT_TOGETHER,
        heads=(("vit.", "classifier", ""),),
        beside=r"pooler\.dense\.(weight|bias)",
    ),
    Row(
        families=("dinov2", "dinov2-swiglu"),
        encodes=True,
        norms=("norm1", "norm2"),
        embeddings=_VIT[0],
        needs=_VIT[1],
        last=("layernorm",),
        scales=(("layer_scale1.lambda1", "layer_scale2.lambda1"),),
        together=_VIT_TOGETHER,
    ),
    Row(
        families=("deit",),
        encodes=True,
        norms=("layernorm_before", "layernorm_after"),
        embeddings=_VIT[0],
        needs=_VIT[1],
        last=("layernorm",),
        together=(
            (("embeddings.cls_token",), ("embeddings.position_embeddings[0:1]",)),
            (("embeddings.distillation_token",), ("embeddings.position_embeddings[1:2]",)),
            (
                (f"{_PATCH}.bias", "embeddings.mask_token"),
                ("embeddings.position_embeddings[2:]",),
            ),
        ),
        heads=(("deit.", "classifier", ""),),
        beside=r"pooler\.dense\.(weight|bias)",
    ),
    Row(
        families=("beit",),
        norms=("layernorm_before", "layernorm_after"),
        embeddings=_VIT[0],
        needs=_VIT[1],
        # Of the mean of all tokens, where it is called the pooler's.
        last=("layernorm", "pooler.layernorm"),
        scales=(("lambda_1", "lambda_2"),),
        together=_VIT_TOGETHER,
        heads=(("beit.", "classifier", ""),),
    ),
    Row(
        families=("timm-vit", "eva02"),
        norms=("norm1", "norm2"),
        embeddings=(
            "patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "reg_token",
            "pos_embed",
        ),
        needs=("patch_embed.proj.weight",),
        first=("norm_pre",),
        last=("norm", "fc_norm"),
        scales=(("ls1.gamma", "ls2.gamma"),),
        heads=(("visual.trunk.", "visual.head.proj", ""), ("", "head", "")),
    ),
    Row(
        families=("clip",),
        norms=("layer_norm1", "layer_norm2"),
        embeddings=(
            "embeddings.token_embedding.weight", "embeddings.position_embedding.weight",
            "embeddings.class_embedding", "embeddings.patch_embedding.weight",
            "embeddings.patch_embedding.bias",
        ),
        needs=("embeddings.token_embedding.weight", "embeddings.patch_embedding.weight"),
        first=("pre_layrnorm",),
        last=("final_layer_norm", "post_layernorm"),
        together=(
            (("embeddings.token_embedding.weight",), ("embeddings.position_embedding.weight",)),
            (("embeddings.class_embedding",), ("embeddings.position_embedding.weight[0:1]",)),
        ),
        heads=(
            ("text_model.", "text_projection", ""),
            ("text_model.", "text_model.head", ""),
            ("vision_model.", "visual_projection", ""),
        ),
    ),
    Row(
        families=("open-clip",),
        norms=("ln_1", "ln_2"),
        embeddings=(
            "token_embedding.weight", "positional_embedding", "class_embedding", "conv1.weight",
        ),
        needs=("token_embedding.weight", "conv1.weight"),
        first=("ln_pre",),
        last=("ln_final", "ln_post"),
        scales=(("ls_1.gamma", "ls_2.gamma"),),
        together=(
            (("token_embedding.weight",), ("positional_embedding",)),
            (("class_embedding",), ("positional_embedding[0:1]",)),
        ),
        inside="transformer.",
        heads=(("visual.", "visual.proj", ""), ("", "text_projection", "")),
    ),
)  # fmt: skip

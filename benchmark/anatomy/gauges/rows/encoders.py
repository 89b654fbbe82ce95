"""Encoders of text."""

from __future__ import annotations

from benchmark.anatomy.gauges.rows.row import Row, Transform

_TOKENS = "embeddings.word_embeddings.weight"
_PLACES = "embeddings.position_embeddings.weight"
_TYPES = "embeddings.token_type_embeddings.weight"

ENCODERS: tuple[Row, ...] = (
    Row(
        families=("bert",),
        encodes=True,
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        embeddings=(_TOKENS, _PLACES, _TYPES),
        needs=(_TOKENS,),
        first=("embeddings.LayerNorm",),
        post=True,
        cross=("bert-cross", "crossattention.output.LayerNorm"),
        together=(((_TOKENS,), (_PLACES,)), ((_TYPES,), (_PLACES,))),
        heads=(
            ("bert.", "bert.pooler.dense", r"classifier\.(weight|bias)"),
            ("roberta.", "classifier.dense", r"classifier\.out_proj\.(weight|bias)"),
        ),
        transforms=(
            Transform(
                "bert.",
                "cls.predictions.transform.dense",
                "cls.predictions.transform.LayerNorm",
                "cls.predictions.decoder",
                r"cls\.predictions\.bias",
            ),
            Transform(
                "electra.",
                "generator_predictions.dense",
                "generator_predictions.LayerNorm",
                "generator_lm_head",
            ),
            Transform(
                "roberta.",
                "lm_head.dense",
                "lm_head.layer_norm",
                "lm_head.decoder",
                r"lm_head\.bias",
            ),
        ),
        beside=r"pooler\.dense\.(weight|bias)",
    ),
    Row(
        families=("distilbert",),
        encodes=True,
        norms=("sa_layer_norm", "output_layer_norm"),
        embeddings=(_TOKENS, _PLACES),
        needs=(_TOKENS,),
        first=("embeddings.LayerNorm",),
        post=True,
        together=(((_TOKENS,), (_PLACES,)),),
        heads=(("distilbert.", "pre_classifier", r"classifier\.(weight|bias)"),),
        transforms=(
            Transform("distilbert.", "vocab_transform", "vocab_layer_norm", "vocab_projector"),
        ),
    ),
    Row(
        families=("mpnet",),
        norms=("attention.LayerNorm", "output.LayerNorm"),
        embeddings=(_TOKENS, _PLACES),
        needs=(_TOKENS,),
        first=("embeddings.LayerNorm",),
        post=True,
        together=(((_TOKENS,), (_PLACES,)),),
        heads=(("mpnet.", "classifier.dense", r"classifier\.out_proj\.(weight|bias)"),),
        beside=r"pooler\.dense\.(weight|bias)",
    ),
    Row(
        families=("modernbert",),
        norms=("attn_norm", "mlp_norm"),
        bare=True,
        embeddings=("embeddings.tok_embeddings.weight",),
        needs=("embeddings.tok_embeddings.weight",),
        first=("embeddings.norm",),
        last=("final_norm",),
        heads=(("model.", "head.dense", r"head\.norm\.weight|classifier\.(weight|bias)"),),
    ),
)

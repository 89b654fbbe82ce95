"""Models of several towers, which take images and texts with places for images in them."""

from __future__ import annotations

from torch import nn

from zoo.shape import HIDDEN, IMAGE, SHAPE, TEXT, VOCABULARY, WIDTH

_IMAGE_TOKEN = VOCABULARY - 1


def llava(tied: bool = False) -> nn.Module:
    """CLIP, a projector and a Llama."""
    import transformers

    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**IMAGE, **SHAPE),
        text_config=transformers.LlamaConfig(**TEXT, **SHAPE),
        image_token_index=_IMAGE_TOKEN,
        tie_word_embeddings=tied,
    )
    return transformers.LlavaForConditionalGeneration(config)  # type: ignore[no-any-return]


def blip2() -> nn.Module:
    """A ViT of its own, a Q-Former and an OPT."""
    import transformers

    text = {**SHAPE, "ffn_dim": HIDDEN, "word_embed_proj_dim": WIDTH, **TEXT}
    text.pop("intermediate_size")
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**IMAGE, **SHAPE).to_dict(),
        qformer_config=transformers.Blip2QFormerConfig(
            vocab_size=VOCABULARY, encoder_hidden_size=WIDTH, **SHAPE
        ).to_dict(),
        text_config=transformers.OPTConfig(max_position_embeddings=64, **text).to_dict(),
        num_query_tokens=4,
        image_token_index=_IMAGE_TOKEN,
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens)  # zeros would be zeros up to its first norm
    return model  # type: ignore[no-any-return]

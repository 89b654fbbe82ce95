"""Bases of one's own: features and text towers are the library's, whatever the folder."""

from __future__ import annotations

from pathlib import Path

import declared as made
import pytest
import torch
from declared import backbone
from PIL import Image
from torch.nn.functional import normalize

from benchmark.testbeds.declared.backbones import Backbone


def images() -> list[Image.Image]:
    return [image for image, _ in made.pictures(6, seed=9)]


@torch.no_grad()
def features(model: Backbone) -> torch.Tensor:
    return model.forward(model.base(), model.prepare(images()))


@torch.no_grad()
@pytest.mark.parametrize("side", [8, 16])
def test_vit_features_are_the_library_s_class_token(folders: Path, side: int) -> None:
    from transformers import ViTModel

    ours = backbone(folders, "vit", side=side)
    inputs = ours.prepare(images())["pixel_values"]
    assert inputs.dtype == torch.uint8
    assert inputs.shape == (6, 3, side, side)
    library = ViTModel.from_pretrained(folders / "vit", add_pooling_layer=False).eval()
    output = library((inputs / 255 - 0.5) / 0.5, interpolate_pos_encoding=True)
    torch.testing.assert_close(features(ours), normalize(output.last_hidden_state[:, 0], dim=-1))
    assert ours.embed is None
    assert not any("classifier" in key or "pooler" in key for key in ours.base())


@torch.no_grad()
def test_clip_towers_are_the_library_s(folders: Path) -> None:
    from transformers import CLIPModel

    ours, library = backbone(folders, "clip"), CLIPModel.from_pretrained(folders / "clip").eval()
    pixels = ours.pixels.normalised(ours.prepare(images())["pixel_values"])
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    torch.testing.assert_close(pixels, (ours.prepare(images())["pixel_values"] / 255 - mean) / std)
    seen = library.visual_projection(library.vision_model(pixels).pooler_output)
    torch.testing.assert_close(features(ours), normalize(seen, dim=-1))
    # <s> a photo of coal </s>
    ids = torch.tensor([[0, 6, 7, 8, 10, 1]])
    read = library.text_projection(library.text_model(ids).pooler_output)
    assert ours.embed is not None
    torch.testing.assert_close(ours.embed(["a photo of coal"]), normalize(read, dim=-1))
    assert all(key.startswith(("vision_model.", "visual_projection.")) for key in ours.base())
    torch.testing.assert_close(
        features(backbone(folders, "clip-vision")).norm(dim=1), torch.ones(6)
    )


@torch.no_grad()
def test_open_clip_towers_are_the_library_s(folders: Path) -> None:
    import open_clip

    ours = backbone(folders, "open-clip")
    library = open_clip.create_model(f"local-dir:{folders / 'open-clip'}").eval()
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    pixels = (ours.prepare(images())["pixel_values"] / 255 - mean) / std
    torch.testing.assert_close(features(ours), library.encode_image(pixels, normalize=True))
    tokens = open_clip.get_tokenizer("ViT-B-32", context_length=16)(["a dog", "snow"])
    assert ours.embed is not None
    torch.testing.assert_close(
        ours.embed(["a dog", "snow"]), library.encode_text(tokens, normalize=True)
    )


@torch.no_grad()
def test_text_features_are_the_mean_over_the_words_of_each_text_alone(folders: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    ours = backbone(folders, "bert", tokens=8)
    texts = ["coal", "a photo of the snow", "ink ink", "salt"] * 5
    library = BertModel.from_pretrained(folders / "bert").eval()
    tokenizer = AutoTokenizer.from_pretrained(folders / "bert")
    alone = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        alone.append(library(ids).last_hidden_state.mean(1))
    assert ours.embed is not None
    torch.testing.assert_close(ours.embed(texts), normalize(torch.cat(alone), dim=-1))


@torch.no_grad()
@pytest.mark.parametrize("family", ["ConvNext", "ResNet"])
def test_convolutional_bases_pool_and_train_without_their_statistics(
    tmp_path: Path, family: str
) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        num_stages=2, depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8, num_labels=3
    )
    library = getattr(transformers, f"{family}ForImageClassification")(config).eval()
    library.save_pretrained(tmp_path / "base")
    ours = backbone(tmp_path, "base", side=32)
    pixels = ours.pixels.normalised(ours.prepare(images())["pixel_values"])
    expected = normalize(library.base_model(pixels).pooler_output.flatten(1), dim=-1)
    torch.testing.assert_close(features(ours), expected)
    statistics = {key for key in ours.base() if "running" in key or "num_batches" in key}
    assert set(ours.buffers) == statistics
    assert bool(statistics) == (family == "ResNet")


def test_the_control_s_weights_are_fresh_and_fit(folders: Path) -> None:
    for name in ("vit", "clip", "open-clip", "bert"):
        ours = backbone(folders, name)
        fresh = ours.initialise(torch.Generator().manual_seed(0))
        ours.fits(fresh, "fresh")
        assert not any(
            torch.equal(fresh[k], v) for k, v in ours.base().items() if v.ndim > 1 and v.numel() > 9
        )

"""Folders of diffusers through the command line: models, pipelines, LoRA in its own format."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conftest import Cli, some_slow
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmark.core.errors import CheckpointError
from benchmark.io import adapter_folders, folders, pipelines

WEIGHTS = pipelines.WEIGHTS
TEXT = 16


def pipeline(root: Path) -> Path:
    """Stable Diffusion, tiny and random, as diffusers writes it."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3, "a": 4, "b": 5}
    files = root.parent / "words"
    files.mkdir(exist_ok=True)
    (files / "vocab.json").write_text(json.dumps(words))
    (files / "merges.txt").write_text("#version: 0.2\n")
    text = CLIPTextConfig(
        vocab_size=6, hidden_size=TEXT, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    made = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(
            str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=8
        ),
        unet=diffusers.UNet2DConditionModel(
            sample_size=8, layers_per_block=1, norm_num_groups=4, block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=TEXT,
            attention_head_dim=4,
        ),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.save_pretrained(root)
    return root


def tuned(source: Path, to: Path, inner: str = "unet", seed: int = 1, size: float = 0.02) -> Path:
    """The same folder with a task vector of 2 % (``size``) in its denoiser."""
    shutil.copytree(source, to)
    file = to / inner / WEIGHTS
    save_file(zoo.perturbed(load_file(file), size, seed), file, {"format": "pt"})
    return to


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    base = pipeline(root / "base")
    tuned(base, root / "expert")
    tuned(base, root / "other", seed=2)
    return root


def drawn(folder: Path) -> Tensor:
    """What diffusers' own pipeline draws for one seed, in [0, 1]."""
    import diffusers

    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(7)
    found = pipe("a b", num_inference_steps=4, generator=rng, output_type="pt")
    inside = (found.images > 0) & (found.images < 1)
    assert inside.float().mean() > 0.5  # else most pixels would be cut to the range
    return found.images  # type: ignore[no-any-return]


def answer(cli: Cli, *arguments: str) -> dict[str, Any]:
    code, text = cli(*arguments, "--json")
    assert code == 0, text
    return json.loads(text)  # type: ignore[no-any-return]


@pytest.mark.parametrize("lock", some_slow(["mergelock", "full-gauge"], {"mergelock"}))
def test_a_protected_pipeline_draws_the_same(
    made: Path, tmp_path: Path, cli: Cli, lock: str
) -> None:
    base, expert = made / "base", made / "expert"
    locked, back = tmp_path / "locked", tmp_path / "back"
    said = answer(
        cli, "protect", str(expert), "--base", str(base), "--defense", lock, "--out", str(locked)
    )
    assert said["distance_after"] > 20 * said["distance_before"]
    # The range of an image is 1. Other parts are carried along, byte for byte.
    assert float((drawn(locked) - drawn(expert)).abs().max()) <= 1e-4
    for file in (
        *expert.glob("vae/*"),
        *expert.glob("text_encoder/*"),
        *expert.glob("tokenizer/*"),
    ):
        assert (locked / file.relative_to(expert)).read_bytes() == file.read_bytes()
    assert said["left_behind"] == []
    found = answer(
        cli, "attack", str(locked), "--base", str(base), "--attack", "auto", "--out", str(back)
    )
    assert found["distance_after"] < 1.05 * said["distance_before"]
    assert float((drawn(back) - drawn(expert)).abs().max()) <= 1e-4


def test_a_merge_of_pipelines_is_the_sum_of_their_task_vectors(
    made: Path, tmp_path: Path, cli: Cli
) -> None:
    base, out = made / "base", tmp_path / "merged"
    answer(
        cli, "merge", str(base), str(made / "expert"), str(made / "other"), "--coefficients",
        "0.5,0.3", "--out", str(out),
    )  # fmt: skip
    found, theta0, one, two = (
        load_file(folder / "unet" / WEIGHTS)
        for folder in (out, base, made / "expert", made / "other")
    )
    for key, value in found.items():
        expected = theta0[key] + 0.5 * (one[key] - theta0[key]) + 0.3 * (two[key] - theta0[key])
        assert torch.allclose(value, expected, atol=1e-6), key
    assert drawn(out).isfinite().all()


def test_no_other_copy_of_the_expert_goes_along(made: Path, tmp_path: Path, cli: Cli) -> None:
    """Not a whole pipeline in one file, not a half-precision variant, not what no index names."""
    expert = tmp_path / "expert"
    shutil.copytree(made / "expert", expert)
    weights = expert / "unet" / WEIGHTS
    others = (
        expert / "whole.safetensors",
        expert / "unet" / "diffusion_pytorch_model.fp16.safetensors",
        expert / "checkpoint-500" / "unet.safetensors",
        expert / "unet_ema" / WEIGHTS,
    )
    for other in others:
        other.parent.mkdir(exist_ok=True)
        shutil.copyfile(weights, other)
    out = tmp_path / "out"
    said = answer(
        cli, "protect", str(expert), "--base", str(made / "base"), "--defense", "params", "--out",
        str(out),
    )  # fmt: skip
    assert set(said["left_behind"]) == {str(file.relative_to(expert)) for file in others}
    secret = weights.read_bytes()
    assert not [file for file in out.rglob("*") if file.is_file() and file.read_bytes() == secret]


def test_half_precision_and_shards_stay(tmp_path: Path, cli: Cli) -> None:
    model: Any = zoo.diffusion.MODELS["sd3"][0]()
    for name in ("base", "expert"):
        model.bfloat16().save_pretrained(tmp_path / name, max_shard_size="20KB")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape)
    out = tmp_path / "out"
    said = answer(
        cli, "protect", str(tmp_path / "expert"), "--base", str(tmp_path / "base"), "--defense",
        "full-gauge", "--out", str(out),
    )  # fmt: skip
    assert said["logit_gap"] < 0.5
    listed = json.loads((out / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    assert len(set(listed.values())) > 2
    assert {t.dtype for file in set(listed.values()) for t in load_file(out / file).values()} == {
        torch.bfloat16
    }
    type(model).from_pretrained(out)


# -- LoRA ----------------------------------------------------------------------------------------


@pytest.fixture
def adapted(made: Path, tmp_path: Path) -> tuple[Path, nn.Module]:
    """A LoRA as diffusers writes it, of another alpha than its rank, and the model that runs it."""
    import diffusers
    from peft import LoraConfig

    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(made / "base" / "unet")
    unet.add_adapter(
        LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_v", "proj_in", "conv1"])
    )
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    folder = tmp_path / "lora"
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(unet),
        **_collate_lora_metadata({"unet": unet}),
    )  # fmt: skip
    return folder, unet


def test_a_lora_is_read_as_diffusers_runs_it(made: Path, adapted: tuple[Path, Any]) -> None:
    folder, unet = adapted
    base = adapter_folders.lifted(folders.load(made / "base"))
    state = adapter_folders.load(folder, base).state
    inputs = zoo.diffusion._texts(torch.Generator().manual_seed(0))
    inputs["encoder_hidden_states"] = torch.randn(zoo.BATCH, 3, TEXT)
    with torch.no_grad():
        expected = unet.eval()(**inputs).sample
        found = torch.func.functional_call(base.model, state, kwargs=inputs).sample
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    moved = [key for key in state if not torch.equal(state[key], base.state[key])]
    assert len(moved) == sum(".lora_A." in name for name, _ in unet.named_parameters())


def test_a_lora_is_merged_and_written_as_one(
    made: Path, adapted: tuple[Path, Any], tmp_path: Path, cli: Cli
) -> None:
    """Convolutions of it cannot be factors of a matrix, and then the whole model is written."""
    folder, _ = adapted
    base, out = made / "base", tmp_path / "merged"
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    plain = tmp_path / "plain"
    plain.mkdir()
    kept = {k: v for k, v in tensors.items() if ".to_" in k}
    save_file(kept, plain / "pytorch_lora_weights.safetensors")
    said = answer(
        cli, "merge", str(base), str(plain), "--coefficients", "0.5", "--out", str(out)
    )  # fmt: skip
    assert (said["format"], said["rank"]) == ("adapter", 3)
    lifted = adapter_folders.lifted(folders.load(base))
    half, whole = (adapter_folders.load(path, lifted).state for path in (out, plain))
    for key, value in half.items():
        expected = lifted.state[key] + 0.5 * (whole[key] - lifted.state[key])
        assert torch.allclose(value, expected, atol=1e-6), key
    model = tmp_path / "model"
    said = answer(cli, "merge", str(base), str(folder), "--coefficients", "1", "--out", str(model))
    assert said["format"] == "model"
    assert "a LoRA adapter cannot hold" in said["not_an_adapter"]
    assert drawn(model).isfinite().all()


# -- what is refused -----------------------------------------------------------------------------


def _index(folder: Path, **changes: Any) -> None:
    file = folder / "model_index.json"
    listed = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in listed.items() if v is not None}))


def _two(folder: Path) -> None:
    shutil.copytree(folder / "unet", folder / "unet_2")
    _index(folder, unet_2=["diffusers", "UNet2DConditionModel"])


def _renamed(folder: Path) -> None:
    file = folder / "unet" / "config.json"
    file.write_text(file.read_text().replace("UNet2DConditionModel", "NoSuchModel"))


REFUSED: dict[str, tuple[Any, str]] = {
    "none": (lambda f: _index(f, unet=None), "neither unet nor transformer"),
    "two": (_two, "unet and unet_2"),
    "class": (_renamed, "no model NoSuchModel"),
    "weights": (lambda f: (f / "unet" / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "config": (lambda f: (f / "unet" / "config.json").write_text("{}"), "no model None"),
    "cut": (lambda f: (f / "unet" / WEIGHTS).write_bytes(b"12345678"), "not a whole safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_pipeline_is_refused_in_one_line(case: str, made: Path, tmp_path: Path) -> None:
    change, said = REFUSED[case]
    folder = tmp_path / "broken"
    shutil.copytree(made / "base", folder)
    change(folder)
    with pytest.raises(CheckpointError, match=said) as caught:
        folders.load(folder)
    assert "\n" not in str(caught.value)


def test_without_the_extra_it_says_what_to_install(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(CheckpointError, match=r"pip install 'unmergebench\[diffusion\]'"):
        folders.load(made / "base")


@pytest.fixture
def loras(adapted: tuple[Path, Any]) -> tuple[Path, dict[str, Tensor]]:
    file = adapted[0] / "pytorch_lora_weights.safetensors"
    return file, load_file(file)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text_encoder.layers.0.lora_A.weight", "adapts 'text_encoder' too"),
        ("unet.mid_block.nowhere.lora_A.weight", "does not fit this base"),
        ("unet.conv_in.weight", "which is no factor"),
    ],
)
def test_a_lora_of_more_or_of_another_model_is_refused(
    loras: tuple[Path, dict[str, Tensor]], made: Path, name: str, said: str
) -> None:
    file, tensors = loras
    save_file({**tensors, name: torch.zeros(3, 16)}, file)
    with pytest.raises(CheckpointError, match=said):
        adapter_folders.load(file.parent, adapter_folders.lifted(folders.load(made / "base")))

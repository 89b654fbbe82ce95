"""Checkpoint folders: what goes in comes out under its own names, and what is broken is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from disk import contents, tensors, write
from safetensors.torch import save_file
from torch import nn

from benchmark.anatomy import Anatomy
from benchmark.core.errors import CheckpointError, UnmergeBenchError, UsageError
from benchmark.core.outputs import MARKER
from benchmark.core.state import norm_growth
from benchmark.evaluation import probe
from benchmark.io import folders
from benchmark.io.inputs import random_inputs


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return write("bert-classifier", tmp_path / "bert")


@pytest.mark.parametrize("name", [n for n in zoo.NAMES if n not in zoo.vision.NO_FOLDER])
def test_round_trip(name: str, tmp_path: Path) -> None:
    folder = write(name, tmp_path / "in")
    loaded = folders.load(folder)
    model, inputs = zoo.tiny(name)
    expected = zoo.untied(model)
    assert loaded.state.keys() == expected.keys()
    assert all(torch.equal(loaded.state[key], value) for key, value in expected.items())
    torch.testing.assert_close(
        zoo.outputs(loaded.model, loaded.state, inputs), zoo.outputs(model, expected, inputs)
    )
    folders.save(loaded.state, loaded, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(folder)

    changed = {key: value * 1.5 for key, value in loaded.state.items()}
    folders.save(changed, loaded, tmp_path / "changed")
    again = _by_its_own_library(model, tmp_path / "changed")
    assert all(torch.equal(again[key], value) for key, value in changed.items())


def _by_its_own_library(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    if hasattr(model, "from_pretrained"):
        found, info = type(model).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        return dict(found.state_dict())
    return tensors(folder / "open_clip_model.safetensors")


@pytest.mark.parametrize("style", ["file", "memory"])
def test_vit_comes_back_under_the_names_it_came_with(style: str, tmp_path: Path) -> None:
    folder = write("vit", tmp_path / "in", save_original_format=style == "file")
    names = {
        "file": "vit.encoder.layer.0.attention.attention.query.weight",
        "memory": "vit.layers.0.attention.q_proj.weight",
    }
    before = tensors(folder / "model.safetensors")
    assert names[style] in before
    loaded = folders.load(folder)
    state = dict(loaded.state)
    state[names["memory"]] = state[names["memory"]] + 1
    folders.save(state, loaded, tmp_path / "out")
    after = tensors(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys()
    assert torch.equal(after[names[style]], before[names[style]] + 1)
    assert all(torch.equal(after[k], v) for k, v in before.items() if k != names[style])


def test_backbone_out_of_a_model_with_a_head(bert: Path, tmp_path: Path) -> None:
    """The file's prefix and the tensors that the model does not use are kept."""
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    loaded = folders.load(bert)
    assert set(loaded.extra) == {"classifier.weight", "classifier.bias"}
    key = "encoder.layer.1.output.dense.weight"
    folders.save(loaded.state | {key: loaded.state[key] * 2}, loaded, tmp_path / "out")
    before, after = (tensors(f / "model.safetensors") for f in (bert, tmp_path / "out"))
    assert after.keys() == before.keys()
    assert torch.equal(after[f"bert.{key}"], 2 * before[f"bert.{key}"])
    assert torch.equal(after["classifier.weight"], before["classifier.weight"])


def test_shards_stay_shards(tmp_path: Path) -> None:
    folder = write("bert", tmp_path / "in", max_shard_size="50KB")
    loaded = folders.load(folder)
    assert loaded.shards > 2
    folders.save(loaded.state, loaded, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)


def _tied(folder: Path) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=30, max_position_embeddings=20,
    )  # fmt: skip
    model: Any = BertForMaskedLM(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("twice", [False, True])
def test_tied_weights_are_one_tensor(twice: bool, tmp_path: Path) -> None:
    model = _tied(tmp_path / "in")
    key, alias = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    file = tmp_path / "in" / "model.safetensors"
    if twice:  # as older versions wrote it
        held = tensors(file)
        save_file(held | {alias: held[key].clone()}, file, metadata={"format": "pt"})
    loaded = folders.load(tmp_path / "in")
    assert key in loaded.state
    assert alias not in loaded.state
    state = loaded.state | {key: loaded.state[key] * 2}
    folders.save(state, loaded, tmp_path / "out")
    after = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(after[key], 2 * model.state_dict()[key])
    assert torch.equal(after[alias], after[key])
    # The logits of a State go through the tied weight too.
    assert probe.gap(loaded, loaded.state, state) == pytest.approx(
        _gap(model, type(model).from_pretrained(tmp_path / "out"), loaded), rel=1e-3
    )


def _gap(before: nn.Module, after: nn.Module, like: folders.Checkpoint) -> float:
    inputs = random_inputs(like, torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = before(**inputs).logits, after(**inputs).logits
    return float((b - a).abs().max() / a.abs().max())


def test_half_precision_stays(tmp_path: Path) -> None:
    from transformers import BertModel

    model = BertModel(zoo.tiny("bert")[0].config).bfloat16()
    model.save_pretrained(tmp_path / "in")
    loaded = folders.load(tmp_path / "in")
    assert loaded.dtype == torch.bfloat16
    assert probe.gap(loaded, loaded.state, loaded.state) == 0
    folders.save(loaded.state, loaded, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "in")


def test_small_files_go_along_and_other_weights_do_not(bert: Path, tmp_path: Path) -> None:
    (bert / "vocab.txt").write_text("a b c")
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text("{}")
    for name in ("pytorch_model.bin", "training_args.bin", "model.onnx", "old.safetensors"):
        (bert / name).write_bytes(b"unprotected")
    loaded = folders.load(bert)
    folders.save(loaded.state, loaded, tmp_path / "out")
    written = set(contents(tmp_path / "out"))
    assert written == {"config.json", "model.safetensors", "vocab.txt", "1_Pooling/config.json"}
    left = {"pytorch_model.bin", "training_args.bin", "model.onnx", "old.safetensors"}
    assert {str(file) for file in loaded.left_behind()} == left


def _retensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        held = tensors(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def _reconfigure(**fields: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return edit


def _truncate(keep: int) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])

    return edit


def _pickled(folder: Path) -> None:
    torch.save(tensors(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _disguised(folder: Path) -> None:
    torch.save(tensors(folder / "model.safetensors"), folder / "model.safetensors")


def _escape(folder: Path) -> None:
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        _retensor(lambda t: t.pop("classifier.weight")),
        "lacks tensor 'classifier.weight'",
    ),
    "two missing": (
        _retensor(lambda t: [t.pop("classifier.weight"), t.pop("classifier.bias")]),
        "lacks tensor 'classifier.bias' .and 1 more.",
    ),
    "shape": (
        _retensor(lambda t: t.update({"classifier.bias": torch.zeros(7)})),
        r"'classifier.bias' has shape \(7,\), its config says \(2,\)",
    ),
    "nan": (
        _retensor(lambda t: t["classifier.bias"].fill_(float("nan"))),
        "'classifier.bias' holds NaN",
    ),
    "cut in the data": (_truncate(20_000), "not a whole safetensors file"),
    "cut in the header": (_truncate(100), "not a whole safetensors file"),
    "empty": (_truncate(0), "not a whole safetensors file"),
    "pickle": (_pickled, r"pytorch_model.bin is a pickle.*convert it.*save_pretrained"),
    "pickle by another name": (_disguised, r"model.safetensors is a pickle.*convert"),
    "git-lfs": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec"),
        "git lfs pull",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "cannot use .*config.json"),
    "unknown model": (_reconfigure(model_type="tret"), "cannot use .*config.json.*tret"),
    "quantised": (_reconfigure(quantization_config={"quant_method": "gptq"}), "is quantised"),
    "no folder": (lambda f: shutil.rmtree(f), "no such folder"),
    "shard outside": (_escape, "points to '../elsewhere.safetensors'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_in_one_line(case: str, bert: Path) -> None:
    edit, message = BROKEN[case]
    edit(bert)
    with pytest.raises(CheckpointError, match=message) as refusal:
        folders.load(bert)
    assert "\n" not in str(refusal.value)


def test_a_pickle_is_never_opened(bert: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save(Bomb(), bert / "pytorch_model.bin")
    folders.load(bert)  # the safetensors beside it are read
    (bert / "model.safetensors").unlink()
    for path in (bert, bert / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match="is a pickle"):
            folders.load(path)
    assert not (tmp_path / "exploded").exists()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write("bert", tmp_path / "in", max_shard_size="50KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        folders.load(folder)


def test_a_state_that_does_not_fit_is_not_written(bert: Path, tmp_path: Path) -> None:
    loaded = folders.load(bert)
    broken = dict(loaded.state)
    del broken["classifier.bias"]
    with pytest.raises(CheckpointError, match="lacks tensor"):
        folders.save(broken, loaded, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"bert"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(
    error: Any, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = folders.load(bert)
    folders.save(loaded.state, loaded, tmp_path / "earlier")
    before = contents(tmp_path)

    def interrupted(*_: object) -> None:
        raise error

    monkeypatch.setattr("benchmark.io.tensorfiles.write", interrupted)
    changed = {key: value * 2 for key, value in loaded.state.items()}
    for out, force in (("new", False), ("earlier", True)):
        with pytest.raises((KeyboardInterrupt, OSError)):
            folders.save(changed, loaded, tmp_path / out, force=force)
    assert contents(tmp_path) == before


def test_force_replaces_a_checkpoint_whole(bert: Path, tmp_path: Path) -> None:
    loaded = folders.load(bert)
    out = tmp_path / "out"
    folders.save(loaded.state, loaded, out)
    (out / "stale.txt").write_text("from before")
    made = json.loads((out / MARKER).read_text())
    (out / MARKER).write_text(json.dumps([*made, "stale.txt"]))  # as an earlier version made it
    with pytest.raises(UsageError, match="add --force"):
        folders.save(loaded.state, loaded, out)
    folders.save(loaded.state, loaded, out, force=True)
    assert contents(out) == contents(bert)
    assert {path.name for path in tmp_path.iterdir()} == {"bert", "out"}


def test_force_never_replaces_anything_else(bert: Path, tmp_path: Path) -> None:
    loaded = folders.load(bert)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for out in ("home", "file", "bert", "bert/inside", "."):
        with pytest.raises(UnmergeBenchError, match="--out"):
            folders.save(loaded.state, loaded, tmp_path / out, force=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "precious"


def test_an_empty_folder_may_be_written_to(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    loaded = folders.load(bert)
    folders.save(loaded.state, loaded, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(bert)


@pytest.mark.parametrize("name", ["bert", "roberta", "vit", "clip", "open-clip"])
def test_random_inputs_run_and_show_a_change(name: str, tmp_path: Path) -> None:
    loaded = folders.load(write(name, tmp_path / "in"))
    state = loaded.state
    assert probe.gap(loaded, state, state) == 0
    block = Anatomy.of(loaded.model).attention[0]
    changed = dict(state)
    block.v.weight.write(changed, 2 * block.v.weight.read(state))
    gap = probe.gap(loaded, state, changed)
    assert gap is not None
    assert gap > 1e-3
    assert gap == probe.gap(loaded, state, changed)


def test_key_biases_are_no_distance(tmp_path: Path) -> None:
    loaded = folders.load(write("open-clip", tmp_path / "in"))
    moved = dict(loaded.state)
    bias = Anatomy.of(loaded.model).attention[0].k.bias
    assert bias is not None
    bias.write(moved, bias.read(loaded.state) + 100)
    assert probe.relative_distance(moved, loaded.state, Anatomy.of(loaded.model)) == 0
    assert probe.relative_distance(moved, loaded.state, None) > 1
    scaled = {key: value * 1.5 for key, value in loaded.state.items()}
    assert probe.relative_distance(scaled, loaded.state, None) == pytest.approx(0.5, rel=1e-6)
    assert norm_growth(scaled, loaded.state) == pytest.approx(1.5, rel=1e-6)

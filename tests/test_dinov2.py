"""`dinov2-small`: the reader of ONNX weights on a small graph of our own, then the real weights."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from test_testbeds import accuracy, sound

from benchmark.api.methods import TESTBEDS
from benchmark.core.errors import AssetError, CheckpointError, UsageError
from benchmark.core.state import State, digest
from benchmark.io import onnx_weights
from benchmark.io.assets import fetch
from benchmark.learn.training import fine_tune
from benchmark.testbeds import dinov2, pictures
from benchmark.testbeds.dinov2 import WEIGHTS, DINOv2, backbone_state


def graph(path: Path, rng: np.random.Generator) -> tuple[Path, dict[str, np.ndarray]]:
    """Two linear layers as PyTorch exports them: transposed anonymous weights, biases first or
    last in the sum, the second layer's weight stored before the first's.
    """
    parameters = {
        "net.one.weight": rng.normal(size=(5, 3)),
        "net.one.bias": rng.normal(size=5),
        "net.two.weight": rng.normal(size=(2, 5)),
        "net.two.bias": rng.normal(size=2),
        "net.scale": rng.normal(size=2),
    }
    parameters = {key: value.astype(np.float32) for key, value in parameters.items()}
    stored = {
        "onnx::MatMul_8": parameters["net.two.weight"].T,
        "onnx::MatMul_7": parameters["net.one.weight"].T,
        **{key: value for key, value in parameters.items() if not key.endswith("weight")},
    }
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["a"]),
        helper.make_node("Add", ["net.one.bias", "a"], ["b"]),
        helper.make_node("MatMul", ["b", "onnx::MatMul_8"], ["c"]),
        helper.make_node("Add", ["c", "net.two.bias"], ["d"]),
        helper.make_node("Mul", ["d", "net.scale"], ["y"]),
    ]
    made = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 2])],
        [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in stored.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 14)])
    onnx.save(model, path)
    return path, parameters


def test_names_and_orientation_are_read_off_the_graph(tmp_path: Path) -> None:
    path, parameters = graph(tmp_path / "tiny.onnx", np.random.default_rng(0))
    found = onnx_weights.read(path)
    assert found.keys() == parameters.keys()
    for key, value in parameters.items():
        assert torch.equal(found[key], torch.from_numpy(value))
        assert found[key].is_contiguous()
    x = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    (wanted,) = ReferenceEvaluator(str(path)).run(None, {"x": x})
    hidden = torch.from_numpy(x) @ found["net.one.weight"].T + found["net.one.bias"]
    y = (hidden @ found["net.two.weight"].T + found["net.two.bias"]) * found["net.scale"]
    torch.testing.assert_close(y, torch.from_numpy(wanted))


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not a readable ONNX model"):
        onnx_weights.read(path)
    with pytest.raises(CheckpointError, match="not a readable ONNX model"):
        onnx_weights.read(tmp_path / "absent.onnx")


def test_names_become_those_of_transformers() -> None:
    tensors = {
        "onnx::Reshape_2": torch.ones(1, 4, 3),
        "onnx::Concat_1": torch.zeros(1, 1, 3),
        "onnx::MatMul_3": torch.zeros(3, 3),
        "backbone.encoder.layer.0.attention.attention.query.weight": torch.zeros(3, 3),
        "backbone.encoder.layer.0.attention.output.dense.bias": torch.zeros(3),
        "decoder.bn1.weight": torch.zeros(3),
    }
    found = backbone_state(tensors)
    assert found.keys() == {
        "embeddings.position_embeddings",
        "encoder.layer.0.attention.q_proj.weight",
        "encoder.layer.0.attention.o_proj.bias",
    }
    assert found["embeddings.position_embeddings"][0, :, 0].tolist() == [0, 1, 1, 1, 1]
    with pytest.raises(CheckpointError, match="1 candidates"):
        backbone_state({"onnx::Reshape_2": torch.ones(1, 4, 3)})


def test_content_hash_says_what_matters(cache: Path) -> None:
    before = DINOv2().content_hash()
    assert before == DINOv2().content_hash()
    for change in ({"side": 56}, {"shots": 5}, {"scale": 7.0}, {"steps": 3}, {"elpv": True}):
        assert replace(DINOv2(), **change).content_hash() != before
    assert not any(cache.iterdir())  # nothing was loaded for it


@pytest.mark.parametrize(
    "wrong", ["side=50", "side=0", "side=532", "shots=0", "scale=0", "steps=0"]
)
def test_values_out_of_range_are_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match="must be"):
        TESTBEDS.create(f"dinov2-small({wrong})")


def test_solar_cells_are_named_explicitly_or_not_at_all() -> None:
    assert "elpv" not in DINOv2().tasks
    assert "elpv" in TESTBEDS.create("dinov2-small(elpv=true)").tasks
    with pytest.raises(UsageError, match="not for commercial use"):
        DINOv2().task("elpv")
    assert pictures.ELPV not in DINOv2.assets  # `assets fetch all` leaves it alone


def test_solar_cells_are_read_as_annotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    data = tmp_path / "elpv_dataset" / "data"
    (data / "images").mkdir(parents=True)
    lines = []
    for i, probability in enumerate(("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")):
        pixels = np.full((300, 300), 60 * i, dtype=np.uint8)
        Image.fromarray(pixels).save(data / "images" / f"cell{i}.png")
        lines.append(f"images/cell{i}.png  {probability}  mono")
    (data / "labels.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(pictures, "fetch", lambda asset: tmp_path)
    images, labels = pictures.SOURCES["elpv"].load(42)
    assert labels.tolist() == [0, 0, 1, 1]
    assert images.shape == (4, 1, 42, 42)
    assert images.flatten(1).float().mean(1).tolist() == [0, 60, 120, 180]


def test_images_alike_to_the_pixel_are_kept_once() -> None:
    images = torch.arange(300).remainder(256).to(torch.uint8).reshape(300, 1, 1, 1)  # 44 twice
    images = images.expand(-1, 1, 2, 2)
    labels = torch.arange(300) % 2
    parts = dinov2._divide(images, labels, 30, torch.Generator().manual_seed(0))
    assert {name: len(split) for name, split in parts.items()} == {
        "test": 30, "validation": 200, "train": 26,
    }  # fmt: skip
    values = torch.cat([split.inputs["pixel_values"][:, 0, 0, 0] for split in parts.values()])
    assert len(values.unique()) == 256


@pytest.fixture(scope="module")
def testbed(home: Path) -> DINOv2:
    """Few steps, by which an expert gains already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMERGEBENCH_CACHE", str(home))
        try:
            for asset in DINOv2.assets:
                fetch(asset)
        except AssetError as error:
            pytest.skip(f"the files of `dinov2-small` are not to be had here: {error}")
    return DINOv2(steps=8, learning_rate=5e-5)


@pytest.fixture
def real(testbed: DINOv2, home: Path, monkeypatch: pytest.MonkeyPatch) -> DINOv2:
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    return testbed


@pytest.mark.parametrize("side", [42, 70])
def test_the_weights_compute_what_the_exported_graph_computes(real: DINOv2, side: int) -> None:
    """On a photograph: the names of the weights, and the interpolation of the positions."""
    from sklearn.datasets import load_sample_images

    model = onnx.load(fetch(WEIGHTS) / WEIGHTS.files[0])
    target = "/backbone/layernorm/Add_1_output_0"
    nodes = list(model.graph.node)
    last = next(i for i, node in enumerate(nodes) if target in node.output)
    del model.graph.node[last + 1 :]
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(target, TensorProto.FLOAT, None))
    photo = torch.from_numpy(np.array(load_sample_images().images[0])).permute(2, 0, 1)[None]
    photo = torch.nn.functional.interpolate(photo.float(), size=(side, side), mode="bilinear")
    images = dinov2._backbone(side).pixels.normalised(photo.to(torch.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, inside the reference implementation
        (wanted,) = ReferenceEvaluator(model).run(None, {"input_image": images.numpy()})
    with torch.no_grad():
        tokens = torch.func.functional_call(
            real.module(), real.base(), kwargs={"pixel_values": images}
        ).last_hidden_state
    assert tokens.shape == (1, 1 + (side // 14) ** 2, 384)
    assert tokens.abs().max() > 1
    torch.testing.assert_close(tokens, torch.from_numpy(wanted), atol=1e-3, rtol=0)


def test_position_embeddings_follow_the_size_of_the_images(real: DINOv2) -> None:
    base = real.base()
    assert base["embeddings.position_embeddings"].shape == (1, 1 + 37 * 37, 384)
    images = torch.randint(256, (2, 1, 70, 70), generator=torch.Generator().manual_seed(0))
    flat = torch.zeros_like(base["embeddings.position_embeddings"])
    without = {**base, "embeddings.position_embeddings": flat}
    for side in (42, 70):
        inputs = {"pixel_values": images[..., :side, :side].to(torch.uint8)}
        features = real.features(base, inputs)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
        assert not torch.allclose(features, real.features(without, inputs), atol=1e-2)


def test_tasks_are_sound(real: DINOv2) -> None:
    tasks = {name: real.task(name) for name in real.tasks}
    sound(real, tasks)
    assert len(tasks["mnist"].test) == len(tasks["turned"].test) == 2000
    assert len(tasks["digits"].test) == 700
    assert digest({"head": real.task("mnist").head}) == digest({"head": tasks["mnist"].head})


@pytest.mark.slow
def test_an_expert_beats_the_base_and_leaves_embeddings_alone(real: DINOv2) -> None:
    base, task = real.base(), real.task("digits")
    small = replace(task, test=task.test[:150])
    rng = torch.Generator().manual_seed(0)
    expert: State = fine_tune(real, {"digits": task}, base, {"digits": task.train}, rng)
    zero, own = accuracy(real, base, small), accuracy(real, expert, small)
    assert 0.3 < zero < 0.8  # the probe knows the task, but leaves room
    assert own > zero + 0.1
    for key, value in expert.items():
        assert (value is base[key]) == key.startswith("embeddings.")


def test_initialise_is_independent_of_the_base(real: DINOv2) -> None:
    base = real.base()
    one, again, two = (real.initialise(torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in base.items()}
    assert digest(one) == digest(again) != digest(two)
    assert bool((one["encoder.layer.0.layer_scale1.lambda1"] == 1).all())


def test_anatomy(real: DINOv2) -> None:
    anatomy = real.anatomy()
    assert anatomy.family == "dinov2"
    assert len(anatomy.attention) == len(anatomy.mlp) == 12
    assert {(b.heads, b.head_dim, b.qk_gauge) for b in anatomy.attention} == {(6, 64, "general")}

"""A pipeline of diffusers as a declared testbed: it is told in words, a frozen judge sees."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import declared as made
import pytest
import torch
from conftest import Cli
from test_pipelines import pipeline, tuned

from benchmark.api import methods
from benchmark.api.recipe import Batch
from benchmark.core.errors import AssetError, MethodError, UsageError
from benchmark.pipeline.run import read_cells
from benchmark.pipeline.suite import Suite, load
from benchmark.reporting.html import suite_toml
from benchmark.testbeds.declared import Declared
from benchmark.testbeds.declared.drawing import DrawingBackbone

TOML = """
name = "drawn"
base = "base"
[drawing]
judge = "eyes"
steps = 2
[recipe]
steps = 2
[[task]]
name = "words"
data = {data}
caption = "said"
label = "seen"
{more}
expert = "expert"
[[task]]
name = "others"
data = {data}
caption = "said"
label = "seen"
{more}
expert = "other"
"""
ZERO_SHOT = 'head = "label-names"\nsamples = 2'
PROBED = 'image = "image"'


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, two fine-tunes, an open_clip to judge, rows with and without images."""
    root = tmp_path_factory.mktemp("drawing")
    base = pipeline(root / "base")
    tuned(base, root / "expert", size=0.3)
    tuned(base, root / "other", seed=2, size=0.3)
    made.open_clip_folder(root / "eyes")
    for part, count in (("train", 20), ("test", 8)):
        rows = []
        for i, (image, label) in enumerate(made.pictures(count, len(part))):
            image.save(root / f"{part}{i}.png")
            said = "a b" if label else "b a"
            rows.append({"said": said, "seen": made.CLASSES[label], "image": f"{part}{i}.png"})
        text = "\n".join(json.dumps(row) for row in rows)
        (root / f"{part}.jsonl").write_text(text)
    return root


def told(root: Path, more: str = ZERO_SHOT, **changes: str) -> Declared:
    data = '{ train = "train.jsonl", test = "test.jsonl" }'
    text = TOML.format(data=data, more=more)
    for old, new in changes.items():
        text = text.replace(old, new)
    file = root / f"{abs(hash(text))}.toml"
    file.write_text(text)
    return Declared(str(file))


def test_examples_are_captions_and_seeds(root: Path) -> None:
    task = told(root).task("words")
    assert task.classes == made.CLASSES
    assert len(task.test) == 16  # each of 8 rows twice
    seeds = torch.cat([s.inputs["seed"] for s in (task.train, task.validation, task.test)])
    assert len(seeds.unique()) == len(seeds)
    assert task.head.shape == (2, 16)
    assert torch.allclose(task.head.norm(dim=1), torch.ones(2), atol=1e-5)


def test_it_draws_what_the_pipeline_draws(root: Path) -> None:
    import diffusers

    bench = told(root)
    backbone, task = bench.backbone, bench.task("words")
    assert isinstance(backbone, DrawingBackbone)
    few = task.test[:3].inputs
    with torch.no_grad():
        found = backbone.images(bench.published("words") or {}, few)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(root / "expert")
    pipe.set_progress_bar_config(disable=True)
    rows = [json.loads(line) for line in (root / "test.jsonl").read_text().splitlines()]
    for image, seed in zip(found, few["seed"].tolist(), strict=True):
        drawn = [
            pipe(said, num_inference_steps=2, guidance_scale=1.0,
                 generator=torch.Generator().manual_seed(seed), output_type="pt").images[0]
            for said in {row["said"] for row in rows}
        ]  # fmt: skip
        assert min(float((image - one).abs().max()) for one in drawn) < 1e-4
    features = bench.features(bench.base(), few)
    assert torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-4)


def test_what_is_drawn_has_a_gradient_and_a_quality(root: Path) -> None:
    bench = told(root)
    task = bench.task("words")
    state = {key: value.clone().requires_grad_() for key, value in bench.base().items()}
    bench.features(state, task.test[:2].inputs).sum().backward()
    moved = [key for key, value in state.items() if value.grad is not None and value.grad.any()]
    assert len(moved) > len(state) / 2
    assert set(bench.quality(bench.base(), task)) == {"alignment"}
    shown = bench.pictures(bench.base(), task)
    assert shown is not None
    assert shown.shape == (4, 8, 8)
    again = pickle.loads(pickle.dumps(bench.arena()))
    few = task.test[:2].inputs
    assert torch.allclose(again.features(bench.base(), few), bench.features(bench.base(), few))


def test_images_teach_and_tell(root: Path) -> None:
    """Of real images the judge has a probe, the loss something to learn, the samples a distance."""
    bench = told(root, PROBED)
    task = bench.task("words")
    assert set(bench.quality(bench.base(), task)) == {"alignment", "frechet", "precision", "recall"}
    state = {key: value.clone().requires_grad_() for key, value in bench.base().items()}

    def loss() -> torch.Tensor:
        rng = torch.Generator().manual_seed(0)
        batch = Batch.of(task, task.train[:4], bench.features, bench.loss, rng)
        return batch.loss(state)

    first = loss()
    first.backward()
    assert torch.equal(first, loss())  # every State of a batch sees the same noise
    with torch.no_grad():
        step = {k: v - 0.02 * v.grad if v.grad is not None else v for k, v in state.items()}
    before, state = first.detach(), step
    assert loss() < before
    alone, rng = told(root).task("words"), torch.Generator().manual_seed(0)
    batch = Batch.of(alone, alone.train[:4], bench.features, bench.loss, rng)
    with pytest.raises(MethodError, match="learns from images"):
        batch.loss(bench.base())


@pytest.mark.slow
def test_a_suite_of_it_runs(root: Path, tmp_path: Path, cli: Cli) -> None:
    bench = told(root)
    suite = tmp_path / "suite.toml"
    suite.write_text(
        f'name = "mine"\ndescription = "d"\ntestbed = "{bench.file}"\n'
        'groups = [{ victim = "words", partners = ["others"] }]\n'
        'defenses = ["none", "mergelock"]\nattacks = ["none", "gauge-align"]\n'
        'mergers = ["task-arithmetic"]\nseeds = [0]\ntest = 16\nvalidation_rungs = [4]\n'
    )
    code, text = cli("run", str(suite), "--out", str(tmp_path / "out"))
    assert code == 0, text
    cells = [
        json.loads(line) for line in (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    ]
    assert {cell["status"] for cell in cells} <= {"ok", "no-benefit"}, cells
    assert all("alignment" in cell["quality"]["attacked"] for cell in cells)
    assert all(cell["pictures"] for cell in cells)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<th>Alignment</th>" in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"more": ""}, "linear probe needs a column of images"),
        ({'caption = "said"': 'text = "said"'}, "needs a caption"),
        ({'caption = "said"': 'caption = "nothing"'}, "no text column 'nothing'"),
        ({'base = "base"': 'base = "eyes"'}, "goes with the folder of a pipeline"),
        ({'judge = "eyes"': 'judge = "base"'}, "draws images"),
    ],
)
def test_what_cannot_be_drawn_or_seen_is_said(
    root: Path, changes: dict[str, str], said: str
) -> None:
    more = changes.pop("more", ZERO_SHOT)
    with pytest.raises(UsageError, match=said) as caught:
        told(root, more, **changes).task("words")
    assert "\n" not in str(caught.value)


def test_the_page_runs_as_written(root: Path, tmp_path: Path) -> None:
    page = Path(__file__).parents[1] / "docs/your-testbed.md"
    found = re.search(r"^```toml drawn\.toml\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    assert found is not None
    for name, of in {"sd": "base", "clip": "eyes", "sd-ships": "expert"}.items():
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / name).symlink_to(root / of)
    for name in ("animals", "ships"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for part in root.glob("*.jsonl"):
            text = part.read_text().replace('"image": "', f'"image": "{root}/')
            (tmp_path / "data" / name / part.name).write_text(text)
    file = tmp_path / "drawn.toml"
    file.write_text(found[1].replace("steps = 20", "steps = 2"))
    bench = Declared(str(file))
    animals, ships = (bench.task(name) for name in bench.tasks)
    assert len(animals.test) == 4 * len(ships.test)
    assert animals.test.answers["image"].shape[1:] == (3, 8, 8)
    assert bench.published("animals") is None
    with torch.no_grad():
        drawn = bench.features(bench.published("ships") or {}, ships.test[:2].inputs)
    assert drawn.isfinite().all()


# -- PaRaMS's testbed ----------------------------------------------------------------------------


def test_what_it_needs_is_one_line() -> None:
    bench = methods.testbed("sd-1.5").method
    with pytest.raises(AssetError, match=r"needs stable-diffusion-v1-5/.*judge=FOLDER of a CLIP"):
        bench.base()
    assert len(bench.content_hash()) == 64


@pytest.mark.slow
def test_the_paper_in_full_at_toy_size(root: Path, tmp_path: Path, cli: Cli) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for part in ("train", "test"):
            rows = [json.loads(x) for x in (root / f"{part}.jsonl").read_text().splitlines()]
            kept = [{"text": row["said"], "image": str(root / row["image"])} for row in rows]
            text = "\n".join(json.dumps(row) for row in kept)
            (tmp_path / name / f"{part}.jsonl").write_text(text)
    suite = load("params-sd-paper")
    folders = f"weights={root / 'base'}, data={tmp_path}, judge={root / 'eyes'}"
    spec = f"sd-1.5({folders}, steps=20, learning_rate=0.003, drawn=2, guidance=1.0, samples=2)"
    update = {"testbed": spec, "test": 16, "validation_rungs": (4,)}
    toy = Suite.model_validate({**suite.model_dump(), **update})
    file = tmp_path / "toy.toml"
    file.write_text(suite_toml(toy.model_dump(mode="json")))
    code, output = cli("run", str(file), "--out", str(tmp_path / "run"))
    assert code == 0, output
    cells = read_cells(tmp_path / "run")
    assert {cell.status for cell in cells} <= {"ok", "no-benefit"}
    assert len(cells) == 2 * len(suite.defenses) * len(suite.attacks)
    board = json.loads((tmp_path / "run/leaderboard.json").read_text())
    assert len(board["published"]) == 4
    for line in board["published"]:
        assert line["measured"]["unprotected"] is not None, line
        assert line["measured"]["protected"] is not None, line
    assert "alignment" in (tmp_path / "run/report.html").read_text(encoding="utf-8")

"""Testbeds of one's own: mistakes, identity, the hub's cache, experts, suites, commands."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import declared as made
import pytest
import torch
import zoo
from conftest import Cli
from declared import COUNTS, VISION, backbone

from benchmark.api.methods import testbed as named_testbed
from benchmark.core.errors import AssetError, CheckpointError, UnmergeBenchError, UsageError
from benchmark.testbeds.declared import Declared, place

# --- mistakes ------------------------------------------------------------------------------------

MISTAKES = [
    ("side = 8", "sied = 8", "sied: .*did you mean 'side'"),
    ('data = "one"', 'dat = "one"', r"task.0.dat: .*did you mean 'data'"),
    ("steps = 4", "step = 4", "recipe.step: .*did you mean 'steps'"),
    ("steps = 4", "steps = 0", "recipe.steps: .*greater than or equal to 1"),
    (
        "steps = 4",
        'frozen = ["embedings."]',
        r"begins with 'embedings\.'; did you mean 'embeddings",
    ),
    ('name = "two"', 'name = "one"', "two tasks are called 'one'"),
    ('name = "mine"', 'name = "minilm"', "'minilm' is a testbed that ships here"),
    ('name = "mine"', "name = mine", "not valid TOML"),
    ('base = "vit"', 'base = "vti"', r"base: no such file or folder: .*vti"),
    ('base = "vit"', 'base = "some/vit"', "as a hub id 'some/vit' needs its pin: revision"),
    ('base = "vit"', 'base = "one"', "has no config.json"),
    ('base = "vit"', 'base = "vit"\npretrained = "openai"', "pretrained goes with"),
    (
        'base = "vit"',
        'base = "open_clip:ViT-B-23"\npretrained = "openai"',
        "did you mean 'ViT-B-32'",
    ),
    ('base = "vit"', 'base = "open_clip:ViT-B-32"', "needs pretrained: .*openai"),
    (
        'base = "vit"',
        'base = "vit"\ndtype = "half"',
        "dtype: Input should be 'float32' or 'bfloat16'",
    ),
    ('data = "one"', 'data = "noe"', "task one: data: no such file or folder"),
    ('data = "one"', 'data = { train = "a.csv", test = "b.csv" }', "data: no such file: .*a.csv"),
    ('data = "one"', 'data = { test = "one/test.parquet" }', "no split 'train'.*set splits"),
    ('data = "one"', 'data = "one"\nsplits = { test = "tset" }', "no split 'tset'"),
    ('data = "one"', 'data = "one"\nimage = "img"', "no image column 'img' .it has image, label"),
    ('data = "one"', 'data = "texts"', "no image column 'image' .it has sentence, kind"),
    ('data = "one"', 'data = "one"\nlabel = "lable"', "no label column 'lable'"),
    ('data = "one"', 'data = "one"\nclasses = ["dark"]', "label 1 is none of the 1 classes"),
    ('data = "one"', 'data = "one"\nclasses = { dark = "d" }', "label 'light' has no name"),
    ('data = "one"', 'data = "one"\nclasses = "names.json"', "classes: no such file"),
    (
        'data = "one"',
        'data = "one"\nhead = "label-names"',
        'no text tower.*set head = "linear-probe"',
    ),
    ('data = "one"', 'data = "one"\nprompts = ["a photo"]', "every prompt needs {}"),
    ('data = "one"', 'data = "one"\nimage = "a"\ntext = "b"', "not both"),
]


def use(path: str) -> None:
    """What a run asks of a testbed before it trains anything."""
    testbed = Declared(path)
    testbed.content_hash()
    _ = testbed.recipe
    testbed.task("one")


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES)
def test_a_mistake_is_one_line(
    folders: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    for name in ("vit", "one", "two", "texts"):
        (tmp_path / name).symlink_to(folders / name)
    assert old in VISION
    path = made.write(tmp_path, VISION.replace(old, new, 1))
    with pytest.raises(UnmergeBenchError) as caught:
        use(path)
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_and_an_unknown_task(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*none\.toml: No such file"):
        Declared(str(tmp_path / "none.toml"))
    testbed = Declared(made.write(folders, VISION))
    with pytest.raises(UsageError, match="mine has no task 'on'; did you mean 'one'"):
        testbed.task("on")


# --- identity ------------------------------------------------------------------------------------


def test_the_hash_is_of_the_content_wherever_it_lies(folders: Path, tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        for part in ("vit", "one", "two"):
            shutil.copytree(folders / part, tmp_path / name / part)
    here, there = (Declared(made.write(tmp_path / n, VISION)) for n in ("here", "there"))
    before = here.content_hash()
    assert before == there.content_hash()
    renamed = Declared(made.write(tmp_path / "here", VISION.replace("mine", "ours"), "b.toml"))
    assert renamed.content_hash() == before
    changed = Declared(
        made.write(tmp_path / "here", VISION.replace("steps = 4", "steps = 5"), "c.toml")
    )
    assert changed.content_hash() != before
    made.pictures(1, 77)[0][0].save(tmp_path / "here" / "two" / "train" / "dark" / "new.png")
    after_data = here.content_hash()
    assert after_data != before
    weights = tmp_path / "here" / "vit" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert here.content_hash() not in (before, after_data)


# --- the hub -------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub(root: Path, kind: str, name: str, source: Path) -> None:
    """A repository as the hub's client caches it."""
    folder = root / f"{kind}s--{name.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


ON_THE_HUB = f"""
name = "remote"
base = "some/vit"
revision = "{COMMIT}"
side = 8
[[task]]
name = "one"
data = "some/pictures"
revision = "{COMMIT}"
"""


def test_what_the_hub_s_cache_holds_works_without_network(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    testbed = Declared(made.write(tmp_path, ON_THE_HUB))
    with pytest.raises(AssetError, match=f"hf download some/vit --revision {COMMIT}; or name a"):
        testbed.base()
    hub(tmp_path / "hub", "model", "some/vit", folders / "vit")
    assert testbed.base().keys() == backbone(folders, "vit").base().keys()
    with pytest.raises(
        AssetError, match="hf download some/pictures --repo-type dataset --revision"
    ):
        testbed.task("one")
    hub(tmp_path / "hub", "dataset", "some/pictures", folders / "one")
    assert len(testbed.task("one").test) == COUNTS["test"]


# --- experts, suites, commands -------------------------------------------------------------------


def test_a_published_expert_is_used_and_not_trained(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmark.core.state import digest
    from benchmark.pipeline.store import Store
    from benchmark.pipeline.workbench import Workbench

    shutil.copytree(folders / "vit", tmp_path / "fine-tuned")
    model, _ = zoo.tiny("vit")
    moved = zoo.perturbed(zoo.state_of(model), 0.01, seed=1)
    from transformers import ViTForImageClassification

    tuned = ViTForImageClassification(model.config)
    tuned.load_state_dict(moved)
    tuned.save_pretrained(tmp_path / "fine-tuned")
    for name in ("vit", "one", "two"):
        (tmp_path / name).symlink_to(folders / name)
    text = VISION.replace('data = "one"', 'data = "one"\nexpert = "fine-tuned"')
    path = made.write(tmp_path, text)
    monkeypatch.setattr("benchmark.pipeline.workbench.fine_tune", None)
    bench = Workbench(named_testbed(path), torch.device("cpu"), Store(tmp_path / "store"))
    expert = bench.expert("one")
    assert expert.facts["notes"] == {"expert.published": True}
    wanted = {k.removeprefix("vit."): v for k, v in moved.items() if k.startswith("vit.")}
    assert digest(expert.state()) == digest(wanted)
    before = bench.testbed.content_hash()
    tuned.vit.layernorm.bias.data += 1
    tuned.save_pretrained(tmp_path / "fine-tuned")
    assert bench.testbed.content_hash() != before
    with pytest.raises(TypeError):  # the other one would be trained
        bench.expert("two").state()


def test_an_expert_of_another_architecture_is_refused(folders: Path, tmp_path: Path) -> None:
    text = VISION.replace('data = "one"', 'data = "one"\nexpert = "bert"')
    with pytest.raises(CheckpointError, match=r"expert .*bert lacks"):
        Declared(made.write(folders, text, "wrong.toml")).published("one")


def test_a_clip_image_tower_gets_the_base_s_projection(folders: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    ours = backbone(folders, "clip")
    tower = CLIPVisionModel(zoo.tiny("clip")[0].config.vision_config)
    tower.save_pretrained(tmp_path / "tower")
    from benchmark.testbeds.declared import read

    state = read(ours, place("tower", tmp_path, None, "expert"))
    assert torch.equal(state["visual_projection.weight"], ours.base()["visual_projection.weight"])
    for key, value in tower.state_dict().items():
        assert torch.equal(state[f"vision_model.{key.removeprefix('vision_model.')}"], value)


SUITE = """
name = "mine"
description = "a suite on a testbed of my own"
testbed = "testbed.toml"
groups = [{ victim = "one", partners = ["two"] }]
defenses = ["none", "params"]
attacks = ["none", "gauge-align"]
mergers = ["task-arithmetic(fixed=0.8)"]
test = 20
validation_rungs = [4]
"""


def test_a_suite_names_a_testbed_beside_it(
    folders: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vit", "one", "two"):
        (tmp_path / name).symlink_to(folders / name)
    made.write(tmp_path, VISION)
    suite = made.write(tmp_path, SUITE, "suite.toml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, printed = cli("run", suite, "--out", "run", "--json")
    assert code == 0, printed
    cells = [json.loads(line) for line in Path("run/cells.jsonl").read_text().splitlines()]
    assert {cell["testbed"] for cell in cells} == {"mine"}
    assert {cell["status"] for cell in cells} <= {"ok", "no-benefit"}
    assert len(cells) == 4
    gaps = [cell["logit_gap"] for cell in cells if cell["defense"] == "params"]
    assert max(gaps) < 1e-4
    # The same question from another folder: found finished.
    monkeypatch.chdir(tmp_path)
    assert cli("run", "suite.toml", "--out", "elsewhere/run", "--json")[0] == 0


def test_show_and_run_tell_a_testbed_from_a_suite(folders: Path, cli: Cli) -> None:
    path = made.write(folders, VISION)
    code, printed = cli("show", path, "--json")
    assert code == 0
    (found,) = json.loads(printed)
    assert (found["kind"], found["name"], found["side"]) == ("testbeds", "mine", 8)
    assert found["tasks"]["one"] == "one (linear-probe)"
    assert cli("show", path)[0] == 0
    code, printed = cli("run", path)
    assert code == 2
    assert "is a testbed, not a suite" in printed
    code, printed = cli("show", made.write(folders, SUITE, "suite.toml"), "--json")
    assert json.loads(printed)[0]["kind"] == "suites"

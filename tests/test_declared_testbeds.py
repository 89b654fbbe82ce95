"""Testbeds of one's own: every kind of base and of data, on folders in the hub's formats."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import declared as made
import pytest
import torch
import zoo
from conftest import Cli
from PIL import Image
from torch.nn.functional import normalize

from benchmark.errors import AssetError, CheckpointError, UnmergeBenchError, UsageError
from benchmark.methods import testbed as named_testbed
from benchmark.testbeds.declared import Declared, Input, linear_probe, open_backbone, place
from benchmark.testbeds.declared.backbones import Backbone

COUNTS = {"train": 60, "test": 24}
VISION = """
name = "mine"
base = "vit"
side = 8
[recipe]
steps = 4
learning_rate = 1e-3
[[task]]
name = "one"
data = "one"
[[task]]
name = "two"
data = "two"
max_validation = 5
"""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints by the zoo's names, open_clip, and data sets. Never written to by a test."""
    root = tmp_path_factory.mktemp("declared")
    for name in ("vit", "clip", "clip-vision", "bert"):
        made.checkpoint(root / name, name)
    made.open_clip_folder(root / "open-clip")
    made.parquet(root / "one", COUNTS)
    made.imagefolder(root / "two", {"train": 50, "test": 20})
    made.csv(root / "texts", COUNTS)
    return root


def backbone(folders: Path, name: str, **wanted: Any) -> Backbone:
    return open_backbone(place(name, folders, None, "base"), Input(**wanted))


def images() -> list[Image.Image]:
    return [image for image, _ in made.pictures(6, seed=9)]


@torch.no_grad()
def features(model: Backbone) -> torch.Tensor:
    return model.forward(model.base(), model.prepare(images()))


# --- bases ---------------------------------------------------------------------------------------


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


# --- data ----------------------------------------------------------------------------------------


def _hub_folder(folder: Path) -> str:
    made.parquet(folder / "pictures", COUNTS)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n"
        "  - {split: train, path: pictures/train.parquet}\n"
        "  - {split: held, path: pictures/test.parquet}\n---\n"
    )
    return 'data = "data"\nconfig = "small"\nsplits = { test = "held" }'


def _saved(folder: Path) -> str:
    import datasets

    parts = {}
    made.parquet(folder.parent / "source", COUNTS)
    for split in COUNTS:
        path = folder.parent / "source" / f"{split}.parquet"
        parts[split] = datasets.Dataset.from_parquet(
            str(path), cache_dir=str(folder.parent / "cache")
        )
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return 'data = "data"'


def _paths(folder: Path) -> str:
    made.imagefolder(folder, COUNTS)
    for split in COUNTS:
        files = sorted((folder / split).rglob("*.png"))
        rows = [f"{file.relative_to(folder)},{file.parent.name}" for file in files]
        (folder / f"{split}.csv").write_text("\n".join(["file,kind", *rows]) + "\n")
    return (
        'data = { train = "data/train.csv", test = "data/test.csv" }\n'
        'image = "file"\nlabel = "kind"'
    )


def _bare(folder: Path) -> str:
    made.parquet(folder, COUNTS, feature=False)
    (folder / "labels.json").write_text(json.dumps(made.CLASSES))
    return 'data = "data"'


DATA = {
    "imagefolder": lambda folder: str(made.imagefolder(folder, COUNTS)) and 'data = "data"',
    "parquet": lambda folder: str(made.parquet(folder, COUNTS)) and 'data = "data"',
    "bare-parquet": _bare,
    "hub-folder": _hub_folder,
    "saved-to-disk": _saved,
    "csv-of-paths": _paths,
    "validation": lambda folder: (
        str(made.parquet(folder, {**COUNTS, "validation": 9})) and 'data = "data"'
    ),
}


def content(task: Any) -> dict[str, set[bytes]]:
    return {
        part: {row.numpy().tobytes() for row in task.split(part).inputs["pixel_values"]}
        for part in ("train", "validation", "test")
    }


@pytest.mark.parametrize("form", DATA)
def test_images_in_every_form(folders: Path, tmp_path: Path, form: str) -> None:
    (tmp_path / "vit").symlink_to(folders / "vit")
    lines = DATA[form](tmp_path / "data")
    path = made.write(
        tmp_path, f'name = "t"\nbase = "vit"\n[[task]]\nname = "light"\n{lines}\nmax_test = 20\n'
    )
    task = Declared(path).task("light")
    assert task.classes == made.CLASSES
    held = 9 if form == "validation" else 12  # a fifth of the 60 rows of train
    assert [len(task.train), len(task.validation), len(task.test)] == [
        60 if form == "validation" else 48, held, 20,
    ]  # fmt: skip
    for part in ("train", "validation", "test"):
        split = task.split(part)
        assert torch.equal(made.brightness(split.inputs["pixel_values"]), split.labels)
        assert 0 < int(split.labels.sum()) < len(split)  # shuffled, both classes
    rows = content(task)
    assert not rows["train"] & rows["test"]
    assert not rows["train"] & rows["validation"]
    assert not rows["validation"] & rows["test"]
    torch.testing.assert_close(task.head.norm(dim=1), torch.ones(2))


def test_rows_that_look_alike_are_kept_once_and_in_test(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "vit").symlink_to(folders / "vit")
    made.parquet(tmp_path / "data", COUNTS)
    shutil.copyfile(tmp_path / "data" / "train.parquet", tmp_path / "data" / "test.parquet")
    text = 'name = "t"\nbase = "vit"\n[[task]]\nname = "a"\ndata = "data"\nmax_test = 20\n'
    task = Declared(made.write(tmp_path, text)).task("a")
    assert [len(task.train), len(task.validation), len(task.test)] == [32, 8, 20]
    assert not content(task)["train"] & content(task)["test"]


def test_texts_with_label_names_as_heads(folders: Path, tmp_path: Path) -> None:
    text = f"""
name = "words"
base = "{folders / "bert"}"
tokens = 8
[defaults]
head = "label-names"
text = "sentence"
label = "kind"
data = "{folders / "texts"}"
[[task]]
name = "plain"
prompts = ["a {{}}", "a photo of {{}}"]
[[task]]
name = "named"
classes = {{ light = "snow", dark = "coal" }}
"""
    testbed = Declared(made.write(tmp_path, text))
    plain, named = testbed.task("plain"), testbed.task("named")
    assert plain.classes == ("dark", "light")
    assert named.classes == ("snow", "coal")
    assert plain.scale == 20
    assert torch.equal(plain.test.labels, 1 - named.test.labels)
    embed = testbed.backbone.embed
    assert embed is not None
    two = embed(["a dark", "a photo of dark"]).mean(0)
    torch.testing.assert_close(plain.head[0], normalize(two, dim=0))
    torch.testing.assert_close(named.head, embed(["snow", "coal"]))


def test_label_names_come_from_the_text_tower(folders: Path, tmp_path: Path) -> None:
    for base in ("clip", "open-clip"):
        text = (
            f'name = "t"\nbase = "{folders / base}"\n[[task]]\nname = "a"\n'
            f'data = "{folders / "one"}"\nhead = "label-names"\nprompts = "simple"\n'
        )
        testbed = Declared(made.write(tmp_path, text))
        task = testbed.task("a")
        assert task.scale == 100
        assert task.head.shape == (2, 16)
        torch.testing.assert_close(task.head.norm(dim=1), torch.ones(2))


# --- heads ---------------------------------------------------------------------------------------


def probe_data(classes: int, common: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes that differ by one direction each, far from the origin if ``common`` is large."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % classes
    centre = torch.eye(8)[labels] + common * torch.eye(8)[7]
    return normalize(centre + 0.3 * torch.randn(300, 8, generator=rng), dim=-1), labels


@pytest.mark.parametrize("common", [0.0, 5.0])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_linear_probe_is_as_good_as_a_regression_with_an_intercept(
    classes: int, common: float
) -> None:
    from sklearn.linear_model import LogisticRegression

    features, labels = probe_data(classes, common)
    head = linear_probe(features, labels, classes)
    torch.testing.assert_close(head.norm(dim=1), torch.ones(classes))
    right = float(((features @ head.T).argmax(1) == labels).float().mean())
    best = LogisticRegression(C=100).fit(features.numpy(), labels.numpy())
    assert right > best.score(features.numpy(), labels.numpy()) - 0.02
    assert right > 0.9
    if classes == 2:
        torch.testing.assert_close(head[0], -head[1])


def test_a_probe_needs_every_class() -> None:
    features, labels = probe_data(2, 1.0)
    with pytest.raises(UsageError, match="2 of 3 occur"):
        linear_probe(features, labels, 3)


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
    with pytest.raises(UsageError, match="cannot read the testbed file"):
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
    from benchmark.checkpoint import digest
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

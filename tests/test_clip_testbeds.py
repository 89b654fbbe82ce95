"""The CLIP testbeds on local fixtures in the hub's formats, and what they say without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import toy_clip
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

from benchmark.api.contracts import Testbed
from benchmark.api.methods import testbed
from benchmark.cli import assets as command
from benchmark.core.data import Task
from benchmark.core.errors import AssetError, UsageError
from benchmark.io import hub
from benchmark.io.hub import Repository
from benchmark.learn.training import fine_tune
from benchmark.testbeds import clip

Cli = Callable[..., tuple[int, str]]
NAMES = ("clip-vit-b-32", "clip-vit-b-16", "clip-vit-l-14", "convnext")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data``: MNIST as parquet, EuroSAT as images; ``weights``: a tiny open_clip model."""
    folder = tmp_path_factory.mktemp("toy")
    toy_clip.parquet(folder / "data/mnist", 10)
    names = _eurosat()
    folders = [name.replace(" ", "_") for name in names[:5]] + [f"{i}" for i in range(5, 10)]
    toy_clip.images(folder / "data/eurosat", folders)
    toy_clip.open_clip_folder(folder / "weights")
    return folder


def _eurosat() -> tuple[str, ...]:
    (task,) = (t for t in clip._toml("clip8")["task"] if t["name"] == "eurosat")
    return tuple(task["classes"])


def made(home: Path, name: str = "clip-vit-b-32", **fields: object) -> Testbed:
    given = {"data": home / "data", "weights": home / "weights", "steps": 3, **fields}
    return testbed(f"{name}({', '.join(f'{k}={v}' for k, v in given.items())})").method


def sound(bed: Testbed, task: Task) -> None:
    """Features are unit vectors of the head's width, and training moves the State."""
    start = bed.base()
    with torch.no_grad():
        features = bed.features(start, task.test.inputs)
    assert features.shape == (len(task.test), task.head.shape[1])
    assert torch.allclose(features.norm(dim=1), torch.ones(len(features)), atol=1e-4)
    assert torch.allclose(task.head.norm(dim=1), torch.ones(len(task.head)), atol=1e-4)
    rng = torch.Generator().manual_seed(0)
    trained = fine_tune(bed, {task.name: task}, start, {task.name: task.train}, rng)
    assert trained.keys() == start.keys()
    assert any(not torch.equal(trained[key], start[key]) for key in start)


# -- declarations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_eight_tasks_are_declared(name: str) -> None:
    bed = testbed(name).method
    assert bed.tasks == ("sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
    assert len(bed.content_hash()) == 64  # known without any data, so that suites can be planned
    sizes = {task["name"]: len(task["classes"]) for task in clip._toml("clip8")["task"]}
    assert sizes == {"sun397": 397, "cars": 196, "resisc45": 45, "eurosat": 10, "svhn": 10,
                     "gtsrb": 43, "mnist": 10, "dtd": 47}  # fmt: skip
    for task in clip._toml("clip8")["task"]:
        assert len(set(task["classes"])) == len(task["classes"])
        assert all(prompt.count("{}") == 1 for prompt in task["prompts"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("convnext(library=transformers)", "transformers has no such model; leave library out"),
        ("clip-vit-b-32(expert=published)", "are of library=transformers; say so too"),
        (
            "clip-vit-b-32(library=transformers, expert=published, adapter=lora)",
            "are full ones; leave adapter out",
        ),
        ("clip-vit-b-32(steps=0)", "steps and learning_rate must be positive"),
        ("clip-vit-b-32(file=x)", "has no parameter 'file'"),
        ("clip-vit-b-32(libary=open_clip)", "did you mean 'library'"),
    ],
)
def test_a_wrong_parameter_is_one_line(spec: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        testbed(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_recipe_follows_the_adapter(home: Path) -> None:
    full, lora = made(home), made(home, adapter="lora")
    assert (full.recipe.learning_rate, full.recipe.lora) == (1e-5, None)
    assert lora.recipe.learning_rate == 3e-4
    assert lora.recipe.lora is not None
    assert lora.recipe.lora.rank == 16
    assert len({full.content_hash(), lora.content_hash(), made(home, steps=4).content_hash()}) == 3


# -- local folders --------------------------------------------------------------------------------


def test_open_clip_weights_and_parquet(home: Path) -> None:
    bed = made(home)
    assert bed.tasks == ("eurosat", "mnist")
    task = bed.task("mnist")
    assert task.classes == tuple("0123456789")
    assert task.scale == 100.0
    assert (len(task.test), len(task.validation), len(task.train)) == (24, 12, 48)
    assert sorted(task.test.labels.tolist()) == sorted(toy_clip.labels(10, 24))
    sound(bed, task)


def test_the_head_is_the_mean_of_the_prompts(home: Path) -> None:
    import open_clip

    model = open_clip.create_model(f"local-dir:{home / 'weights'}", pretrained_text=False).eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{home / 'weights'}")
    name = _eurosat()[3]
    prompts = [f"a centered satellite photo of {a}{name}." for a in ("", "a ", "the ")]
    with torch.no_grad():
        each = torch.nn.functional.normalize(model.encode_text(tokens(prompts)), dim=-1)
    wanted = torch.nn.functional.normalize(each.mean(0), dim=0)
    assert torch.allclose(made(home).task("eurosat").head[3], wanted, atol=1e-5)


def test_image_folders_are_classes_by_name_or_number(home: Path) -> None:
    task = made(home).task("eurosat")
    assert task.classes == _eurosat()
    # Folders in another order than the classes, all with as many images as the others.
    counts = torch.bincount(task.test.labels, minlength=10)
    expected = [toy_clip.labels(10, 24).count(c) for c in range(10)]
    assert counts.tolist() == expected


def test_an_unknown_folder_of_images_is_one_line(home: Path, tmp_path: Path) -> None:
    toy_clip.images(tmp_path / "data/eurosat", ["forest", "deep space"], train=4, test=4)
    with pytest.raises(UsageError, match="folder 'deep space' is none of its 10 classes") as caught:
        made(home, data=tmp_path / "data").task("eurosat")
    assert "\n" not in str(caught.value)


def test_local_folders_are_part_of_the_content(home: Path, tmp_path: Path) -> None:
    toy_clip.parquet(tmp_path / "data/mnist", 10, seed=1)
    toy_clip.parquet(tmp_path / "same/mnist", 10, seed=1)
    first = made(home, data=tmp_path / "data").content_hash()
    assert first == made(home, data=tmp_path / "same").content_hash()
    toy_clip.parquet(tmp_path / "other/mnist", 10, seed=2)
    assert first != made(home, data=tmp_path / "other").content_hash()


def test_transformers_weights(home: Path, tmp_path: Path) -> None:
    bed = made(home, library="transformers", weights=_transformers(tmp_path / "clip"))
    sound(bed, bed.task("mnist"))
    assert any(key.endswith("visual_projection.weight") for key in bed.base())


def test_convnext(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="open_clip's ConvNeXt needs timm")
    weights = toy_clip.open_clip_folder(
        tmp_path / "weights",
        timm_model_name="test_convnext",
        timm_model_pretrained=False,
        timm_pool="",
        timm_proj="linear",
        image_size=32,
    )
    bed = made(home, "convnext", weights=weights)
    sound(bed, bed.task("mnist"))


def _transformers(folder: Path) -> Path:
    """A random CLIP as transformers saves it, with a tokenizer of single letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

    letters = [chr(i) for i in range(33, 127)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    files = folder.with_name("tokenizer")
    files.mkdir(parents=True)
    (files / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 4, "projection_dim": 16}  # fmt: skip
    text = {**tower, "vocab_size": len(tokens), "bos_token_id": len(tokens) - 2,
            "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}  # fmt: skip
    vision = {**tower, "image_size": toy_clip.SIDE, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    CLIPTokenizerFast.from_pretrained(files).save_pretrained(folder)
    return folder


# -- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def mirror(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the hub: what is asked for is taken from this folder, as ``snapshot_download``
    lays it out.
    """
    root = tmp_path / "mirror"

    def download(repository: Repository, commit: str | None) -> tuple[str, Path]:
        source = root / repository.name
        if not source.is_dir():
            raise OfflineModeIsEnabled("no network in tests")
        target = hub.home() / repository.name / "snapshots" / (commit or COMMIT)
        for file in source.rglob("*"):
            if file.is_file():
                (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                (target / file.relative_to(source)).write_bytes(file.read_bytes())
        return commit or COMMIT, target

    monkeypatch.setattr(hub, "_download", download)
    return root


def test_what_was_fetched_is_pinned_and_used(home: Path, mirror: Path, cli: Cli) -> None:
    for repository in clip.groups()["clip-vit-b-32"]:
        folder = mirror / repository.name
        if repository.kind == "model":
            shutil.copytree(home / "weights", folder)
        else:
            toy_clip.parquet(folder / ("cropped_digits" if "svhn" in folder.name else "data"), 10)
    before = testbed("clip-vit-b-32").method.content_hash()
    code, output = cli("assets", "fetch", "clip-vit-b-32", "--json")
    assert code == 0
    pinned = hub.KNOWN["dataset:tanganke/dtd"]
    versions = {row["package"]: row["version"] for row in json.loads(output)}
    assert versions["tanganke/dtd"] == pinned, "a commit that is known is what is asked for"
    assert versions["tanganke/eurosat"] == COMMIT, "else the one that was found"
    bed = testbed("clip-vit-b-32").method
    assert bed.content_hash() != before
    assert len(bed.task("svhn").test) == 24
    assert len(bed.base()) > 10
    listed = {row["package"]: row for row in json.loads(cli("assets", "list", "--json")[1])}
    assert (listed["tanganke/dtd"]["version"], listed["tanganke/dtd"]["cached"]) == (pinned, True)
    assert "clip-vit-l-14" in listed["tanganke/dtd"]["testbeds"]
    # A machine without the hub goes on with the same commit.
    fetched = hub.found(Repository("dataset", "tanganke/dtd"))
    assert fetched is not None
    assert fetched.commit == pinned


def test_published_fine_tunes_are_experts(home: Path, mirror: Path, tmp_path: Path) -> None:
    base = _transformers(mirror / "openai/clip-vit-base-patch32")
    toy_clip.parquet(mirror / "ylecun/mnist", 10)
    # As published: the tower without its projection.
    from transformers import CLIPVisionModel

    tower = CLIPVisionModel.from_pretrained(base)
    with torch.no_grad():
        for value in tower.parameters():
            value.add_(0.01)
    tower.save_pretrained(mirror / "tanganke/clip-vit-base-patch32_mnist")
    for repository in clip.groups()["clip-vit-b-32-published"]:
        if (mirror / repository.name).is_dir():
            hub.fetch(repository)
    bed = testbed("clip-vit-b-32(library=transformers, expert=published)").method
    expert, start = bed.published("mnist"), bed.base()
    assert expert is not None
    moved = {key for key in start if not torch.equal(expert[key], start[key])}
    assert expert.keys() == start.keys()
    assert not any("visual_projection" in key for key in moved)
    assert len(moved) > 10
    with pytest.raises(AssetError, match=r"needs the fine-tune for dtd .*fetch clip-vit-b-32-publ"):
        bed.published("dtd")


def test_weights_that_would_be_unpickled_are_refused(mirror: Path) -> None:
    folder = mirror / "openai/clip-vit-base-patch32"
    folder.mkdir(parents=True)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(AssetError, match="holds no safetensors weights; nothing else is read"):
        hub.fetch(Repository("model", "openai/clip-vit-base-patch32"))
    assert hub.found(Repository("model", "openai/clip-vit-base-patch32")) is None


def test_a_damaged_list_of_pins_is_no_crash(mirror: Path) -> None:
    save = Repository("dataset", "tanganke/dtd")
    hub.home().mkdir(parents=True)
    for content in ("", "[]", '{"dataset:tanganke/dtd": 3}', '{"dataset:tanganke/dtd": {}}'):
        (hub.home() / "pins.json").write_text(content)
        assert hub.found(save) is None
    toy_clip.parquet(mirror / "tanganke/dtd/data", 10, train=10, test=10)
    assert hub.fetch(save) == hub.found(save)


# -- without a network ----------------------------------------------------------------------------


def test_fetching_offline_is_one_line(cli: Cli) -> None:
    code, output = cli("assets", "fetch", "clip8")
    assert code == 1
    assert "\n" not in output
    assert output.startswith("cannot fetch the dataset tanganke/sun397: HF_HUB_OFFLINE forbids it")
    assert "copy" in output
    assert "clip-vit-b-32(data=FOLDER, weights=FOLDER)" in output


@pytest.mark.parametrize("name", ["params-paper", "mergeguard-paper"])
def test_a_suite_without_its_data_is_one_line(cli: Cli, tmp_path: Path, name: str) -> None:
    bed = {"params-paper": "clip-vit-b-32", "mergeguard-paper": "clip-vit-l-14"}[name]
    code, output = cli("run", name, "--out", tmp_path / "run")
    assert code == 1
    assert "\n" not in output
    assert f"run `unmergebench assets fetch {bed}`" in output or "fetch clip8" in output
    assert f"name a local folder: {bed}(" in output


def test_missing_local_folders_are_one_line(home: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(AssetError, match=r"no folder .*empty/dtd; put there parquet") as caught:
        made(home, data=empty).task("dtd")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="weights: no such folder"):
        made(home, weights=tmp_path / "nothing").base()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("name resolution"), "the hub cannot be reached"),
        (OSError(28, "No space left"), "the disk is full"),
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError), "does not offer it"),
    ],
)
def test_a_failed_fetch_says_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(repository: Repository, commit: str | None) -> tuple[str, Path]:
        raise error

    monkeypatch.setattr(hub, "_download", fail)
    with pytest.raises(AssetError, match=reason):
        hub.fetch(Repository("dataset", "tanganke/dtd"))


def test_all_does_not_mean_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command._chosen(["all"])[1] == []
    assert [r.name for r in command._chosen(["tanganke/dtd"])[1]] == ["tanganke/dtd"]
    with pytest.raises(UsageError, match="did you mean 'clip8'"):
        command._chosen(["clip9"])

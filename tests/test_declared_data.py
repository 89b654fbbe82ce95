"""Data of one's own in each of the hub's formats, and heads made from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import declared as made
import pytest
import torch
from declared import COUNTS
from torch.nn.functional import normalize

from benchmark.core.errors import UsageError
from benchmark.testbeds.declared import Declared, linear_probe


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

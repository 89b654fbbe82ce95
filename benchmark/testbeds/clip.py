"""The papers' own testbeds: CLIP's image towers on eight tasks, with zero-shot text heads.

Weights, images and fine-tunes come from the model hub, by ``unmergebench assets fetch clip8`` and
the like, or from local folders. Everything else is a declared testbed: the tasks are in
``clip8.toml``, each base in ``clip-*.toml``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

from benchmark.api.contracts import Card
from benchmark.api.recipe import Lora, Recipe
from benchmark.core.errors import AssetError, UsageError
from benchmark.io import hub
from benchmark.io.hub import Repository
from benchmark.testbeds.declared import Declared, Place
from benchmark.testbeds.declared.schema import TaskSpec, TestbedSpec
from benchmark.testbeds.declared.sources import Source

Library = Literal["open_clip", "transformers"]

#: Names of the published fine-tunes where they differ from the tasks'.
_PUBLISHED = {"cars": "stanford-cars"}
_RATES = {"full": 1e-5, "lora": 3e-4}
_NOTES = (
    "class names and prompts as in FusionBench 0.2.33, heads are the mean of the prompts' unit "
    "embeddings; AdamW with Trap²'s constants and rates, the number of steps is ours; at most "
    "8,000 training and 5,000 test images per task"
)


@dataclass(frozen=True)
class _Clip(Declared):
    """A CLIP image tower on SUN397, Cars, RESISC45, EuroSAT, SVHN, GTSRB, MNIST and DTD.

    Attributes:
        library: whose weights and code: ``open_clip`` or ``transformers``.
        data: a local folder with one folder per task (``sun397``, ``cars``, ...) that holds parquet
            files or images by split and class, in place of the hub's data sets; some tasks will do.
        weights: a local checkpoint folder of the base in place of the hub's.
        expert: ``trained`` here, or the ``published`` fine-tunes of FusionBench (transformers).
        adapter: how experts are trained: ``full``, or ``lora`` of rank 16 on q, k, v, o.
        steps, learning_rate: of that training; a rate of None is 1e-5 for full, 3e-4 for lora.
    """

    file: str = field(default="", init=False, repr=False)
    library: Library = "open_clip"
    data: str = ""
    weights: str = ""
    expert: Literal["trained", "published"] = "trained"
    adapter: Literal["full", "lora"] = "full"
    steps: int = 2000
    learning_rate: float | None = None

    name: ClassVar[str]

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.learning_rate is not None and not self.learning_rate > 0):
            raise ValueError("steps and learning_rate must be positive")
        if self.library not in _bases(self.name):
            raise ValueError(f"{self.library} has no such model; leave library out")
        if self.expert == "published" and self.library != "transformers":
            raise ValueError("the published fine-tunes are of library=transformers; say so too")
        if self.expert == "published" and self.adapter == "lora":
            raise ValueError("the published fine-tunes are full ones; leave adapter out")

    @property
    def spec(self) -> TestbedSpec:
        rate = _RATES[self.adapter] if self.learning_rate is None else self.learning_rate
        recipe = {
            "steps": self.steps,
            "learning_rate": rate,
            "warmup": min(500, self.steps // 4),
            "betas": (0.9, 0.98),
            "eps": 1e-6,
            "schedule": "cosine",
        }
        return TestbedSpec.model_validate(
            {
                **_toml("clip8"),
                "name": self.name,
                "summary": self.card.summary,
                "base": _bases(self.name)[self.library],
                "recipe": recipe,
            }
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """All eight; of a local ``data`` folder those it has."""
        every = super().tasks
        here = tuple(name for name in every if (Path(self.data).expanduser() / name).is_dir())
        return here if self.data and here else every

    @property
    def root(self) -> Path:
        return Path.cwd()

    @property
    def recipe(self) -> Recipe:
        recipe = super().recipe
        return replace(recipe, lora=Lora()) if self.adapter == "lora" else recipe

    def content_hash(self) -> str:
        """sha256 of the declaration and of all files or commits; what is not here yet is absent."""
        meaning = self.spec.model_dump(exclude={"name", "summary"}, mode="json")
        parts = [meaning, self.adapter, _or_absent(lambda: self._identity(self._base))]
        for name in self.tasks:
            parts.append(_or_absent(lambda name=name: self._source(name).content()))  # type: ignore[misc]
            if self.expert == "published":
                parts.append(_or_absent(lambda name=name: self._identity(self._expert(name))))  # type: ignore[misc]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def _base(self) -> Place:
        if self.weights:
            path = Path(self.weights).expanduser()
            if not path.is_dir():
                raise UsageError(f"{self.name}: weights: no such folder: {path}")
            return Place(self.weights, path)
        base = Repository("model", _bases(self.name)[self.library])
        return self._fetched(base, "the base", "weights")

    def _expert(self, name: str) -> Place | None:
        if self.expert == "trained":
            return None
        return self._fetched(_fine_tune(self.name, name), f"the fine-tune for {name}", "")

    def _source(self, name: str) -> Source:
        spec = self._task(name)
        if self.data:
            return Source(_local(spec, Path(self.data).expanduser(), self.name), self.root)
        place = self._fetched(_dataset(spec), f"the images of {name}", "data")
        assert place.path is not None
        files: dict[Any, tuple[str, ...]] = {
            part: tuple(str(file) for file in sorted(place.path.rglob(f"{part}-*.parquet")))
            for part in ("train", "test")
        }
        own = spec.model_copy(update={"data": files, "config": None})
        return _Pinned(own, self.root, f"{place.name}@{place.revision}")

    def _fetched(self, repository: Repository, what: str, parameter: str) -> Place:
        """Raises AssetError: it was never fetched; in one line what to do."""
        found = hub.found(repository)
        if found is None:
            group = "clip8" if repository.kind == "dataset" else _group(self.name, self)
            local = (
                f", or name a local folder: {self.name}({parameter}=FOLDER)" if parameter else ""
            )
            raise AssetError(
                f"{self.name} needs {what} ({repository.name}), not in {hub.home()}; where the hub "
                f"can be reached run `unmergebench assets fetch {group}`{local}"
            )
        return Place(repository.name, found.folder, found.commit)

    @staticmethod
    def _identity(place: Place | None) -> str:
        assert place is not None
        return f"{place.name}@{place.revision}" if place.revision else place.content


@dataclass(frozen=True)
class _Pinned(Source):
    """Fetched files, which their repository's commit determines: gigabytes need no hashing."""

    pin: str = ""

    def content(self) -> list[str]:
        return [self.pin]


@dataclass(frozen=True)
class ClipB32(_Clip):
    """CLIP ViT-B/32; see :class:`_Clip`."""

    name: ClassVar[str] = "clip-vit-b-32"
    card: ClassVar[Card] = Card(
        summary="CLIP ViT-B/32 on the 8 tasks of the merging literature, zero-shot text heads",
        paper="Learning Transferable Visual Models From Natural Language Supervision",
        authors="Radford et al. 2021",
        arxiv="2103.00020",
        notes=_NOTES,
    )


@dataclass(frozen=True)
class ClipB16(_Clip):
    """CLIP ViT-B/16; see :class:`_Clip`."""

    name: ClassVar[str] = "clip-vit-b-16"
    card: ClassVar[Card] = replace(
        ClipB32.card, summary=ClipB32.card.summary.replace("B/32", "B/16")
    )


@dataclass(frozen=True)
class ClipL14(_Clip):
    """CLIP ViT-L/14; see :class:`_Clip`."""

    name: ClassVar[str] = "clip-vit-l-14"
    card: ClassVar[Card] = replace(
        ClipB32.card, summary=ClipB32.card.summary.replace("B/32", "L/14")
    )


@dataclass(frozen=True)
class ConvNeXt(_Clip):
    """CLIP with a ConvNeXt image tower, through open_clip; see :class:`_Clip`."""

    name: ClassVar[str] = "convnext"
    card: ClassVar[Card] = Card(
        summary="CLIP ConvNeXt-B (wide) on the 8 tasks of the merging literature, text heads",
        paper="Reproducible scaling laws for contrastive language-image learning (open_clip)",
        authors="Cherti et al. 2022; Liu et al. 2022",
        arxiv="2212.07143",
        notes=f"{_NOTES}; which ConvNeXt a paper used is not known to us",
    )


TESTBEDS: tuple[type[_Clip], ...] = (ClipB32, ClipB16, ClipL14, ConvNeXt)


def groups() -> dict[str, tuple[Repository, ...]]:
    """What ``unmergebench assets fetch`` takes: a name → the repositories behind it."""
    tasks = TestbedSpec.model_validate({**_toml("clip8"), "name": "clip8", "base": "-"}).task
    data = tuple(_dataset(task) for task in tasks)
    found: dict[str, tuple[Repository, ...]] = {"clip8": data}
    for testbed in TESTBEDS:
        bases = {k: Repository("model", name) for k, name in _bases(testbed.name).items()}
        found[testbed.name] = (bases["open_clip"], *data)
        if "transformers" in bases:
            found[f"{testbed.name}-transformers"] = (bases["transformers"], *data)
            tuned = (_fine_tune(testbed.name, task.name) for task in tasks)
            found[f"{testbed.name}-published"] = (bases["transformers"], *tuned, *data)
    return found


def _group(name: str, testbed: _Clip) -> str:
    if testbed.expert == "published":
        return f"{name}-published"
    return name if testbed.library == "open_clip" else f"{name}-transformers"


def _or_absent(content: Callable[[], Any]) -> Any:
    try:
        return content()
    except (AssetError, UsageError):
        return "absent"


@functools.cache
def _toml(name: str) -> dict[str, Any]:
    file = resources.files("benchmark") / "testbeds" / f"{name}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _bases(name: str) -> dict[str, str]:
    """Library → repository of the base."""
    content = _toml(f"clip-{name.removeprefix('clip-')}")
    return {key: value for key, value in content.items() if key != "published"}


def _fine_tune(name: str, task: str) -> Repository:
    pattern = _toml(f"clip-{name.removeprefix('clip-')}")["published"]
    return Repository("model", pattern.format(_PUBLISHED.get(task, task)))


def _dataset(task: TaskSpec) -> Repository:
    """Of the data sets with corrupted test images too, only train and test."""
    folder = f"{task.config}/" if task.config else "*"
    return Repository(
        "dataset", str(task.data), (f"{folder}train-*.parquet", f"{folder}test-*.parquet")
    )


def _local(spec: TaskSpec, data: Path, name: str) -> TaskSpec:
    """The task with its images from ``data/<task>``.

    Raises:
        AssetError: no such folder.
        UsageError: a folder of images is called like no class.
    """
    folder = data / spec.name
    if not folder.is_dir():
        raise AssetError(
            f"{name}: data: no folder {folder}; put there parquet files (train-*.parquet, "
            f"test-*.parquet) or images as train/CLASS/*.png and test/CLASS/*.png"
        )
    classes: Any = spec.classes
    if (folder / "train").is_dir() and not list(folder.rglob("*.parquet")):
        classes = _by_folder(
            spec, sorted(p.name for p in (folder / "train").iterdir() if p.is_dir())
        )
    update = {"data": str(folder.resolve()), "config": None, "classes": classes}
    return spec.model_copy(update=update)


def _by_folder(spec: TaskSpec, folders: list[str]) -> dict[str, str]:
    """Folder of a class → its name, in the order of labels. Folders have the class's name (spaces
    may be underscores), or its number from 0.
    """
    assert isinstance(spec.classes, tuple)
    numbers = {_plain(name): index for index, name in enumerate(spec.classes)}
    if spec.name not in ("mnist", "svhn"):  # their class names are numbers
        numbers |= {str(index): index for index in range(len(spec.classes))}
    at: dict[int, str] = {}
    for folder in folders:
        key = str(int(folder)) if folder.isdecimal() else _plain(folder)
        if key not in numbers:
            raise UsageError(
                f"{spec.name}: folder {folder!r} is none of its {len(spec.classes)} classes; "
                f"call it as in {spec.classes[0]!r}, or by the class's number from 0"
            )
        at[numbers[key]] = folder
    return {at.get(index, f"\0{index}"): name for index, name in enumerate(spec.classes)}


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").replace("/", " ").strip()


__all__ = ["TESTBEDS", "ClipB16", "ClipB32", "ClipL14", "ConvNeXt", "groups"]

"""What a testbed.toml may say. Every mistake is one line that names the field and the remedy."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from benchmark.api.contracts import Dtype
from benchmark.api.recipe import Lora, Projection, Recipe
from benchmark.api.specs import did_you_mean
from benchmark.core.errors import UsageError
from benchmark.core.paths import read_text
from benchmark.testbeds.declared.asking import Asking, Part, Strict
from benchmark.testbeds.declared.backbones import Pooling
from benchmark.testbeds.declared.pixels import Channels

Head = Literal["label-names", "linear-probe"]
#: A file name or a list of them.
Files = str | tuple[str, ...]
#: What a task of features and labels has, and one with ``score`` has not.
_CLASSIFIED = {"image", "text", "label", "head", "prompts", "probe"}


class LoraSpec(Strict):
    """See :class:`benchmark.api.recipe.Lora`."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    targets: tuple[Projection, ...] = Field(default=("q", "k", "v", "o"), min_length=1)


class RecipeSpec(Strict):
    """How an expert is trained; see :class:`benchmark.api.recipe.Recipe`. ``clip = 0``: none.

    ``lora``: experts are adapters on attention, trained at ``learning_rate`` as it stands.
    """

    later: ClassVar[frozenset[str]] = frozenset({"lora"})

    steps: int = Field(default=80, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=5e-5, gt=0)
    warmup: int = Field(default=10, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, ge=0)
    frozen: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    schedule: Literal["linear", "cosine"] = "linear"
    lora: LoraSpec | None = None

    def recipe(self, frozen: tuple[str, ...]) -> Recipe:
        """The recipe, with these tensors frozen too."""
        lora = Lora(**self.lora.model_dump()) if self.lora else None
        fields = self.model_dump() | {"clip": self.clip or None, "lora": lora}
        return Recipe(**fields | {"frozen": (*self.frozen, *frozen)})


class DrawingSpec(Strict):
    """How a pipeline draws, and what sees what it drew.

    ``judge``: a CLIP or an image model, a folder or a hub id with its ``revision``. ``steps`` of
    the pipeline's scheduler; ``guidance`` by captions, 1 is none; ``side`` in pixels.
    """

    judge: str
    revision: str | None = None
    steps: int = Field(default=20, ge=1, le=1000)
    guidance: float = Field(default=1.0, ge=0)
    side: int | None = Field(default=None, ge=8, le=2048)


class TaskSpec(Asking):
    """One task; for a language model :class:`Asking` has more. What all tasks share may
    stand in ``[defaults]``.

    ``caption``: the column of what a generator is asked to draw, ``samples`` times in validation
    and test; ``label`` is then what is to be seen, by default the caption, and ``image`` what to
    learn from.

    ``data``: a folder (parquet or csv files, a folder of images per class, or a data set in the
    hub's format), files by split, or a hub id with its ``revision``. ``splits``: what the data
    calls train, validation and test. ``classes``: names in the order of the labels; a JSON
    file of them; or a table label = "name". ``prompts``: texts with ``{}``, ``openai``, ``simple``.
    ``expert``: a published fine-tune to use in place of one trained here.
    """

    later: ClassVar[frozenset[str]] = frozenset({*Asking.model_fields, "caption", "samples"})

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: str | dict[Part, Files]
    config: str | None = None
    revision: str | None = None
    splits: dict[Part, str] = Field(default_factory=dict)
    image: str | None = None
    text: str | None = None
    caption: str | None = None
    samples: int = Field(default=1, ge=1)
    label: str = "label"
    classes: str | tuple[str, ...] | dict[str, str] | None = None
    head: Head = "linear-probe"
    prompts: Literal["openai", "simple"] | tuple[str, ...] = ("{}",)
    probe: int = Field(default=2000, ge=10)
    expert: str | None = None
    expert_revision: str | None = None
    max_train: int = Field(default=5000, ge=1)
    max_validation: int = Field(default=500, ge=1)
    max_test: int = Field(default=2000, ge=1)

    @field_validator("prompts")
    @classmethod
    def _placeholder(cls, prompts: Any) -> Any:
        if not isinstance(prompts, str) and not (prompts and all("{}" in p for p in prompts)):
            raise ValueError(
                'every prompt needs {} where the class name goes, as in "a photo of {}."'
            )
        return prompts

    @model_validator(mode="after")
    def _one_column(self) -> TaskSpec:
        if self.caption and (self.text or self.score):
            raise ValueError("a task with caption has no text and no score; leave one of them out")
        if self.image and self.text:
            raise ValueError("name an image column or a text column, not both")
        if self.score and (wrong := sorted(_CLASSIFIED & self.model_fields_set)):
            raise ValueError(f"a task with score has no {wrong[0]}; leave one of the two out")
        return self


class TestbedSpec(Strict):
    """A whole testbed.toml.

    ``partial``: methods may go on where no row of the anatomy covers a part of the base.
    ``dtype``: what releases are stored in, and judged as rounded to.
    """

    __test__ = False  # not a pytest class

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    summary: str = ""
    base: str
    pretrained: str | None = None
    revision: str | None = None
    scale: float | None = Field(default=None, gt=0)
    side: int | None = Field(default=None, ge=8, le=1024)
    tokens: int = Field(default=32, ge=4, le=8192)
    mean: Channels | None = None
    std: Channels | None = None
    pooling: Pooling = "auto"
    partial: bool = False
    dtype: Dtype = "float32"
    drawing: DrawingSpec | None = None
    recipe: RecipeSpec = RecipeSpec()
    task: tuple[TaskSpec, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _share(cls, content: Any) -> Any:
        """``[defaults]`` into every task."""
        if not isinstance(content, dict) or "defaults" not in content:
            return content
        shared = content["defaults"]
        tasks = content.get("task")
        if not isinstance(shared, dict) or not isinstance(tasks, list):
            raise ValueError("[defaults] is a table of what every [[task]] shares")
        rest = {key: value for key, value in content.items() if key != "defaults"}
        return {**rest, "task": [{**shared, **t} if isinstance(t, dict) else t for t in tasks]}

    @model_validator(mode="after")
    def _distinct(self) -> TestbedSpec:
        names = [task.name for task in self.task]
        for task in self.task:
            if (task.caption is None) != (self.drawing is None):
                wanted = "[drawing] with a judge" if task.caption else "a caption in every task"
                raise ValueError(
                    f"a generator has [drawing] and captions: task {task.name!r} needs {wanted}"
                )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two tasks are called {twice[0]!r}; give each a name of its own")
        return self


def parse(text: str, where: str) -> TestbedSpec:
    """The content of a testbed.toml.

    Raises:
        UsageError: not TOML, or the first wrong field.
    """
    try:
        return TestbedSpec.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"testbed {where}: not valid TOML: {error}") from None
    except ValidationError as error:
        # A misspelt key is the cause where its right spelling is missing too.
        problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        first = problems[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        hint = ""
        if first["type"] == "extra_forbidden":
            models: dict[Any, type[BaseModel]] = {"task": TaskSpec, "recipe": RecipeSpec}
            model = (
                models.get(first["loc"][0], TestbedSpec) if len(first["loc"]) > 1 else TestbedSpec
            )
            known = [*model.model_fields, *(["defaults"] if model is TestbedSpec else [])]
            hint = did_you_mean(str(first["loc"][-1]), known)
        said = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"testbed {where}: {field}: {said}{hint}") from None


def is_testbed(path: Path) -> bool:
    """Whether a TOML file says it is a testbed rather than a suite."""
    try:
        content = tomllib.loads(read_text(path))
    except (UsageError, ValueError):
        return False
    return "base" in content or "task" in content

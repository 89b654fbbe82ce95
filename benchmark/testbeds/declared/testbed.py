"""A testbed that a user declares in a testbed.toml (docs/your-testbed.md)."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmark.anatomy import Anatomy
from benchmark.api.contracts import Arena, Card, Dtype, Testbed
from benchmark.api.recipe import Batch, Recipe, plain_loss
from benchmark.api.specs import did_you_mean
from benchmark.core import pictures
from benchmark.core.data import Split, Task
from benchmark.core.errors import UsageError
from benchmark.core.paths import read_text
from benchmark.core.state import State
from benchmark.testbeds import samples
from benchmark.testbeds.declared import heads
from benchmark.testbeds.declared.backbones import Backbone
from benchmark.testbeds.declared.captions import Captions
from benchmark.testbeds.declared.drawing import DrawingBackbone, Sampling
from benchmark.testbeds.declared.language import LanguageBackbone
from benchmark.testbeds.declared.opening import Input, named_base, open_backbone, read
from benchmark.testbeds.declared.opening_drawing import open_drawing
from benchmark.testbeds.declared.places import Place, folder, place
from benchmark.testbeds.declared.questions import Questions
from benchmark.testbeds.declared.schema import TaskSpec, TestbedSpec, parse
from benchmark.testbeds.declared.sources import Rows, Source
from benchmark.testbeds.declared.splits import divided, packed, read_names, spelled, unpacked
from benchmark.testbeds.declared.words import tokenizer_of
from benchmark.testbeds.kept import kept

_REVISION = 1  # of splitting and heads: raise it when they change
#: Logits = scale · cosine, where the testbed does not say: CLIP's own, and minilm's.
_SCALES = {"image": 100.0, "text": 20.0}
_PROBE_SCALE = 20.0


@dataclass(frozen=True)
class Declared(Testbed):
    """The testbed that ``file`` describes; paths in it are relative to its folder."""

    file: str

    card: ClassVar[Card] = Card(summary="a testbed of your own, declared in a TOML file")

    def __post_init__(self) -> None:
        """Raises UsageError: no such file, or the first wrong field."""
        _ = self.spec

    @property
    def spec(self) -> TestbedSpec:
        """What the file says."""
        path = Path(self.file)
        return _parsed(read_text(path), path.name)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def root(self) -> Path:
        """The folder that relative paths begin at."""
        return Path(self.file).resolve().parent

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.spec.task)

    @property
    def recipe(self) -> Recipe:
        """The file's; tensors that are no parameters are frozen too.

        Raises:
            UsageError: a ``frozen`` that no tensor's name begins with.
        """
        backbone = self.backbone
        for prefix in self.spec.recipe.frozen:
            if not any(key.startswith(prefix) for key in backbone.weights()):
                known = {f"{key.split('.')[0]}." for key in backbone.weights()}
                hint = did_you_mean(prefix, known)
                raise UsageError(f"recipe.frozen: no tensor's name begins with {prefix!r}{hint}")
        return self.spec.recipe.recipe(backbone.buffers)

    @property
    def stored(self) -> Dtype:
        return self.spec.dtype

    @property
    def backbone(self) -> Backbone:
        """The base model and how it is run; always the same object."""
        spec = self.spec
        if (how := spec.drawing) is not None:
            base, sampling = self._base, Sampling(how.steps, how.guidance, how.side)
            judge = place(how.judge, self.root, how.revision, "drawing.judge")
            return open_drawing(base, judge, sampling)
        return open_backbone(
            self._base,
            Input(
                spec.side,
                spec.mean,
                spec.std,
                spec.tokens,
                spec.pooling,
                asked=any(task.score for task in spec.task),
            ),
        )

    @property
    def _base(self) -> Place:
        spec = self.spec
        return named_base(spec.base, spec.pretrained, self.root, spec.revision)

    def content_hash(self) -> str:
        """sha256 of the file's meaning, of all files it names, and of the commits of hub ids."""
        published = [place_.content for place_ in map(self._expert, self.tasks) if place_]
        data = [self._source(name).content() for name in self.tasks]
        # What came later is named only where it is set: earlier results stay valid.
        later = {"partial": False, "dtype": "float32", "drawing": None}
        unset = {name for name, value in later.items() if getattr(self.spec, name) == value}
        meaning = self.spec.model_dump(exclude={"name", "summary"} | unset, mode="json")
        judge = [self.backbone.content] if self.spec.drawing is not None else []
        return _sha256([meaning, self._base.content, data, published, *judge])

    def base(self) -> State:
        return self.backbone.base()

    def module(self) -> torch.nn.Module:
        return self.backbone.module

    def anatomy(self) -> Anatomy:
        return replace(super().anatomy(), partial=self.spec.partial)

    def arena(self) -> Arena:
        return Opened(self.backbone.bare())

    def initialise(self, rng: torch.Generator) -> State:
        return self.backbone.initialise(rng)

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.backbone.forward(state, inputs)

    @property
    def draws(self) -> bool:
        return self.spec.drawing is not None

    def loss(self, state: State, batch: Batch) -> Tensor:
        return _loss(self.backbone, state, batch)

    def quality(self, state: State, task: Task) -> dict[str, float]:
        """Of images: how near the judge sees them to what was asked for, as a cosine; and with real
        ones to compare with, :func:`benchmark.testbeds.samples.measures`."""
        backbone = self.backbone
        if not isinstance(backbone, DrawingBackbone):
            return {}
        with torch.inference_mode():
            found = backbone.forward(state, task.test.inputs).cpu()
            wanted = task.head.cpu()[task.test.labels.cpu()]
            out = {"alignment": max(0.0, float((found * wanted).sum(1).mean()))}
            if (shown := task.test.answers.get("image")) is not None:
                real = backbone.seen(shown.cpu().float() / 255)
                out |= samples.measures(found, real)
        return out

    def pictures(self, state: State, task: Task) -> Tensor | None:
        """The first two of each class in grey, as many as a record holds."""
        backbone, labels = self.backbone, task.test.labels
        if not isinstance(backbone, DrawingBackbone):
            return None
        rows = torch.cat([(labels == label).nonzero()[:2, 0] for label in labels.unique()])
        with torch.inference_mode():
            rows = rows[: max(1, pictures.MOST // backbone.side**2)]
            drawn = backbone.images(state, task.test[rows].inputs).mean(1)
        return drawn if drawn.numel() <= pictures.MOST else None

    def published(self, task: str) -> State | None:
        """The published fine-tune that the file names for ``task``, if any."""
        found = self._expert(task)
        return None if found is None else read(self.backbone, found, self._base)

    def task(self, name: str) -> Task:
        """Splits are disjoint in what the model sees; rows are in a random order.

        Raises:
            UsageError: no such task; a column, split or class that the data lacks.
            AssetError: base or data are not at hand and cannot be fetched.
        """
        spec, source, backbone = self._task(name), self._source(name), self.backbone
        if isinstance(backbone, DrawingBackbone):
            told = Captions(spec, backbone, self.root)
            key = _sha256([spec.model_dump(mode="json"), source.content(), backbone.content])
            return told.task(kept(f"declared-{name}", key, told.prepare))
        asked = self._questions(spec)
        if asked is None and getattr(backbone, "crossing", False):
            raise UsageError(
                f"task {name}: an encoder-decoder writes answers; set score, prompt and answer"
            )
        if spec.head == "label-names" and backbone.embed is None:
            raise UsageError(
                f"task {name}: this base has no text tower for label names; "
                'set head = "linear-probe"'
            )
        # Only what prepares the examples: another recipe must not read the data again.
        key = _sha256([spec.model_dump(mode="json"), source.content(), backbone.content])
        if asked is not None:
            return asked.task(kept(f"declared-{name}", key, lambda: asked.prepare(source)))
        found = kept(f"declared-{name}", key, lambda: self._prepare(spec, source))
        splits = unpacked(found)
        scale = self.spec.scale
        if scale is None:
            scale = _PROBE_SCALE if spec.head == "linear-probe" else _SCALES[backbone.kind]
        classes = read_names(found["classes"])
        return Task(name, classes, head=found["head"], scale=scale, **splits)

    def _prepare(self, spec: TaskSpec, source: Source) -> dict[str, Tensor]:
        backbone = self.backbone
        rows, classes = source.read(backbone.kind)
        parts = divided(
            {part: _prepared(backbone, each) for part, each in rows.items()}, spec.max_validation
        )
        out = packed(spec.name, parts)
        if spec.head == "label-names":
            assert backbone.embed is not None
            out["head"] = heads.label_names(backbone.embed, classes, spec.prompts)
        else:
            few = parts["train"][: spec.probe]
            with torch.no_grad():
                features = backbone.forward(backbone.base(), few.inputs)
            try:
                out["head"] = heads.linear_probe(features, few.labels, len(classes))
            except UsageError as error:
                raise UsageError(f"task {spec.name}: {error}") from None
        out["classes"] = spelled(classes)
        return out

    def _questions(self, spec: TaskSpec) -> Questions | None:
        """How a language model is asked, if the task says so."""
        if spec.score is None:
            return None
        backbone = self.backbone
        assert isinstance(backbone, LanguageBackbone)
        # The default is for texts of which a feature is made; half a question is none.
        tokens = self.spec.tokens if "tokens" in self.spec.model_fields_set else None
        return Questions(spec, backbone, tokenizer_of(folder(self._base)), tokens)

    def _task(self, name: str) -> TaskSpec:
        for task in self.spec.task:
            if task.name == name:
                return task
        raise UsageError(f"{self.spec.name} has no task {name!r}{did_you_mean(name, self.tasks)}")

    def _source(self, name: str) -> Source:
        return Source(self._task(name), self.root)

    def _expert(self, name: str) -> Place | None:
        spec = self._task(name)
        if spec.expert is None:
            return None
        return place(spec.expert, self.root, spec.expert_revision, f"task {name}: expert")

    def describe(self) -> dict[str, Any]:
        """What ``unmergebench show`` prints; reads neither weights nor data."""
        spec = self.spec
        given = spec.model_dump(mode="json", exclude_unset=True)
        tasks = {t.name: f"{t.data} ({t.score or t.head})" for t in spec.task}
        recipe = {k: v for k, v in spec.recipe.model_dump(mode="json").items() if v}
        rest = {k: v for k, v in given.items() if k not in ("name", "task", "recipe", "summary")}
        summary = spec.summary or self.card.summary
        return {"name": spec.name, "summary": summary, **rest, "recipe": recipe, "tasks": tasks}


@dataclass(frozen=True)
class Opened:
    """The model of a declared testbed, without its files."""

    backbone: Backbone

    def module(self) -> torch.nn.Module:
        return self.backbone.module

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.backbone.forward(state, inputs)

    def loss(self, state: State, batch: Batch) -> Tensor:
        return _loss(self.backbone, state, batch)


def _loss(backbone: Backbone, state: State, batch: Batch) -> Tensor:
    if isinstance(backbone, DrawingBackbone):
        return backbone.loss(state, batch)
    return plain_loss(state, batch)


@functools.lru_cache(maxsize=16)
def _parsed(text: str, where: str) -> TestbedSpec:
    from benchmark.api.methods import TESTBEDS

    spec = parse(text, where)
    if spec.name in TESTBEDS.names():
        raise UsageError(
            f"testbed {where}: {spec.name!r} is a testbed that ships here; rename yours"
        )
    return spec


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps([_REVISION, content], sort_keys=True).encode()).hexdigest()


def _prepared(backbone: Backbone, rows: Rows) -> Split:
    return Split(backbone.prepare(rows.inputs), torch.tensor(rows.labels, dtype=torch.int64))

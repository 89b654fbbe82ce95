"""Tasks of captions as tensors, and the heads by which what is drawn is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmark.core.data import Split, Task
from benchmark.core.errors import UsageError
from benchmark.testbeds.declared import heads
from benchmark.testbeds.declared.asking import PARTS
from benchmark.testbeds.declared.drawing import DrawingBackbone, check_caption
from benchmark.testbeds.declared.pixels import Pixels
from benchmark.testbeds.declared.schema import TaskSpec
from benchmark.testbeds.declared.sources import Source
from benchmark.testbeds.declared.splits import divided, packed, read_names, spelled, unpacked

#: Logits = scale · cosine: CLIP's own, and that of a probe.
_SCALES = {"label-names": 100.0, "linear-probe": 20.0}
#: Seeds of the splits never meet.
_APART = 2**24


@dataclass(frozen=True)
class Captions:
    """One task for a generator. ``root``: the folder of the testbed.toml."""

    spec: TaskSpec
    backbone: DrawingBackbone
    root: Path

    @property
    def texts(self) -> Source:
        """Captions and what is to be seen: by default each caption for itself."""
        spec = self.spec
        label = spec.label if "label" in spec.model_fields_set else spec.caption
        changes = {"text": spec.caption, "image": None, "label": label}
        return Source(spec.model_copy(update=changes), self.root)

    @property
    def images(self) -> Source:
        """The same rows as images."""
        read = self.texts
        changes = {"text": None, "image": self.spec.image}
        return Source(read.spec.model_copy(update=changes), self.root)

    def prepare(self) -> dict[str, Tensor]:
        """The tensors of all splits and the head, by name.

        Raises:
            UsageError: a column or split is not there; the judge needs more to judge by.
        """
        spec, judge = self.spec, self.backbone.judge
        rows, classes = self.texts.read("text")
        if len(classes) < 2:
            raise UsageError(
                f"task {spec.name}: all captions are one, {classes[0]!r}, which tells nothing apart"
            )
        images = self.images.read("image")[0] if spec.image else {}
        parts = {}
        for number, part in enumerate(PARTS):
            if part not in rows:
                continue
            texts = [str(text) for text in rows[part].inputs]
            check_caption(self.backbone.pipeline, texts, spec.name)
            times = 1 if part == "train" else spec.samples
            again = torch.arange(len(texts)).repeat_interleave(times)
            inputs = {key: value[again] for key, value in self.backbone.prepare(texts).items()}
            inputs["seed"] = torch.arange(len(again)) + number * _APART
            shown = {"image": self._pixels.prepare(images[part].inputs)[again]} if images else {}
            parts[part] = Split(inputs, torch.tensor(rows[part].labels)[again], shown)
        out = packed(spec.name, divided(parts, spec.max_validation))
        if spec.head == "label-names":
            if judge.embed is None:
                raise UsageError(
                    f"task {spec.name}: the judge has no text tower for label names; give a CLIP, "
                    'or name a column of images (image) for head = "linear-probe"'
                )
            out["head"] = heads.label_names(judge.embed, classes, spec.prompts)
        else:
            out["head"] = self._probe(out, len(classes))
        out["classes"] = spelled(classes)
        return out

    def task(self, found: Mapping[str, Tensor]) -> Task:
        """The task that :meth:`prepare` made the tensors of."""
        classes = read_names(found["classes"])
        scale = _SCALES[self.spec.head]
        return Task(self.spec.name, classes, head=found["head"], scale=scale, **unpacked(found))

    def _probe(self, found: Mapping[str, Tensor], classes: int) -> Tensor:
        """What tells real images of the classes apart."""
        shown = found.get("answers.train.image")
        if shown is None:
            raise UsageError(
                f"task {self.spec.name}: a linear probe needs a column of images (image); a judge "
                'with a text tower does with head = "label-names"'
            )
        few = slice(0, self.spec.probe)
        with torch.no_grad():
            features = self.backbone.seen(shown[few].float() / 255)
        try:
            return heads.linear_probe(features, found["labels.train"][few], classes)
        except UsageError as error:
            raise UsageError(f"task {self.spec.name}: {error}") from None

    @property
    def _pixels(self) -> Pixels:
        """Of the size that the pipeline draws."""
        return Pixels(self.backbone.side)

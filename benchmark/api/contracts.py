"""The abstract classes that third parties subclass: Defense, Attack, Merger, Testbed.

A method is a frozen dataclass whose fields are its hyper-parameters. It never mutates its inputs,
takes all randomness from ``rng`` (a CPU generator), runs on any device, and returns every key of
the base in its shape and dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from benchmark.anatomy import Anatomy
from benchmark.api.knowledge import Access, Budget, FineTune, Knowledge
from benchmark.api.recipe import Batch, Loss, Recipe, plain_loss
from benchmark.core.data import Split, Task
from benchmark.core.state import Forward, State
from benchmark.io.assets import Asset

__all__ = [
    "Access",
    "Attack",
    "Budget",
    "Card",
    "Defense",
    "Ensemble",
    "FineTune",
    "Knowledge",
    "Members",
    "Merger",
    "Setting",
    "Testbed",
    "Victim",
]


@dataclass(frozen=True)
class Card:
    """Where a method comes from and what it claims.

    ``role``: ``method`` is ranked; ``control`` and ``reference`` stand beside the ranking.
    ``trains``: needs training, so its result is worth keeping. ``fidelity``: ``faithful`` to
    published code or equations, ``reconstruction`` where the source is silent (``notes`` says
    where), ``ours``. ``exact``: the release computes the expert's function. ``locks``: multiplies Q
    and K by matrices, which :func:`benchmark.anatomy.within` cuts down to the architecture's gauge
    group. ``architectures``: what it works on.
    """

    summary: str
    paper: str = ""
    authors: str = ""
    arxiv: str = ""
    fidelity: Literal["faithful", "reconstruction", "ours"] = "ours"
    exact: bool = False
    trains: bool = False
    role: Literal["method", "control", "reference"] = "method"
    locks: bool = False
    architectures: str = "any"
    licence: str = "Apache-2.0"
    notes: str = ""


def _unheard(key: str, value: object) -> None:
    """Where nobody keeps what a defense reports."""


@dataclass(frozen=True)
class Victim:
    """What the owner of an expert has when protecting it.

    ``fine_tune`` runs the testbed's recipe; ``initialise`` draws an independent random State of the
    same architecture; ``features`` is the forward pass (state, inputs) → (n, d); ``module`` is the
    architecture it runs, without weights, whose modules :mod:`benchmark.anatomy.taps` can watch.
    ``note(key, value)`` reports what a defense found out on its way (a search, a constant it
    chose): a JSON value under ``"method.what"``, kept with the release, written into its cells.
    ``loss`` is what training minimises (:meth:`batch`).
    """

    base: State
    expert: State
    anatomy: Anatomy
    task: Task
    recipe: Recipe
    fine_tune: FineTune
    initialise: Callable[[torch.Generator], State]
    features: Forward
    module: torch.nn.Module
    note: Callable[[str, object], None] = _unheard
    loss: Callable[[State, Batch], Tensor] = plain_loss

    def accuracy(self, state: State, split: Split, batch_size: int = 512) -> float:
        """The share of ``split`` that ``state`` classifies correctly (0 if its logits are NaN)."""
        right, size, ask = 0, min(batch_size, self.task.most), partial(self.features, state)
        with torch.inference_mode():
            for start in range(0, len(split), size):
                batch = split[start : start + size]
                logits = self.task.logits(ask(batch.given))
                right += int(self.task.answered(logits, batch, ask).sum())
        return right / len(split)

    def batch(self, examples: Split, rng: torch.Generator) -> Batch:
        """Examples of the victim's task, with the training loss of any State on them."""
        return Batch.of(self.task, examples, self.features, self.loss, rng)

    def train(
        self,
        start: State,
        rng: torch.Generator,
        *,
        recipe: Recipe | None = None,
        loss: Loss | None = None,
    ) -> State:
        """Fine-tune ``start`` on the victim's whole training split."""
        examples = {self.task.name: self.task.train}
        return self.fine_tune(start, examples, rng, recipe=recipe, loss=loss)


class Defense(ABC):
    """Turns an expert into the checkpoint its owner releases.

    ``expected_failed_checks``: checks of :mod:`benchmark.conformance` it may fail, each with why.
    """

    card: ClassVar[Card]
    expected_failed_checks: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        """The released State, as a merger sees it: every tensor of the base."""

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        """The model as its users run it: ``released``, unless the defense changes modules.

        A defense that does returns a :class:`benchmark.core.state.ForeignState`, and in ``protect``
        puts the base's tensors in place of what a merger cannot read. ``released`` is what
        ``protect`` gave; ``rng`` is in the state it had there.
        """
        return released

    @property
    def changes_modules(self) -> bool:
        """Whether users run another model than mergers see."""
        return type(self).shipped is not Defense.shipped


class Members(NamedTuple):
    """Base, victim and partners as they enter the merge, all in one common gauge."""

    base: State
    released: State
    partners: tuple[State, ...]


class Attack(ABC):
    """Undoes a defense, before the merge (``recover``, ``members``) or after it (``refine``).

    ``expected_failed_checks``: checks of :mod:`benchmark.conformance` it may fail, each with why.
    """

    card: ClassVar[Card]
    access: ClassVar[Access]
    expected_failed_checks: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        """A State to merge in place of the released one."""

    def members(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> Members:
        """All members of the merge. Override when base and partners must change too."""
        recovered = self.recover(released, knowledge, rng)
        return Members(knowledge.base, recovered, knowledge.partners)

    def merging(self, merger: Merger, anatomy: Anatomy) -> Merger:
        """The merger as this attack uses it: itself, or a wrapper
        (:class:`benchmark.merging.wrapped.WrappedMerger`).
        """
        return merger

    def refine(self, merged: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        """The merged State after the merge; the identity unless overridden."""
        return merged

    @property
    def refines(self) -> bool:
        """Whether it works on the merged model (and so needs a control at equal budget)."""
        return type(self).refine is not Attack.refine


class Ensemble(Attack):
    """Several attacks of which validation picks one; the pipeline runs the search.

    ``version`` changes with the list, its order or its budgets, and stands in every result row.
    """

    version: ClassVar[str]

    @property
    @abstractmethod
    def candidates(self) -> tuple[str, ...]:
        """Specs of the attacks it tries. The first, its prior favourite, is always a finalist."""

    @property
    @abstractmethod
    def challengers(self) -> int:
        """How many of the others, the best in the screening, are finalists too."""


@dataclass(frozen=True)
class Setting:
    """One point of a merger's search space: a coefficient per member, and named parameters.

    A coefficient of 0 means the same as leaving that member out. ``layers``, where given, are the
    coefficients of each band of depth, from the first layers to the last
    (:mod:`benchmark.merging.layers`); ``coefficients`` then are the greatest of each member.
    """

    coefficients: tuple[float, ...]
    parameters: dict[str, float] = field(default_factory=dict)
    layers: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def by_layer(
        cls, layers: Sequence[tuple[float, ...]], parameters: dict[str, float] | None = None
    ) -> Setting:
        """The setting with these coefficients of each band; a plain one if they are all equal."""
        greatest = tuple(max(column, key=abs) for column in zip(*layers, strict=True))
        differ = len(set(layers)) > 1
        return cls(greatest, parameters or {}, tuple(layers) if differ else ())

    def without_victim(self) -> Setting:
        """The same for the other members."""
        layers = tuple(band[1:] for band in self.layers)
        return Setting(self.coefficients[1:], self.parameters, layers)

    def to_dict(self) -> dict[str, object]:
        layers = {"layers": [list(band) for band in self.layers]} if self.layers else {}
        return {"coefficients": list(self.coefficients), **self.parameters, **layers}


class Merger(ABC):
    """Combines experts into one model.

    ``expected_failed_checks``: checks of :mod:`benchmark.conformance` it may fail, each with why.
    """

    card: ClassVar[Card]
    expected_failed_checks: ClassVar[Mapping[str, str]] = {}
    access: ClassVar[Access] = Access.WEIGHTS
    task_aware: ClassVar[bool] = False
    #: Draws from ``rng`` (DARE's masks); others need no result per seed.
    stochastic: ClassVar[bool] = False
    #: Wants ``knowledge.anatomy`` though weights are all it needs: it takes fused tensors apart.
    reads_anatomy: ClassVar[bool] = False

    @abstractmethod
    def search_space(self, members: int) -> list[Setting]:
        """The settings a free-rider tries for ``members`` models; the victim comes first.

        Raises:
            MethodError: it does not merge so many models (its cells are skipped).
        """

    @abstractmethod
    def merge(
        self,
        base: State,
        experts: Sequence[State],
        setting: Setting,
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> State:
        """The merged State. ``experts`` and ``setting.coefficients`` are in the same order."""

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        """``setting → merged State``, with the work that settings share done once.

        Every setting sees the same randomness, in whatever order settings are tried.
        """
        start = rng.get_state()

        def merged(setting: Setting) -> State:
            return self.merge(base, experts, setting, knowledge, torch.Generator().set_state(start))

        return merged


class Arena(Protocol):
    """What runs a testbed's model: of a :class:`Testbed` these two methods."""

    def module(self) -> torch.nn.Module: ...

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor: ...


#: What a release may be stored in.
Dtype = Literal["float32", "bfloat16"]


class Testbed(ABC):
    """A base model with tasks and the recipe that makes experts. A frozen dataclass.

    ``assets``: what it fetches from the package index. ``threads``: the most CPU threads worth
    using when running and training its model, or None for torch's default.
    """

    card: ClassVar[Card]
    assets: ClassVar[tuple[Asset, ...]] = ()
    threads: ClassVar[int | None] = None
    __test__ = False  # not a pytest class

    @property
    def name(self) -> str:
        """What a file calls the testbed it declares; empty for one that is known by its class."""
        return ""

    @property
    @abstractmethod
    def tasks(self) -> tuple[str, ...]:
        """Names of its tasks."""

    @property
    @abstractmethod
    def recipe(self) -> Recipe:
        """How an expert is trained."""

    @property
    def stored(self) -> Dtype:
        """What releases are stored in. They are judged as rounded to it."""
        return "float32"

    @abstractmethod
    def content_hash(self) -> str:
        """sha256 of all that determines base, data and heads, found without loading them."""

    @abstractmethod
    def base(self) -> State:
        """The public base, on the CPU."""

    @abstractmethod
    def module(self) -> torch.nn.Module:
        """The architecture that ``features`` runs, without weights; always the same object."""

    def arena(self) -> Arena:
        """What runs the model where the testbed's files are out of reach (it is pickled).

        The testbed itself, unless ``module`` or ``features`` read files: then something that holds
        the module, and neither weights nor data.
        """
        return self

    def anatomy(self) -> Anatomy:
        """The blocks of the architecture."""
        return Anatomy.of(self.module())

    @abstractmethod
    def task(self, name: str) -> Task:
        """One task, on the CPU."""

    @property
    def draws(self) -> bool:
        """Whether its models are generators, which have a ranking of their own."""
        return False

    @property
    def duties(self) -> Mapping[str, tuple[str, ...]]:
        """Victims that keep secrets → the tasks that their users ask of them.

        What such a victim answers of its own task is a leak: the free-rider's gain is the share of
        it that his model gives away, and its utility are these other tasks.
        """
        return {}

    def owned(self, name: str) -> Task | None:
        """A task as the owner of its expert has it, on the CPU, where he has data that nobody else
        is given."""
        return None

    def recipe_of(self, task: str) -> Recipe:
        """How the expert of one task is trained."""
        return self.recipe

    def quality(self, state: State, task: Task) -> dict[str, float]:
        """Measures, at least 0, of what a State makes on the test split of a task, which no single
        example shows (a Fréchet distance). Stated beside the score."""
        return {}

    def pictures(self, state: State, task: Task) -> Tensor | None:
        """A few of what a State draws on the test split of a task, (k, h, w) within [0, 1]; None
        where there is nothing to see."""
        return None

    def unfit(self, task: str, expert: State) -> str:
        """Why an expert, on any device, is not what the testbed is about; empty if it is. Nothing
        is measured on one that is not."""
        return ""

    def published(self, task: str) -> State | None:
        """An expert that somebody published, in place of one trained here, on the CPU."""
        return None

    @abstractmethod
    def initialise(self, rng: torch.Generator) -> State:
        """A State of the same architecture, independent of the base (for the control `oracle`)."""

    def loss(self, state: State, batch: Batch) -> Tensor:
        """What is minimised when an expert is trained: a scalar, differentiable in ``state``.

        What it draws, it draws from ``batch.rng()``.
        """
        return plain_loss(state, batch)

    @abstractmethod
    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """Forward pass through ``torch.func.functional_call``: (n, d) unit vectors, differentiable.

        Runs ``module`` on the device of ``state`` and ``inputs``; holds no parameters of its own.
        """

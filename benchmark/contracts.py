"""The abstract classes that third parties subclass: Defense, Attack, Merger, Testbed.

A method is a frozen dataclass whose fields are its hyper-parameters. It never mutates its inputs,
takes all randomness from ``rng`` (a CPU generator), runs on any device, and returns every key of
the base in its shape and dtype.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from benchmark.assets import Asset
from benchmark.checkpoint import Forward, State
from benchmark.data import Split, Task
from benchmark.errors import AccessError

if TYPE_CHECKING:
    from benchmark.anatomy import Anatomy
    from benchmark.training import Loss, Recipe


class Access(enum.IntEnum):
    """What the free-rider holds, each tier with all of the one below."""

    WEIGHTS = 0
    UNLABELED = 1
    LABELED = 2

    @property
    def label(self) -> Literal["weights", "unlabeled", "labeled"]:
        """The name in commands and records."""
        return cast(Literal["weights", "unlabeled", "labeled"], self.name.lower())


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


class FineTune(Protocol):
    """Fine-tune ``start`` on ``examples`` per task, under the testbed's recipe."""

    def __call__(
        self,
        start: State,
        examples: Mapping[str, Split],
        rng: torch.Generator,
        *,
        recipe: Recipe | None = None,
        loss: Loss | None = None,
    ) -> State: ...


@dataclass(frozen=True)
class Victim:
    """What the owner of an expert has when protecting it.

    ``fine_tune`` runs the testbed's recipe; ``initialise`` draws an independent random State of the
    same architecture; ``features`` is the forward pass (state, inputs) → (n, d); ``module`` is the
    architecture it runs, without weights, whose modules :mod:`benchmark.anatomy.taps` can watch.
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
    """Turns an expert into the checkpoint its owner releases."""

    card: ClassVar[Card]

    @abstractmethod
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        """The released State, as a merger sees it: every tensor of the base."""

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        """The model as its users run it: ``released``, unless the defense changes modules.

        A defense that does returns a :class:`benchmark.checkpoint.ForeignState`, and in ``protect``
        puts the base's tensors in place of what a merger cannot read. ``released`` is what
        ``protect`` gave; ``rng`` is in the state it had there.
        """
        return released

    @property
    def changes_modules(self) -> bool:
        """Whether users run another model than mergers see."""
        return type(self).shipped is not Defense.shipped


@dataclass
class Budget:
    """What an attack used beyond weights: distinct examples, optimisation steps, model FLOPs."""

    examples: int = 0
    steps: int = 0
    flops: float = 0.0


class Knowledge:
    """What the free-rider knows. Reaching past ``access`` raises: the threat model is code.

    ``partners`` are the free-rider's own experts, in the order they are merged after the victim.
    """

    def __init__(
        self,
        access: Access,
        base: State,
        partners: Sequence[State],
        anatomy: Anatomy,
        *,
        tasks: Mapping[str, Task] | None = None,
        recipe: Recipe | None = None,
        fine_tune: FineTune | None = None,
        features: Forward | None = None,
        flops_per_example: float = 0.0,
    ) -> None:
        self.access = access
        self.base = base
        self.partners = tuple(partners)
        self.anatomy = anatomy
        self.budget = Budget()
        self._tasks = dict(tasks or {})
        self._recipe = recipe
        self._fine_tune = fine_tune
        self._features = features
        self._flops = flops_per_example

    def require(self, tier: Access, what: str) -> None:
        """Raise AccessError unless ``tier`` was granted."""
        if self.access < tier:
            raise AccessError(
                f"{what} needs access {tier.label!r}; only {self.access.label!r} given"
            )

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """Forward pass of a State on inputs the attacker holds: (n, d) unit vectors."""
        self.require(Access.UNLABELED, "running the model on data")
        assert self._features is not None
        self.budget.flops += self._flops * len(next(iter(inputs.values())))
        return self._features(state, inputs)

    def unlabeled(self, per_task: int, rng: torch.Generator) -> dict[str, dict[str, Tensor]]:
        """Up to ``per_task`` training inputs of each task, without their labels."""
        self.require(Access.UNLABELED, "unlabelled inputs")
        out = {}
        for name, task in self._tasks.items():
            rows = torch.randperm(len(task.train), generator=rng)[:per_task]
            self.budget.examples += len(rows)
            out[name] = task.train[rows.to(task.train.labels.device)].inputs
        return out

    def labeled(self, per_class: int, rng: torch.Generator) -> dict[str, Split]:
        """``per_class`` labelled training examples of each class of each task."""
        self.require(Access.LABELED, "labelled examples")
        out = {name: task.train.few_shot(per_class, rng) for name, task in self._tasks.items()}
        self.budget.examples += sum(len(split) for split in out.values())
        return out

    @property
    def recipe(self) -> Recipe:
        """The testbed's fine-tuning recipe (public: it is how the field trains)."""
        assert self._recipe is not None
        return self._recipe

    def fine_tune(
        self,
        start: State,
        examples: Mapping[str, Split],
        rng: torch.Generator,
        *,
        recipe: Recipe | None = None,
        loss: Loss | None = None,
    ) -> State:
        """Fine-tune on labelled examples; the steps are charged to the budget."""
        self.require(Access.LABELED, "fine-tuning on labels")
        assert self._fine_tune is not None
        used = recipe or self.recipe
        self.budget.steps += used.steps
        self.budget.flops += (
            3 * self._flops * used.steps * used.batch_size
        )  # backward = 2 × forward
        return self._fine_tune(start, examples, rng, recipe=recipe, loss=loss)


class Members(NamedTuple):
    """Base, victim and partners as they enter the merge, all in one common gauge."""

    base: State
    released: State
    partners: tuple[State, ...]


class Attack(ABC):
    """Undoes a defense, before the merge (``recover``, ``members``) or after it (``refine``)."""

    card: ClassVar[Card]
    access: ClassVar[Access]

    @abstractmethod
    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        """A State to merge in place of the released one."""

    def members(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> Members:
        """All members of the merge. Override when base and partners must change too."""
        recovered = self.recover(released, knowledge, rng)
        return Members(knowledge.base, recovered, knowledge.partners)

    def refine(self, merged: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        """The merged State after the merge; the identity unless overridden."""
        return merged

    @property
    def refines(self) -> bool:
        """Whether it works on the merged model (and so needs a control at equal budget)."""
        return type(self).refine is not Attack.refine


@dataclass(frozen=True)
class Setting:
    """One point of a merger's search space: a coefficient per member, and named parameters.

    A coefficient of 0 means the same as leaving that member out.
    """

    coefficients: tuple[float, ...]
    parameters: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        return {"coefficients": list(self.coefficients), **self.parameters}


class Merger(ABC):
    """Combines experts into one model."""

    card: ClassVar[Card]
    access: ClassVar[Access] = Access.WEIGHTS
    task_aware: ClassVar[bool] = False
    #: Draws from ``rng`` (DARE's masks); others need no result per seed.
    stochastic: ClassVar[bool] = False

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
    @abstractmethod
    def tasks(self) -> tuple[str, ...]:
        """Names of its tasks."""

    @property
    @abstractmethod
    def recipe(self) -> Recipe:
        """How an expert is trained."""

    @abstractmethod
    def content_hash(self) -> str:
        """sha256 of all that determines base, data and heads, found without loading them."""

    @abstractmethod
    def base(self) -> State:
        """The public base, on the CPU."""

    @abstractmethod
    def module(self) -> torch.nn.Module:
        """The architecture that ``features`` runs, without weights; always the same object."""

    def anatomy(self) -> Anatomy:
        """The blocks of the architecture."""
        from benchmark.anatomy import Anatomy

        return Anatomy.of(self.module())

    @abstractmethod
    def task(self, name: str) -> Task:
        """One task, on the CPU."""

    @abstractmethod
    def initialise(self, rng: torch.Generator) -> State:
        """A State of the same architecture, independent of the base (for the control `oracle`)."""

    @abstractmethod
    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """Forward pass through ``torch.func.functional_call``: (n, d) unit vectors, differentiable.

        Runs ``module`` on the device of ``state`` and ``inputs``; holds no parameters of its own.
        """

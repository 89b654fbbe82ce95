"""What a free-rider knows. Reaching past the access tier raises: the threat model is code."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from benchmark.anatomy import Anatomy
from benchmark.api.recipe import Batch, Loss, Recipe
from benchmark.core.data import Split, Task
from benchmark.core.errors import AccessError, MethodError
from benchmark.core.state import Forward, State, forward_of


class Access(enum.IntEnum):
    """What the free-rider holds, each tier with all of the one below."""

    WEIGHTS = 0
    UNLABELED = 1
    LABELED = 2

    @property
    def label(self) -> Literal["weights", "unlabeled", "labeled"]:
        """The name in commands and records."""
        return cast(Literal["weights", "unlabeled", "labeled"], self.name.lower())


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
        module: torch.nn.Module | None = None,
        shipped: State | None = None,
        second: Callable[[], State] | None = None,
        flops_per_example: float = 0.0,
        task_id: bool = False,
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
        self._module = module
        #: What users of the release run, where its modules are not the base's; else None.
        self.shipped = shipped
        self._second = second
        self._flops = flops_per_example
        self._task_id = task_id

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
        return forward_of(state, self._features)(state, inputs)

    def logits(self, state: State, task: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """Scaled logits (n, classes) over the classes of ``task``, whose names are public."""
        return self._tasks[task].logits(self.features(state, inputs))

    def charge(self, steps: int, examples: int) -> None:
        """Count optimisation steps over ``examples`` forward passes that :meth:`features` made.

        A backward pass costs two forward passes.
        """
        self.budget.steps += steps
        self.budget.flops += 2 * self._flops * examples

    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, victim first; in a merge, one for each model that takes part."""
        if not self._task_id:
            self.require(Access.UNLABELED, "naming the tasks")
        return tuple(self._tasks)

    @property
    def forward(self) -> Forward:
        """How models of this architecture are run, for one that holds several of them.

        Raises:
            AccessError: the method is not task-aware (:class:`benchmark.api.contracts.Merger`).
        """
        if not self._task_id:
            raise AccessError("a model made of several models needs a task-aware merger")
        assert self._features is not None
        return self._features

    def second_release(self) -> State:
        """Another release of the same expert, protected with other draws.

        Raises:
            MethodError: its owner released it once.
        """
        if self._second is None:
            raise MethodError("needs a second release of the same expert, and there is only one")
        return self._second()

    @property
    def module(self) -> torch.nn.Module:
        """The architecture without weights, which :mod:`benchmark.anatomy.taps` can watch."""
        assert self._module is not None
        return self._module

    def unlabeled(
        self, per_task: int, rng: torch.Generator, *, victim_only: bool = False
    ) -> dict[str, dict[str, Tensor]]:
        """Up to ``per_task`` training inputs of each task, without their labels; victim first."""
        self.require(Access.UNLABELED, "unlabelled inputs")
        out = {}
        for name, task in self._chosen(victim_only).items():
            rows = torch.randperm(len(task.train), generator=rng)[:per_task]
            self.budget.examples += len(rows)
            out[name] = task.train[rows.to(task.train.labels.device)].inputs
        return out

    def labeled(
        self, per_class: int, rng: torch.Generator, *, victim_only: bool = False
    ) -> dict[str, Split]:
        """``per_class`` labelled training examples of each class of each task; victim first."""
        self.require(Access.LABELED, "labelled examples")
        tasks = self._chosen(victim_only)
        out = {name: task.train.few_shot(per_class, rng) for name, task in tasks.items()}
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
        passes: int = 1,
    ) -> State:
        """Fine-tune on labelled examples; ``passes`` per step of ``loss`` are charged."""
        self.require(Access.LABELED, "fine-tuning on labels")
        return self._train(start, examples, rng, recipe or self.recipe, loss, passes)

    def distil(
        self,
        start: State,
        teacher: State,
        inputs: Mapping[str, Mapping[str, Tensor]],
        rng: torch.Generator,
        *,
        recipe: Recipe | None = None,
    ) -> State:
        """Train ``start`` to answer as ``teacher`` does: KL(teacher ‖ student) over the classes."""
        self.require(Access.UNLABELED, "distillation")

        def loss(batch: Batch, state: State, rng: torch.Generator) -> Tensor:
            with torch.no_grad():
                wanted = batch.logits(teacher).log_softmax(-1)
            own = batch.logits(state).log_softmax(-1)
            return torch.nn.functional.kl_div(own, wanted, reduction="batchmean", log_target=True)

        # Labels that say nothing: the loss never looks at them.
        blank = {
            name: Split(
                dict(batch), next(iter(batch.values())).new_zeros(_rows(batch), dtype=torch.long)
            )
            for name, batch in inputs.items()
        }
        return self._train(start, blank, rng, recipe or self.recipe, loss, forward_only=1)

    def _train(
        self,
        start: State,
        examples: Mapping[str, Split],
        rng: torch.Generator,
        recipe: Recipe,
        loss: Loss | None,
        passes: int = 1,
        forward_only: int = 0,
    ) -> State:
        assert self._fine_tune is not None
        self.budget.steps += recipe.steps
        # A backward pass costs two forward passes.
        each = (3 * passes + forward_only) * self._flops
        self.budget.flops += each * recipe.steps * recipe.batch_size
        return self._fine_tune(start, examples, rng, recipe=recipe, loss=loss)

    def _chosen(self, victim_only: bool) -> dict[str, Task]:
        names = list(self._tasks)[: 1 if victim_only else None]
        return {name: self._tasks[name] for name in names}


def _rows(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))

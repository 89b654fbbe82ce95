"""Makes the models of one testbed: expert → released → shipped, recovered. On one device.

Every method's work is a node, known by the key of everything that determines it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch

from benchmark.anatomy import Anatomy
from benchmark.api.contracts import (
    Access,
    Attack,
    Defense,
    FineTune,
    Knowledge,
    Members,
    Merger,
    Testbed,
    Victim,
)
from benchmark.api.methods import Named
from benchmark.api.recipe import Loss, Recipe
from benchmark.core.data import Split
from benchmark.core.errors import Unfit
from benchmark.core.state import State, compatible, digest, ordered, rounded, to_device
from benchmark.evaluation.accuracy import Evaluator
from benchmark.learn.training import fine_tune
from benchmark.pipeline import apart, identity
from benchmark.pipeline.guard import Guard
from benchmark.pipeline.identity import generator
from benchmark.pipeline.nodes import Node, Report
from benchmark.pipeline.situation import Situation
from benchmark.pipeline.store import Store
from benchmark.pipeline.suite import Group

#: Hears what a defense reports: key, value.
Note = Callable[[str, object], None]

#: Bytes of States that are kept in memory, in all.
MEMORY = 4e9

#: Added to the seed of a release for a second release of the same expert.
_SECOND = 1_000_000


class Workbench:
    """Makes models of one testbed. ``notify(text)`` hears what is being done."""

    def __init__(
        self,
        testbed: Named[Testbed],
        device: torch.device,
        store: Store,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.testbed = testbed.method
        self.name = testbed.spec
        self.evaluator = Evaluator(self.testbed, device)
        self.store = store
        self.notify = notify
        self.key = identity.testbed(self.testbed, device)
        self.guard = Guard()

    @cached_property
    def anatomy(self) -> Anatomy:
        return self.testbed.anatomy()

    @cached_property
    def base(self) -> Node:
        """The public base."""
        state = self.evaluator.base
        size = sum(value.numel() * value.element_size() for value in state.values())
        # As many States in memory as a search goes through, if they are small enough.
        self.store.memory = max(8, min(32, int(MEMORY // size)))
        self.guard.watch("the base", state)
        node = Node(self.key, lambda report: Members(state, state, ()), self.store, state)
        return node.known(digest(state))

    def expert(self, task: str) -> Node:
        """Trained once per testbed and task, kept on disk; or the testbed's published one.

        ``facts["notes"]["expert.published"]`` says that it was not trained here.
        """

        def make(report: Report) -> Members:
            base = self.evaluator.base
            published = self.testbed.published(task)
            if published is not None:
                compatible(published, base, f"the published expert for {task}")
                report.notes["expert.published"] = True
                made = ordered(to_device(published, self.evaluator.device), base)
            else:
                examples = {task: self.evaluator.owned(task).train}
                train, rng = self.trainer(f"expert {task}", key), generator("expert", task)
                made = train(base, examples, rng, recipe=self.testbed.recipe_of(task))
            if reason := self.testbed.unfit(task, made):
                raise Unfit(f"testbed {self.name} refuses to run, its expert for {task} {reason}")
            return Members(base, made, ())

        key = identity.expert(self.key, task)
        return self._node(key, make, durable=True, inputs=[self.base])

    def released(self, defense: Named[Defense], victim: str, seed: int) -> Node:
        """What the owner publishes: what the defense made, as the testbed's releases are stored."""
        return self._stored(self.made(defense, victim, seed))

    def shipped(self, defense: Named[Defense], victim: str, seed: int) -> Node:
        """The release as its users run it: another model only where the defense changes modules."""
        return self._stored(self.unrounded(defense, victim, seed))

    def _stored(self, made: Node) -> Node:
        if self.testbed.stored == "float32":
            return made

        def make(report: Report) -> Members:
            return Members(self.evaluator.base, rounded(made.state()), ())

        return self._node(identity.stored(made.key, self.testbed.stored), make, inputs=[made])

    def made(self, defense: Named[Defense], victim: str, seed: int) -> Node:
        """What the defense makes, in float32; ``facts["notes"]`` is what it reported."""

        def make(report: Report) -> Members:
            self.notify(f"{defense.spec} protects {victim}")
            owner = self.owner(defense.spec, victim, key, report.notes.__setitem__)
            rng = generator("defense", defense.spec, victim, seed)
            with self.guard.held(f"defense {defense.spec}"):
                if isinstance(defense.method, apart.Apart):
                    state = apart.protect(
                        defense.method, self.testbed, owner, rng,
                        resume=lambda n: self.store.training(key, n), notify=self.notify,
                    )  # fmt: skip
                else:
                    state = defense.method.protect(owner, rng)
            compatible(state, self.evaluator.base, f"defense {defense.spec}")
            return Members(self.evaluator.base, ordered(state, self.evaluator.base), ())

        key = identity.released(self.key, defense, victim, seed)
        durable = defense.method.card.trains
        return self._node(key, make, durable=durable, inputs=[self.base, self.expert(victim)])

    def unrounded(self, defense: Named[Defense], victim: str, seed: int) -> Node:
        """What :meth:`shipped` stores, in float32."""
        released = self.made(defense, victim, seed)
        if not defense.method.changes_modules:
            return released

        def make(report: Report) -> Members:
            owner = self.owner(defense.spec, victim, key, report.notes.__setitem__)
            # One release for all groups of this victim: the draw must not depend on partners.
            rng = generator("defense", defense.spec, victim, seed)
            with self.guard.held(f"defense {defense.spec}"):
                if isinstance(defense.method, apart.Apart):
                    state: State = apart.ship(
                        defense.method, self.testbed, owner, released.state(), rng,
                        resume=lambda n: self.store.training(key, n), notify=self.notify,
                    )  # fmt: skip
                else:
                    state = defense.method.shipped(owner, released.state(), rng)
            return Members(self.evaluator.base, state, ())

        key = identity.shipped(released.key)
        return self._node(key, make, inputs=[released])

    def recovered(self, at: Situation) -> Node:
        """The members of the merge after the attack on the release."""
        victim, seed = at.group.victim, at.seed
        released = self.released(at.defense, victim, seed)
        shipped = self.shipped(at.defense, victim, seed)
        return self._attacked(
            at,
            released,
            f"attacks {at.defense.spec}",
            shipped,
            lambda: self.released(at.defense, victim, seed + _SECOND).state(),
        )

    def control(self, at: Situation) -> Node:
        """What the attack's data and compute make of the base, in place of the release."""
        return self._attacked(at, self.base, "on the base, as a control")

    def _attacked(
        self,
        at: Situation,
        released: Node,
        doing: str,
        shipped: Node | None = None,
        second: Callable[[], State] | None = None,
    ) -> Node:
        def make(report: Report) -> Members:
            base, attack = self.evaluator.base, at.attack
            self.notify(f"{attack.spec} {doing}")
            knowledge = self.knowledge(attack, at.group, key, second)
            knowledge.anatomy = self.anatomy.handed("attack", report.notes.__setitem__)
            if shipped is not None and shipped.key != released.key:
                knowledge.shipped = shipped.state()
            rng = generator("attack", attack.spec, at.group.victim, at.group.partners, at.seed)
            with self.guard.held(f"attack {attack.spec}"):
                members = attack.method.members(released.state(), knowledge, rng)
            for what, state in (("base", members.base), ("release", members.released)):
                compatible(state, base, f"attack {attack.spec} on the {what}")
            report.budget = asdict(knowledge.budget)
            return members._replace(released=ordered(members.released, base))

        key = identity.recovered(released.key, at.attack, at.group, at.seed)
        partners = [self.expert(partner) for partner in at.group.partners]
        needed = [] if shipped is None else [shipped]
        return self._node(key, make, inputs=[self.base, released, *needed, *partners])

    def _node(
        self,
        key: str,
        make: Callable[[Report], Members],
        *,
        durable: bool = False,
        inputs: Sequence[Node],
    ) -> Node:
        return Node(key, make, self.store, self.evaluator.base, durable=durable, inputs=inputs)

    def owner(
        self, what: str, victim: str, node: str = "", note: Note = lambda key, value: None
    ) -> Victim:
        """What the owner of an expert has when protecting it. ``what`` names its trainings, which
        resume if the key of the ``node`` they are part of is given; ``note`` hears its reports."""
        expert = self.expert(victim).state()
        self.guard.watch(f"the expert for {victim}", expert)
        return Victim(
            base=self.evaluator.base,
            expert=expert,
            anatomy=self.anatomy.handed("defense", note),
            task=self.evaluator.owned(victim).without_test(),
            recipe=self.testbed.recipe,
            fine_tune=self.trainer(f"{what} {victim}", node),
            initialise=lambda rng: to_device(self.testbed.initialise(rng), self.evaluator.device),
            features=self.testbed.features,
            module=self.testbed.module(),
            note=note,
            loss=self.testbed.loss,
        )

    def knowledge(
        self,
        method: Named[Attack] | Named[Merger],
        group: Group,
        node: str = "",
        second: Callable[[], State] | None = None,
        tasks: Sequence[str] = (),
    ) -> Knowledge:
        """What an attack or a merger may know, by its declared access.

        Trainings resume if the key of the ``node`` they are part of is given. ``tasks``: those it
        has data of, if not all of the group's.
        """
        access = method.method.access
        task_id = isinstance(method.method, Merger) and method.method.task_aware
        data = {}
        if access >= Access.UNLABELED or task_id:
            names = tasks or (group.victim, *group.partners)
            data = {name: self.evaluator.task(name) for name in names}
        partners = {name: self.expert(name).state() for name in group.partners}
        for name, state in partners.items():
            self.guard.watch(f"the expert for {name}", state)
        return Knowledge(
            access,
            self.evaluator.base,
            list(partners.values()),
            self.anatomy,
            tasks=data,
            recipe=self.testbed.recipe,
            fine_tune=self.trainer(method.spec, node),
            features=self.testbed.features,
            module=self.testbed.module(),
            second=second,
            flops_per_example=self.flops_per_example if access >= Access.UNLABELED else 0.0,
            task_id=task_id,
        )

    @cached_property
    def flops_per_example(self) -> float:
        """FLOPs of one forward pass of one example, counted by torch."""
        from torch.utils.flop_counter import FlopCounterMode

        task = self.evaluator.task(self.testbed.tasks[0])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.testbed.features(self.evaluator.base, task.validation[:1].given)
        return float(counter.get_total_flops())

    def trainer(self, what: str, node: str = "") -> FineTune:
        """The fine-tuning helper of one node: its n-th training has the n-th resume file."""
        numbers = itertools.count()

        def train(
            start: State,
            examples: Mapping[str, Split],
            rng: torch.Generator,
            *,
            recipe: Recipe | None = None,
            loss: Loss | None = None,
        ) -> State:
            resume: Path | None = self.store.training(node, next(numbers)) if node else None
            return fine_tune(
                self.testbed,
                {name: self.evaluator.task(name) for name in examples},
                start,
                examples,
                rng,
                recipe=recipe,
                loss=loss,
                progress=lambda step, steps: self.notify(f"training {what}: step {step}/{steps}"),
                resume=resume,
            )

        return train

"""The nodes of a plan on one testbed and one device: expert → released → recovered → merged → bits.

A node is known by the key of everything that determines it and is made only when a result that
needs it is not in the store.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmark.api.contracts import (
    Access,
    Attack,
    Defense,
    Knowledge,
    Members,
    Merger,
    Testbed,
    Victim,
)
from benchmark.api.methods import Named
from benchmark.api.recipe import Loss, Recipe
from benchmark.api.specs import parameters
from benchmark.core.data import Split
from benchmark.core.state import (
    State,
    compatible,
    digest,
    norm_growth,
    ordered,
    rounded,
    to_device,
)
from benchmark.evaluation.accuracy import Evaluator, relative_gap
from benchmark.evaluation.statistics import pack_bits, unpack_bits
from benchmark.learn.training import fine_tune
from benchmark.pipeline.fingerprint import sha, source_hash
from benchmark.pipeline.store import Store
from benchmark.pipeline.suite import Group

#: Bytes of States that are kept in memory, in all.
MEMORY = 4e9

#: Added to the seed of a release for a second release of the same expert.
_SECOND = 1_000_000


def generator(*parts: Any) -> torch.Generator:
    """A CPU generator seeded by what it is for, so that no draw depends on what ran before."""
    seed = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


def method_key(method: Any, search: bool = True) -> list[Any]:
    """What a method's results depend on: its parameters and its source.

    With ``search=False`` without the fields that only say which settings are tried.
    """
    parts = getattr(method, "parts", None)
    if parts is not None:
        return [method_key(part) for part in parts]
    only_search = {f.name for f in fields(method) if f.metadata.get("search")}
    kept = {k: v for k, v in parameters(method).items() if search or k not in only_search}
    # A method that runs an outside program says which version of it.
    outside = [method.outside] if hasattr(method, "outside") else []
    return [type(method).__qualname__, kept, source_hash(type(method).__module__), *outside]


@dataclass(frozen=True)
class Model:
    """The members of a merge (for an expert or a release: only ``released`` matters), made lazily.

    ``facts``: sha256 of ``base``, ``released`` and each partner, seconds and budget of its making.
    """

    key: str
    members: Callable[[], Members]
    facts: dict[str, Any]

    @property
    def sha256(self) -> str:
        return str(self.facts["released"])

    def state(self) -> State:
        return self.members().released


class Workbench:
    """Makes and evaluates models of one testbed. ``notify(text)`` hears what is being done."""

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
        self.key = testbed_key(self.testbed, device)

    @cached_property
    def anatomy(self) -> Any:
        return self.testbed.anatomy()

    @cached_property
    def base(self) -> Model:
        """The public base."""
        state = self.evaluator.base
        size = sum(value.numel() * value.element_size() for value in state.values())
        # As many States in memory as a search goes through, if they are small enough.
        self.store.memory = max(8, min(32, int(MEMORY // size)))
        return Model(self.key, lambda: Members(state, state, ()), {"released": digest(state)})

    def expert(self, task: str) -> Model:
        """Trained once per testbed and task, kept on disk; or the testbed's published one.

        ``facts["notes"]["expert.published"]`` says that it was not trained here.
        """

        def make() -> State:
            published = self.testbed.published(task)
            if published is not None:
                compatible(published, self.evaluator.base, f"the published expert for {task}")
                self.store.put(f"notes:{key}", {"expert.published": True})
                moved = to_device(published, self.evaluator.device)
                return ordered(moved, self.evaluator.base)
            examples = {task: self.evaluator.task(task).train}
            train = self.trainer(f"expert {task}", key)
            trained: State = train(self.evaluator.base, examples, generator("expert", task))
            return trained

        key = sha("expert", self.key, task)
        return self._model(key, make, durable=True)

    def released(self, defense: Named[Defense], victim: str, seed: int) -> Model:
        """What the owner publishes; ``facts["notes"]`` is what the defense reported."""

        def make() -> State:
            self.notify(f"{defense.spec} protects {victim}")
            notes: dict[str, object] = {}
            view = replace(self._view(defense, victim, key), note=notes.__setitem__)
            state = defense.method.protect(view, self._draws(defense, victim, seed))
            compatible(state, self.evaluator.base, f"defense {defense.spec}")
            # Before the State is stored: one that is found is not made again.
            self.store.put(f"notes:{key}", notes)
            return ordered(state, self.evaluator.base)

        key = sha("released", self.key, victim, seed, defense.spec, method_key(defense.method))
        return self._model(key, make, durable=defense.method.card.trains)

    def shipped(self, defense: Named[Defense], victim: str, seed: int) -> Model:
        """The release as its users run it: another model only where the defense changes modules."""
        released = self.released(defense, victim, seed)
        if not defense.method.changes_modules:
            return released

        def make() -> State:
            view = self._view(defense, victim, key)
            rng = self._draws(defense, victim, seed)
            return defense.method.shipped(view, released.state(), rng)

        key = sha("shipped", released.key)
        return self._model(key, make, durable=False)

    def _view(self, defense: Named[Defense], victim: str, node: str) -> Victim:
        return Victim(
            base=self.evaluator.base,
            expert=self.expert(victim).state(),
            anatomy=self.anatomy,
            task=self.evaluator.task(victim),
            recipe=self.testbed.recipe,
            fine_tune=self.trainer(f"{defense.spec} {victim}", node),
            initialise=lambda rng: to_device(self.testbed.initialise(rng), self.evaluator.device),
            features=self.testbed.features,
            module=self.testbed.module(),
        )

    @staticmethod
    def _draws(defense: Named[Defense], victim: str, seed: int) -> torch.Generator:
        # One release for all groups of this victim: the draw must not depend on partners.
        return generator("defense", defense.spec, victim, seed)

    def recovered(
        self, defense: Named[Defense], attack: Named[Attack], group: Group, seed: int
    ) -> Model:
        """The members of the merge after the attack."""
        released = self.released(defense, group.victim, seed)
        shipped = self.shipped(defense, group.victim, seed)
        return self._attacked(
            released,
            attack,
            group,
            seed,
            f"attacks {defense.spec}",
            shipped,
            lambda: self.released(defense, group.victim, seed + _SECOND).state(),
        )

    def control(self, attack: Named[Attack], group: Group, seed: int) -> Model:
        """What the attack's data and compute make of the base, in place of the release."""
        return self._attacked(self.base, attack, group, seed, "on the base, as a control")

    def _attacked(
        self,
        released: Model,
        attack: Named[Attack],
        group: Group,
        seed: int,
        doing: str,
        shipped: Model | None = None,
        second: Callable[[], State] | None = None,
    ) -> Model:
        key = sha(
            "recovered", released.key, group.partners, attack.spec, method_key(attack.method), seed
        )
        budget: dict[str, Any] = {}

        def make() -> Members:
            self.notify(f"{attack.spec} {doing}")
            knowledge = self.knowledge(attack, group, key, second)
            if shipped is not None and shipped.key != released.key:
                knowledge.shipped = shipped.state()
            rng = generator("attack", attack.spec, group.victim, group.partners, seed)
            members = attack.method.members(released.state(), knowledge, rng)
            self.store.forget_training(key)
            for what, state in (("base", members.base), ("release", members.released)):
                compatible(state, self.evaluator.base, f"attack {attack.spec} on the {what}")
            budget.update(asdict(knowledge.budget))
            return members._replace(released=ordered(members.released, self.evaluator.base))

        def members() -> Members:
            return self.store.recent(key, make)

        def facts() -> dict[str, Any]:
            start = time.perf_counter()
            made = members()
            seconds = time.perf_counter() - start
            known = {id(self.evaluator.base): self.base.sha256}
            for partner in group.partners:
                expert = self.expert(partner)
                known[id(expert.state())] = expert.sha256

            def hashed(state: State) -> str:
                return known.get(id(state)) or digest(state)

            return {
                "base": hashed(made.base),
                "released": hashed(made.released),
                "partners": [hashed(partner) for partner in made.partners],
                "seconds": seconds,
                "budget": budget,
            }

        released.state()  # its own cost must not be counted as the attack's
        return Model(key, members, self.store.result(f"facts:{key}", facts))

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
        return Knowledge(
            access,
            self.evaluator.base,
            [self.expert(partner).state() for partner in group.partners],
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
            self.testbed.features(self.evaluator.base, task.validation[:1].inputs)
        return float(counter.get_total_flops())

    def bits(
        self, content: str, build: Callable[[], State], task: str, split: str, rows: range
    ) -> np.ndarray:
        """Which of the ``rows`` the model with this content identity gets right."""
        key = self._bits_key(content, task, split, rows)
        stored = self.store.result(
            key,
            lambda: pack_bits(self.evaluator.correct(build(), task, split, rows)),
        )
        return unpack_bits(stored, len(rows))

    def size(self, task: str, split: str) -> int:
        """How many examples a split has."""
        return len(self.evaluator.task(task).split(split))

    def alone(self, model: Model, reference: Model, task: str, rows: range) -> tuple[float, float]:
        """Test accuracy of ``model`` alone, and max relative |Δlogit| against ``reference``."""

        def logits(of: Model) -> Tensor:
            return self.store.recent(
                f"logits:{of.sha256}:{task}:{rows.stop}",
                lambda: self.evaluator.logits(of.state(), task, "test", rows),
            )

        def gap() -> float:
            mine = logits(model)
            right = pack_bits(self.evaluator.outcomes(mine, task, "test", rows))
            self.store.put(self._bits_key(model.sha256, task, "test", rows), right)
            return relative_gap(mine, logits(reference))

        key = sha("gap", self.key, model.sha256, reference.sha256, task, rows.stop)
        difference = self.store.result(key, gap)
        return float(self.bits(model.sha256, model.state, task, "test", rows).mean()), difference

    def in_bf16(self, model: Model, task: str, examples: int = 64) -> float:
        """Max relative |Δlogit| that storing ``model`` in bfloat16 costs."""

        def gap() -> float:
            rows = range(min(examples, self.size(task, "test")))
            half, full = (
                self.evaluator.logits(state, task, "test", rows)
                for state in (rounded(model.state()), model.state())
            )
            return relative_gap(half, full)

        key = sha("bf16", self.key, model.sha256, task, examples)
        return float(self.store.result(key, gap))

    def norm_growth(self, model: Model, reference: Model) -> float:
        """The largest growth of a weight matrix's norm over the reference's."""
        key = sha("growth", model.sha256, reference.sha256)
        growth = self.store.result(key, lambda: norm_growth(model.state(), reference.state()))
        return float(growth)

    def _bits_key(self, content: str, task: str, split: str, rows: range) -> str:
        return sha("bits", self.key, content, task, split, rows.start, rows.stop)

    def _model(self, key: str, make: Callable[[], State], durable: bool) -> Model:
        def state() -> State:
            made = self.store.state(key, self.evaluator.base, make) if durable else make()
            self.store.forget_training(key)
            return made

        def members() -> Members:
            made = self.store.recent(key, state)
            return Members(self.evaluator.base, made, ())

        def facts() -> dict[str, Any]:
            start = time.perf_counter()
            made = members().released
            return {
                "seconds": time.perf_counter() - start,
                "released": digest(made),
                "notes": self.store.get(f"notes:{key}") or {},
            }

        return Model(key, members, self.store.result(f"facts:{key}", facts))

    def trainer(self, what: str, node: str = "") -> Any:
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
            return fine_tune(
                self.testbed,
                {name: self.evaluator.task(name) for name in examples},
                start,
                examples,
                rng,
                recipe=recipe,
                loss=loss,
                progress=lambda step, steps: self.notify(f"training {what}: step {step}/{steps}"),
                resume=self.store.training(node, next(numbers)) if node else None,
            )

        return train


def testbed_key(testbed: Testbed, device: torch.device) -> str:
    """What every result of a testbed depends on, found without loading its data."""
    return sha(
        "testbed",
        testbed.content_hash(),
        source_hash(type(testbed).__module__),
        source_hash("benchmark.evaluation.accuracy"),
        device.type,  # sums differ between a CPU and a GPU
        torch.__version__,
    )

"""The models a free-rider may end with, each known by what determines it before it is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from benchmark.api.contracts import Access, Attack, Budget, Merger, Setting
from benchmark.api.methods import Named
from benchmark.core.state import (
    ForeignState,
    PerTask,
    State,
    compatible,
    merged_well,
    with_variances,
)
from benchmark.merging.layers import by_layer
from benchmark.pipeline.fingerprint import sha
from benchmark.pipeline.suite import Group
from benchmark.pipeline.workbench import Model, Workbench, generator, method_key


class Skip(Exception):
    """The merger does not apply: these cells make no sense, and nothing failed."""


@dataclass(frozen=True)
class Part:
    """A State that enters a merge: its sha256, and how to get it."""

    sha256: str
    state: Callable[[], State]

    @staticmethod
    def of(model: Model) -> Part:
        return Part(model.sha256, model.state)


@dataclass(frozen=True)
class Candidate:
    """``content`` identifies the model, ``build`` makes its State; ``kind`` groups alternatives."""

    name: str
    content: str
    build: Callable[[], State]
    setting: Setting | None = None
    kind: str = ""


def members(attacked: Model) -> tuple[Part, list[Part]]:
    """Base and members of the merge as an attack left them (it may have moved all of them)."""
    facts = attacked.facts
    base = Part(facts["base"], lambda: attacked.members().base)
    partners = [
        Part(sha256, lambda i=i: attacked.members().partners[i])  # type: ignore[misc]
        for i, sha256 in enumerate(facts["partners"])
    ]
    return base, [Part.of(attacked), *partners]


def merges(
    bench: Workbench,
    merger: Named[Merger],
    base: Part,
    parts: Sequence[Part],
    settings: Sequence[Setting],
    group: Group,
    seed: int,
    kind: str,
) -> list[Candidate]:
    """One candidate per setting. A member at coefficient 0 is no part of its identity.

    So the merges without the victim are evaluated once, whatever defends it.
    """
    # Mergers that differ only in what they try share what they both tried.
    method = method_key(merger.method, search=False)
    knows = merger.method.access > Access.WEIGHTS or merger.method.task_aware
    # Only a merger that draws or sees data has results per seed; its draws belong to positions.
    draws = ["merge", method[:2], group.victim, group.partners, seed]
    draws = [*draws, len(parts)] if merger.method.stochastic or knows else []
    means = [*draws, bench.key] if knows else draws
    identity = sha(method, base.sha256, [p.sha256 for p in parts], means)
    # The victim comes first, and may be the one left out.
    tasks = (group.victim, *group.partners)[-len(parts) :]

    def prepared() -> tuple[Callable[[Setting], State], Budget]:
        states = [part.state() for part in parts]
        asks = knows or merger.method.reads_anatomy
        knowledge = bench.knowledge(merger, group, identity, tasks=tasks) if asks else None
        if knows:
            bench.notify(f"{merger.spec} merges {', '.join(tasks)}")
        made = merger.method.prepare(base.state(), states, knowledge, generator(*draws))
        return made, knowledge.budget if knowledge else Budget()

    def build(setting: Setting) -> State:
        def make() -> State:
            if setting.layers:
                return by_layer(build, base.state(), setting)
            merge, budget = bench.store.recent(f"prepared:{identity}", prepared)
            merged = with_variances(merge(setting))
            merged_well(merged, base.state(), f"merger {merger.spec}")
            if knows:
                bench.store.put(f"spent:{content(setting)}", asdict(budget))
            return merged

        # Kept from rung to rung of the search, and for the test of the winner.
        state: State = bench.store.recent(f"merged:{content(setting)}", make)
        return state

    def content(setting: Setting) -> str:
        used = [
            [part.sha256, coefficient, position if draws else 0]
            for position, (part, coefficient) in enumerate(
                zip(parts, setting.coefficients, strict=True)
            )
            if coefficient != 0
        ]
        layers = [setting.layers] if setting.layers else []
        return sha("merged", method, base.sha256, used, setting.parameters, means, *layers)

    return [
        Candidate(kind, content(s), lambda s=s: build(s), s, kind)  # type: ignore[misc]
        for s in settings
    ]


def outside(
    bench: Workbench,
    shipped: Model,
    merger: Named[Merger],
    settings: Sequence[Setting],
    group: Group,
    seed: int,
) -> list[Candidate]:
    """What a free-rider has without merging the victim (DESIGN section 4).

    The released model used alone, each partner alone, the partners merged without it, the base.
    """
    experts = [bench.expert(partner) for partner in group.partners]
    base = Part.of(bench.base)
    without = [s.without_victim() for s in settings if not s.coefficients[0]]
    parts = [Part.of(expert) for expert in experts]
    return [
        Candidate("released alone", shipped.sha256, shipped.state, kind="released"),
        *(
            Candidate(f"{partner} alone", expert.sha256, expert.state, kind="partners")
            for partner, expert in zip(group.partners, experts, strict=True)
        ),
        *merges(bench, merger, base, parts, without, group, seed, "partners"),
        Candidate("base", base.sha256, base.state, kind="base"),
    ]


def controls(
    bench: Workbench,
    attack: Named[Attack],
    merger: Named[Merger],
    settings: Sequence[Setting],
    group: Group,
    seed: int,
) -> list[Candidate]:
    """What the attack's data and compute give without the victim: the attack run on the base.

    That model alone, and merged with the partners in the victim's place. Empty where the attack
    leaves the base as it is (it works after the merge, or on locks only).
    """
    model = bench.control(attack, group, seed)
    if model.sha256 == bench.base.sha256:
        return []
    base, parts = members(model)
    with_it = [s for s in settings if s.coefficients[0] and any(s.coefficients[1:])]
    return [
        Candidate("control alone", model.sha256, model.state, kind="control"),
        *merges(bench, merger, base, parts, with_it, group, seed, "control"),
    ]


def refined(
    bench: Workbench, candidate: Candidate, attack: Named[Attack], group: Group, seed: int
) -> Candidate:
    """The candidate after the attack worked on it; what that took is stored under its content."""
    content = sha(
        "refined",
        [bench.key, candidate.content, attack.spec, method_key(attack.method)],
        group.model_dump(),
        seed,
    )

    def make() -> State:
        bench.notify(f"{attack.spec} on {candidate.name}")
        knowledge = bench.knowledge(attack, group)
        # The same draws for every candidate: the outside options get the same examples.
        rng = generator("refine", attack.spec, group.victim, group.partners, seed)
        start = candidate.build()
        if isinstance(start, (ForeignState, PerTask)):
            bench.store.put(f"spent:{content}", asdict(knowledge.budget))
            return start  # no one model of this architecture to train: it stays as it is
        state = attack.method.refine(start, knowledge, rng)
        compatible(state, bench.evaluator.base, f"attack {attack.spec} after the merge")
        bench.store.put(f"spent:{content}", asdict(knowledge.budget))
        return state

    def build() -> State:
        made: State = bench.store.recent(f"refined:{content}", make)
        return made

    return Candidate(
        f"{candidate.name}, refined", content, build, candidate.setting, candidate.kind
    )


def spent(bench: Workbench, candidate: Candidate) -> dict[str, float]:
    """The budget of a refined candidate, or of a merge with data (built if it never was)."""
    if bench.store.get(f"spent:{candidate.content}") is None:
        candidate.build()
    return dict(bench.store.get(f"spent:{candidate.content}") or {})

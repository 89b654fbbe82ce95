"""The models a free-rider may end with, each known by what determines it before it is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from benchmark.api import methods
from benchmark.api.contracts import Access, Budget, Setting
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
from benchmark.pipeline import identity
from benchmark.pipeline.identity import generator
from benchmark.pipeline.nodes import Node
from benchmark.pipeline.situation import Situation
from benchmark.pipeline.workbench import Workbench

#: What the task vector of the release is multiplied by where nothing is merged with it. Not 1: that
#: is the release, which is an outside option.
SCALES = (0.5, 0.75, 1.5)


@dataclass(frozen=True)
class Part:
    """A State that enters a merge: its sha256, and how to get it."""

    sha256: str
    state: Callable[[], State]

    @staticmethod
    def of(node: Node) -> Part:
        return Part(node.sha256, node.state)


@dataclass(frozen=True)
class Candidate:
    """``content`` identifies the model, ``build`` makes its State; ``kind`` groups alternatives."""

    name: str
    content: str
    build: Callable[[], State]
    setting: Setting | None = None
    kind: str = ""

    @staticmethod
    def of(name: str, node: Node, kind: str = "") -> Candidate:
        return Candidate(name, node.identity, node.state, kind=kind)


def members(attacked: Node) -> tuple[Part, list[Part]]:
    """Base and members of the merge as an attack left them (it may have moved all of them)."""
    facts = attacked.facts
    base = Part(facts["base"], lambda: attacked.members().base)
    partners = [
        Part(sha256, lambda i=i: attacked.members().partners[i])  # type: ignore[misc]
        for i, sha256 in enumerate(facts["partners"])
    ]
    return base, [Part.of(attacked), *partners]


def merging(bench: Workbench, at: Situation) -> Situation:
    """The situation with the merger as its attack uses it."""
    merger = at.attack.method.merging(at.merger.method, bench.anatomy)
    return replace(at, merger=Named(at.merger.spec, merger))


def merges(
    bench: Workbench,
    at: Situation,
    base: Part,
    parts: Sequence[Part],
    settings: Sequence[Setting],
    kind: str,
) -> list[Candidate]:
    """One candidate per setting. A member at coefficient 0 is no part of its identity.

    So the merges without the victim are evaluated once, whatever defends it.
    """
    merger, group, store = at.merger, at.group, bench.store
    knows = merger.method.access > Access.WEIGHTS or merger.method.task_aware
    # Only a merger that draws or sees data has results per seed; its draws belong to positions.
    draws = ["merge", identity.draws(merger.method), group.victim, group.partners, at.seed]
    draws = [*draws, len(parts)] if merger.method.stochastic or knows else []
    means = [*draws, bench.key] if knows else draws
    own = identity.method(merger.method, search=False)
    ready = identity.prepared(own, base.sha256, [p.sha256 for p in parts], means)
    # The victim comes first, and may be the one left out.
    tasks = at.tasks[-len(parts) :]

    def prepared() -> tuple[Callable[[Setting], State], Budget]:
        states = [part.state() for part in parts]
        asks = knows or merger.method.reads_anatomy
        knowledge = bench.knowledge(merger, group, ready, tasks=tasks) if asks else None
        if knows:
            bench.notify(f"{merger.spec} merges {', '.join(tasks)}")
        with bench.guard.held(f"merger {merger.spec}"):
            made = merger.method.prepare(base.state(), states, knowledge, generator(*draws))
        return made, knowledge.budget if knowledge else Budget()

    def build(setting: Setting) -> State:
        def make() -> State:
            if setting.layers:
                return by_layer(build, base.state(), setting)
            merge, budget = store.recent(f"prepared:{ready}", prepared)
            merged = with_variances(merge(setting))
            merged_well(merged, base.state(), f"merger {merger.spec}")
            bench.guard.check(f"merger {merger.spec}", whole=False)
            if knows:
                store.put(f"spent:{content(setting)}", asdict(budget))
            return merged

        # Kept from rung to rung of the search, and for the test of the winner.
        state: State = store.recent(f"merged:{content(setting)}", make)
        return state

    def content(setting: Setting) -> str:
        used = [
            [part.sha256, coefficient, position if draws else 0]
            for position, (part, coefficient) in enumerate(
                zip(parts, setting.coefficients, strict=True)
            )
            if coefficient != 0
        ]
        asked = {"parameters": setting.parameters, "layers": setting.layers}
        return identity.merge(own, base.sha256, used, asked, means)

    return [
        Candidate(kind, content(s), lambda s=s: build(s), s, kind)  # type: ignore[misc]
        for s in settings
    ]


def scaled(
    bench: Workbench,
    at: Situation,
    base: Part,
    parts: Sequence[Part],
    settings: Sequence[Setting],
    kind: str,
) -> list[Candidate]:
    """θ0 + c·τ of the first member alone, for each c of ``SCALES``: with two models in hand anybody
    can do that, whatever his merger does with more. So it is one model for all mergers.

    ``settings``: of the merger. Where they hold one choice of coefficients only, a protocol fixes
    them or the method has none: nothing but that is asked there.
    """
    used = {s.coefficients for s in settings if s.coefficients[0] and any(s.coefficients[1:])}
    if len(used) <= 1:
        return []
    others = (0.0,) * (len(parts) - 1)
    alone = [Setting((c, *others)) for c in SCALES]
    plain = replace(at, merger=methods.merger("task-arithmetic"))
    return merges(bench, plain, base, parts, alone, kind)


def outside(bench: Workbench, at: Situation, settings: Sequence[Setting]) -> list[Candidate]:
    """What a free-rider has without merging the victim (DESIGN section 4).

    The released model used alone, each partner alone, the partners merged without it, the base.
    """
    experts = {partner: bench.expert(partner) for partner in at.group.partners}
    shipped = bench.shipped(at.defense, at.group.victim, at.seed)
    without = [s.without_victim() for s in settings if not s.coefficients[0]]
    parts = [Part.of(expert) for expert in experts.values()]
    return [
        Candidate.of("released alone", shipped, "released"),
        *(Candidate.of(f"{name} alone", expert, "partners") for name, expert in experts.items()),
        *merges(bench, at, Part.of(bench.base), parts, without, "partners"),
        Candidate.of("base", bench.base, "base"),
    ]


def released_scaled(
    bench: Workbench, at: Situation, settings: Sequence[Setting]
) -> list[Candidate]:
    """The release with its task vector scaled. Of secrets an outside option: what that alone
    undoes was never kept by the release."""
    parts = [Part.of(bench.released(at.defense, at.group.victim, at.seed))]
    parts += [Part.of(bench.expert(partner)) for partner in at.group.partners]
    found = scaled(bench, at, Part.of(bench.base), parts, settings, "released")
    return [replace(one, name="released scaled") for one in found]


def controls(bench: Workbench, at: Situation, settings: Sequence[Setting]) -> list[Candidate]:
    """What the attack's data and compute give without the victim: the attack run on the base.

    That model alone, scaled, and merged with the partners in the victim's place. Empty where the
    attack leaves the base as it is (it works after the merge, or on locks only).
    """
    node = bench.control(at)
    if node.sha256 == bench.base.sha256:
        return []
    base, parts = members(node)
    with_it = [s for s in settings if s.coefficients[0] and any(s.coefficients[1:])]
    return [
        Candidate.of("control alone", node, "control"),
        *scaled(bench, at, base, parts, settings, "control"),
        *merges(bench, at, base, parts, with_it, "control"),
    ]


def refined(bench: Workbench, at: Situation, candidate: Candidate) -> Candidate:
    """The candidate after the attack worked on it; what that took is stored under its content."""
    attack, group = at.attack, at.group
    content = identity.refined(bench.key, candidate.content, attack, group, at.seed)

    def make() -> State:
        bench.notify(f"{attack.spec} on {candidate.name}")
        knowledge = bench.knowledge(attack, group)
        # The same draws for every candidate: the outside options get the same examples.
        rng = generator("refine", attack.spec, group.victim, group.partners, at.seed)
        state = candidate.build()
        # One model of this architecture can be trained; another stays as it is.
        if not isinstance(state, (ForeignState, PerTask)):
            with bench.guard.held(f"attack {attack.spec}"):
                state = attack.method.refine(state, knowledge, rng)
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

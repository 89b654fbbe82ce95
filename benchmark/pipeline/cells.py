"""One cell: what a free-rider gets out of one defense, with one attack and one merger."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from benchmark.api.contracts import Access, Attack, Setting
from benchmark.api.methods import Named, attack, defense, merger
from benchmark.core.errors import Tampered, described, stop_if_serious
from benchmark.core.records import SEARCHED, Cell, Hashes, Seconds, Spent
from benchmark.core.state import State, digest
from benchmark.evaluation import flags, utility
from benchmark.evaluation.scoring import (
    SITUATIONS,
    Gains,
    accuracies,
    gain,
    is_release,
    normalized,
    units,
)
from benchmark.evaluation.statistics import pack_bits, ratio_protection
from benchmark.pipeline import benign
from benchmark.pipeline import candidates as made
from benchmark.pipeline.candidates import Candidate
from benchmark.pipeline.ensemble import Attackers, Solved
from benchmark.pipeline.freerider import FreeRider, Outcome, Skip
from benchmark.pipeline.nodes import Node
from benchmark.pipeline.situation import Situation
from benchmark.pipeline.suite import Suite
from benchmark.pipeline.workbench import Workbench


class CellMaker:
    """Computes the cells of one suite; what cells share is remembered."""

    def __init__(self, bench: Workbench, suite: Suite) -> None:
        self.bench = bench
        self.suite = suite
        self.rider = FreeRider(bench, suite)
        self.measure = self.rider.measure
        self.attackers = Attackers(self.rider)
        self.none = defense("none")
        self.no_attack = attack("none")
        self.first_merger = merger(suite.mergers[0])

    def compute(self, key: str, at: Situation) -> Cell:
        """The record of one cell. Whatever a method raises becomes status ``error``.

        Raises:
            UsageError: the suite asks for more examples than a task has.
            AssetError: the testbed's data cannot be had.
            OSError: the disk is full or not writable.
        """
        self.rider.check(at.group)
        access = max(at.attack.method.access, at.merger.method.access)
        cell = Cell(
            key=key,
            testbed=self.bench.name,
            victim=at.group.victim,
            partners=list(at.group.partners),
            seed=at.seed,
            defense=at.defense.spec,
            attack=at.attack.spec,
            merger=at.merger.spec,
            access=access.label,
            task_id=at.merger.method.task_aware,
            changes_modules=at.defense.method.changes_modules,
            n_val=self.suite.validation_rungs[-1],
            n_test=len(self.rider.rows(at.group.victim)),
            duties=list(self.rider.duties(at.group)),
            draws=self.rider.bench.testbed.draws,
        )
        start = time.perf_counter()
        try:
            self._fill(cell, at)
        except Skip as skip:
            cell.status, cell.reason = "skipped", str(skip)
        except Tampered as error:
            self._start_over()
            cell = _failed(cell, error)
        except Exception as error:  # any failure of a method is an error, never protection
            stop_if_serious(error)
            cell = _failed(cell, error)
        cell.seconds.evaluate = time.perf_counter() - start
        return cell

    def _start_over(self) -> None:
        """Forget every State in memory: a method wrote to one of them, and they share tensors."""
        bench = self.bench
        bench.store.forget()
        bench = Workbench(
            Named(bench.name, bench.testbed), bench.evaluator.device, bench.store, bench.notify
        )
        CellMaker.__init__(self, bench, self.suite)

    def _fill(self, cell: Cell, at: Situation) -> None:
        bench = self.bench
        settings = self.rider.settings(at.merger, at.group)  # before any work: may raise Skip
        cell.one_coefficient = _one_coefficient(settings)
        expert = bench.expert(at.group.victim)
        released = bench.released(at.defense, at.group.victim, at.seed)
        shipped = bench.shipped(at.defense, at.group.victim, at.seed)
        made = bench.made(at.defense, at.group.victim, at.seed)
        cell.notes = dict(made.facts["notes"])
        cell.sha256 = Hashes(
            base=bench.base.sha256, expert=expert.sha256, released=released.facts["released"]
        )
        cell.qk_gauge = bench.anatomy.qk_gauge
        solved = self.attackers.solve(at)
        recovered = bench.recovered(at.under(solved.attack))
        cell.ensemble = solved.report
        cell.sha256.recovered = recovered.sha256
        cell.notes.update(recovered.facts["notes"])
        cell.seconds = Seconds(
            expert=expert.facts["seconds"],
            protect=made.facts["seconds"],
            recover=recovered.facts["seconds"],
            merge=solved.outcome.seconds,
        )
        self._alone(cell, at, expert, shipped, recovered)
        cell.budget = self._spent(at, solved, recovered.facts["budget"])
        cell.search = solved.outcome.search
        self._score(cell, at, solved)
        self._merged(cell, at, solved.outcome)
        self._fixed(cell, at.under(solved.attack), asked=at.attack)
        if self._asks_for_tax(at):
            judged = (*cell.duties, at.group.victim)[0]
            cell.benign, notes = benign.tax(
                self.measure, shipped, expert, judged, at.group.partners[0], self.suite.test
            )
            cell.notes.update(notes)
        growth = self.measure.growth(released, expert)
        cell.flags = flags.of_cell(cell, at.defense.method.card, growth=growth)

    def _asks_for_tax(self, at: Situation) -> bool:
        """Once per defense, victim and seed is enough: neither attack nor merger plays a part."""
        plain = at.attack.spec == self.no_attack.spec
        return self.suite.benign and plain and at.merger.spec == self.first_merger.spec

    def _spent(self, at: Situation, solved: Solved, before: Mapping[str, float]) -> Spent:
        """What the attack used before and after the merge, together: each draws its own examples.

        Labelled examples per class are what its ``per_class`` says, its parts' added up; those of
        an attack without such a parameter are counted, spread over all classes.
        """
        after, attack = solved.outcome.spent, solved.attack.method
        total = {k: before.get(k, 0) + after.get(k, 0) for k in {*before, *after}}
        spent = Spent.model_validate(total)
        if attack.access >= Access.LABELED and spent.examples:
            parts = getattr(attack, "parts", (attack,))
            named = sum(getattr(part, "per_class", 0) for part in parts)
            classes = sum(len(self.bench.evaluator.task(task).classes) for task in at.tasks)
            spent.per_class = named or -(-spent.examples // classes)
        return spent

    def _alone(
        self, cell: Cell, at: Situation, expert: Node, shipped: Node, recovered: Node
    ) -> None:
        """Base, expert, release as shipped and recovered model, each by itself."""
        measure, victim = self.measure, at.group.victim
        rows = self.rider.rows(victim)
        experts = self.rider.experts(at, "test")
        base = self.rider.test(Candidate.of("base", self.bench.base), cell.scored)
        cell.expert_accuracy, cell.zero_shot = accuracies(experts), accuracies(base)
        # Whether it is exact shows in float32, in whatever releases are stored.
        unrounded = self.bench.unrounded(at.defense, victim, at.seed)
        cell.logit_gap = measure.gap(unrounded, expert, victim, rows)
        cell.recovered_gap = measure.gap(recovered, shipped, victim, rows)
        cell.bf16_gap = measure.in_bf16(unrounded, victim)
        cell.bf16_gap_expert = measure.in_bf16(expert, victim)
        cell.standalone = float(measure.of(recovered, victim, "test", rows).mean())
        own, kept = (
            {task: measure.of(of, task, "test", self.rider.rows(task)) for task in tasks}
            for of, tasks in ((expert, cell.duties), (shipped, [victim, *cell.duties]))
        )
        cell.correct = _packed(expert={**experts, **own}, base=base, released=kept)
        self._samples(cell, "released", shipped.identity, shipped.state)
        worst = utility.worst(cell)
        assert worst is not None, "outcomes on all of its tasks were just packed"
        right, answered, n = utility.judged(cell)[worst]
        cell.utility, cell.utility_drop = answered / n, (right - answered) / n
        if cell.changes_modules:
            # What attackers get are training inputs; the model is run the same way on both.
            size = min(n, len(measure.split(worst, "train")))
            cell.seen = float(measure.of(shipped, worst, "train", range(size)).mean())

    def _score(self, cell: Cell, at: Situation, solved: Solved) -> None:
        attacked, outside, reference = solved.outcome, solved.outside, solved.reference
        undefended = max(
            (
                self.attackers.solve(at.with_defense(self.none).under(which)).outcome
                for which in (self.no_attack, at.attack)
            ),
            key=lambda outcome: outcome.score,
        )
        experts = self.rider.experts(at, "test")
        for who, chosen in (("undefended", undefended.best), ("attacked", attacked.best)):
            self._samples(cell, who, chosen.content, chosen.build)
        cell.choice = attacked.best.name
        cell.outside_choice = outside.best.name
        cell.setting = attacked.best.setting.to_dict() if attacked.best.setting else {}
        cell.accuracy = accuracies(attacked.correct)
        unit = units(accuracies(experts), secrets=bool(cell.duties))
        cell.normalized = normalized(cell.accuracy, unit)
        outcomes = {
            "attacked": attacked.correct,
            "undefended": undefended.correct,
            "outside": outside.correct,
            "reference": reference.correct,
        }
        cell.correct |= _packed(**outcomes)
        alone = is_release(cell.outside_choice)
        gains = Gains.made((gain(outcomes[who], unit) for who in SITUATIONS), alone=alone)
        cell.gain, cell.gain_undefended = gains.attacked, gains.undefended
        cell.gain_outside, cell.gain_reference = gains.outside, gains.reference
        cell.status, cell.protection = gains.status, gains.protection
        if cell.status == "no-benefit":
            cell.reason = "merging the undefended expert gains less than 0.02 over not merging it"
        else:
            cell.protection_ci = ratio_protection(
                cell.correct, alone=alone, scope=cell.testbed, secrets=bool(cell.duties)
            ).interval

    def _samples(self, cell: Cell, who: str, content: str, build: Callable[[], State]) -> None:
        """What the testbed measures and shows of a model's work, where it does."""
        rows = self.rider.rows(cell.victim)
        if quality := self.measure.quality(content, build, cell.victim, len(rows)):
            cell.quality[who] = quality
        if pictures := self.measure.pictures(content, build, cell.victim):
            cell.pictures[who] = pictures

    def _merged(self, cell: Cell, at: Situation, attacked: Outcome) -> None:
        """The best merge that uses the victim."""
        merge = attacked.merge
        if merge is None or merge.setting is None:
            return
        cell.merged_setting = merge.setting.to_dict()
        if merge is attacked.best:
            cell.merged_accuracy = cell.accuracy
            cell.sha256.merged = str(
                self.bench.store.result(f"sha256:{merge.content}", lambda: digest(merge.build()))
            )
        elif at.defense.spec == self.none.spec:
            cell.merged_accuracy = accuracies(self.rider.test(merge, cell.scored))

    def _fixed(self, cell: Cell, at: Situation, asked: Named[Attack]) -> None:
        """The merge at the papers' coefficients, and at the best on validation of shared ones,
        after the attack where the suite asks for that."""
        everywhere, bench = self.suite.fixed_everywhere, self.bench
        if not everywhere and asked.spec != self.no_attack.spec:
            return
        base, parts = made.members(bench.recovered(at))
        at = made.merging(bench, at)
        tasks = cell.scored if everywhere else cell.scored[:1]

        def merged(coefficients: Sequence[float]) -> Iterator[tuple[float, Candidate]]:
            settings = [Setting((c,) * len(parts)) for c in coefficients]
            options = made.merges(bench, at, base, parts, settings, "fixed")
            for coefficient, option in zip(coefficients, options, strict=True):
                refines = at.attack.method.refines
                yield coefficient, made.refined(bench, at, option) if refines else option

        for coefficient, option in merged(self.suite.fixed_coefficients):
            cell.fixed[f"{coefficient:g}"] = accuracies(self.rider.test(option, tasks))
        if self.suite.shared_search:
            coefficient, option = self._shared(merged(self.suite.shared_search), at)
            cell.fixed[SEARCHED] = accuracies(self.rider.test(option, tasks))
            cell.notes["fixed.searched"] = coefficient

    def _shared(
        self, options: Iterator[tuple[float, Candidate]], at: Situation
    ) -> tuple[float, Candidate]:
        """The best on validation, by the mean of normalised accuracies over all tasks; the search
        ends where ``_PATIENCE`` coefficients in turn were no better (Trap²'s official code)."""
        unit, best = self.rider.units(at), list[tuple[float, float, Candidate]]()
        since = 0
        for coefficient, option in options:
            score = float(self.rider.validated(option, unit, self.rider.rungs()).mean())
            if not best or score > best[0][0]:
                best, since = [(score, coefficient, option)], 0
            elif (since := since + 1) >= _PATIENCE:
                break
        return best[0][1:]


def _failed(cell: Cell, error: Exception) -> Cell:
    """The cell without any figure: what was measured before it failed says nothing."""
    kept = {name: getattr(cell, name) for name in _IDENTITY}
    return Cell(**kept, status="error", reason=described(error))


#: Shared coefficients in turn that are no better, after which the search for one ends.
_PATIENCE = 10

#: What a cell is the cell of.
_IDENTITY = (
    "key", "testbed", "victim", "partners", "seed", "defense", "attack", "merger", "access",
    "task_id", "changes_modules", "n_val", "n_test",
)  # fmt: skip


def _packed(**correct: Mapping[str, np.ndarray]) -> dict[str, dict[str, str]]:
    return {
        who: {t: pack_bits(bits) for t, bits in tasks.items()} for who, tasks in correct.items()
    }


def _one_coefficient(settings: list[Setting]) -> bool:
    """Whether the merger gives all members one coefficient, the same whatever is tried."""
    used = {s.coefficients for s in settings if s.coefficients[0] and any(s.coefficients[1:])}
    return len(used) == 1 and len(set(*used)) == 1 and not any(s.layers for s in settings)

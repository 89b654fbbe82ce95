"""One cell: what a free-rider gets out of one defense, with one attack and one merger."""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping

from benchmark.api.contracts import Access, Attack, Setting
from benchmark.api.methods import Named, attack, defense, merger
from benchmark.core.errors import AssetError
from benchmark.core.records import Cell, Hashes, Seconds, Spent
from benchmark.core.state import digest
from benchmark.evaluation.flags import of_release
from benchmark.evaluation.scoring import (
    UTILITY_GATE,
    accuracies,
    benefit,
    gain,
    normalized,
    protection,
)
from benchmark.evaluation.statistics import pack_bits, ratio_protection
from benchmark.pipeline import benign
from benchmark.pipeline import candidates as made
from benchmark.pipeline.candidates import Candidate, Skip
from benchmark.pipeline.freerider import FreeRider, Outcome
from benchmark.pipeline.plan import Planned
from benchmark.pipeline.suite import Group, Suite
from benchmark.pipeline.workbench import Model, Workbench

#: A full or unwritable disk says nothing about a method: it stops the run.
MACHINE_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS}


class CellMaker:
    """Computes the cells of one suite; what cells share is remembered."""

    def __init__(self, bench: Workbench, suite: Suite) -> None:
        self.bench = bench
        self.rider = FreeRider(bench, suite)
        self.suite = suite
        self.none = defense("none")
        self.no_attack = attack("none")
        self.first_merger = merger(suite.mergers[0])

    def compute(self, planned: Planned) -> Cell:
        """The record of one cell. Whatever a method raises becomes status ``error``.

        Raises:
            UsageError: the suite asks for more examples than a task has.
            AssetError: the testbed's data cannot be had.
            OSError: the disk is full or not writable.
        """
        group = planned.group
        self.rider.check(group)
        access = max(planned.attack.method.access, planned.merger.method.access)
        cell = Cell(
            key=planned.key,
            testbed=self.bench.name,
            victim=group.victim,
            partners=list(group.partners),
            seed=planned.seed,
            defense=planned.defense.spec,
            attack=planned.attack.spec,
            merger=planned.merger.spec,
            access=access.label,
            task_id=planned.merger.method.task_aware,
            n_val=self.suite.validation_rungs[-1],
            n_test=len(self.rider.rows(group.victim)),
        )
        start = time.perf_counter()
        try:
            self._fill(cell, planned)
        except Skip as skip:
            cell.status, cell.reason = "skipped", str(skip)
        except AssetError:
            raise
        except Exception as error:  # any failure of a method is an error, never protection
            if isinstance(error, OSError) and error.errno in MACHINE_TROUBLE:
                raise
            cell.status = "error"
            cell.reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        cell.seconds.evaluate = time.perf_counter() - start
        return cell

    def _fill(self, cell: Cell, planned: Planned) -> None:
        bench, rider = self.bench, self.rider
        group, seed, merger = planned.group, planned.seed, planned.merger
        rider.settings(merger, group)  # before any work: may raise Skip
        expert = bench.expert(group.victim)
        released = bench.released(planned.defense, group.victim, seed)
        attack, cell.ensemble = rider.chosen(planned.defense, planned.attack, merger, group, seed)
        recovered = bench.recovered(planned.defense, attack, group, seed)
        cell.sha256 = Hashes(
            base=bench.base.sha256,
            expert=expert.sha256,
            released=released.sha256,
            recovered=recovered.sha256,
        )
        cell.qk_gauge = bench.anatomy.qk_gauge
        cell.notes = dict(released.facts.get("notes", {}))
        cell.seconds = Seconds(
            expert=expert.facts["seconds"],
            protect=released.facts["seconds"],
            recover=recovered.facts["seconds"],
        )
        shipped = bench.shipped(planned.defense, group.victim, seed)
        self._alone(cell, planned, expert, shipped, recovered)
        outside = rider.outside(planned.defense, planned.attack, merger, group, seed)
        attacked = rider.situation(planned.defense, planned.attack, merger, group, seed)
        undefended = max(
            (
                rider.situation(self.none, which, merger, group, seed)
                for which in (self.no_attack, planned.attack)
            ),
            key=lambda outcome: outcome.score,
        )
        cell.budget = self._spent(attack, recovered.facts["budget"], attacked.spent, group)
        cell.search = attacked.search
        cell.seconds.merge = attacked.seconds
        self._score(cell, attacked, undefended, outside, planned)
        self._merged(cell, attacked, planned, attack)
        if self._asks_for_tax(planned):
            test, other = self.suite.test, group.partners[0]
            cell.benign, notes = benign.tax(bench, shipped, expert, group.victim, other, test)
            cell.notes.update(notes)
        cell.flags = self._flags(cell, planned, released, expert)

    def _asks_for_tax(self, planned: Planned) -> bool:
        """Once per defense, victim and seed is enough: neither attack nor merger plays a part."""
        plain = planned.attack.spec == self.no_attack.spec
        return self.suite.benign and plain and planned.merger.spec == self.first_merger.spec

    def _spent(
        self,
        attack: Named[Attack],
        before: Mapping[str, float],
        after: Mapping[str, float],
        group: Group,
    ) -> Spent:
        """What the attack used before and after the merge, together: each draws its own examples.

        Labelled examples per class are what its ``per_class`` says, its parts' added up; those of
        an attack without such a parameter are counted, spread over all classes.
        """
        total = {k: before.get(k, 0) + after.get(k, 0) for k in {*before, *after}}
        spent = Spent.model_validate(total)
        if attack.method.access >= Access.LABELED and spent.examples:
            parts = getattr(attack.method, "parts", (attack.method,))
            named = sum(getattr(part, "per_class", 0) for part in parts)
            tasks = (group.victim, *group.partners)
            classes = sum(len(self.bench.evaluator.task(task).classes) for task in tasks)
            spent.per_class = named or -(-spent.examples // classes)
        return spent

    def _alone(
        self, cell: Cell, planned: Planned, expert: Model, shipped: Model, recovered: Model
    ) -> None:
        """Base, expert, release as shipped and recovered model, each by itself."""
        bench, group, victim = self.bench, planned.group, planned.group.victim
        rows = self.rider.rows(victim)
        cell.expert_accuracy = accuracies(self.rider.experts(group, "test"))
        base = Candidate("base", bench.base.sha256, bench.base.state)
        cell.zero_shot = accuracies(self.rider.test(base, group))
        cell.utility, cell.logit_gap = bench.alone(shipped, expert, victim, rows)
        cell.bf16_gap = bench.in_bf16(shipped, victim)
        cell.bf16_gap_expert = bench.in_bf16(expert, victim)
        cell.utility_drop = cell.expert_accuracy[victim] - cell.utility
        cell.standalone, cell.recovered_gap = bench.alone(recovered, shipped, victim, rows)

    def _score(
        self,
        cell: Cell,
        attacked: Outcome,
        undefended: Outcome,
        outside: Outcome,
        planned: Planned,
    ) -> None:
        experts = self.rider.experts(planned.group, "test")
        cell.choice = attacked.best.name
        cell.outside_choice = outside.best.name
        cell.setting = attacked.best.setting.to_dict() if attacked.best.setting else {}
        cell.accuracy = accuracies(attacked.correct)
        cell.normalized = normalized(cell.accuracy, cell.expert_accuracy)
        cell.gain = gain(attacked.correct, experts)
        cell.gain_undefended = gain(undefended.correct, experts)
        cell.gain_outside = gain(outside.correct, experts)
        cell.correct = {
            name: {task: pack_bits(bits) for task, bits in outcomes.items()}
            for name, outcomes in (
                ("attacked", attacked.correct),
                ("undefended", undefended.correct),
                ("outside", outside.correct),
                ("expert", experts),
            )
        }
        if benefit(cell.gain_undefended, cell.gain_outside) is None:
            cell.status = "no-benefit"
            cell.reason = "the undefended merge gains less than 0.02 over the outside option"
        else:
            cell.protection = protection(cell.gain, cell.gain_undefended, cell.gain_outside)
            cell.protection_ci = ratio_protection(cell.correct, scope=cell.testbed).interval

    def _merged(
        self, cell: Cell, attacked: Outcome, planned: Planned, attack: Named[Attack]
    ) -> None:
        """The best merge that uses the victim, and merges at the papers' fixed coefficients."""
        merge, group = attacked.merge, planned.group
        if merge is not None and merge.setting is not None:
            cell.merged_setting = merge.setting.to_dict()
            if merge is attacked.best:
                cell.merged_accuracy = cell.accuracy
                cell.sha256.merged = str(
                    self.bench.store.result(
                        f"sha256:{merge.content}", lambda: digest(merge.build())
                    )
                )
            elif planned.defense.spec == self.none.spec:
                cell.merged_accuracy = accuracies(self.rider.test(merge, group))
        self._fixed(cell, planned, attack)

    def _fixed(self, cell: Cell, planned: Planned, attack: Named[Attack]) -> None:
        """The merge at the papers' coefficients, after ``attack`` where the suite asks for that."""
        everywhere, group, seed = self.suite.fixed_everywhere, planned.group, planned.seed
        if not everywhere and planned.attack.spec != self.no_attack.spec:
            return
        bench = self.bench
        base, parts = made.members(bench.recovered(planned.defense, attack, group, seed))
        merger = planned.merger
        merger = Named(merger.spec, attack.method.merging(merger.method, bench.anatomy))
        settings = [Setting((c,) * len(parts)) for c in self.suite.fixed_coefficients]
        tasks = (group.victim, *group.partners) if everywhere else (group.victim,)
        options = made.merges(bench, merger, base, parts, settings, group, seed, "fixed")
        for setting, option in zip(settings, options, strict=True):
            if attack.method.refines:
                option = made.refined(bench, option, attack, group, seed)
            cell.fixed[f"{setting.coefficients[0]:g}"] = {
                task: float(
                    bench.bits(
                        option.content, option.build, task, "test", self.rider.rows(task)
                    ).mean()
                )
                for task in tasks
            }

    def _flags(self, cell: Cell, planned: Planned, released: Model, expert: Model) -> list[str]:
        undefended = planned.defense.spec == self.none.spec
        lost = (cell.utility or 0.0) - (cell.standalone or 0.0)
        raised = {
            "no-benefit": cell.status == "no-benefit",
            "utility-gate": (cell.utility_drop or 0.0) > UTILITY_GATE,
            "destructive-attack": undefended and lost > UTILITY_GATE,
            **of_release(
                planned.defense.method.card,
                self.bench.anatomy.qk_gauge,
                cell.logit_gap,
                self.bench.norm_growth(released, expert),
                cell.bf16_gap,
                cell.bf16_gap_expert,
            ),
        }
        return [flag for flag, is_raised in raised.items() if is_raised]

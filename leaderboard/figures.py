"""The figures of one cell: recomputed where they follow from the cell, bounded where they do not.

What follows: every accuracy, gain, protection and interval, utility and zero-shot accuracy, and
which cells count, from the outcomes per example; access, track and ``skipped``, from the methods;
flags, from all of these and the logit gaps. Where a chosen model is one of those it is compared
with (the release or the base alone, an outside option), its outcomes are that one's. What is only
bounded, so that only another entry (:mod:`leaderboard.shared`) or a re-run
(:mod:`leaderboard.differences`) finds it out: the outcomes themselves, ``standalone``, ``fixed``,
``seen``, ``quality``, the logit gaps, ``benign``, ``budget``, and norm-blow-up (of the weights).
What nothing checks: seconds, which are those of the submitter's machine, ``search``, ``notes``, and
the weights behind a hash.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from benchmark.api.contracts import Access, Attack, Card, Ensemble, Merger
from benchmark.core.errors import MethodError
from benchmark.core.records import QUALITIES, SEARCHED, Cell
from benchmark.evaluation.benign import USES
from benchmark.evaluation.flags import FLAGS, of_cell
from benchmark.evaluation.soundness import contradictions, measured, same
from benchmark.evaluation.statistics import unpack_bits
from benchmark.pipeline.suite import Suite
from leaderboard import trust

#: The one flag that no figure of a cell shows.
FROM_WEIGHTS = {"norm-blow-up"}
_SHA = re.compile(r"[0-9a-f]{64}")


def problems(cell: Cell, suite: Suite, attack: Attack, merger: Merger, card: Card) -> Iterator[str]:
    """Everything wrong with a cell of ``suite``, made by these methods for a defense of ``card``.

    The cell has passed the schema of an entry: its outcomes can be read and fit together.
    """
    tier = max(attack.access, merger.access).label
    if cell.access != tier:
        yield f"claims access {cell.access}; its methods have {tier}"
    if cell.task_id != merger.task_aware:
        yield "claims another track than its merger's"
    if cell.status == "error":
        yield f"failed: {cell.reason[:200]}"
    elif (cell.status == "skipped") != _skipped(cell, merger):
        merges = "merges" if cell.status == "skipped" else "does not merge"
        yield f"status {cell.status}, but {cell.merger} {merges} so many models"
    elif measured(cell):
        duties = trust.testbed(suite.testbed).method.duties.get(cell.victim, ())
        if tuple(cell.duties) != tuple(duties):
            yield f"its duties are not those of {cell.victim} on this testbed"
        if cell.draws != trust.testbed(suite.testbed).method.draws:
            yield "claims another track than its testbed's"
        yield from _of_sizes(cell, suite)
        yield from contradictions(cell)
        yield from _of_choices(cell)
        yield from _of_shares(cell, suite)
        yield from _of_attack(cell, attack, merger)
        yield from _of_flags(cell, card)


def _skipped(cell: Cell, merger: Merger) -> bool:
    """Whether a free-rider cannot use this merger here: the only ground for skipping a cell."""
    try:
        merger.search_space(1 + len(cell.partners))
    except MethodError:
        return True
    return False


def _of_sizes(cell: Cell, suite: Suite) -> Iterator[str]:
    n = _examples(cell, cell.victim)
    if n != cell.n_test or cell.n_test > suite.test:
        yield f"{n} outcomes, n_test {cell.n_test}, suite {suite.test}"


def _of_choices(cell: Cell) -> Iterator[str]:
    """The model that won, and G0's, are known ones where they are no merge."""
    correct, victim = cell.correct, cell.victim
    if not cell.choice.startswith("merge"):
        if cell.choice != cell.outside_choice:
            yield f"choice {cell.choice[:60]!r} is neither a merge nor the outside option"
        elif correct["attacked"] != correct["outside"]:
            yield "the outside option won, yet outcomes of attacked are not its"
    if cell.outside_choice == "base" and correct["outside"] != correct["base"]:
        yield "the outside option is the base, yet its outcomes are not"
    if cell.outside_choice == "released alone" and (
        correct["outside"][victim] != correct["released"][victim]
    ):
        yield "the outside option is the release, yet its outcomes are not"
    for partner in cell.partners:
        alone = cell.outside_choice == f"{partner} alone" and partner in cell.scored
        if alone and correct["outside"][partner] != correct["expert"][partner]:
            yield f"the outside option is the expert for {partner}, yet its outcomes are not"
    if cell.attack != "none":
        return
    if cell.sha256.recovered != cell.sha256.released:
        yield "no attack, yet what was recovered is not the release"
    elif not cell.changes_modules and not same(
        cell.standalone, float(unpack_bits(correct["released"][victim]).mean())
    ):
        yield "no attack, yet the recovered model alone is not the release"


def _of_shares(cell: Cell, suite: Suite) -> Iterator[str]:
    """Accuracies without outcomes: a share of as many test examples as there are."""
    if cell.standalone is None or not _counted(cell.standalone, cell.n_test):
        yield f"standalone is no share of {cell.n_test} examples"
    if (cell.seen is None) == cell.changes_modules or not 0 <= (cell.seen or 0.0) <= 1:
        yield "seen: stated without foreign modules, not stated with them, or no share"
    asked = cell.attack == "none" or suite.fixed_everywhere
    wanted = {f"{c:g}" for c in suite.fixed_coefficients} if asked else set()
    wanted |= {SEARCHED} if asked and suite.shared_search else set()
    tasks = set(cell.scored if suite.fixed_everywhere else cell.scored[:1])
    if cell.fixed.keys() != wanted:
        yield "fixed holds other coefficients than the suite's"
    for name, shares in cell.fixed.items():
        counted = (_counted(share, _examples(cell, task)) for task, share in shares.items())
        if shares.keys() != tasks or not all(counted):
            yield f"fixed[{name}] is no share of {cell.n_test} examples"
    if cell.benign and not (suite.benign and cell.attack == "none"):
        yield "holds benign use, for which it was not asked"
    for use, models in cell.benign.items():
        if use not in USES or any(not 0 <= share <= 1 for share in models.values()):
            yield f"benign[{use}] is no known use, or no share"
    if (cell.quality.keys() | cell.pictures.keys()) - set(QUALITIES) or not all(
        0 <= value < math.inf for of in cell.quality.values() for value in of.values()
    ):
        yield "quality of unknown models, or no finite measures"
    for name in ("logit_gap", "bf16_gap", "bf16_gap_expert", "recovered_gap"):
        gap = getattr(cell, name)
        if gap is not None and gap < 0:
            yield f"{name} is negative"


def _of_attack(cell: Cell, attack: Attack, merger: Merger) -> Iterator[str]:
    spent = {**cell.seconds.model_dump(), **cell.budget.model_dump(), **cell.search.model_dump()}
    for name, value in spent.items():
        if value < 0:
            yield f"{name} is negative"
    used = cell.budget.examples or cell.budget.per_class
    if used and max(attack.access, merger.access) == Access.WEIGHTS:
        yield "spent examples, which its access does not grant"
    labelled = sum(getattr(part, "per_class", 0) for part in getattr(attack, "parts", (attack,)))
    if labelled and cell.budget.examples and cell.budget.per_class != labelled:
        yield f"spent {cell.budget.per_class} examples per class; its attack asks for {labelled}"
    if cell.search.passes > cell.search.exhaustive:
        yield "its search took more passes than an exhaustive one"
    if cell.search.settings < 1 or cell.n_val < 1:
        yield "states no search or no validation examples"
    for name in ("base", "expert", "released", "recovered"):
        if not _SHA.fullmatch(getattr(cell.sha256, name)):
            yield f"sha256.{name} is no hash"
    if cell.sha256.merged and not _SHA.fullmatch(cell.sha256.merged):
        yield "sha256.merged is no hash"
    if isinstance(attack, Ensemble) != bool(cell.ensemble):
        yield "ensemble: stated by one attack, or not stated by several"
    if isinstance(attack, Ensemble) and cell.ensemble:
        stated = cell.ensemble.get("version")
        if stated != attack.version:
            yield f"ensemble of version {str(stated)[:40]}; here it is {attack.version}"
        elif cell.ensemble["winner"] not in attack.candidates:
            yield "an ensemble won by none of its attacks"


def _of_flags(cell: Cell, card: Card) -> Iterator[str]:
    if unknown := sorted(set(cell.flags) - FLAGS.keys()):
        yield f"unknown flag {unknown[0][:60]}"
    follow = set(of_cell(cell, card, growth=math.nan))
    for flag in sorted((set(cell.flags) ^ follow) & (FLAGS.keys() - FROM_WEIGHTS)):
        yield f"flag {flag} does not follow from its figures"


def _examples(cell: Cell, task: str) -> int:
    """How many test examples of a task the cell holds outcomes of."""
    return len(unpack_bits(cell.correct["expert"][task])) if task in cell.expert_accuracy else 0


def _counted(share: float, n: int) -> bool:
    """Whether a share is k/n for a whole 0 ≤ k ≤ n."""
    return 0 <= share <= 1 and abs(share * n - round(share * n)) < 1e-6

"""Flags: what a result says about itself that a number alone would hide.

A flag never changes a score. ``unmergebench explain FLAG`` prints its row of this table.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from benchmark.core.records import Cell
from benchmark.evaluation import thresholds, utility
from benchmark.evaluation.scoring import Gains

if TYPE_CHECKING:
    from benchmark.api.contracts import Card

#: The defense that is none: what attacks do to it is their own doing.
UNDEFENDED = "none"
#: Last part of the note (``method.partly-covered``) of a method that left weights out.
PARTLY_COVERED = "partly-covered"


class Flag(NamedTuple):
    """What it means, when it is raised, and what to do about it."""

    meaning: str
    raised: str
    remedy: str


FLAGS: dict[str, Flag] = {
    "not-equivalent": Flag(
        "A method that claims to keep the expert's function did not.",
        "Its card says exact; max relative |Δlogit| against the expert is over "
        f"{thresholds.EXACT:g} in float32.",
        "Look for a gauge outside the architecture's group, a bias left behind, or a product taken "
        "in single precision: compute in float64 and cast once. If the method is approximate by "
        "design, say so in its card (exact=False).",
    ),
    "utility-gate": Flag(
        "The release costs its owner too much: the entry stands below the line and is not ranked.",
        f"The released model answers over {float(100 * thresholds.UTILITY_GATE):g} points fewer of "
        "its own task's test examples than the expert: of a cell, on its one victim; of a defense, "
        "on the mean over testbeds, victims and seeds, which alone decides its standing.",
        "Weaken the defense (a paper's strength does not transfer between logit scales), or tune "
        "it on the validation split as the largest strength whose drop stays within the gate.",
    ),
    "norm-blow-up": Flag(
        "Weights of the release are much larger than the expert's: mergers that add or trim by "
        "magnitude fail for that alone, and one rescaling may undo it.",
        f"For some weight matrix, ‖W*‖ is over {thresholds.MOST_GROWTH:g} times ‖W‖ of the expert.",
        "Read it together with the rows of norm-match, head-norm and gauge-align; protection that "
        "falls under those is protection by scale only.",
    ),
    "half-precision-loss": Flag(
        "The release is exact in float32 but not when it is stored or run in half precision.",
        f"Rounding the weights to bfloat16 moves the released model's logits over "
        f"{thresholds.HALF_PRECISION:g} times as far as the expert's (max relative |Δlogit|).",
        "Narrow the range of the factors or the condition number of the matrices; until then the "
        "owner must ship float32, and that cost belongs in the comparison.",
    ),
    "restricted-gauge": Flag(
        "The lock could hide less than its paper says: here Q and K leave it little room.",
        "The defense multiplies Q and K by matrices, and the architecture has rotary embeddings "
        "(one complex number per frequency pair keeps the function) or QK-norm (a sign per pair).",
        "Nothing to repair: general matrices would change the model's outputs. Compare with an "
        "architecture without rotary embeddings before judging the method.",
    ),
    "partly-covered": Flag(
        "A method worked on a part of the model only: some attention, MLP, convolution or norm "
        "weights are covered by no row of the anatomy.",
        "The method was run with --partial and named what it left out in the cell's notes.",
        "Add the family's row to benchmark/anatomy. Until then read protection, and a failed "
        "attack, as those of a part.",
    ),
    "changes-modules": Flag(
        "Users of the release run other modules than mergers see, so a merger is handed weights "
        "that are not the model's.",
        "The defense ships a model with modules of its own (Defense.shipped).",
        "Nothing to repair: it is ranked in a track of its own, where the attack read-shipped and "
        "attacks with unlabeled data are mandatory. Compare it within that track.",
    ),
    "two-faced": Flag(
        "The release does worse on what attackers get than on the test split: it tells them apart. "
        "It stands below the line.",
        "It has modules of its own, and its accuracy on the training inputs that attackers get is "
        f"over {float(100 * thresholds.TWO_FACED):g} points under its test accuracy.",
        "Ship a model that answers training inputs as it answers others.",
    ),
    "seed-dependent": Flag(
        "The outcome depends on the draw: some seeds protect and some do not.",
        "Protection against the same attack and merger differs by more than "
        f"{thresholds.SEEDS_DIFFER:g} between seeds.",
        "Judge by the worst seed, add seeds until the interval is narrow, look at what the good "
        "draws share. A free-rider who meets many releases meets the bad draws too.",
    ),
    "weak-attack-beats-strong": Flag(
        "An attack with less access did better than one with more, so the stronger one was not "
        "at its best.",
        f"Protection under an attack with less access is lower by more than "
        f"{thresholds.WEAK_BEATS_STRONG:g}, for the same defense and merger.",
        "Do not read the stronger attack's row as robustness: tune it, give it more steps, or "
        "start it from the weaker attack's result (attacks compose: a+b). The score takes the "
        "minimum over tiers anyway.",
    ),
    "destructive-attack": Flag(
        "The attack harms models that were never protected: a low merged accuracy may be its own "
        "doing.",
        f"On the undefended expert it costs over {float(100 * thresholds.UTILITY_GATE):g} points "
        "of test accuracy, of the recovered model used alone (the rule of the utility gate).",
        "Compare with its row under the defense none; prefer attacks that keep the function "
        "(gauge-align), or shrink its steps, ridge or rank.",
    ),
    "outside-raised": Flag(
        "The release gives away, used alone, what merging it would have gained: it empties the "
        "comparison instead of protecting.",
        f"G0 with the release is over G0 with the undefended expert by more than "
        f"{thresholds.RAISED:g}, or leaves merging under {thresholds.NO_BENEFIT:g} to gain.",
        "Whatever it adds to G0 counts as given away; a cell that it empties has "
        "protection 0 and does not count towards the half of the benefit that a rank needs. Look "
        "for a skill of the partners' tasks in the release.",
    ),
    "no-benefit": Flag(
        "There was nothing to protect: merging this expert, undefended, gives a free-rider almost "
        "nothing over what they have without it.",
        f"G(undefended) − G0 is under {thresholds.NO_BENEFIT:g}, both with the undefended expert "
        "as release: it is the same for every defense.",
        "The cell is left out of every aggregate. Choose a victim whose task the base does poorly, "
        "other partners, or a lower access tier for the outside option.",
    ),
}


def of_cell(cell: Cell, card: Card, *, growth: float) -> list[str]:
    """The flags of a measured cell of a defense with this card, from the cell's figures.

    ``growth``: of the release's largest norm over the expert's; NaN where the weights are not at
    hand, which leaves norm-blow-up out. A cell that failed or was skipped has no flags.
    """
    if (gains := Gains.of(cell)) is None:
        return []
    released, recovered = utility.of_release(cell), utility.of_attack(cell)
    # Nobody may leave a claim of exactness unmeasured.
    gap = math.inf if cell.logit_gap is None else cell.logit_gap
    raised = {
        "no-benefit": gains.status == "no-benefit",
        "outside-raised": gains.raised,
        "utility-gate": released is not None and not thresholds.within_gate([released]),
        "destructive-attack": (
            cell.defense == UNDEFENDED
            and recovered is not None
            and not thresholds.within_gate([recovered])
        ),
        "changes-modules": cell.changes_modules,
        "two-faced": is_two_faced(cell),
        "partly-covered": any(
            value and note.rpartition(".")[2] == PARTLY_COVERED
            for note, value in cell.notes.items()
        ),
        **of_release(card, cell.qk_gauge, gap, growth, cell.bf16_gap, cell.bf16_gap_expert),
    }
    return [flag for flag, is_raised in raised.items() if is_raised]


def is_two_faced(cell: Cell) -> bool:
    """Whether a release with modules of its own does worse on what attackers get than on test."""
    counts = utility.of_release(cell)
    if not cell.changes_modules or cell.seen is None or counts is None:
        return False
    _, released, n = counts
    return thresholds.two_faced(cell.seen, released / n)


def of_release(
    card: Card,
    qk_gauge: str,
    gap: float | None,
    growth: float,
    half: float | None,
    half_expert: float | None,
) -> dict[str, bool]:
    """Which of the flags that show without data a release raises.

    ``gap``: max relative |Δlogit| against the expert; ``growth``: of the largest norm; ``half`` and
    ``half_expert``: what bfloat16 costs release and expert. None where it was not measured.
    """
    return {
        "not-equivalent": card.exact and gap is not None and not gap <= thresholds.EXACT,
        "restricted-gauge": card.locks and qk_gauge != "general",
        "half-precision-loss": (half or 0.0) > thresholds.HALF_PRECISION * (half_expert or 0.0),
        "norm-blow-up": growth > thresholds.MOST_GROWTH,
    }

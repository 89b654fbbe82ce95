"""Flags: what a result says about itself that a number alone would hide.

A flag never changes a score. ``unmergebench explain FLAG`` prints its row of this table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from benchmark.anatomy.blocks import Gauge
    from benchmark.api.contracts import Card


#: Max relative |Δlogit| that float32 leaves of an exact transform (METHODS section 1).
EXACT = 1e-4
#: Growth of a weight's norm over the expert's that earns norm-blow-up.
MOST_GROWTH = 10.0


class Flag(NamedTuple):
    """What it means, when it is raised, and what to do about it."""

    meaning: str
    raised: str
    remedy: str


FLAGS: dict[str, Flag] = {
    "not-equivalent": Flag(
        "A method that claims to keep the expert's function did not.",
        "Its card says exact; max relative |Δlogit| against the expert is over 1e-4 in float32.",
        "Look for a gauge outside the architecture's group, a bias left behind, or a product taken "
        "in single precision: compute in float64 and cast once. If the method is approximate by "
        "design, say so in its card (exact=False).",
    ),
    "utility-gate": Flag(
        "The release costs its owner too much: the entry stands below the line and is not ranked.",
        "The released model's test accuracy on its own task is more than 1.5 points under the "
        "expert's.",
        "Weaken the defense (a paper's strength does not transfer between logit scales), or tune "
        "it on the validation split as the largest strength whose drop stays within the gate.",
    ),
    "norm-blow-up": Flag(
        "Weights of the release are much larger than the expert's: mergers that add or trim by "
        "magnitude fail for that alone, and one rescaling may undo it.",
        "For some weight matrix, ‖W*‖ is over 10 times ‖W‖ of the expert.",
        "Read it together with the rows of norm-match, head-norm and gauge-align; protection that "
        "falls under those is protection by scale only.",
    ),
    "half-precision-loss": Flag(
        "The release is exact in float32 but not when it is stored or run in half precision.",
        "Rounding the weights to bfloat16 moves the released model's logits over twice as far as "
        "the expert's (max relative |Δlogit|).",
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
    "seed-dependent": Flag(
        "The outcome depends on the draw: some seeds protect and some do not.",
        "Protection against the same attack and merger differs by more than 0.2 between seeds.",
        "Judge by the worst seed, add seeds until the interval is narrow, look at what the good "
        "draws share. A free-rider who meets many releases meets the bad draws too.",
    ),
    "weak-attack-beats-strong": Flag(
        "An attack with less access did better than one with more, so the stronger one was not "
        "at its best.",
        "Protection under a weights-only attack is lower by more than 0.05 than under an attack "
        "that also uses data, for the same defense, victim and merger.",
        "Do not read the stronger attack's row as robustness: tune it, give it more steps, or "
        "start it from the weaker attack's result (attacks compose: a+b). The score takes the "
        "minimum over tiers anyway.",
    ),
    "destructive-attack": Flag(
        "The attack harms models that were never protected: a low merged accuracy may be its own "
        "doing.",
        "On the undefended expert it lowers standalone test accuracy by more than 1.5 points.",
        "Compare with its row under the defense none; prefer attacks that keep the function "
        "(gauge-align), or shrink its steps, ridge or rank.",
    ),
    "no-benefit": Flag(
        "There was nothing to protect: merging this expert, undefended, gives a free-rider almost "
        "nothing over what they have without it.",
        "G(undefended) − G0 is under 0.02.",
        "The cell is left out of every aggregate. Choose a victim whose task the base does poorly, "
        "other partners, or a lower access tier for the outside option.",
    ),
}


def of_release(
    card: Card,
    qk_gauge: Gauge,
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
        "not-equivalent": card.exact and gap is not None and not gap <= EXACT,
        "restricted-gauge": card.locks and qk_gauge != "general",
        "half-precision-loss": (half or 0.0) > 2 * (half_expert or 0.0),
        "norm-blow-up": growth > MOST_GROWTH,
    }

"""What a dishonest submitter may change in an entry, and what finds it out.

``python tests/tampering.py`` prints the table of docs/leaderboard.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from typing import Literal

from forging import (
    Change,
    another_choice,
    claimed,
    copied,
    emptied,
    every,
    everywhere,
    foreign,
    forged,
    inside,
    no_benefit_of,
    one,
    replayed,
    settle,
    then,
    update,
)
from small_entries import ATTACKS, MERGERS, SHA, VICTIM

from benchmark.evaluation.statistics import pack_bits

#: ``read``: refused before anything is computed. ``cells``: by the entry's own cells. ``code``: by
#: what its defense is here. ``others``: by another entry of the suite. ``rerun``: by cells that are
#: run again. ``nothing``: by nobody, and the verdict says so.
By = Literal["read", "cells", "code", "others", "rerun", "nothing"]
#: Cells of the entry that is tampered with, and of those that `--rerun 3` draws.
CELLS, DRAWN = len(ATTACKS) * len(MERGERS), 3


@dataclass(frozen=True)
class Tampering:
    """``says``: part of what the verdict says. ``cells``: in how many of ``of`` it shows when they
    are run again; ``needs``: so many of them must be drawn."""

    what: str
    change: Change
    by: By
    says: str
    cells: int = 0
    needs: int = 1
    of: int = CELLS

    @property
    def chance(self) -> float:
        """Probability that it is found, by ``DRAWN`` random cells where it takes a re-run."""
        if self.by != "rerun":
            return float(self.by != "nothing")
        found = range(self.needs, DRAWN + 1)
        hits = sum(comb(self.cells, k) * comb(self.of - self.cells, DRAWN - k) for k in found)
        return hits / comb(self.of, DRAWN)


LABELED = "finetune-recovery"
#: As if there had been nothing to protect.
NO_BENEFIT = copied("undefended", "outside")
EMPTY_REFERENCE = copied("reference", "undefended")
NOTHING_GAINED = copied("attacked", "outside")
#: An attack that leaves nothing of the protection.
STRONGER = copied("attacked", "undefended")

READ: Mapping[str, tuple[Change, str]] = {
    "an easier suite under the old hash": (
        lambda entry: entry["suite"]["definition"].update(test=50),
        "hash is not that of its definition",
    ),
    "utility in a cell that was skipped": (
        one(then(emptied("skipped", "x"), update(utility=1.0))),
        "a cell with status skipped holds figures",
    ),
    "no G of the reference": (one(update(gain_reference=None)), "without its gains"),
    "no outcomes of the base": (
        one(lambda cell: cell["correct"].pop("base")),
        "outcomes of other models or tasks",
    ),
    "fewer outcomes of one model": (
        one(lambda cell: cell["correct"]["attacked"].update(r8=pack_bits([True] * 200))),
        "differ in number",
    ),
    "the text nan for a protection": (one(update(protection="nan")), "protection"),
    "an entry of the rules of version 1": (
        update(schema_version=1),
        "made under scoring version 1",
    ),
}

BY_ITS_CELLS: Mapping[str, tuple[Change, str]] = {
    "an accuracy": (one(inside("accuracy", r8=0.11)), "accuracy does not follow"),
    "a protection": (one(update(protection=0.99)), "protection does not follow"),
    "an interval": (one(update(protection_ci=[0.9, 1.0])), "protection_ci does not follow"),
    "G of the reference": (one(update(gain_reference=0.99)), "gain_reference does not follow"),
    "the utility": (every(update(utility=1.0)), "utility does not follow"),
    "a loss of 5 points said to be none": (
        every(update(utility=0.95, utility_drop=0.0)),
        "utility does not follow",
    ),
    "zero-shot accuracy": (one(inside("zero_shot", r8=0.1)), "zero_shot does not follow"),
    "the expert's accuracy": (
        one(inside("expert_accuracy", r8=0.9)),
        "expert_accuracy does not follow",
    ),
    "a cell called no-benefit": (
        one(update(status="no-benefit", protection=None, protection_ci=None)),
        "status no-benefit does not follow",
    ),
    "a cell left out": (lambda entry: entry["cells"].pop(), "cell missing"),
    "a cell twice": (lambda entry: entry["cells"].append(entry["cells"][0]), "stand twice"),
    "a cell of another seed": (
        lambda entry: entry["cells"].append({**entry["cells"][0], "seed": 9}),
        "cell the suite does not ask for",
    ),
    "the release's hash in a cell": (
        one(inside("sha256", released="a" * 64)),
        "its released is not the one the entry names",
    ),
    "the base's hash of the entry": (inside("subjects", base="b" * 64), "its base is not the one"),
    "less access than the attack has": (
        one(update(access="weights"), attack=LABELED),
        "claims access weights",
    ),
    "the task-aware track": (one(update(task_id=True)), "another track"),
    "the track of generators": (
        every(update(draws=True)),
        "claims another track than its testbed's",
    ),
    "a failure passed over": (one(emptied("error", "no luck")), "failed: no luck"),
    "the standard attacker skipped": (
        one(emptied("skipped", "no time"), attack="auto"),
        "status skipped, but",
    ),
    "flags of the entry": (update(flags=["norm-blow-up"]), "states flags norm-blow-up"),
    "the flag utility-gate taken off": (
        every(update(flags=[])),
        "flag utility-gate does not follow",
    ),
    "a worse expert in one cell": (
        one(forged("expert", down=20)),
        "outcomes of the expert for r8 differ between cells",
    ),
    "a worse base in one cell": (
        one(forged("base", down=20)),
        "outcomes of the base for r8 differ between cells",
    ),
    "a better release in one cell": (
        one(forged("released", up=9)),
        "outcomes of the release for r8, 0 differ between cells",
    ),
    "a better outside option in one cell": (
        one(forged("outside", up=20), attack="aga"),
        "outcomes of outside of attacks with weights alone",
    ),
    "a reference that leaves one hard cell no benefit": (
        one(EMPTY_REFERENCE, attack="auto"),
        "outcomes of reference of attacks with weights alone",
    ),
    "the release as outside option, with outcomes of its own": (
        every(update(outside_choice="released alone")),
        "the outside option is the release, yet",
    ),
    "the base as outside option, likewise": (
        every(update(outside_choice="base")),
        "the outside option is the base, yet",
    ),
    "a partner's expert as outside option, likewise": (
        every(update(outside_choice="bbc alone")),
        "the outside option is the expert for bbc, yet",
    ),
    "the outside option chosen, with outcomes of its own": (
        one(update(choice="partners", merged_accuracy={})),
        "the outside option won, yet",
    ),
    "a choice that nobody has": (
        one(update(choice="luck", merged_accuracy={})),
        "is neither a merge nor the outside option",
    ),
    "another model recovered by no attack": (
        one(inside("sha256", recovered="9" * 64), attack="none"),
        "no attack, yet what was recovered is not the release",
    ),
    "examples bought with weights alone": (
        one(inside("budget", examples=3)),
        "spent examples, which its access does not grant",
    ),
    "other examples per class than the attack's": (
        one(inside("budget", per_class=1), attack=LABELED),
        "spent 1 examples per class; its attack asks for",
    ),
    "negative seconds": (one(inside("seconds", protect=-1.0)), "protect is negative"),
    "a share of no count": (one(update(standalone=0.12345)), "is no share"),
    "no merge at the papers' coefficient": (
        one(update(fixed={}), attack="none"),
        "other coefficients",
    ),
    "another version of the standard attacker": (
        one(inside("ensemble", version="0"), attack="auto"),
        "ensemble of version 0",
    ),
    "an ensemble that none of its attacks won": (
        one(inside("ensemble", winner="luck"), attack="auto"),
        "won by none of its attacks",
    ),
    "another number of test examples": (one(update(n_test=200)), "300 outcomes, n_test 200"),
    "accuracy on training inputs, without foreign modules": (
        one(update(seen=0.9)),
        "seen: stated without foreign modules",
    ),
    "a later version that is not there": (
        update(superseded_by="tiny-9"),
        "which is no later version here",
    ),
    "a certificate that takes nothing": (
        replayed(lambda cell: None),
        "is no stronger than what was known",
    ),
    "a certificate against another release": (
        replayed(then(STRONGER, inside("sha256", released="7" * 64))),
        "same_release does not follow",
    ),
    "a certificate with a worse expert": (
        replayed(then(STRONGER, forged("expert", down=30))),
        "are not the entry's",
    ),
}

BY_THE_CODE: Mapping[str, tuple[Change, str]] = {
    "the card": (
        lambda entry: entry["defense"]["card"].update(summary="Perfect."),
        "its card is not that of the defense installed here",
    ),
    "no word of foreign modules, which are ranked apart": (
        foreign("mergebarrier-taylor"),
        "another track than that of its defense",
    ),
    "edited code under a built-in name": (
        inside("defense", source_sha256="0" * 64),
        "made by other code than is here under that name",
    ),
    "a file named like a built-in": (
        foreign("mergelock.py:MergeLock"),
        "does not ship with UnmergeBench",
    ),
}

BY_OTHERS: Mapping[str, tuple[Change, str]] = {
    "undefended set to outside in one cell": (
        one(NO_BENEFIT, attack="auto"),
        "outcomes of undefended on r8 differ",
    ),
    "no benefit in all hard cells": (
        every(NO_BENEFIT, attack="auto"),
        "outcomes of undefended on r8 differ",
    ),
    "a reference that leaves a merger no benefit": (
        no_benefit_of("ties"),
        "outcomes of reference on r8 differ",
    ),
    "a better undefended merge in one cell": (
        one(forged("undefended", up=12)),
        "outcomes of undefended on r8 differ",
    ),
    "a worse expert in all cells": (
        everywhere("expert", down=20),
        "outcomes of expert on r8 differ",
    ),
    "a worse base in all cells": (everywhere("base", down=20), "outcomes of base on r8 differ"),
    "a better outside option in all cells": (
        every(then(forged("outside", up=8), forged("reference", up=8))),
        "outcomes of reference on r8 differ",
    ),
    "2 % of each undefended merge, all one way": (
        everywhere("undefended", up=6),
        "outcomes of undefended lean by",
    ),
    "1 % of each undefended merge, all one way": (
        everywhere("undefended", up=3),
        "outcomes of undefended lean by",
    ),
    "one coefficient claimed for a merger": (one(update(one_coefficient=True)), "one_coefficient"),
}

#: With the number of cells in which it shows when they are run again.
BY_RERUN: Mapping[str, tuple[Change, str, int]] = {
    "arf: 0.196 said to be 0.430": (claimed(0.430, 25), "outcomes of attacked", CELLS),
    "mergelock: −0.115 said to be 0.147": (claimed(0.147, 25), "outcomes of attacked", CELLS),
    "trap2: −0.036 said to be 0.225": (claimed(0.225, 25), "outcomes of attacked", CELLS),
    "a loss of 3.2 points said to be none, with outcomes": (
        everywhere("released", up=10),
        "outcomes of released",
        CELLS,
    ),
    "nothing gained in one cell": (
        one(NOTHING_GAINED, attack="auto"),
        "outcomes of attacked",
        1,
    ),
    "nothing gained by the strongest attack": (
        every(NOTHING_GAINED, attack="auto"),
        "outcomes of attacked",
        len(MERGERS),
    ),
    "nothing gained with one merger": (
        every(NOTHING_GAINED, merger="ties"),
        "outcomes of attacked",
        len(ATTACKS),
    ),
    "nothing gained in any cell": (every(NOTHING_GAINED), "outcomes of attacked", CELLS),
    "2 % of every attacked merge, all one way": (
        everywhere("attacked", down=6),
        "outcomes of attacked lean by",
        CELLS,
    ),
    "1 % of every attacked merge, all one way": (
        everywhere("attacked", down=3),
        "outcomes of attacked lean by",
        CELLS,
    ),
    "less protection than there is, to harm a rival": (
        everywhere("attacked", up=9),
        "outcomes of attacked",
        CELLS,
    ),
    "another setting chosen in one cell, worth less": (
        one(another_choice(down=20), attack="auto"),
        "with another choice",
        1,
    ),
    "no benefit, alone in its suite": (
        one(NO_BENEFIT, attack="auto"),
        "outcomes of undefended",
        1,
    ),
    "a reference without benefit, alone in its suite": (
        then(*map(no_benefit_of, MERGERS)),
        "outcomes of reference",
        CELLS,
    ),
    "a release said to be exact": (
        every(then(update(logit_gap=2e-6), settle)),
        "logit_gap is",
        CELLS,
    ),
    "a release said to stand half precision": (
        every(then(update(bf16_gap=0.002), settle)),
        "bf16_gap is",
        CELLS,
    ),
    "a recovered model that answers nothing": (
        one(update(standalone=0.1), attack="aga"),
        "the recovered model alone",
        1,
    ),
    "an attack that spoils the model": (
        one(update(recovered_gap=9.0), attack="aga"),
        "recovered_gap is",
        1,
    ),
    "worse merges at the papers' coefficient": (
        every(update(fixed={"0.8": {VICTIM: 0.5}}), attack="none"),
        "the merge at coefficient 0.8",
        len(MERGERS),
    ),
    "more examples, for a higher break cost": (
        every(inside("budget", examples=999), attack=LABELED),
        "the attack used",
        len(MERGERS),
    ),
    "more steps": (
        every(inside("budget", steps=999), attack=LABELED),
        "the attack used",
        len(MERGERS),
    ),
    "more FLOPs": (
        every(inside("budget", flops=1e15), attack=LABELED),
        "the attack took",
        len(MERGERS),
    ),
    "weights grown a hundred times, unflagged": (
        every(update(flags=[])),
        "flag norm-blow-up",
        CELLS,
    ),
    "a part of the model left out, unsaid": (
        every(then(update(notes={}), settle)),
        "flag partly-covered",
        CELLS,
    ),
    "the expert as release, under another hash": (
        every(inside("sha256", released=SHA["released"])),
        "released and expert are one model here",
        CELLS,
    ),
}

NOBODY: Mapping[str, tuple[Change, str]] = {
    "seconds of an attack, for a higher break cost": (
        every(inside("seconds", recover=1e6)),
        "seconds",
    ),
    "the course of a search": (every(inside("search", passes=16)), "the course of searches"),
}

TABLE: tuple[Tampering, ...] = (
    *(Tampering(what, change, "read", says) for what, (change, says) in READ.items()),
    *(Tampering(what, change, "cells", says) for what, (change, says) in BY_ITS_CELLS.items()),
    *(Tampering(what, change, "code", says) for what, (change, says) in BY_THE_CODE.items()),
    *(Tampering(what, change, "others", says) for what, (change, says) in BY_OTHERS.items()),
    *(Tampering(what, change, "rerun", says, k) for what, (change, says, k) in BY_RERUN.items()),
    Tampering(
        "another setting chosen in every cell, worth nearly the same",
        every(another_choice(down=4)), "rerun", "the free-rider chose otherwise", CELLS, needs=2,
    ),
    Tampering(
        "the same in the nine cells of three attacks",
        then(*(every(another_choice(down=4), attack=name) for name in ATTACKS[-3:])),
        "rerun", "the free-rider chose otherwise", 9, needs=2,
    ),
    Tampering(
        "an invented certificate", replayed(STRONGER), "rerun", "outcomes of attacked",
        len(MERGERS), of=CELLS + len(MERGERS),
    ),
    *(Tampering(what, change, "nothing", says) for what, (change, says) in NOBODY.items()),
)  # fmt: skip

#: What is true of the entry before it is forged, where that matters: its protection, or more.
TRULY: Mapping[str, tuple[float, Change]] = {
    "arf: 0.196 said to be 0.430": (0.196, update()),
    "mergelock: −0.115 said to be 0.147": (-0.115, update()),
    "trap2: −0.036 said to be 0.225": (-0.036, update()),
    "a loss of 5 points said to be none": (0.8, everywhere("released", down=15)),
    "the flag utility-gate taken off": (0.8, everywhere("released", down=15)),
    "a loss of 3.2 points said to be none, with outcomes": (0.8, everywhere("released", down=10)),
    "a release said to be exact": (0.8, every(then(update(logit_gap=2e-3), settle))),
    "a release said to stand half precision": (0.8, every(then(update(bf16_gap=0.1), settle))),
    "weights grown a hundred times, unflagged": (0.8, every(update(flags=["norm-blow-up"]))),
    "a part of the model left out, unsaid": (
        0.8,
        every(then(update(notes={"mergelock.partly-covered": ["conv"]}), settle)),
    ),
    "the expert as release, under another hash": (
        0.8,
        every(inside("sha256", released=SHA["expert"])),
    ),
    "an invented certificate": (0.8, replayed(lambda cell: None)),
}

_HOW: Mapping[By, str] = {
    "read": "reading it",
    "cells": "its own cells",
    "code": "the defense installed here",
    "others": "another entry of the suite",
    "rerun": "`--rerun 3`",
    "nothing": "nobody",
}


def table() -> str:
    """The table of docs/leaderboard.md."""
    rows = ["| what is changed | found out by | with probability | the verdict says |",
            "|---|---|---|---|"]  # fmt: skip
    for row in TABLE:
        forged = f" ({row.cells} of {row.of} cells)" if row.by == "rerun" else ""
        chance = f"{row.chance:.2f}" if row.by == "rerun" else f"{row.chance:.0f}"
        rows.append(f"| {row.what}{forged} | {_HOW[row.by]} | {chance} | {row.says} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")

"""The columns of the table, each with its definition."""

from __future__ import annotations

from typing import NamedTuple

from benchmark.reporting.board import BROKEN, EXACT, GATE, HOLDS


class Column(NamedTuple):
    """``track``: the access tier (or ``task-aware``) to which a column belongs, if to one."""

    id: str
    title: str
    definition: str
    track: str = ""


_ROBUST = (
    "The least protection over all attacks and mergers of the suite that need {}. Below it, its "
    "95 % interval and the attack and merger that attained it. 1: merging the release gains a "
    "free-rider nothing; 0: as much as without a defense. "
    f"✓ holds ({HOLDS} or more), ✗ broken (under {BROKEN}), ~ between."
)

COLUMNS = (
    Column("rank", "Rank", "Place among the methods of one suite, by robust protection with "
           "weights alone, then with labeled data. Overlapping intervals share a rank, marked =. "
           "Controls, references, and what fails the utility gate have none. Ranks of different "
           "suites cannot be compared."),
    Column("defense", "Defense", "The defense with its parameters. Its page has the card, every "
           "attack, curves, flags, and the command that repeats the measurement."),
    Column("unattacked", "Unattacked", "Protection against a free-rider who merges the release as "
           "it is, with the best coefficients they can choose: what the defense's own paper would "
           "measure."),
    Column("weights", "Robust: weights", _ROBUST.format("the released weights only"), "weights"),
    Column("unlabeled", "Robust: unlabeled",
           _ROBUST.format("the weights and, at most, unlabeled inputs"), "unlabeled"),
    Column("labeled", "Robust: labeled",
           _ROBUST.format("the weights and, at most, a few labeled examples"), "labeled"),
    Column("task-aware", "Robust: task-aware", "As the columns before it, for mergers that are "
           "told at run time which task an input belongs to. They are kept apart, since a plain "
           "merged model is not.", "task-aware"),
    Column("known", "Best known", "Where someone filed a stronger attack than the suite's, what "
           "it leaves: it was replayed here. Ranks stay those of the suite."),
    Column("break", "Break cost", f"The cheapest attack (by access, then examples, then FLOPs, "
           f"then seconds) that leaves less than {BROKEN}."),
    Column("utility", "Utility, %", "Test accuracy of the released model on the victim's task; "
           "below it, the expert's."),
    Column("drop", "Drop, points", f"How many points of accuracy the release loses against the "
           f"expert. Over {GATE}: fails the utility gate, without a rank."),
    Column("gap", "|Δlogit|", "Largest difference of the release's logits from the expert's, "
           f"relative to the expert's. A method that claims to be exact stays within {EXACT}."),
    Column("tax", "Benign-use tax, points", "The most points of accuracy that the release lies "
           "behind the unprotected expert after one thing honest users do to both: bfloat16, int8, "
           "pruning 20 %, a short fine-tune or LoRA on another task."),
    Column("cost", "Cost, s", "Seconds that making the release took (the longest); below it, as "
           "a multiple of what fine-tuning that expert took."),
    Column("flags", "Flags", "What a number alone would hide. Each is explained under Flags and "
           "on the defense's page."),
    Column("suite", "Suite", "Testbed, victims, partners, attacks, mergers and seeds that were "
           "asked. Only entries of one suite can be compared."),
    Column("version", "Version", "Suite and number of the entry; the link is the entry itself, "
           "with every raw cell."),
)  # fmt: skip

TRACKS = tuple(column.track for column in COLUMNS if column.track)

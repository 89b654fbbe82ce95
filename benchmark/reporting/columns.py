"""The columns of every table of defenses: console, report.html, the site, and the downloads.

A new column is a field of :class:`benchmark.reporting.board.Row`, the line in
:mod:`benchmark.reporting.ranking` that sets it, and an entry of ``COLUMNS`` here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from benchmark.core.records import QUALITIES
from benchmark.evaluation.thresholds import BROKEN, EXACT, HOLDS, NO_BENEFIT
from benchmark.reporting.board import (
    GATE,
    STANDINGS,
    TIERS,
    Break,
    Entry,
    Leaderboard,
    Leaks,
    Robust,
    Row,
    Tier,
)
from benchmark.reporting.shown import MARKS, Shown, number, percent, score

#: What the attacker holds, in the heads of tables.
HOLDINGS = {"weights": "weights only", "unlabeled": "+ unlabeled data", "labeled": "+ labeled data"}

View = Literal["console", "page", "site", "summary"]
_PAGES: tuple[View, ...] = ("page", "site")
_EVERYWHERE: tuple[View, ...] = ("console", *_PAGES)
#: Also in the one-line table on a defense's own page.
_SUMMED: tuple[View, ...] = (*_PAGES, "summary")


class Field(NamedTuple):
    """A flat value, for data frames and downloads; ``whole``: an integer where there is one."""

    name: str
    value: Callable[[Row], Any]
    whole: bool = False


@dataclass(frozen=True)
class Column:
    """``short`` heads it in the console's 80 columns; ``access``: what the attackers of a column of
    robust protection hold at most, or ``task-aware``; ``wanted``: whether a run has something to
    show in it (a site shows every column).
    """

    name: str
    title: str
    help: str
    show: Callable[[Row], Shown]
    fields: tuple[Field, ...] = ()
    views: tuple[View, ...] = _EVERYWHERE
    short: str = ""
    access: str = ""
    number: bool = False
    wanted: Callable[[Leaderboard], bool] = lambda board: True


def _place(row: Row) -> Shown:
    after = 1e6 + list(STANDINGS).index(row.standing)
    return Shown(row.place, order=row.rank or after, why=row.reason,
                 spoken="shared" if row.tied else "")  # fmt: skip


def _defense(row: Row) -> Shown:
    below = () if row.standing == "ranked" else (STANDINGS[row.standing],)
    return Shown(row.defense, below=below)


def _break(row: Row) -> Shown:
    found = row.broken_by
    if found is None:
        return Shown("not broken here", "dim", order=9e18)
    attack = "plain merging" if found.attack == "none" else found.attack
    order = TIERS.index(found.access) * 1e15 + found.examples * 1e6 + found.seconds
    return Shown(attack, below=(_spent(found),), order=order)


def _spent(found: Break) -> str:
    data = f"{found.access}, {found.examples} examples"
    if found.per_class:
        data += f" ({found.per_class} per class)"
    work = f"{found.flops:.1e} FLOPs, " if found.flops else ""
    return f"{data}, {work}{found.seconds:.1f} s"


def _drawn(name: str, row: Row) -> Shown:
    found = {who: measures[name] for who, measures in row.quality.items() if name in measures}
    below = [f"{found[who]:.2f} {who}" for who in ("undefended", "released") if who in found]
    return number("{:.2f}", found.get("attacked"), *below)


def _measured(name: str) -> Callable[[Leaderboard], bool]:
    return lambda board: any(name in some for row in board.rows for some in row.quality.values())


def _of_samples(who: str, name: str) -> Field:
    return Field(f"{name}_{who}", lambda row: row.quality.get(who, {}).get(name))


def _leaked(row: Row) -> Shown:
    if row.leaks is None:
        return Shown("–", "dim")
    found = row.leaks
    below = f"{percent(found.outside)} unmerged", f"{percent(found.undefended)} undefended"
    return number(percent(found.attacked), found.attacked, *below)


def _held(leaks: Leaks | None) -> Shown:
    lines = [
        f"{task} {percent(use.released)} ({percent(use.expert)})"
        for task, use in (leaks.kept if leaks else {}).items()
    ]
    return Shown(lines[0], below=tuple(lines[1:])) if lines else Shown("–", "dim")


def _kept(leaks: Leaks) -> str:
    return ", ".join(f"{task} {use.released:.4f}" for task, use in leaks.kept.items())


def _tax(row: Row) -> Shown:
    if row.tax is None:
        return Shown("–", "dim")
    use, lost = row.tax
    late = round(lost, 9) > GATE
    return number("{:.1f}", lost, *([use] if round(lost, 1) > 0 else []), late=late)


def _cost(row: Row) -> Shown:
    seconds, multiple = row.protect_seconds, row.protect_multiple
    shown = "" if multiple is None else "<0.01" if multiple < 0.01 else f"{multiple:.2g}"
    times = [f"{shown} × tuning"] if shown else []
    return number("<0.1" if seconds < 0.1 else "{:.3g}", seconds, *times)


def _of_entry(name: str, found: Callable[[Row], Entry | None]) -> tuple[Field, ...]:
    """Protection, its interval, and the attack and merger that leave it. Raw."""

    def low(entry: Entry) -> float | None:
        return entry.low if isinstance(entry, Robust) else (entry.interval or (None,))[0]

    parts: dict[str, Callable[[Entry], Any]] = {
        "robust": lambda entry: entry.protection,
        "low": low,
        "high": lambda entry: entry.interval[1] if entry.interval else None,
        "attack": lambda entry: entry.attack,
        "merger": lambda entry: entry.merger,
    }

    def value(get: Callable[[Entry], Any]) -> Callable[[Row], Any]:
        return lambda row: None if (entry := found(row)) is None else get(entry)

    return tuple(Field(f"{part}_{name}", value(get)) for part, get in parts.items())


_ROBUST = (
    "The least protection over all attacks and mergers of the suite that need {}. Below it, from "
    "the lower end by which is ranked (the least of any of their 95 % intervals; 0 where one has "
    "none) to the upper end of its own, and the attack and merger that leave it. 1: merging the "
    "release gains a free-rider nothing; 0: as much as without a defense. "
    f"{MARKS['holds']} holds ({HOLDS} or more), {MARKS['broken']} broken (under {BROKEN}), "
    f"{MARKS['partly']} between. A tier that no attack or merger of the suite uses is not run."
)


def _tier(tier: Tier, needs: str) -> Column:
    return Column(
        tier,
        f"Robust: {tier}",
        _ROBUST.format(needs),
        lambda row: score(row.robust.get(tier), who=True, missing="not run"),
        _of_entry(tier, lambda row: row.robust.get(tier)),
        (*_EVERYWHERE, "summary"),
        short=f"robust, attacker has\n{HOLDINGS[tier]}",
        access=tier,
        wanted=lambda board: tier in board.tiers(),
    )


COLUMNS = (
    Column(
        "rank",
        "Rank",
        "Place among the methods of one suite and track, by the lower end of robust protection "
        "with weights alone; what is equal there to two decimals is decided at the higher tiers, "
        "or shares a rank, marked =. A wide interval never helps. Controls, references, and what "
        "fails the utility gate, is two-faced, or misses cells has none. Ranks of different suites "
        "cannot be compared.",
        _place,
        short="#",
        number=True,
    ),
    Column(
        "defense",
        "Defense",
        "The defense with its parameters; below it, why it has no rank.",
        _defense,
        (
            Field("defense", lambda row: row.defense),
            Field("role", lambda row: row.role),
            Field("track", lambda row: row.track),
            Field("standing", lambda row: row.standing),
            Field("rank", lambda row: row.rank, whole=True),
            Field("tied", lambda row: row.tied),
            Field("reason", lambda row: row.reason),
        ),
        short="defense",
    ),
    Column(
        "track",
        "Track",
        "weights: the release is weights of the base's own architecture. modules: its users run "
        "other modules than mergers see; such releases are ranked apart, and must face the attack "
        "read-shipped and attacks with unlabeled data. secrets: it keeps secrets, not a skill.",
        lambda row: Shown(row.track),
        views=_PAGES,
        wanted=lambda board: any(row.track != "weights" for row in board.rows),
    ),
    Column(
        "leaks",
        "Leaks, %",
        "Share of secrets that come out under the attack and merger that bring out most; below it, "
        "without merging the release (asked in any way, or scaled), and of the undefended expert.",
        _leaked,
        (
            Field("leaks", lambda row: row.leaks and row.leaks.attacked),
            Field("leaks_outside", lambda row: row.leaks and row.leaks.outside),
            Field("leaks_undefended", lambda row: row.leaks and row.leaks.undefended),
        ),
        (*_EVERYWHERE, "summary"),
        short="leaks\n%",
        number=True,
        wanted=lambda board: any(row.leaks for row in board.rows),
    ),
    Column(
        "kept",
        "Kept, %",
        "What users ask of a release that keeps secrets: how often it refuses to tell them, and an "
        "ordinary skill; of the expert in brackets.",
        lambda row: _held(row.leaks),
        (Field("kept", lambda row: row.leaks and _kept(row.leaks)),),
        _SUMMED,
        wanted=lambda board: any(row.leaks for row in board.rows),
    ),
    Column(
        "published",
        "As published",
        "Unattacked, through the suite's first merger that gives all members one coefficient and "
        "searches none: what most papers measure.",
        lambda row: score(row.as_published),
        (
            Field("as_published", lambda row: row.as_published and row.as_published.protection),
            Field("as_published_merger", lambda row: row.as_published and row.as_published.merger),
        ),
        (*_EVERYWHERE, "summary"),
        short="as pub-\nlished",
        wanted=lambda board: any(row.as_published for row in board.rows),
    ),
    Column(
        "unattacked",
        "Unattacked",
        "Protection against a free-rider who merges the release as it is, with the merger and the "
        "coefficients that suit them best.",
        lambda row: score(row.unattacked),
        (Field("unattacked", lambda row: row.unattacked and row.unattacked.protection),),
        (*_EVERYWHERE, "summary"),
        short="without\nattack",
    ),
    _tier("weights", "the released weights only"),
    _tier("unlabeled", "the weights and, at most, unlabeled inputs"),
    _tier("labeled", "the weights and, at most, a few labeled examples"),
    Column(
        "task-aware",
        "Robust: task-aware",
        "As the columns before it, for mergers that are told at run time which task an input "
        "belongs to. They are kept apart, since a plain merged model is not.",
        lambda row: score(row.task_aware, who=True),
        _of_entry("task_aware", lambda row: row.task_aware),
        (*_EVERYWHERE, "summary"),
        short="robust\ntask-aware",
        access="task-aware",
        wanted=lambda board: any(row.task_aware for row in board.rows),
    ),
    Column(
        "break",
        "Break cost",
        "The cheapest attack (by access, then examples, then FLOPs, then seconds) that leaves less "
        f"than {BROKEN}.",
        _break,
        tuple(
            Field(
                f"break_{name}",
                lambda row, name=name: row.broken_by and getattr(row.broken_by, name),  # type: ignore[misc]
                whole=name == "examples",
            )
            for name in ("attack", "access", "examples", "seconds")
        ),
        views=_PAGES,
    ),
    Column(
        "utility",
        "Utility, %",
        "Test accuracy of the released model on the victim's task, mean over victims and seeds; "
        "below it, the expert's.",
        lambda row: number(percent(row.utility), row.utility, f"of {percent(row.expert)}"),
        (Field("utility", lambda row: row.utility), Field("expert", lambda row: row.expert)),
        _SUMMED,
        number=True,
    ),
    Column(
        "quality",
        "Fréchet distance",
        "Of a generator: distance of what the attacked merge draws from real images of the "
        "victim's classes, in the features of a frozen classifier; below it, of the undefended "
        "merge and of the release. Means over attacks, mergers, victims and seeds.",
        partial(_drawn, "frechet"),
        tuple(
            _of_samples(who, name)
            for name in ("frechet", "precision", "recall")
            for who in QUALITIES
        ),
        _SUMMED,
        number=True,
        wanted=_measured("frechet"),
    ),
    Column(
        "alignment",
        "Alignment",
        "Of a generator that is told in words: cosine between what the attacked merge draws and "
        "what was asked for, in the features of the judge; below it, of the undefended merge and "
        "of the release. Means over attacks, mergers, victims and seeds.",
        partial(_drawn, "alignment"),
        tuple(_of_samples(who, "alignment") for who in QUALITIES),
        _SUMMED,
        number=True,
        wanted=_measured("alignment"),
    ),
    Column(
        "drop",
        "Drop, points",
        "How many points of accuracy the release loses against the expert, mean over victims and "
        f"seeds. Over {GATE:g}: fails the utility gate, without a rank.",
        lambda row: number("{:.1f}", row.drop, late="utility-gate" in row.flags),
        (Field("drop", lambda row: row.drop),),
        (*_EVERYWHERE, "summary"),
        short="points\nlost",
        number=True,
    ),
    Column(
        "gap",
        "|Δlogit|",
        "Largest difference of the release's logits from the expert's, relative to the expert's. A "
        f"method that claims to be exact stays within {EXACT:g}.",
        lambda row: number("{:.1e}", row.logit_gap),
        (Field("logit_gap", lambda row: row.logit_gap),),
        _SUMMED,
        number=True,
    ),
    Column(
        "tax",
        "Benign-use tax, points",
        "The most points of accuracy that the release lies behind the unprotected expert after one "
        "thing honest users do to both: bfloat16, int8, 4 bits, pruning 20 %, a short fine-tune or "
        "LoRA on another task.",
        _tax,
        (
            Field("tax_points", lambda row: row.tax[1] if row.tax else None),
            Field("tax_use", lambda row: row.tax[0] if row.tax else None),
        ),
        short="benign\ntax",
        number=True,
        wanted=lambda board: any(row.benign for row in board.rows),
    ),
    Column(
        "cost",
        "Cost, s",
        "Seconds that making the release took (the longest); below it, as a multiple of what "
        "fine-tuning that expert took.",
        _cost,
        (
            Field("protect_seconds", lambda row: row.protect_seconds),
            Field("protect_multiple", lambda row: row.protect_multiple),
        ),
        (*_EVERYWHERE, "summary"),
        short="cost,\ns",
        number=True,
    ),
    Column(
        "flags",
        "Flags",
        "What a number alone would hide; each is explained under Flags.",
        lambda row: Shown(words=tuple(row.flags)) if row.flags else Shown("none", "dim"),
        (Field("flags", lambda row: ", ".join(row.flags)),),
        views=_PAGES,
    ),
)

FIELDS = tuple(field for column in COLUMNS for field in column.fields)

#: What tables rest on, for the pages' lists of definitions.
TERMS = (
    (
        "protection",
        "1 − (G(attacked) − G0) / (G(undefended) − G0). G is the best mean accuracy over the "
        "victim's and the partners' tasks, each divided by its own expert's, that the free-rider "
        "reaches by choosing on validation data; G0 is the best without merging the victim. "
        "Measured on separate test data, shown clipped to [0, 1]. Over victims and seeds it is a "
        "ratio of sums.",
    ),
    ("interval", "95 %, paired bootstrap over test examples."),
    (
        "no-benefit",
        f"Merging the undefended expert gains under {NO_BENEFIT}: there was nothing to protect, "
        "whatever the defense. Left out.",
    ),
    (
        "error",
        "A method failed. That is never protection, and a defense with an error has no rank.",
    ),
    ("control, reference", "Yardsticks outside the ranking."),
)


def of_view(view: View, board: Leaderboard | None = None) -> Sequence[Column]:
    """The columns of a view; those for which ``board`` has something to show, where it is given."""
    return [c for c in COLUMNS if view in c.views and (board is None or c.wanted(board))]

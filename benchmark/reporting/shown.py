"""One cell of a table, before it is text or HTML."""

from __future__ import annotations

from typing import NamedTuple

from benchmark.reporting.board import Entry, Robust, band

#: Beside the colour: readable without seeing colours.
MARKS = {"holds": "✓", "partly": "~", "broken": "✗"}


class Shown(NamedTuple):
    """What a cell says.

    ``kind``: holds, partly or broken for a protection; a status; late (over a limit), dim (no
    value) or empty. ``bounds``: its interval, () where none could be computed, None where there is
    nothing to say. ``below``: smaller lines.
    ``words``: entries of the glossary of flags. ``order``: by which is sorted; ``why``: on
    hovering; ``spoken``: for those who do not see; ``href``: where the text leads.
    """

    text: str = ""
    kind: str = ""
    bounds: tuple[float, ...] | None = None
    below: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    order: float | None = None
    why: str = ""
    spoken: str = ""
    href: str = ""

    @property
    def scored(self) -> bool:
        """Whether it is a protection."""
        return self.kind in MARKS


def score(entry: Entry | None, *, who: bool = False, missing: str = "–") -> Shown:
    """A protection; ``who``: with the attack and merger that leave it."""
    if entry is None:
        return Shown(missing, "dim")
    if entry.status != "ok":
        return Shown(entry.status, entry.status, why="; ".join(entry.reasons))
    return Shown(
        f"{entry.shown:.2f}",
        band(entry.shown),
        entry.bounds if entry.interval else (),
        (entry.attacker, f"× {entry.merger}") if who else (),
        # Ranked by the lower end, where there is such.
        order=entry.bounds[0] if isinstance(entry, Robust) else entry.shown,
        why=f"raw {entry.protection:.2f}, {entry.cells} cells",
    )


def number(text: str, value: float | None, *below: str, late: bool = False) -> Shown:
    """A value, and smaller lines; a dash where there is none."""
    if value is None:
        return Shown("–", "dim")
    return Shown(text.format(value), "late" if late else "", below=below, order=value)


def percent(value: float | None) -> str:
    """A share for people, in %."""
    return "–" if value is None else f"{100 * value:.1f}"

"""Cells of an entry run again, from nothing: a store holds what somebody computed before."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from benchmark.core.paths import cache
from benchmark.core.records import Cell
from benchmark.evaluation.soundness import measured
from benchmark.pipeline.suite import Group, Suite
from leaderboard import trust
from leaderboard.checks import Place, place
from leaderboard.entry import Entry

#: How many cells: a number, or every one.
Count = int | Literal["all"]

#: What an empty cache shares with the user's: downloads, which are checked against their hashes.
DOWNLOADS = ("assets", "hub")


def choose(entry: Entry, count: Count, seed: int, first: Collection[Place] = ()) -> list[Cell]:
    """Measured cells, certificates' included, drawn without replacement; one at ``first`` leads.

    ``first``: places about which the entry contradicts another, of which one more is drawn.
    """
    done = [cell for cell in entry.all_cells if measured(cell)]
    if count == "all":
        return done
    rng = random.Random(seed)
    disputed = [cell for cell in entry.cells if measured(cell) and place(cell) in first]
    lead = [rng.choice(disputed)] if disputed else []
    rest = [cell for cell in done if not any(cell is one for one in lead)]
    return lead + rng.sample(rest, min(count, len(rest)))


@contextmanager
def empty_store() -> Iterator[Path]:
    """A cache of its own, which ``UNMERGEBENCH_CACHE`` names meanwhile: no base, expert, release or
    cell that was made before is in it. It is removed in the end."""
    own = cache()
    before = os.environ.get("UNMERGEBENCH_CACHE")
    with tempfile.TemporaryDirectory(prefix="unmergebench-") as scratch:
        for name in DOWNLOADS:
            (own / name).mkdir(parents=True, exist_ok=True)
            (Path(scratch) / name).symlink_to((own / name).resolve())
        os.environ["UNMERGEBENCH_CACHE"] = scratch
        try:
            yield Path(scratch)
        finally:
            if before is None:
                del os.environ["UNMERGEBENCH_CACHE"]
            else:
                os.environ["UNMERGEBENCH_CACHE"] = before


def again(suite: Suite, stated: Cell, scratch: Path, notify: Callable[[str], None]) -> Cell:
    """One cell of the suite as it comes out here, in the cache at ``scratch``."""
    import torch

    from benchmark.pipeline import plan as planning
    from benchmark.pipeline import run as running

    # The suite's first merger is where benign use is measured.
    mergers = dict.fromkeys((trust.merger(suite.mergers[0]).spec, stated.merger))
    suite = suite.model_copy(
        update={
            "groups": (Group(victim=stated.victim, partners=tuple(stated.partners)),),
            "seeds": (stated.seed,),
            "attacks": (stated.attack,),
            "mergers": tuple(mergers),
        }
    )
    device = torch.device("cpu")
    plan = planning.make(suite, device)
    wanted = stated.attack, stated.merger
    cells = tuple(p for p in plan.cells if (p.at.attack.spec, p.at.merger.spec) == wanted)
    narrowed = planning.Plan(plan.suite, plan.testbed, cells)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        (found,) = running.execute(narrowed, Path(folder) / "run", device, notify=notify)
    return found

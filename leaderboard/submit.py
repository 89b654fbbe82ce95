"""From a run to entries: one per defense that the run answers for in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from benchmark.api import methods
from benchmark.api.contracts import Defense
from benchmark.api.methods import Named
from benchmark.api.specs import did_you_mean
from benchmark.core.errors import UnmergeBenchError, UsageError
from benchmark.core.paths import write_text
from benchmark.core.records import Cell
from benchmark.evaluation.soundness import measured
from benchmark.pipeline import apart
from benchmark.pipeline import suite as suites
from benchmark.pipeline.suite import Suite
from leaderboard import checks, folder, trust
from leaderboard.entry import Entry, Method, Subjects, SuiteId, asked_of
from leaderboard.runs import Run, read

#: Facts of run.json that tell where and with what a run was made.
_KEPT = ("device", "environment", "packages", "git", "seeds")


class Submitted(NamedTuple):
    """An entry that was written, and where."""

    entry: Entry
    path: Path


class Incomplete(UnmergeBenchError):
    """A run that cannot be submitted; ``reasons`` has the whole list."""

    def __init__(self, run: Path, reasons: Sequence[str]) -> None:
        self.reasons = list(reasons)
        shown = "".join(f"\n  - {reason}" for reason in self.reasons[:20])
        more = f"\n  and {len(self.reasons) - 20} more" if len(self.reasons) > 20 else ""
        super().__init__(f"{run} cannot be submitted:{shown}{more}")


def submit(
    path: Path, into: Path, *, defenses: Sequence[str] = (), credit: str = ""
) -> list[Submitted]:
    """Write an entry for each method of the run (or of ``defenses``), superseding older versions.

    Raises:
        Incomplete: the run is unfinished, of no suite that ships with UnmergeBench, cells are
            missing or failed, or a defense did not pass `check`.
        UsageError: a defense the run does not hold, or one that has no rank.
        Untrusted: a defense of the run is somebody's own code and not among ``defenses``.
    """
    run = read(path)
    suite = _question(run)
    found = _chosen(run, defenses)
    if not found:
        raise Incomplete(path, ["it holds no defense that can be ranked, only controls"])
    made = [_entry(run, suite, named, credit) for named in found]
    if reasons := [f"{e.defense.spec}: {p}" for e in made for p in checks.problems(e)]:
        raise Incomplete(path, reasons)
    with folder.locked(into):
        return [_write(into, entry) for entry in made]


def _question(run: Run) -> Suite:
    """The suite that ships under the run's name, if the run asked what it asks."""
    facts = dict(run.facts.get("suite") or {})
    if not run.facts.get("finished"):
        raise Incomplete(run.folder, ["the run is not finished; the same command resumes it"])
    facts.pop("hash", None)
    try:
        ran = Suite.model_validate(facts)
        run.facts["testbed"]["name"], run.facts["testbed"]["hash"]
    except (ValidationError, KeyError, TypeError):
        raise Incomplete(
            run.folder, ["its run.json lacks suite or testbed; run it again"]
        ) from None
    name = ran.name.removesuffix("-custom")  # what narrowing a suite makes of its name
    if name not in suites.builtin():
        known = ", ".join(suites.builtin())
        raise Incomplete(
            run.folder, [f"suite {ran.name!r} does not ship with UnmergeBench ({known})"]
        )
    suite = suites.load(name)
    if ran.model_copy(update={"defenses": suite.defenses}).hash != suite.hash:
        changed = [
            field
            for field in Suite.model_fields
            if field not in ("name", "description", "defenses")
            and getattr(ran, field) != getattr(suite, field)
        ]
        raise Incomplete(run.folder, [f"it changed the suite {name}: {', '.join(changed)}"])
    return suite


def _chosen(run: Run, defenses: Sequence[str]) -> list[Named[Defense]]:
    """The defenses to submit: those named, else every one whose card says it is a method.

    A run folder may be somebody else's: code that it alone names is not run.
    """
    held = list(dict.fromkeys(cell.defense for cell in run.cells))
    if not defenses:
        found = [trust.defense(spec) for spec in held]
        return [named for named in found if named.method.card.role == "method"]
    chosen = {named.spec: named for named in map(apart.defense, defenses)}
    for spec in chosen:
        if spec not in held:
            raise UsageError(f"{run.folder} holds no {spec!r}{did_you_mean(spec, held)}")
        path = spec.partition(".py:")[0]
        if ".py:" in spec and (Path(path).is_absolute() or ".." in Path(path).parts):
            raise UsageError(
                f"{spec} names a place on this machine, and seeds depend on the name; run it again "
                "from the folder of the file, as file.py:Class"
            )
    for named in chosen.values():
        if named.method.card.role != "method":
            raise UsageError(f"{named.spec} is a {named.method.card.role}; it has no rank")
    return list(chosen.values())


def _entry(run: Run, suite: Suite, named: Named[Defense], credit: str) -> Entry:
    cells = [cell for cell in run.cells if cell.defense == named.spec]
    asked = asked_of(suite, named.spec)
    card = named.method.card
    _passed(run, named)
    if failed := [
        f"{checks.words(c)}: {c.status}: {c.reason}" for c in cells if c.status == "error"
    ]:
        raise Incomplete(run.folder, [f"{named.spec}: {reason}" for reason in failed])
    try:
        return Entry(
            version=f"{suite.name}-1",
            suite=SuiteId(name=suite.name, hash=asked.hash, definition=asked),
            defense=Method(
                spec=named.spec, card=card, source_sha256=methods.DEFENSES.fingerprint(named.spec)
            ),
            subjects=_subjects(run, cells),
            cells=tuple(cells),
            environment={key: run.facts[key] for key in _KEPT if key in run.facts},
            flags=tuple(checks.flags(cells, named.spec, lambda spec: card)),
            credit=credit,
            created=datetime.now(UTC).replace(microsecond=0),
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "its cells"
        raise Incomplete(run.folder, [f"{named.spec}: {where}: {first['msg']}"]) from None


def _passed(run: Run, named: Named[Defense]) -> None:
    """Refuse a defense that its run does not mark as having passed `check`, as it is now."""
    marks = run.facts.get("checks")
    found = marks.get(named.spec) if isinstance(marks, dict) else None
    if not isinstance(found, dict):
        reason = f"was not held to `unmergebench check defense {named.spec}`; run it again"
    elif found.get("source") != methods.DEFENSES.fingerprint(named.spec):
        reason = "was edited since it was run; run it again"
    elif found.get("passed") is not True:
        failed = ", ".join(map(str, found.get("failed") or ())) or "a check"
        reason = (
            f"failed {failed}; mend it, see `unmergebench check defense {named.spec}`, run it again"
        )
    else:
        return
    raise Incomplete(run.folder, [f"{named.spec} {reason}"])


def _subjects(run: Run, cells: Sequence[Cell]) -> Subjects:
    done = [cell for cell in cells if measured(cell)]
    if not done:
        reasons = sorted({f"{c.status}: {c.reason}" for c in cells})
        raise Incomplete(run.folder, reasons or ["it holds no cells"])
    testbed = run.facts["testbed"]
    return Subjects(
        testbed=testbed["name"],
        data=testbed["hash"],
        base=done[0].sha256.base,
        experts={cell.victim: cell.sha256.expert for cell in done},
        released={f"{cell.victim}/{cell.seed}": cell.sha256.released for cell in done},
    )


def _write(into: Path, entry: Entry) -> Submitted:
    """Under the next number of this defense and suite; the one before is superseded.

    A submission that is there already, perhaps of a process that was killed before it was through,
    is only finished.
    """
    older = list(_versions(into, entry))
    known = [before for before in older if _same(before, entry)]
    if known:
        entry = known[-1]
        path = folder.path_of(into, entry)
    else:
        number = f"{entry.suite.name}-{_next(into, entry)}"
        entry = entry.model_copy(update={"version": number})
        path = folder.write(into, entry)
    for before in older:
        if before.stands and before.version != entry.version:
            folder.write(into, before.model_copy(update={"superseded_by": entry.version}))
    readme = path.parent / "README.md"
    if not readme.exists():
        write_text(readme, _readme(entry))
    return Submitted(entry, path)


def _same(one: Entry, other: Entry) -> bool:
    """Whether two entries say the same, whenever that was, and the first still stands."""
    silent = {"version", "superseded_by", "created"}
    return one.stands and one.model_dump(exclude=silent) == other.model_dump(exclude=silent)


def _versions(into: Path, entry: Entry) -> Iterator[Entry]:
    for path, found in folder.versions(folder.path_of(into, entry).parent):
        if found.defense.spec != entry.defense.spec:
            raise UnmergeBenchError(f"{path} is an entry of {found.defense.spec}; move it")
        if found.suite.name == entry.suite.name:
            yield found


def _next(into: Path, entry: Entry) -> int:
    """One more than the last version of this defense and suite, of whatever schema."""
    home = folder.path_of(into, entry).parent
    stems = (path.stem.rpartition("-") for path in home.glob(f"{entry.suite.name}-*.json"))
    numbers = [int(n) for suite, _, n in stems if suite == entry.suite.name and n.isdecimal()]
    return 1 + max(numbers, default=0)


def _readme(entry: Entry) -> str:
    card = entry.defense.card
    source = f"{card.paper} (arXiv {card.arxiv})" if card.arxiv else card.paper or "not published"
    return (
        f"# {entry.defense.spec}\n\n{card.summary}\n\n"
        f"Source: {source}. Fidelity: {card.fidelity}.\n\n"
        "What a reader should know about this submission: where the code is, how constants were\n"
        "chosen, what it is not meant for.\n"
    )

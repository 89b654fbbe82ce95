"""The errors a user may meet. Each is one line that names the mistake and the remedy."""

import errno
from pathlib import Path

#: A full or unwritable disk says nothing about a method.
_MACHINE_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS}


class UnmergeBenchError(Exception):
    """Something failed (exit code 1)."""

    exit_code = 1


class UsageError(UnmergeBenchError):
    """The command, a spec string or a suite file is wrong (exit code 2)."""

    exit_code = 2


class Interrupted(UnmergeBenchError):
    """Ctrl-C in something that can be resumed (exit code 130, as shells have it)."""

    exit_code = 130


class CheckpointError(UnmergeBenchError):
    """A checkpoint is unreadable, incomplete, of the wrong shape, or not finite."""


class AssetError(UnmergeBenchError):
    """An asset cannot be fetched, or is not what its hash says."""


class Unfit(UnmergeBenchError):
    """A testbed is not what it says of itself: nothing measured on it would mean anything."""


class AccessError(UnmergeBenchError):
    """A method reached for data or knowledge beyond its declared access tier."""


class MethodError(UnmergeBenchError):
    """A defense, attack or merger broke its contract (its cell becomes ``error``)."""


class Tampered(MethodError):
    """A method changed what it was handed: nothing in memory can be trusted any longer."""


def stop_if_serious(error: Exception) -> None:
    """Raise what is more than one candidate's failure again: it concerns the machine, the data or
    everything in memory."""
    if isinstance(error, (Interrupted, AssetError, Tampered, Unfit)):
        raise error
    if isinstance(error, OSError) and error.errno in _MACHINE_TROUBLE:
        raise error


def disk_trouble(error: Exception, path: Path) -> OSError:
    """What libraries say of the disk in words, as the operating system's own error."""
    full = "full" in str(error) or "No space" in str(error)
    return OSError(errno.ENOSPC if full else errno.EACCES, first_line(error), str(path))


def described(error: BaseException) -> str:
    """What an exception says, in one line; with its type unless it is one of ours."""
    line = first_line(error)
    return line if isinstance(error, UnmergeBenchError) else f"{type(error).__name__}: {line}"


def brief(error: Exception, size: int = 160) -> str:
    """The first sentence of an error's message, not longer than ``size``."""
    text = first_line(error).split(". ")[0]
    return text if len(text) <= size else f"{text[: size - 1]}…"


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

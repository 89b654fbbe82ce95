"""The errors a user may meet. Each is one line that names the mistake and the remedy."""


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


class AccessError(UnmergeBenchError):
    """A method reached for data or knowledge beyond its declared access tier."""


class MethodError(UnmergeBenchError):
    """A defense, attack or merger broke its contract (its cell becomes ``error``)."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

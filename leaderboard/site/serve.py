"""The built page on this machine's own address, for a look before it is published."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmark.core.errors import UnmergeBenchError, UsageError


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: what a browser asks for is of no interest here."""

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()


def server(site: Path, port: int) -> ThreadingHTTPServer:
    """A server of ``site`` that only this machine reaches; port 0 takes any free one.

    Raises:
        UsageError: nothing was built there.
        UnmergeBenchError: the port is taken.
    """
    if not (site / "index.html").is_file():
        raise UsageError(
            f"{site} holds no page; `unmergebench leaderboard build --out {site}` makes it"
        )
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Quiet, directory=str(site)))
    except OSError as error:
        raise UnmergeBenchError(
            f"port {port}: {error.strerror or error}; --port 0 takes a free one"
        ) from None


def serve(site: Path, port: int, announce: Callable[[str], None]) -> None:
    """Serve until interrupted. ``announce`` gets the address. Raises as :func:`server`."""
    with server(site, port) as running:
        announce(f"http://127.0.0.1:{running.server_port}/")
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            announce("stopped")

"""
Ask several mirrors for a file at once, and take the first answer that comes.

    python examples/first_success.py                    one is slow, one fails, one is good
    python examples/first_success.py failing failing    nobody has it
    python examples/first_success.py slow slow          takes a minute: press Ctrl-C

The mirrors are HTTP servers on this machine, which the program starts itself. As soon as one has
sent the whole file the others are cancelled, and leave their reads within a millisecond.

The exit code is 0 if a mirror had the file, 1 if none had it, and 130 after Ctrl-C.
"""

import argparse
import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fastpool import FirstSuccess, Task, TaskGroup, blocking

FILE = b"what everybody wants\n" * 30
PAUSE = 0.1  # seconds that a good mirror takes, and a slow one for each byte


class Mirror(ThreadingHTTPServer):
    """A server of one kind."""

    daemon_threads = True

    def __init__(self, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.kind = kind
        self.url = f"http://127.0.0.1:{self.server_port}/file"


class Answer(BaseHTTPRequestHandler):
    """What a mirror says to a request."""

    server: Mirror

    def do_GET(self) -> None:
        if self.server.kind == "failing":
            self.send_error(503)
            return
        slow = self.server.kind == "slow"
        with contextlib.suppress(OSError):  # the client has gone
            self.send_response(200)
            self.send_header("Content-Length", str(len(FILE)))
            self.end_headers()
            for sent in range(len(FILE) if slow else 0):
                self.wfile.write(FILE[sent : sent + 1])
                time.sleep(PAUSE)
            if not slow:
                time.sleep(PAUSE)
                self.wfile.write(FILE)

    def log_message(self, *arguments: object) -> None:
        """Nobody needs a log of this."""


@contextlib.contextmanager
def serving(kinds: list[str]) -> Iterator[list[Mirror]]:
    """Mirrors that serve until the block is left."""
    with contextlib.ExitStack() as ending:
        mirrors = []
        for kind in kinds:
            mirror = ending.enter_context(Mirror(kind))
            thread = threading.Thread(target=mirror.serve_forever, args=(0.01,), daemon=True)
            thread.start()
            ending.callback(thread.join)
            ending.callback(mirror.shutdown)
            mirrors.append(mirror)
        yield mirrors


def fetch(url: str) -> bytes:
    """The whole file; a cancel ends it wherever it waits for the server."""
    with blocking.urlopen(url) as response:
        content: bytes = response.read()
    return content


def race(mirrors: list[Mirror]) -> int:
    """Ask all of them, tell what became of each, and return the exit code."""
    print("asking:", *(mirror.kind for mirror in mirrors), flush=True)
    tasks: list[Task[bytes]] = []
    start = time.monotonic()
    try:
        with TaskGroup(len(mirrors), name="mirrors", policy=FirstSuccess()) as group:
            for mirror in mirrors:
                submitter = group.with_options(name=mirror.kind)
                tasks.append(submitter.submit(fetch, mirror.url))
    except ExceptionGroup:
        print("nobody has the file", file=sys.stderr)  # each failure is told below
    print(f"after {(time.monotonic() - start) * 1000:.0f} ms:")
    for task in tasks:
        print(f"  {task.name}: {fate(task)}")
    if group.winner is None:
        return 1
    print(f"{group.winner.name} was first, with {len(group.winner.result())} bytes")
    return 0


def fate(task: Task[bytes]) -> str:
    """What became of a request, in words."""
    if task.cancelled():
        return "cancelled"
    error = task.exception()
    return "has it" if error is None else f"failed, {error}"


def main() -> int:
    """Read the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ["slow", "failing", "good"]
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(kinds))
    asked = parser.parse_args().kinds or kinds
    for kind in asked:
        if kind not in kinds:
            parser.error(f"no mirror is {kind!r}; choose from: {', '.join(kinds)}")
    try:
        with serving(asked) as mirrors:
            return race(mirrors)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

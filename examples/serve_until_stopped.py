"""
Serve until told to stop: hash every file that is put into a folder, and stop in good order.

    python examples/serve_until_stopped.py FOLDER

Ctrl-C or SIGTERM stops it: files that are at work are left as they were, so the next start takes
them up again. A second one leaves at once, and names what still runs.
"""

import hashlib
import signal
import sys
from pathlib import Path

import fastpool
from fastpool import CancelToken, TaskGroup, cancellable


@cancellable
def checksum(token: CancelToken, path: Path) -> None:
    """Print a file's checksum, and rename the file to say that this is done."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in token.each(iter(lambda: file.read(65536), b"")):
            digest.update(block)
    path.rename(path.with_name(f"{path.name}.done"))
    print(digest.hexdigest(), path.name, flush=True)


def serve(folder: Path) -> None:
    """Look into the folder ten times a second, and have what is new hashed."""
    taken: set[Path] = set()
    with TaskGroup(4, name="hashing") as group:
        fastpool.cancel_on_signals(group, signal.SIGTERM)
        print("serving", flush=True)
        while True:
            for path in sorted(folder.iterdir()):
                if path.suffix != ".done" and path not in taken:
                    taken.add(path)
                    group.submit(checksum, path)
            fastpool.sleep(0.1)


def main() -> None:
    """Serve the folder that was named, and say that it is over."""
    if len(sys.argv) != 2:
        sys.exit("usage: serve_until_stopped.py FOLDER")
    folder = Path(sys.argv[1])
    if not folder.is_dir():
        sys.exit(f"no folder: {folder}")
    try:
        serve(folder)
    except KeyboardInterrupt as stop:
        # The notes name what was left behind, if that was the second one.
        print("stopped by Ctrl-C", *getattr(stop, "__notes__", ()), sep="\n", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

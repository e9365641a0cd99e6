"""
Find the corrupt archive in a folder: unpack every .zip, .tar.gz and .tgz there, into nowhere.

    python find_corrupt_archive.py DIR                 name the first that is corrupt, and stop
    python find_corrupt_archive.py DIR --keep-going    name them all
    python find_corrupt_archive.py DIR --processes     on processes, one for each processor

Unpacking computes: threads take turns at much of it, processes do not. All else is the same.

The exit code is 0 if all can be read to their end, 1 if one is corrupt, 2 if something else went
wrong, and 130 after Ctrl-C.
"""

import argparse
import gzip
import os
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fastpool import (
    CancelToken,
    CollectAll,
    FailFast,
    TaskGroup,
    WorkerDiedError,
    cancellable,
)

BLOCK = 1 << 18  # bytes unpacked between two checks of the token
SUFFIXES = (".zip", ".tar.gz", ".tgz")


class Corrupt(Exception):
    """An archive cannot be read to its end."""


@cancellable
def drain(token: CancelToken, stream: IO[bytes] | gzip.GzipFile) -> None:
    """Read to the end; the token is looked at before every block."""
    for _ in token.each(iter(lambda: stream.read(BLOCK), b"")):
        pass


def read_zip(path: Path) -> None:
    """Unpack every member, which compares its checksum."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as stream:
                drain(stream)


def read_tar(path: Path) -> None:
    """Unpack the members one after the other, and what follows: the checksum comes last."""
    with gzip.open(path) as unpacked:
        with tarfile.open(fileobj=unpacked, mode="r|") as archive:
            for member in archive:
                stream = archive.extractfile(member)
                if stream is not None:
                    drain(stream)
        drain(unpacked)


def check(path: Path) -> int:
    """
    Read an archive to its end.

    Returns:
        Its size, in bytes.

    Raises:
        Corrupt: If that cannot be done. What raises stops all the others, unless they keep going.
    """
    try:
        if path.suffix == ".zip":
            read_zip(path)
        else:
            read_tar(path)
        return path.stat().st_size
    except Exception as error:  # the parsers have many
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # `read` does not say it
            raise
        raise Corrupt(f"{str(path)!r}: {type(error).__name__}: {error}") from error


def archives_in(root: Path) -> Iterator[Path]:
    """The archives below a folder, in a fixed order."""

    def give_up(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(root, onerror=give_up):
        folders.sort()
        for file in sorted(files):
            path = Path(folder, file)
            if file.endswith(SUFFIXES) and path.is_file():
                yield path


def say(error: BaseException) -> None:
    """Tell the user what went wrong."""
    if isinstance(error, OSError) and error.filename:
        print(f"cannot read {error.filename!r}: {error.strerror}", file=sys.stderr)
    elif isinstance(error, Corrupt):
        print(f"corrupt: {error}")
    else:
        print(error, file=sys.stderr)


def main() -> int:
    """Read the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="the folder")
    parser.add_argument("--keep-going", action="store_true", help="name all that are corrupt")
    parser.add_argument("--processes", action="store_true", help="on processes, not on threads")
    parser.add_argument("--workers", type=int, metavar="N", help="how many archives at once")
    options = parser.parse_args()
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers must be 1 or more, not {options.workers}")
    try:
        with TaskGroup(
            options.workers,
            name="archives",
            pool="processes" if options.processes else "threads",
            policy=CollectAll() if options.keep_going else FailFast(),
        ) as group:
            sizes = group.map(check, archives_in(options.dir))
    except ExceptionGroup as errors:
        for error in sorted(errors.exceptions, key=str):
            say(error)
        return 1 if all(isinstance(error, Corrupt) for error in errors.exceptions) else 2
    except (Corrupt, OSError, WorkerDiedError) as error:
        say(error)
        return 1 if isinstance(error, Corrupt) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"{len(sizes)} archives, {sum(sizes)} bytes: all can be read to their end")
    return 0


if __name__ == "__main__":
    sys.exit(main())

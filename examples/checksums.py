"""
SHA-256 checksums of a folder, hashed in threads that stop at the first trouble.

    python checksums.py DIR                     print a manifest, as sha256sum does
    python checksums.py DIR -o MANIFEST         write it to a file, whole or not at all
    python checksums.py DIR --check MANIFEST    verify the folder, up to the first mismatch
    python checksums.py DIR --keep-going ...    go on after trouble, as sha256sum and make -k do

Names in a manifest are relative to DIR; `sha256sum --check` inside DIR reads it too.
A link to a file counts as the file, a link to a folder is not followed, and what is neither
file nor folder (a pipe, a broken link) is left out with a note. So is MANIFEST itself.

With --keep-going every file that cannot be read, differs or is missing is named in the end, and
the manifest has all the others; it is written even so, and the exit code tells that it lacks some.

The exit code is 0 if all is well, 1 if a file differs or is missing, 2 if something cannot be
read or written, and 130 after Ctrl-C, when nothing is written.
"""

import argparse
import errno
import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

from fastpool import CancelToken, CollectAll, FailFast, TaskGroup, cancellable

T = TypeVar("T")

BLOCK = 1 << 20  # bytes read between two checks of the token
AHEAD = 100  # files that have been found and wait to be hashed
LINE = re.compile(rb"(\\?)([0-9a-fA-F]{64}) [ *](.+)", re.DOTALL)
ESCAPED = re.compile(rb"(?:[^\\]|\\[\\nr])+")
ESCAPES = {b"\\\\": b"\\", b"\\n": b"\n", b"\\r": b"\r"}


class Mismatch(Exception):
    """A file is not what the manifest says."""


class BadManifest(Exception):
    """A line of a manifest is not to be trusted."""


class CannotWrite(Exception):
    """There is no place for the manifest."""


@cancellable
def checksum(token: CancelToken, path: Path) -> str:
    """Hash one file; the token is looked at before every block."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            for block in token.each(iter(lambda: file.read(BLOCK), b"")):
                digest.update(block)
    except OSError as error:
        error.filename = str(path)  # `read` does not say it
        raise
    return digest.hexdigest()


def verify(root: Path, name: str, expected: str) -> None:
    """Hash one file under the same token, and compare; what raises stops all the others."""
    path = root / name
    if path.exists() and not path.is_file():
        raise Mismatch(f"{name!r} is no file any more")
    try:
        found = checksum(path)
    except FileNotFoundError:
        raise Mismatch(f"{name!r} is missing") from None
    if found != expected:
        raise Mismatch(f"{name!r} differs: expected {expected}, found {found}")


def names_in(
    root: Path, leave_out: Path | None, onerror: Callable[[OSError], None]
) -> Iterator[str]:
    """The names of the files below a folder, relative to it, as they are found."""
    known = leave_out.stat() if leave_out is not None and leave_out.is_file() else None
    for folder, _, files in os.walk(root, onerror=onerror):
        for file in files:
            path = Path(folder, file)
            try:
                status = path.stat()
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ELOOP) and path.is_symlink():
                    say(f"left out, since it leads nowhere: {str(path)!r}")
                else:
                    onerror(error)
                continue
            if not stat.S_ISREG(status.st_mode):
                say(f"left out, since it is no file: {str(path)!r}")
            elif known is None or not os.path.samestat(known, status):
                yield path.relative_to(root).as_posix()


def line_of(name: str, digest: str) -> bytes:
    """A line of a manifest; a name that would break it is escaped, as sha256sum does."""
    raw = os.fsencode(name)
    escaped = raw.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return (b"\\" if escaped != raw else b"") + f"{digest}  ".encode() + escaped + b"\n"


def read_manifest(path: Path) -> Iterator[tuple[str, str]]:
    """The names and digests in a manifest; nothing that leads out of the folder."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line or line.startswith(b"#"):
            continue
        match = LINE.fullmatch(line)
        if match is None or b"\0" in line or (match[1] and not ESCAPED.fullmatch(match[3])):
            raise BadManifest(f"{str(path)!r}, line {number}: not a checksum and a name")
        escaped, digest, raw = match.groups()
        if escaped:
            raw = re.sub(rb"\\[\\nr]", lambda found: ESCAPES[found.group()], raw)
        name = os.fsdecode(raw)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BadManifest(f"{str(path)!r}, line {number}: {name!r} leads out of the folder")
        yield name, digest.decode().lower()


def refuse_bad_place(path: Path) -> None:
    """Say before the work, and not after it, that a manifest cannot be written."""
    if path.is_dir():
        raise CannotWrite(f"cannot write {str(path)!r}: it is a folder")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise CannotWrite(f"cannot write {str(path)!r}: there is no folder {str(folder)!r}")
    if not os.access(folder, os.W_OK):
        raise CannotWrite(f"cannot write {str(path)!r}: no permission to write there")


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in its place at once, or not at all. A pipe or a device just takes it."""
    path = path.resolve()  # what a link leads to
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def say(message: str) -> None:
    """Tell the user, beside the output."""
    print(f"checksums: {message}", file=sys.stderr)


def for_each(
    fn: Callable[[T], None], items: Iterable[T], workers: int | None, keep_going: bool
) -> list[BaseException]:
    """
    Call a function for each item, in threads, while the items are still being read.

    The first failure stops everything and is raised; to keep going is another policy.
    """
    policy = CollectAll() if keep_going else FailFast()
    try:
        with TaskGroup(workers, name="checksums", max_queued=AHEAD, policy=policy) as group:
            for item in items:
                group.submit(fn, item)
    except ExceptionGroup:
        for failure in group.failures:
            # What the items raise has stopped everything, and a mistake of ours shall show.
            if failure.task is None or not isinstance(failure.exception, (OSError, Mismatch)):
                raise failure.exception from None
    return [failure.exception for failure in group.failures]


def check(root: Path, manifest: Path, workers: int | None, keep_going: bool) -> int:
    """Verify every file that a manifest names, all of them if told to; return the exit code."""
    entries = list(read_manifest(manifest))
    if not entries:
        raise BadManifest(f"{str(manifest)!r}: no checksums in it")

    def verify_one(entry: tuple[str, str]) -> None:
        verify(root, *entry)

    failures = for_each(verify_one, entries, workers, keep_going)
    if failures:
        code = report(failures)
        say(f"{len(failures)} of {len(entries)} are not as they should be")
        return code
    say(f"{len(entries)} checked, all as they should be")
    return 0


def hash_all(root: Path, output: Path | None, workers: int | None, keep_going: bool) -> int:
    """Hash every file below a folder, and hand out the manifest; return the exit code."""
    if output is not None:
        refuse_bad_place(output)
    digests: dict[str, str] = {}  # of a tree of any size, only this is kept
    unlisted: list[BaseException] = []

    def hash_one(name: str) -> None:
        digests[name] = checksum(root / name)

    def cannot_list(error: OSError) -> None:
        if not keep_going or Path(error.filename) == root:
            raise error
        unlisted.append(error)

    names = names_in(root, output, cannot_list)
    failures = unlisted + for_each(hash_one, names, workers, keep_going)
    write_manifest(output, digests)
    if failures:
        code = report(failures)
        say(f"the manifest lacks {len(failures)} that could not be read")
        return code
    return 0


def report(failures: Sequence[BaseException]) -> int:
    """Name all that went wrong, in a fixed order; return the exit code."""
    for message in sorted(map(describe, failures)):
        say(message)
    return 2 if any(isinstance(failure, OSError) for failure in failures) else 1


def describe(failure: BaseException) -> str:
    """What to tell the user of a failure."""
    if isinstance(failure, OSError) and failure.filename:
        return f"cannot read {failure.filename!r}: {failure.strerror}"
    return str(failure)


def write_manifest(output: Path | None, digests: dict[str, str]) -> None:
    """Print the manifest, or write it to its place; sorted by name."""
    names = sorted(digests, key=os.fsencode)
    manifest = b"".join(line_of(name, digests[name]) for name in names)
    try:
        if output is not None:
            write_whole(output, manifest)
        else:
            sys.stdout.buffer.write(manifest)
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        raise
    except OSError as error:
        place = "the output" if output is None else repr(str(output))
        raise CannotWrite(f"cannot write {place}: {error.strerror}") from error


def main() -> int:
    """Read the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="the folder")
    parser.add_argument("--check", type=Path, metavar="MANIFEST", help="verify against this")
    parser.add_argument("-o", "--output", type=Path, metavar="MANIFEST", help="write to this")
    parser.add_argument("-k", "--keep-going", action="store_true", help="go on after trouble")
    parser.add_argument("--workers", type=int, metavar="N", help="how many files at once")
    options = parser.parse_args()
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers must be 1 or more, not {options.workers}")
    if options.check is not None and options.output is not None:
        parser.error("--check writes no manifest; leave out --output")
    try:
        if options.check is not None:
            return check(options.dir, options.check, options.workers, options.keep_going)
        return hash_all(options.dir, options.output, options.workers, options.keep_going)
    except (BadManifest, CannotWrite) as error:
        say(str(error))
        return 2
    except BrokenPipeError:
        return 141  # as other programs end whose reader has gone
    except (Mismatch, OSError) as error:
        return report([error])
    except KeyboardInterrupt:
        say("interrupted" if options.check is not None else "interrupted; nothing was written")
        return 130


if __name__ == "__main__":
    sys.exit(main())

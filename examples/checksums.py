"""
SHA-256 checksums of a folder, hashed in threads that stop at the first trouble.

    python checksums.py DIR                     print a manifest, as sha256sum does
    python checksums.py DIR -o MANIFEST         write it to a file, whole or not at all
    python checksums.py DIR --check MANIFEST    verify the folder, up to the first mismatch

Names in a manifest are relative to DIR; `sha256sum --check` inside DIR reads it too.
A link to a file counts as the file, a link to a folder is not followed, and what is neither
file nor folder (a pipe, a broken link) is left out with a note. So is MANIFEST itself.

The exit code is 0 if all is well, 1 if a file differs or is missing, 2 if something cannot be
read or written, and 130 after Ctrl-C.
"""

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fastpool import CancelToken, TaskGroup, cancellable

BLOCK = 1 << 20  # bytes read between two checks of the token
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


def names_in(root: Path, leave_out: Path | None) -> Iterator[str]:
    """The names of the files below a folder, relative to it, in a fixed order."""

    def give_up(error: OSError) -> None:
        raise error

    known = leave_out.stat() if leave_out is not None and leave_out.is_file() else None
    for folder, folders, files in os.walk(root, onerror=give_up):
        folders.sort()
        for file in sorted(files):
            path = Path(folder, file)
            if path.is_file():
                if known is not None and os.path.samestat(known, path.stat()):
                    continue
            elif path.exists() or path.is_symlink():
                say(f"left out, since it is no file: {str(path)!r}")
                continue
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


def check(root: Path, manifest: Path, workers: int | None) -> None:
    """Verify every file that a manifest names; raise at the first mismatch."""
    entries = list(read_manifest(manifest))
    if not entries:
        raise BadManifest(f"{str(manifest)!r}: no checksums in it")
    with TaskGroup(workers, name="checksums") as group:
        group.starmap(verify, [(root, name, digest) for name, digest in entries])
    say(f"{len(entries)} checked, all as they should be")


def hash_all(root: Path, output: Path | None, workers: int | None) -> None:
    """Hash every file below a folder, and hand out the manifest."""
    if output is not None:
        refuse_bad_place(output)
    names = sorted(names_in(root, output), key=os.fsencode)
    with TaskGroup(workers, name="checksums") as group:
        digests = group.map(checksum, [root / name for name in names])
    manifest = b"".join(map(line_of, names, digests))
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
    parser.add_argument("--workers", type=int, metavar="N", help="how many files at once")
    options = parser.parse_args()
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers must be 1 or more, not {options.workers}")
    if options.check is not None and options.output is not None:
        parser.error("--check writes no manifest; leave out --output")
    try:
        if options.check is not None:
            check(options.dir, options.check, options.workers)
        else:
            hash_all(options.dir, options.output, options.workers)
    except Mismatch as error:
        say(str(error))
        return 1
    except (BadManifest, CannotWrite) as error:
        say(str(error))
        return 2
    except BrokenPipeError:
        return 141  # as other programs end whose reader has gone
    except OSError as error:
        say(f"cannot read {error.filename!r}: {error.strerror}" if error.filename else str(error))
        return 2
    except KeyboardInterrupt:
        say("interrupted" if options.check is not None else "interrupted; nothing was written")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

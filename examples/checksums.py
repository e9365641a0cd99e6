"""
SHA-256 checksums of a folder, hashed in threads that stop at the first trouble.

    python checksums.py DIR                     print a manifest, as sha256sum does
    python checksums.py DIR -o MANIFEST         write it to a file, whole or not at all
    python checksums.py DIR --check MANIFEST    verify the folder against one

Names in a manifest are relative to DIR; `sha256sum --check` inside DIR reads it too.
A link to a file counts as the file, a link to a folder is not followed, and what is neither
file nor folder is left out with a note.

The exit code is 0 if all is well, 1 if a file differs or is missing, 2 if something cannot be
read, and 130 after Ctrl-C.
"""

import argparse
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fastpool import CancelToken, TaskGroup, cancellable

BLOCK = 1 << 20  # bytes read between two checks of the token
LINE = re.compile(rb"(\\?)([0-9a-f]{64}) [ *](.+)", re.DOTALL)
ESCAPES = {b"\\\\": b"\\", b"\\n": b"\n", b"\\r": b"\r"}


class Mismatch(Exception):
    """A file is not what the manifest says."""


class BadManifest(Exception):
    """A line of a manifest is not to be trusted."""


@cancellable
def checksum(token: CancelToken, path: Path) -> str:
    """Hash one file; the token is looked at before every block."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for block in token.each(iter(lambda: file.read(BLOCK), b"")):
            digest.update(block)
    return digest.hexdigest()


def verify(root: Path, name: str, expected: str) -> None:
    """Hash one file under the same token, and compare; what raises stops all the others."""
    try:
        found = checksum(root / name)
    except FileNotFoundError:
        raise Mismatch(f"{name!r} is missing") from None
    if found != expected:
        raise Mismatch(f"{name!r} differs: expected {expected}, found {found}")


def names_in(root: Path, leave_out: Path | None) -> Iterator[str]:
    """The names of the files below a folder, relative to it, in a fixed order."""

    def give_up(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(root, onerror=give_up):
        folders.sort()
        for file in sorted(files):
            path = Path(folder, file)
            if leave_out is not None and path.absolute() == leave_out:
                continue
            if path.exists() and not path.is_file():
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
        if not line:
            continue
        match = LINE.fullmatch(line)
        if match is None:
            raise BadManifest(f"{str(path)!r}, line {number}: not a checksum and a name")
        escaped, digest, raw = match.groups()
        if escaped:
            raw = re.sub(rb"\\[\\nr]", lambda found: ESCAPES[found.group()], raw)
        name = os.fsdecode(raw)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BadManifest(f"{str(path)!r}, line {number}: {name!r} leads out of the folder")
        yield name, digest.decode()


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in its place at once, or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def say(message: str) -> None:
    """Tell the user, beside the output."""
    print(f"checksums: {message}", file=sys.stderr)


def run(options: argparse.Namespace) -> None:
    """Do what was asked for, or raise."""
    root: Path = options.dir
    with TaskGroup(options.workers, name="checksums") as group:
        if options.check is not None:
            entries = list(read_manifest(options.check))
            group.starmap(verify, [(root, name, digest) for name, digest in entries])
        else:
            output = None if options.output is None else options.output.absolute()
            names = sorted(names_in(root, output), key=os.fsencode)
            digests = group.map(checksum, [root / name for name in names])
    if options.check is not None:
        say(f"all {len(entries)} files are as they should be")
        return
    manifest = b"".join(map(line_of, names, digests))
    if options.output is None:
        sys.stdout.buffer.write(manifest)
    else:
        write_whole(options.output, manifest)


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
    try:
        run(options)
    except Mismatch as error:
        say(str(error))
        return 1
    except BadManifest as error:
        say(str(error))
        return 2
    except OSError as error:
        say(f"cannot read {error.filename!r}: {error.strerror}" if error.filename else str(error))
        return 2
    except KeyboardInterrupt:
        say("interrupted; nothing was written")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

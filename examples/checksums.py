"""
SHA-256 checksums of every file in a folder, hashed by a group of threads.

  python checksums.py DIR                     print a manifest, as sha256sum writes it
  python checksums.py DIR -o SUMS             write it to a file, whole or not at all
  python checksums.py DIR --check SUMS        compare the folder with it, to the first difference

Whatever goes wrong stops all threads at once, and leaves nothing half written.
Names are relative to DIR, with `/`, in the order of their bytes; `sha256sum --check`, run in
DIR, reads the manifest. A link to a file counts as a file with the content it points to.
Links to folders are not followed, and pipes, sockets and devices never opened; both are named
on stderr. The file that the manifest goes to is not in it. --check looks at what the manifest
names, not at what the folder holds beside.

Exit status: 0 if all is well; 1 if a file is missing or differs; 2 if a file cannot be read
or written or a manifest makes no sense; 130 after Ctrl-C.
"""

import argparse
import hashlib
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath

from fastpool import CancelToken, TaskGroup, cancellable

BLOCK = 1 << 18  # bytes hashed between two looks at the token
ESCAPES = {b"\\": rb"\\", b"\n": rb"\n", b"\r": rb"\r"}
CHARACTERS = {escape: character for character, escape in ESCAPES.items()}
# If a backslash opens the line, the name has escapes; else a backslash is a backslash.
LINE = re.compile(
    rb"(\\)?([0-9a-fA-F]{64}) [ *]((?(1)(?:[^\\\0\n]|\\[\\nr])+|[^\0\n]+))\n?"
)  # fmt: skip


class Trouble(Exception):
    """Ends the program with a message and an exit status."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


@cancellable
def checksum(token: CancelToken, path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            for block in token.each(iter(lambda: file.read(BLOCK), b"")):
                digest.update(block)
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def verify(path: Path, expected: str) -> None:
    if not path.is_file():
        raise Trouble(f"{str(path)!r} is missing, or not a file", status=1)
    if checksum(path) != expected:
        raise Trouble(f"{str(path)!r} differs from the manifest", status=1)


def files(root: Path, output: os.stat_result | None) -> Iterator[Path]:
    """Every file below a folder but the output; what else is left out is named on stderr."""

    def fail(error: OSError) -> None:
        raise unreadable(error.filename, error) from error

    for folder, folders, names in os.walk(root, onerror=fail):
        folders.sort()
        for path in (Path(folder, name) for name in [*folders, *sorted(names)]):
            try:
                found = path.stat()
            except OSError as error:
                raise unreadable(path, error) from error
            if stat.S_ISREG(found.st_mode):
                if output is None or not os.path.samestat(found, output):
                    yield path
            elif not stat.S_ISDIR(found.st_mode):
                say(f"skipping {str(path)!r}, which is not a regular file")
            elif path.is_symlink():
                say(f"skipping {str(path)!r}, a link to a folder")


def manifest(root: Path, workers: int | None, output: os.stat_result | None) -> bytes:
    with TaskGroup(workers, name="checksums") as group:
        tasks = {path: group.submit(checksum, path) for path in files(root, output)}
    named = {os.fsencode(path.relative_to(root).as_posix()): tasks[path] for path in tasks}
    lines = []
    for name in sorted(named):
        escaped = re.sub(rb"[\\\n\r]", lambda found: ESCAPES[found[0]], name)
        mark = b"\\" if escaped != name else b""
        lines.append(b"%s%s  %s\n" % (mark, named[name].result().encode(), escaped))
    return b"".join(lines)


def entries(path: Path) -> Iterator[tuple[PurePath, str]]:
    """The names of a manifest and what each file should hash to."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            found = LINE.fullmatch(line)
            if not found:
                raise Trouble(f"{path}:{number}: not a line as sha256sum writes it")
            escaped, digest, text = found.groups()
            if escaped:
                text = re.sub(rb"\\.", lambda found: CHARACTERS[found[0]], text)
            name = PurePath(os.fsdecode(text))
            if name.anchor or ".." in name.parts:
                raise Trouble(f"{path}:{number}: {str(name)!r} leads out of the folder")
            yield name, digest.decode().lower()


def write(content: bytes, path: Path) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def unreadable(path: object, error: OSError) -> Trouble:
    return Trouble(f"cannot read {str(path)!r}: {error.strerror}")


def say(message: object) -> None:
    print(f"checksums: {message}", file=sys.stderr)

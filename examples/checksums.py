"""
SHA-256 checksums of every file in a folder, hashed by a group of threads.

  checksums.py DIR                 print a manifest, as sha256sum writes it
  checksums.py DIR --output SUMS   write it to a file, whole or not at all
  checksums.py DIR --check SUMS    compare the folder with it, up to the first difference

Whatever goes wrong stops all threads at once and leaves nothing half written. In DIR,
`sha256sum --check` reads the manifest too. A link to a file stands for what it points to, a link
to a folder is not followed, pipes, sockets and devices are skipped with a note on stderr, and the
manifest itself is left out. The exit status is 0 if all is well, 1 if a file is missing or differs,
2 if anything else goes wrong, 130 after Ctrl-C.
"""

import hashlib
import os
import re
import stat
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory

from fastpool import CancelToken, TaskGroup, cancellable

# Only in a line that opens with a backslash does the name have escapes.
LINE = re.compile(rb"(\\)?([0-9a-fA-F]{64}) [ *]((?(1)(?:[^\\\n\0]|\\[\\nr])+|[^\n\0]+))\n?")
CHARACTERS = {rb"\\": b"\\", rb"\n": b"\n", rb"\r": b"\r"}


class MismatchError(Exception):
    """Raised when a file is not what the manifest says."""


@cancellable
def checksum(token: CancelToken, path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            for block in token.each(iter(lambda: file.read(1 << 18), b"")):
                digest.update(block)
    except OSError as error:
        error.filename = str(path)  # read() does not say it
        raise
    return digest.hexdigest()


def verify(path: Path, expected: str) -> None:
    if not path.is_file():
        raise MismatchError(f"{str(path)!r} is missing, or not a file")
    if checksum(path) != expected:
        raise MismatchError(f"{str(path)!r} differs from the manifest")


def files(root: Path, target: int | Path) -> Iterator[Path]:
    """Every file in a folder and those below it, but for the target."""
    own = os.stat(target) if os.path.exists(target) else None
    folders = [root]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            found = path.stat()
            if stat.S_ISREG(found.st_mode):
                if own is None or not os.path.samestat(found, own):
                    yield path
            elif not stat.S_ISDIR(found.st_mode):
                say(f"skipping {str(path)!r}, which is not a regular file")
            elif not path.is_symlink():
                folders.append(path)


def make(root: Path, target: int | Path, workers: int | None) -> None:
    with TaskGroup(workers, name="checksums") as group:
        tasks = {path: group.submit(checksum, path) for path in files(root, target)}
    lines = {}
    for path, task in tasks.items():
        name = os.fsencode(path.relative_to(root).as_posix())
        escaped = name.replace(b"\\", rb"\\").replace(b"\n", rb"\n").replace(b"\r", rb"\r")
        mark = b"" if escaped == name else b"\\"
        lines[name] = b"%s%s  %s\n" % (mark, task.result().encode(), escaped)
    write(b"".join(lines[name] for name in sorted(lines)), target)


def write(content: bytes, target: int | Path) -> None:
    if isinstance(target, int):
        with open(target, "wb", closefd=False) as stream:
            stream.write(content)
        return
    real = Path(os.path.realpath(target))  # not the link to it
    with TemporaryDirectory(prefix=".checksums-", dir=real.parent) as folder:
        part = Path(folder, real.name)
        part.write_bytes(content)
        part.replace(real)


def check(root: Path, manifest: Path, workers: int | None) -> None:
    os.listdir(root)  # not to have a folder is another matter than to miss a file
    entries = list(read(manifest))
    with TaskGroup(workers, name="checksums") as group:
        group.starmap(verify, ((root / name, digest) for name, digest in entries))
    write(b"files checked: %d, all as the manifest says\n" % len(entries), 1)


def read(manifest: Path) -> Iterator[tuple[PurePath, str]]:
    """The names in a manifest, and what each file should hash to."""
    with manifest.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            found = LINE.fullmatch(line)
            if found is None:
                raise ValueError(f"{manifest}:{number}: not a line as sha256sum writes it")
            escaped, digest, text = found.groups()
            if escaped:
                text = re.sub(rb"\\.", lambda found: CHARACTERS[found[0]], text)
            name = PurePath(os.fsdecode(text))
            if name.anchor or ".." in name.parts:
                raise ValueError(f"{manifest}:{number}: {str(name)!r} leads out of the folder")
            yield name, digest.decode().lower()


def say(message: object) -> None:
    print(f"checksums: {message}", file=sys.stderr)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dir", metavar="DIR", type=Path)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("-o", "--output", metavar="FILE", type=Path)
    either.add_argument("-c", "--check", metavar="MANIFEST", type=Path)
    parser.add_argument("--workers", metavar="N", type=int, help="how many threads hash")
    options = parser.parse_args()
    output = options.output
    if output and not (output.is_file() or (output.parent.is_dir() and not output.exists())):
        parser.error(f"--output must be a file, in a folder that is there, not {str(output)!r}")
    try:
        if options.check:
            check(options.dir, options.check, options.workers)
        else:
            make(options.dir, output or 1, options.workers)
    except (MismatchError, OSError, ValueError) as error:
        say(error)
        sys.exit(1 if isinstance(error, MismatchError) else 2)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()

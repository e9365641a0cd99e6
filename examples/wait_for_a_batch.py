"""
Wait for a batch of tasks and go on with the same threads (W1); wait for everything (W2).

By hand it is `map_async` and `wait` for the batch, `close` and `join` for everything.
Here a batch can be waited for inside the block, and leaving the block waits for the rest,
whether or not you kept a handle.
"""

import hashlib
import os
from pathlib import Path

from fastpool import CancelToken, TaskGroup, cancellable

sizes: dict[str, int] = {}


@cancellable
def checksum(token: CancelToken, path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in token.each(iter(lambda: file.read(65536), b"")):
            digest.update(block)
    return digest.hexdigest()


def measure(path: Path) -> None:
    sizes[path.name] = path.stat().st_size


def main() -> None:
    library = Path(os.__file__).parent
    modules = sorted(library.glob("*.py"))[:10]

    with TaskGroup(name="library") as group:
        batch = group.map(checksum, modules)
        batch.wait()
        print(f"the first batch is done: {len(set(batch.results()))} different checksums")

        print("two more batches go to the same group, and nobody keeps a handle")
        group.map(measure, modules)
        group.map(measure, sorted(library.glob("json/*.py")))
    print(f"everything is done: {len(sizes)} files measured, {sum(sizes.values())} bytes")


if __name__ == "__main__":
    main()

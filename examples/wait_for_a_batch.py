"""
Wait for a batch, go on in the same group, and leave when everything has run (W1, W2).

By hand: `map_async` and `result.wait()`; later `pool.close()` and `pool.join()`.
"""

import hashlib
from pathlib import Path

from fastpool import TaskGroup


def digest(path: Path) -> str:
    """Hash one file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Hash this folder twice: one batch is waited for, of the other no handle is kept."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    seen: list[str] = []
    with TaskGroup(name="batches") as group:
        batch = group.map(digest, files)
        batch.wait()
        print(f"the first batch is done: {len(batch.results())} files")

        # The group is still open. Nobody keeps a handle of these; they all run.
        group.map(lambda path: seen.append(digest(path)), files)
    print(f"everything has run: {len(seen)} files more")
    print(f"the same digests: {sorted(seen) == sorted(batch)}")


if __name__ == "__main__":
    main()

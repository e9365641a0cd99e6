"""
Shut down, and count the threads that are left (S1); use a group outside its block (S4, P3).

By hand, `close` and `join` end the threads of one pool, in this order and in no other. Here the
threads of a group stay for the next one, ten seconds long or until `shutdown`; and a group that
is not open says so. The exit status is 1 if a thread is left.
"""

import hashlib
import sys
import threading

import fastpool
from fastpool import GroupClosedError, TaskGroup


def checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main() -> int:
    before = threading.active_count()
    print(f"threads before: {before}")

    early = TaskGroup(name="early")
    try:
        early.submit(checksum, b"too early")
    except GroupClosedError as error:
        print(f"before its block: {error}")

    with TaskGroup(max_workers=4, name="checksums") as group:
        batch = group.map(checksum, [bytes(1_000_000)] * 40)
        batch.wait()
        print(f"checksums: {len(batch)}, threads in the block: {threading.active_count()}")
    print(f"threads kept for the next group: {threading.active_count() - before}")
    try:
        group.submit(checksum, b"too late")
    except GroupClosedError as error:
        print(f"after its block: {error}")

    fastpool.shutdown()
    print(f"threads after shutdown: {threading.active_count()}")
    return 0 if threading.active_count() == before else 1


if __name__ == "__main__":
    sys.exit(main())

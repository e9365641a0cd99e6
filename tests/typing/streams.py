"""
What checkers make of streams, of bounded queues and of policies.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any, assert_type

import fastpool
from fastpool import (
    CancelToken,
    CollectAll,
    FailFast,
    Failure,
    FirstSuccess,
    Judge,
    Policy,
    Task,
    TaskGroup,
    cancellable,
)


@cancellable
def fetch(token: CancelToken, url: str, retries: int = 3) -> bytes:
    return url.encode() * retries


def size(data: bytes) -> int:
    return len(data)


def scale(data: bytes, factor: float) -> float:
    return len(data) * factor


def urls() -> Iterator[str]:
    while True:
        yield "u"


class Store:
    @cancellable
    def load(self, token: CancelToken, key: str) -> int:
        return len(key)


def streams() -> None:
    with TaskGroup(max_workers=4, max_queued=10) as group:
        assert_type(group.imap(fetch, urls()), Generator[bytes, None, None])
        assert_type(group.imap(fetch, ["u"], window=3), Generator[bytes, None, None])
        assert_type(group.imap_unordered(fetch, urls()), Generator[bytes, None, None])
        assert_type(group.imap_unordered(size, {b""}, window=None), Generator[int, None, None])
        assert_type(group.imap(Store().load, "keys"), Generator[int, None, None])
        assert_type(group.imap(size, group.imap(fetch, urls())), Generator[int, None, None])
        assert_type(list(group.imap_unordered(size, [b""])), list[int])
        group.imap(fetch, urls()).close()
        for page in group.imap(fetch, urls()):
            assert_type(page, bytes)

        group.imap(fetch)  # type: ignore[call-arg]
        group.imap(fetch, 404)  # type: ignore[arg-type]
        group.imap(fetch, [404])  # type: ignore[arg-type]
        group.imap(404, ["u"])  # type: ignore[arg-type]
        group.imap(scale, [b""])  # type: ignore[arg-type]
        group.imap(fetch, ["u"], 3)  # type: ignore[call-arg]
        group.imap(fetch, ["u"], window="x")  # type: ignore[arg-type]
        group.imap_unordered(size, ["u"])  # type: ignore[arg-type]
        group.imap_unordered(size, [b""], window=1.5)  # type: ignore[arg-type]


class Budget:
    """A policy that a user has written: so many failures are too many."""

    def __init__(self, most: int) -> None:
        self.most = most

    def start(self) -> Judge:
        return Count(self.most)


class Count:
    """Its judge."""

    def __init__(self, left: int) -> None:
        self.left = left

    def outcome(self, task: Task[Any], error: BaseException | None) -> bool:
        self.left -= error is not None
        return self.left < 0

    def end(self, failures: Sequence[Failure]) -> BaseException | None:
        return failures[0].exception if self.left < 0 else None


class NoJudge:
    def start(self) -> int:
        return 404


def policies() -> None:
    chosen: list[Policy] = [FailFast(), CollectAll(), FirstSuccess(), Budget(3)]
    for policy in chosen:
        with TaskGroup(policy=policy) as group:
            assert_type(group.winner, Task[Any] | None)
            assert_type(group.failures, tuple[Failure, ...])
        assert_type(policy.start(), Judge)
    assert_type(fastpool.map(size, [b""], policy=CollectAll(), max_queued=3), list[int])

    TaskGroup(policy=NoJudge())  # type: ignore[arg-type]
    TaskGroup(policy=CollectAll)  # type: ignore[arg-type]
    TaskGroup(policy="fail_fast")  # type: ignore[arg-type]
    TaskGroup(max_queued="x")  # type: ignore[arg-type]
    TaskGroup(max_queued=1.5)  # type: ignore[arg-type]

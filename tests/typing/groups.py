"""
What checkers make of groups: the token is gone, arguments are checked, results are known.
"""

from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import assert_type

import fastpool
from fastpool import Batch, CancelToken, Submitter, Task, TaskGroup, cancellable
from fastpool.backends import Processes
from fastpool.futures import GroupExecutor


@cancellable
def fetch(token: CancelToken, url: str, retries: int = 3) -> bytes:
    return url.encode() * retries


def size(data: bytes, factor: float) -> int:
    return int(len(data) * factor)


class Store:
    @cancellable
    def load(self, token: CancelToken, key: str) -> int:
        return len(key)


def first(items: list[str]) -> str:
    return items[0]


def check(urls: list[str], datas: list[bytes]) -> None:
    with TaskGroup(max_workers=4, timeout=30) as group:
        assert_type(group.submit(fetch, "u"), Task[bytes])
        assert_type(group.submit(fetch, "u", retries=1).result(), bytes)
        assert_type(group.submit(Store().load, "k"), Task[int])
        assert_type(group.submit(size, b"", 2.0), Task[int])
        assert_type(group.map(fetch, urls), Batch[bytes])
        assert_type(group.map(size, datas, [1.0, 2.0]), Batch[int])
        assert_type(group.map(first, [urls]).results(), list[str])
        assert_type(group.starmap(size, [(b"", 1.0)]), Batch[int])
        assert_type(group.with_options(name="n", timeout=1), Submitter)
        assert_type(group.with_options(timeout=1).submit(fetch, "u"), Task[bytes])
        assert_type(group.map(fetch, urls).as_completed(), Iterator[tuple[int, bytes]])
        assert_type(list(group.map(fetch, urls)), list[bytes])
        assert_type(list(fastpool.as_completed([group.submit(fetch, "u")])), list[Task[bytes]])
        assert_type(group.token, CancelToken)

        group.submit(fetch)  # type: ignore[call-arg]
        group.submit(fetch, 404)  # type: ignore[arg-type]
        group.submit(fetch, "u", retry=1)  # type: ignore[call-arg]
        group.submit(fetch, CancelToken(), "u")  # type: ignore[arg-type]
        group.submit(404)  # type: ignore[arg-type]
        group.map(fetch, [404])  # type: ignore[arg-type]
        group.map(size, datas)  # type: ignore[arg-type]
    assert_type(fastpool.map(fetch, urls, max_workers=2), list[bytes])
    assert_type(fastpool.map(fetch, urls, pool=Processes(2, kill_after=None)), list[bytes])
    Processes("2")  # type: ignore[arg-type]


def returns_from_inside() -> list[bytes]:
    """The block is not taken for one that may swallow what leaves it."""
    with TaskGroup() as group:
        return group.map(fetch, ["u"]).results()


def runs_calls_of_libraries(group: TaskGroup, urls: list[str]) -> None:
    """An executor takes what the group takes, and gives the standard library's futures."""
    executor = GroupExecutor(group, fail_fast=True)
    any_executor: Executor = executor
    assert_type(executor.submit(fetch, "u"), Future[bytes])
    assert_type(executor.submit(fetch, "u", retries=1).result(), bytes)
    assert_type(executor.submit(size, b"", 2.0), Future[int])
    assert_type(executor.map(fetch, urls), Iterator[bytes])
    assert_type(any_executor.submit(fetch, "u"), Future[bytes])

    executor.submit(fetch)  # type: ignore[call-arg]
    executor.submit(fetch, 404)  # type: ignore[arg-type]
    executor.submit(fetch, "u", retry=1)  # type: ignore[call-arg]
    executor.submit(404)  # type: ignore[arg-type]
    GroupExecutor()  # type: ignore[call-arg]
    GroupExecutor(urls)  # type: ignore[arg-type]

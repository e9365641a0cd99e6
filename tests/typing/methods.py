# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""What type checkers make of decorated methods; mypy and pyright read this, nobody runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar, assert_type

from fastpool import CancelToken, cancellable

T = TypeVar("T")

token = CancelToken()


class Base(ABC):
    @cancellable
    @abstractmethod
    def crawl(self, token: CancelToken, url: str) -> bytes: ...

    @cancellable
    def method(self, token: CancelToken, url: str, retries: int = 3) -> bytes:
        return url.encode() * retries

    @cancellable
    def nothing(self, token: CancelToken) -> None:
        token.check()

    @cancellable
    def __call__(self, token: CancelToken, url: str) -> str:
        return url

    @cancellable
    @classmethod
    def over_class(cls, token: CancelToken, url: str) -> bytes:
        return url.encode()

    @classmethod
    @cancellable
    def under_class(cls, token: CancelToken, url: str) -> bytes:
        return url.encode()

    @cancellable
    @staticmethod
    def over_static(token: CancelToken, url: str) -> bytes:
        return url.encode()

    @staticmethod
    @cancellable
    def under_static(token: CancelToken, url: str) -> bytes:
        return url.encode()

    @property
    @cancellable
    def stopped(self, token: CancelToken) -> bool:
        return token.cancelled()

    @cancellable(param="token")
    def by_keyword(self, url: str, *, token: CancelToken = CancelToken.NEVER) -> bytes:
        return url.encode()

    @cancellable()
    def with_brackets(self, token: CancelToken, url: str) -> bytes:
        return url.encode()


class Crawler(Base):
    @cancellable
    def crawl(self, token: CancelToken, url: str) -> bytes:
        return assert_type(super().method(url), bytes)

    @cancellable
    def method(self, token: CancelToken, url: str, retries: int = 5) -> bytes:
        return assert_type(super().method(url, retries), bytes)

    @cancellable
    def narrower(self, token: CancelToken, url: str) -> bytes:
        return self.method(url)


crawler = Crawler()

# --- Methods ------------------------------------------------------------------------------

assert_type(crawler.method("u"), bytes)
assert_type(crawler.method("u", 5), bytes)
assert_type(Crawler.method(crawler, "u"), bytes)
assert_type(crawler.crawl("u"), bytes)
assert_type(crawler("u"), str)
assert_type(crawler.stopped, bool)
assert_type(crawler.by_keyword("u"), bytes)
assert_type(crawler.by_keyword("u", token=token), bytes)
assert_type(crawler.with_brackets("u"), bytes)
crawler.nothing()
bound: Callable[[str], bytes] = crawler.method
unbound: Callable[[Crawler, str], bytes] = Crawler.method

crawler.method()  # type: ignore[call-arg]
crawler.method(1)  # type: ignore[arg-type]
crawler.method("u", retry=5)  # type: ignore[call-arg]
crawler.method(token, "u")  # type: ignore[arg-type]
crawler.nothing(token)  # type: ignore[call-arg]
crawler(1)  # type: ignore[arg-type]
crawler.by_keyword(1)  # type: ignore[arg-type]
crawler.with_brackets(1)  # type: ignore[arg-type]
Base()  # type: ignore[abstract]

# --- Class and static methods, in both orders ---------------------------------------------

assert_type(Crawler.over_class("u"), bytes)
assert_type(crawler.over_class("u"), bytes)
assert_type(Crawler.under_class("u"), bytes)
assert_type(crawler.under_class("u"), bytes)
assert_type(Crawler.over_static("u"), bytes)
assert_type(crawler.over_static("u"), bytes)
assert_type(Crawler.under_static("u"), bytes)
assert_type(crawler.under_static("u"), bytes)

Crawler.over_class(1)  # type: ignore[arg-type]
Crawler.under_class(1)  # type: ignore[arg-type]
Crawler.over_static(1)  # type: ignore[arg-type]
Crawler.under_static(1)  # type: ignore[arg-type]
Crawler.over_class(token, "u")  # type: ignore[call-arg, arg-type]
Crawler.under_class(token, "u")  # type: ignore[call-arg, arg-type]
Crawler.over_static(token, "u")  # type: ignore[call-arg, arg-type]
Crawler.under_static(token, "u")  # type: ignore[call-arg, arg-type]
Crawler.over_class()  # type: ignore[call-arg]
Crawler.under_static()  # type: ignore[call-arg]

# --- Overriding and protocols -------------------------------------------------------------


class Wrong(Base):
    @cancellable
    def method(self, token: CancelToken, url: int) -> bytes:  # type: ignore[override]
        return bytes(url)


class Fetches(Protocol):
    def method(self, url: str) -> bytes: ...


class Calls(Protocol):
    def __call__(self, url: str) -> str: ...


fetches: Fetches = crawler
calls: Calls = crawler

# --- Generic classes ----------------------------------------------------------------------


class Box(Generic[T]):
    def __init__(self, item: T) -> None:
        self.item = item

    @cancellable
    def get(self, token: CancelToken) -> T:
        return self.item

    @cancellable
    def swap(self, token: CancelToken, item: T) -> T:
        return item

    @cancellable
    @classmethod
    def of(cls, token: CancelToken, item: T) -> Box[T]:
        return cls(item)


assert_type(Box(1).get(), int)
assert_type(Box("a").swap("b"), str)
Box(1).swap("b")  # type: ignore[arg-type]

# --- Decorated later ----------------------------------------------------------------------


class Plain:
    def method(self, token: CancelToken, url: str) -> bytes:
        return url.encode()


later = cancellable(Plain.method)

assert_type(later(Plain(), "u"), bytes)
later(Plain(), 1)  # type: ignore[arg-type]

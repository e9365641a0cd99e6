# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""What type checkers make of a decorated function; mypy and pyright read this, nobody runs it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, Protocol, TypeVar, assert_type

from fastpool import Cancellable, CancelToken, cancellable

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

token = CancelToken()


# --- The token is gone, and all else stays ------------------------------------------------


@cancellable
def fetch(token: CancelToken, url: str, retries: int = 3) -> bytes:
    """Fetch a page."""
    return assert_type(url.encode() * retries, bytes)


assert_type(fetch("u"), bytes)
assert_type(fetch("u", 5), bytes)
assert_type(fetch(url="u", retries=5), bytes)
assert_type(fetch.__name__, str)
as_callable: Callable[[str, int], bytes] = fetch
as_shorter: Callable[[str], bytes] = fetch
as_itself: Cancellable[[str, int], bytes] = fetch

fetch()  # type: ignore[call-arg]
fetch(1)  # type: ignore[arg-type]
fetch("u", "v")  # type: ignore[arg-type]
fetch("u", 5, 6)  # type: ignore[call-arg]
fetch("u", retry=5)  # type: ignore[call-arg]
fetch(token, "u")  # type: ignore[arg-type]
fetch("u", token=token)  # type: ignore[call-arg]
wrong: Callable[[int], bytes] = fetch  # type: ignore[assignment]


# --- with_token ---------------------------------------------------------------------------

assert_type(fetch.with_token(token, "u"), bytes)
assert_type(fetch.with_token(token, url="u", retries=5), bytes)

fetch.with_token("u")  # type: ignore[call-arg, arg-type]
fetch.with_token(token)  # type: ignore[call-arg]
fetch.with_token(token, 1)  # type: ignore[arg-type]
fetch.with_token(None, "u")  # type: ignore[arg-type]
fetch.with_token(token, "u", retry=5)  # type: ignore[call-arg]


# --- Parameters of every kind -------------------------------------------------------------


@cancellable
def nothing(token: CancelToken) -> None: ...


@cancellable
def star(token: CancelToken, *urls: str) -> list[str]:
    return [*urls]


@cancellable
def double_star(token: CancelToken, /, *urls: str, **options: int) -> list[str]:
    return [*urls, *options]


@cancellable
def positional(token: CancelToken, url: str, /, retries: int) -> str:
    return url * retries


@cancellable
def keyword(token: CancelToken, *, url: str) -> str:
    return url


@cancellable
def optional(token: CancelToken | None, url: str) -> str:
    return url


nothing()
nothing.with_token(token)
assert_type(star("u", "v"), list[str])
assert_type(double_star("u", "v", depth=1), list[str])
assert_type(positional("u", 3), str)
assert_type(keyword(url="u"), str)
assert_type(optional("u"), str)

nothing(token)  # type: ignore[call-arg]
star(1)  # type: ignore[arg-type]
double_star(depth="u")  # type: ignore[arg-type]
positional(url="u", retries=3)  # type: ignore[call-arg]
keyword("u")  # type: ignore[call-arg]


# --- With brackets ------------------------------------------------------------------------


@cancellable()
def with_brackets(token: CancelToken, url: str) -> bytes:
    return url.encode()


assert_type(with_brackets("u"), bytes)
assert_type(with_brackets.with_token(token, "u"), bytes)
with_brackets(1)  # type: ignore[arg-type]


# --- A keyword-only token stays visible, as optional --------------------------------------


@cancellable(param="token")
def by_keyword(url: str, *, token: CancelToken = CancelToken.NEVER) -> bytes:
    return url.encode()


@cancellable
def by_keyword_plainly(url: str, *, token: CancelToken = CancelToken.NEVER) -> bytes:
    return url.encode()


assert_type(by_keyword_plainly("u"), bytes)
assert_type(by_keyword_plainly("u", token=token), bytes)
by_keyword_plainly(1)  # type: ignore[arg-type]

assert_type(by_keyword("u"), bytes)
assert_type(by_keyword("u", token=token), bytes)
by_keyword(1)  # type: ignore[arg-type]
by_keyword()  # type: ignore[call-arg]
by_keyword("u", token=1)  # type: ignore[arg-type]


# --- Generic functions --------------------------------------------------------------------


@cancellable
def first(token: CancelToken, items: Sequence[T]) -> T:
    return items[0]


@cancellable
def apply(token: CancelToken, fn: Callable[[T], R], item: T) -> R:
    return fn(item)


assert_type(first([1, 2]), int)
assert_type(first(["a"]), str)
assert_type(first.with_token(token, [b"a"]), bytes)
assert_type(apply(str, 1), str)
first(1)  # type: ignore[arg-type]


# --- Partial ------------------------------------------------------------------------------


def plain(token: CancelToken, url: str, retries: int) -> bytes:
    return url.encode() * retries


over_partial = cancellable(functools.partial(plain, retries=3))
under_partial = functools.partial(fetch, retries=3)

assert_type(over_partial("u"), bytes)
assert_type(under_partial("u"), bytes)
under_partial(1)  # type: ignore[arg-type]
functools.partial(fetch, 1)  # type: ignore[arg-type]


# --- Objects and bound methods, decorated later -------------------------------------------


class Fetcher:
    def __call__(self, token: CancelToken, url: str) -> bytes:
        return url.encode()

    def fetch(self, token: CancelToken, url: str) -> bytes:
        return url.encode()


of_object = cancellable(Fetcher())
of_method = cancellable(Fetcher().fetch)

assert_type(of_object("u"), bytes)
assert_type(of_method("u"), bytes)
assert_type(of_method.with_token(token, "u"), bytes)
of_object(1)  # type: ignore[arg-type]
of_method(1)  # type: ignore[arg-type]


# --- Handing it on ------------------------------------------------------------------------


class Fetches(Protocol):
    def __call__(self, url: str) -> bytes: ...


def run(fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    return fn(*args, **kwargs)


def timed(fn: Callable[P, R]) -> Callable[P, R]:
    return fn


def logged(fn: Callable[Concatenate[str, P], R]) -> Callable[Concatenate[str, P], R]:
    return fn


def names(fn: Cancellable[P, R]) -> Callable[P, R]:
    return fn


as_protocol: Fetches = with_brackets

assert_type(run(fetch, "u"), bytes)
assert_type(run(fetch, "u", retries=5), bytes)
assert_type(run(nothing), None)
assert_type(timed(fetch)("u"), bytes)
assert_type(logged(fetch)("u", 5), bytes)
assert_type(names(fetch)("u"), bytes)
assert_type(list(map(fetch, ["u"])), list[bytes])

run(fetch)  # type: ignore[call-arg]
run(fetch, 1)  # type: ignore[arg-type]
run(fetch, "u", retry=5)  # type: ignore[call-arg]
run(fetch, token, "u")  # type: ignore[arg-type]


# --- A token of another name --------------------------------------------------------------


@cancellable(param="event")
def by_name(event: CancelToken, url: str) -> bytes:
    return url.encode()


assert_type(by_name("u"), bytes)
assert_type(by_name.with_token(token, "u"), bytes)
by_name(1)  # type: ignore[arg-type]
by_name(token, "u")  # type: ignore[call-arg, arg-type]


# --- No function --------------------------------------------------------------------------

cancellable(404)  # type: ignore[call-overload]

"""The current token: whose it is, and the scopes that change it."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from types import TracebackType
from typing import Protocol

from fastpool import _clock
from fastpool._errors import is_a
from fastpool._token import CancelToken
from fastpool._whole import whole
from fastpool.exceptions import Cancelled

__all__ = [
    "OUTSIDE",
    "Place",
    "Scope",
    "checkpoint",
    "current",
    "current_place",
    "current_token",
    "enter",
    "is_own",
    "leave",
    "shield",
    "sleep",
    "this_thread",
    "timeout",
    "use_token",
]


class Place(Protocol):
    """What a context remembers of where it is: a task, the body of a group, a scope in either."""

    @property
    def _token(self) -> CancelToken:
        """The current token there."""
        ...

    @property
    def _group(self) -> object:
        """The group whose task or body this is in; `None` outside all groups."""

    @property
    def _thread(self) -> object:
        """
        The thread that made the token current, as `this_thread()` names it; None once that is over.
        """


class Scope:
    """A place made by a `with` statement or a call; the thread that is in it writes to it."""

    __slots__ = ("_group", "_thread", "_token", "before", "maker")

    def __init__(
        self,
        token: CancelToken,
        group: object,
        thread: object,
        before: Place | None,
        maker: object = None,
    ) -> None:
        self._token = token
        self._group = group
        self._thread = thread
        self.before = before  # the place around it
        self.maker = maker  # the `with` statement's object, which may have made others


class Places(Protocol):
    """Many places at once, each made only when somebody asks for it."""

    def task(self, index: int) -> Place:
        """The one with that number."""
        ...


OUTSIDE = Scope(CancelToken.NEVER, None, None, None)  # of all groups and scopes

current: ContextVar[Place | tuple[int, Places]] = ContextVar("fastpool", default=OUTSIDE)
_threads = threading.local()


def this_thread() -> object:
    """A name for the calling thread. Unlike its number it is never given to another."""
    try:
        name: object = _threads.name
    except AttributeError:
        name = _threads.name = object()
    return name


def current_place() -> Place:
    """Where the calling code is."""
    place = current.get()
    if type(place) is tuple:
        place = place[1].task(place[0])
        current.set(place)
    return place  # type: ignore[return-value] # no checker knows that a Place is no tuple


def current_token() -> CancelToken:
    """
    The token of the code that calls: its task's, its body's, its scope's, else `NEVER`.

    It belongs to the context, as a context variable does, so a thread that you start has it
    only if you give it the context (`contextvars.copy_context().run`).
    """
    place = current.get()
    if type(place) is tuple:
        place = current_place()
    return place._token  # type: ignore[union-attr] # no checker knows that a Place is no tuple


def checkpoint() -> None:
    """
    Check the current token.

    Raises:
        Cancelled: If it is set.
    """
    current_place()._token.check()


def sleep(seconds: float) -> None:
    """
    Sleep on the current token.

    Args:
        seconds: How long. Zero or less is a check.

    Raises:
        Cancelled: As soon as the token is set.
        TypeError: If `seconds` is no number.
        ValueError: If it is NaN.
    """
    current_place()._token.sleep(seconds)


def is_own(token: CancelToken) -> bool:
    """Whether a token is current because this very thread made it so, not by inheritance."""
    place = current_place()
    return place._token is token and place._thread is this_thread()


def enter(token: CancelToken, group: object = None, maker: object = None) -> Scope:
    """Make a token current; `leave` takes the scope back."""
    before = current_place()
    scope = Scope(token, before._group if group is None else group, this_thread(), before, maker)
    try:
        current.set(scope)
    except BaseException:  # what a signal handler raised, as soon as it was set
        whole(current.set, before)
        raise
    return scope


def leave(scope: Scope) -> bool:
    """
    Make current what was so before the scope.

    Left out of order (by a generator, say), it is taken from under those that are on top of it,
    so that they do not come back to it.

    Returns:
        Whether it was current here, or under what is.
    """
    scope._thread = None
    top = current_place()
    place: Scope | None = None
    below: Place | None = top
    while isinstance(below, Scope) and below is not scope:
        place, below = below, below.before
    if below is scope and place is not None:
        place.before = scope.before
    # With those on top that were left from elsewhere.
    now: Place | None = top
    while isinstance(now, Scope) and now._thread is None and now.before is not None:
        now = now.before
    if now is not top:
        current.set(now)  # type: ignore[arg-type] # the default alone has none
    return below is scope


class _Scopes:
    """What the `with` statements below have in common; each may be entered again and again."""

    __slots__ = ("_entered",)

    def __init__(self) -> None:
        self._entered: list[Scope] = []

    def _enter(self, token: CancelToken) -> CancelToken:
        scope = enter(token, maker=self)
        try:
            self._entered.append(scope)
        except BaseException:  # what a signal handler raised
            whole(self._take_off, scope)
            raise
        return token

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        scope: Scope | None = None
        try:
            scope = self._innermost()
            here = self._take_off(scope)
        except BaseException:  # what a signal handler raised
            if scope is None and self._entered:
                scope = whole(self._innermost)
            if scope is not None:
                whole(self._take_off, scope)
            raise
        token, around = scope._token, scope.before
        if not here and around is not None:
            # It stays current where it was entered, and stands there for what is around it.
            scope._token, scope._group = around._token, around._group
        self._ends(token, error)

    def _innermost(self) -> Scope:
        """This context's; other threads may have entered it as well."""
        place: Place | None = current_place()
        while isinstance(place, Scope) and place.maker is not self:
            place = place.before
        # A generator that is closed in another context than it began in finds none of its own.
        return place if isinstance(place, Scope) else self._entered[-1]

    def _take_off(self, scope: Scope) -> bool:
        here = leave(scope)
        if scope in self._entered:  # else it was interrupted, and is called again
            self._entered.remove(scope)
        return here

    def _ends(self, token: CancelToken, error: BaseException | None) -> None:
        """Look at what leaves the block."""


class use_token(_Scopes):
    """
    Make a token current in a `with` block: how a library adopts its caller's token.

    Args:
        token: The token. The `with` statement gives it back.

    Raises:
        TypeError: If it is no token.
    """

    __slots__ = ("_token",)

    def __init__(self, token: CancelToken) -> None:
        super().__init__()
        if not isinstance(token, CancelToken):
            raise TypeError(
                f"use_token() wants a CancelToken, not {token!r}; "
                "write use_token(token or current_token()) where it may be None"
            )
        self._token = token

    def __enter__(self) -> CancelToken:
        return self._enter(self._token)


class _Limited(_Scopes):
    """A scope with a token of its own, whose expiry leaves as a `TimeoutError`."""

    __slots__ = ("_seconds",)

    def __init__(self, seconds: float | None, what: str) -> None:
        super().__init__()
        self._seconds = _clock.seconds(seconds, what)

    def _take_off(self, scope: Scope) -> bool:
        here = super()._take_off(scope)
        scope._token._unlink()
        return here

    def _ends(self, token: CancelToken, error: BaseException | None) -> None:
        # A descendant that heard this token has its very reason.
        if is_a(error, Cancelled) and token._set_itself() and error.reason is token.reason:
            raise TimeoutError(f"timed out after {self._seconds:g} s") from error


class timeout(_Limited):
    """
    Give a `with` block so many seconds.

    The block gets a token of its own, a child of the current one, that sets itself after them.
    By itself it raises nothing: a check or a blocked call in the block does.

    Args:
        seconds: How long; zero or less has expired at once, `None` or infinity never does.

    Raises:
        TimeoutError: On leaving, in place of a `Cancelled` that leaves the block because its
            time was up.
        TypeError: If `seconds` is no number.
        ValueError: If it is NaN.

    Source:
        `asyncio.timeout`, and trio's `fail_after`.
    """

    __slots__ = ()

    def __init__(self, seconds: float | None) -> None:
        super().__init__(seconds, "seconds")

    def __enter__(self) -> CancelToken:
        token = CancelToken()
        try:
            token._link(current_token(), strongly=True)
            token._limit(self._seconds)
            return self._enter(token)
        except BaseException:  # no thread for the deadline, say
            whole(token._unlink)
            raise


class shield(_Limited):
    """
    Keep cancellation out of a `with` block: for clean-up that must not be cut short.

    The block gets a token that hears nobody, and sets itself only after its own timeout.

    Args:
        timeout: How long the block may take, in seconds; `None` sets no limit.

    Raises:
        TimeoutError: On leaving, in place of a `Cancelled` that leaves the block because its
            time was up.
        TypeError: If the timeout is no number.
        ValueError: If it is NaN.

    Source:
        trio's shielded cancel scopes.
    """

    __slots__ = ()

    def __init__(self, timeout: float | None = None) -> None:
        super().__init__(timeout, "timeout")

    def __enter__(self) -> CancelToken:
        token = CancelToken()
        try:
            token._limit(self._seconds)
            return self._enter(token)
        except BaseException:
            whole(token._unlink)
            raise

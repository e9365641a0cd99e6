"""The switch: the tree of tokens, callbacks, waiting, interrupts, and who a token reports to."""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, TypeVar

from fastpool import _callbacks, _clock, _marks, _wakers
from fastpool._callbacks import (
    Callback,
    Interrupts,
    Registration,
    is_left,
    keys,
    run_callbacks,
)
from fastpool._descriptor import Descriptor
from fastpool._errors import is_a
from fastpool._gate import Gate
from fastpool._whole import whole
from fastpool.exceptions import Cancelled

__all__ = ["CancelToken", "Cause", "Reporter", "after_fork"]

T = TypeVar("T")


class Reporter(Protocol):
    """Who a token reports to, beyond itself: a group."""

    def _report(self, error: BaseException) -> None:
        """Record a failure that a call under the token had, then set the token."""


class Cause:
    """Why a token was set, shared by it and all its descendants."""

    __slots__ = ("at", "expired", "failure", "number", "reason", "source")

    def __init__(
        self,
        reason: object,
        *,
        source: int,
        failure: BaseException | None = None,
        expired: bool = False,
    ) -> None:
        self.reason = reason
        self.failure = failure
        self.source = source  # the key of the token it began with: no reference, hence no cycle
        self.expired = expired
        self.number = next(keys)
        self.at = time.monotonic()


# Stands where the cause stands in a token that nothing can set any more.
_SEALED = Cause(None, source=0)
# The keys in a token's entries under which its cause and its descriptor stand.
_CAUSE = 0
_DESCRIPTOR = -1


class CancelToken:
    """
    A one-way switch that tells running code to stop: cooperative cancellation.

    Code checks it (`check`), waits on it (`sleep`, `wait`), or is interrupted by it
    (`on_cancel`, `interrupts`). It stands wherever a `threading.Event` stood as a stop flag:
    `is_set`, `set` and `wait` are there.

    Args:
        timeout: Seconds until the token sets itself. `None` or infinity: never.
            Zero or less: at once.

    Raises:
        TypeError: If the timeout is no number.
        ValueError: If it is NaN.

    Threads:
        Safe from any thread. No method takes a lock that another can hold, so `cancel` and
        `Registration.unregister` may be called from signal handlers and finalizers.

    Source:
        The tree and the callbacks follow .NET's `CancellationToken` and trio's cancel scopes.
    """

    # How it works, without a lock. `_entries` holds everything that listens: children (weakly,
    # or strongly where somebody is sure to unlink them), gates of sleepers, callbacks, each
    # under a number. Whoever registers inserts first and looks at `_reason` then; whoever
    # cancels sets `_reason` first and looks at the entries then: neither can miss the other.
    # Whoever pops an entry owns it, so each is woken or run once. The cause stands among the
    # entries too, under `_CAUSE`: `setdefault` decides which cancel was the first. Parents and
    # deadline are written by who makes the token, and by who ends it then.
    __slots__ = ("__weakref__", "_deadline", "_entries", "_key", "_parents", "_reason", "_reporter")

    NEVER: ClassVar[CancelToken]
    """The token that can't be cancelled."""

    if TYPE_CHECKING:  # keeps a token from passing for what may stand before one
        __sizeof__: None  # type: ignore[assignment]

    def __init__(self, *, timeout: float | None = None) -> None:
        self._reason: object = None
        self._key = next(keys)
        self._entries: dict[int, object] = {}
        self._parents: tuple[CancelToken, ...] = ()
        self._deadline: float | None = None
        self._reporter: weakref.ref[Reporter] | None = None
        if timeout is not None:
            self._limit(timeout)

    # --- Asking ---------------------------------------------------------------------------

    def cancelled(self) -> bool:
        """Whether the token is set. One poll: it takes no lock and reads no clock."""
        return self._reason is not None

    def check(self) -> None:
        """
        Raise if the token is set.

        Raises:
            Cancelled: A new one each time.
        """
        if self._reason is not None:
            self._raise()

    @property
    def reason(self) -> object:
        """
        Why the token was set; `None` until then, never `None` after.

        What was given to `cancel()`, else the failure that was reported, a `TimeoutError` for
        a deadline, or the word `"cancelled"`. A child that hears an ancestor has the ancestor's.
        """
        return self._reason

    @property
    def deadline(self) -> float | None:
        """
        When the token sets itself, by the nearest deadline of its own and its ancestors'.

        Returns:
            A reading of `time.monotonic()`, in seconds; `None` if there is none.
        """
        if not self._parents:
            return self._deadline
        found = [due for token in self._lineage() if (due := token._deadline) is not None]
        return min(found, default=None)

    def remaining(self) -> float | None:
        """
        The time until the deadline, as libraries take it for their timeouts.

        Returns:
            Seconds, 0.0 once the deadline has passed; `None` if there is none.
        """
        deadline = self.deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def __repr__(self) -> str:
        if self._reason is None:
            return f"<CancelToken {id(self):#x}>"
        reason = self._reason
        what = repr(reason) if type(reason) is str else type(reason).__qualname__
        return f"<CancelToken {id(self):#x}, cancelled: {what}>"

    # --- Setting --------------------------------------------------------------------------

    def cancel(self, reason: object = None) -> bool:
        """
        Set the token and all its descendants, wake who sleeps on them, run their callbacks.

        Args:
            reason: Why; `None` stands for the word `"cancelled"`.

        Returns:
            True for the one call that did it, after every callback has run; False for all
            others, at once.

        Threads:
            Any, a signal handler or a finalizer too: it takes no lock. The callbacks run in
            the calling thread.
        """
        return self._set_by(Cause("cancelled" if reason is None else reason, source=self._key))

    def _set_by(
        self, cause: Cause, run: Callable[[Callable[[], object]], object] | None = None
    ) -> bool:
        """`cancel` with everything there is to say; `run` has the callbacks run elsewhere."""
        mine = next(keys)
        try:
            _setting[mine] = self, cause  # before it is set, and until all have heard of it
            if not self._claim(cause):
                return False
            self._announce(cause, run)
        except BaseException:  # what a signal handler raised: those that sleep still have to hear
            if self._cause is cause:
                whole(self._claim, cause)
                whole(self._announce, cause, run)
            raise
        finally:
            _setting.pop(mine, None)
        return True

    def _announce(self, cause: Cause, run: Callable[[Callable[[], object]], object] | None) -> None:
        """Once it is set: wake who sleeps on it or a descendant, and have the callbacks run."""
        pending = self._spread(cause)
        if run is not None and pending:
            run(lambda: run_callbacks(pending))
        else:
            run_callbacks(pending)

    def _claim(self, cause: Cause) -> bool:
        held = self._entries.setdefault(_CAUSE, cause)
        if held is not _SEALED:
            # The winner may not have got that far yet, and whoever lost must find it set too.
            self._reason = held.reason  # type: ignore[attr-defined]
        return held is cause

    def _spread(self, cause: Cause) -> list[tuple[Callback, CancelToken]]:
        """
        Set every descendant, then wake the sleepers.

        Returns:
            The callbacks that are left to run, the last registered first.
        """
        reached: list[CancelToken] = [self]
        seen = {self._key}
        for token in reached:  # grows as it goes; no recursion, so no chain is too long
            # One that somebody else has just turned hands on what turned it: that call may not
            # have come to its descendants yet.
            reason = token._cause or cause
            for child in token._children():
                if child._key not in seen:
                    seen.add(child._key)
                    child._claim(reason)
                    if child._cause is not None:
                        reached.append(child)  # else it has ended, and hears nobody any more
        pending: list[tuple[Callback, CancelToken]] = []
        for token in reached:
            # Callbacks are left to the call that turned their token.
            ours = token._cause is cause
            for key in list(token._entries):
                entry = token._entries.get(key)
                if isinstance(entry, Gate | Descriptor):
                    entry.open()  # and leave it: who sleeps takes it off, who watches needs it open
                elif ours and type(entry) is Callback:
                    pending.append((entry, token))
        pending.sort(key=lambda pair: pair[0].key, reverse=True)
        return pending

    def _children(self) -> list[CancelToken]:
        found: list[CancelToken] = []
        # Not `items()`, nor a copy: both can start a garbage collection that changes the dict.
        for key in list(self._entries):
            entry = self._entries.get(key)
            child = entry() if type(entry) is _ChildRef else entry
            if isinstance(child, CancelToken):
                found.append(child)
        return found

    def _due(self) -> float | None:
        """The token's own deadline, without its ancestors', as long as it can set it."""
        return None if self._reason is not None else self._deadline

    def _expire(self) -> None:
        """The clock says that the token's own deadline has passed."""
        self._set_by(self._expired(), _clock.run_in_helper)

    def _expired(self) -> Cause:
        return Cause(TimeoutError("the deadline has passed"), source=self._key, expired=True)

    def _interrupt(self, error: BaseException) -> bool:
        """Set the token from a signal handler, as a failure would, but record nothing."""
        cause = Cause(error, source=self._key, failure=error)
        return self._set_by(cause, _clock.run_from_handler)

    def _fail(self, error: BaseException) -> bool:
        """Set the token because of a failure."""
        return self._set_by(Cause(error, source=self._key, failure=error))

    def _report(self, error: BaseException) -> None:
        """
        Take note of an exception that left a call which this token was brought to.

        It is recorded first and the token set then, or the echo of a woken sibling could pass
        for the first failure.
        """
        if is_a(error, Cancelled) and self._reason is not None:
            return
        reporter = None if self._reporter is None else self._reporter()
        if reporter is not None:
            reporter._report(error)
        else:
            self._fail(error)

    def _reports_to(self, reporter: Reporter) -> None:
        """Name who records failures for this token. Held weakly, for it holds the token."""
        self._reporter = weakref.ref(reporter)

    @property
    def _cause(self) -> Cause | None:
        """Why the token was set, in full; `None` if it was not."""
        held = self._entries.get(_CAUSE)
        return held if isinstance(held, Cause) and held is not _SEALED else None

    def _set_itself(self) -> bool:
        """Whether the token was set by its own deadline, and not by somebody or an ancestor."""
        cause = self._cause
        return cause is not None and cause.expired and cause.source == self._key

    def _began(self, cause: Cause) -> bool:
        """Whether that cause began with this token, and not with an ancestor."""
        return cause.source == self._key

    def _raise(self) -> NoReturn:
        _marks.raise_held()  # rather than its echo
        raise self._error()

    def _error(self) -> Cancelled:
        """What a check raises once the token is set: a new one each time."""
        cause = self._cause
        error = Cancelled(self._reason, token=self)
        if cause is not None and cause.failure is not None:
            error.__cause__ = cause.failure
        return error

    # --- Waiting --------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> bool:
        """
        Wait until the token is set. Sleeps; it does not poll.

        Args:
            timeout: Longest wait, in seconds. `None` or infinity: without limit; zero or less
                only looks.

        Returns:
            Whether the token is set.

        Raises:
            TypeError: If the timeout is no number.
            ValueError: If it is NaN.

        Source:
            `threading.Event.wait`.
        """
        span = _clock.seconds(timeout)
        if self._reason is not None:
            return True
        if span is not None and span <= 0:
            return False
        gate = Gate()
        key = self._add_sleeper(gate)
        try:
            if self._reason is None:
                gate.wait(span)
        finally:
            self._remove(key)
        return self._reason is not None

    def sleep(self, seconds: float) -> None:
        """
        Sleep, unless the token is set first.

        Args:
            seconds: How long. Zero or less is a check.

        Raises:
            Cancelled: As soon as the token is set.
            TypeError: If `seconds` is no number.
            ValueError: If it is NaN.
        """
        if seconds is None:
            raise TypeError("seconds must be a number of seconds, not None")
        span = _clock.seconds(seconds, "seconds")
        if self._reason is not None or self.wait(span):
            self._raise()

    @_marks.calls_out
    def each(self, items: Iterable[T]) -> Iterator[T]:
        """
        The items, with a check before every one is taken.

        Returns:
            An iterator of the items, in their order.

        Raises:
            Cancelled: From the iterator, as soon as it is asked for an item when the token is
                set; the item stays where it is.
            TypeError: If `items` cannot be iterated over.
        """
        return self._each(iter(items))

    @_marks.calls_out
    def _each(self, items: Iterator[T]) -> Iterator[T]:
        while True:
            self.check()
            try:
                item = next(items)
            except StopIteration:
                return
            yield item

    def fileno(self) -> int:
        """
        A file descriptor that becomes readable when the token is set, for `select` and its kin.

        It is made by the first call, and closed when the token is gone. It is the token's: do
        not read from it, and do not close it.

        Returns:
            The descriptor, the same each time.

        Raises:
            OSError: If the process has no descriptors left.

        Threads:
            Safe from any thread.
        """
        held = self._entries.get(_DESCRIPTOR)
        if held is None:
            held = self._entries.setdefault(_DESCRIPTOR, Descriptor())
        assert isinstance(held, Descriptor)
        if self._reason is not None:  # looked at after it stands among the entries
            held.open()
        return held.fileno()

    def _add_sleeper(self, gate: Gate | Descriptor) -> int:
        """Have a gate opened when the token is set. Look at the token after, not before."""
        key = next(keys)
        self._entries[key] = gate
        return key

    def _sleepers(self) -> list[Gate]:
        """The gates that are to be opened when the token is set."""
        entries = (self._entries.get(key) for key in list(self._entries))
        return [entry for entry in entries if isinstance(entry, Gate)]

    def _remove(self, key: int) -> None:
        """Take back what stands under a number, if nobody has."""
        self._entries.pop(key, None)

    # --- Callbacks ------------------------------------------------------------------------

    def on_cancel(self, callback: Callable[[], object]) -> Registration:
        """
        Have a function called once the token is set.

        All states turn and all sleepers wake first; then callbacks run, the last registered
        first, each once, in a copy of the context of its registration. If the token is set
        already, the callback runs at once, here.

        Args:
            callback: Called without arguments. It should be quick. What it raises goes to
                `sys.unraisablehook`, and stops nothing.

        Returns:
            The registration, by which to take it back. It holds the token until then; drop the
            token and its registration together, and the callback never runs.

        Threads:
            Any. The callback runs in the thread that calls `cancel()`, in a signal handler that
            calls it too, so it must take no lock there; for a deadline, in a helper thread.

        Source:
            .NET's `CancellationToken.Register`.
        """
        if not callable(callback):
            raise TypeError(f"on_cancel() wants a function, not {callback!r}")
        return self._register(Callback(callback, slow=False))

    def _register(self, entry: Callback) -> Registration:
        registration = Registration(self, entry)
        if self._entries.get(_CAUSE) is _SEALED:
            return registration
        entry.registration = weakref.ref(registration)
        self._entries[entry.key] = entry
        if self._reason is not None:
            try:
                entry.run_in(self)
            except BaseException:  # what a signal handler raised
                whole(entry.run_in, self)
                raise
        return registration

    def interrupts(self, what: object) -> Interrupts:
        """
        Have a blocking call interrupted when the token is set: `with token.interrupts(what):`.

        Args:
            what: A function that makes the call return, or an object of a type that was
                registered with its way of being interrupted.

        Returns:
            A context manager. It raises `Cancelled` on entry if the token is set already; the
            interruption happens at most once, but where it may come too early to meet anything
            (queries of databases, conditions); after the block it is not running and never
            will, unless the block is left from inside a callback, where nothing waits. On
            leaving, if the token is set, `Cancelled` is raised with whatever came out as its
            `__context__`, also when the call returned normally, since what an interrupted call
            returns looks like success. A `Cancelled`, `KeyboardInterrupt`, `SystemExit` or
            `GeneratorExit` passes as it is, and so does an error of the clean-up after Ctrl-C
            or an exit.

        Raises:
            TypeError: If `what` can be neither called nor interrupted.
        """
        waker = _wakers.find(what)
        if waker is not None:
            return Interrupts(self, functools.partial(waker.how, what), waker.slow)
        if callable(what):
            return Interrupts(self, what, slow=False)
        kind = f"{type(what).__module__}.{type(what).__qualname__}"
        instead = _wakers.advice(what)
        if instead is None:
            raise TypeError(
                f"interrupts() does not know how to interrupt {kind}; register a way with "
                f"fastpool.blocking.register({kind!r}, how), or give it a function that does"
            )
        raise TypeError(f"interrupts() cannot interrupt {kind}; {instead}")

    def _close_callbacks(self) -> None:
        """
        Wait until no callback of a token that was set is running or still to run.

        Only to be called for a token that is set or sealed; returns at once from inside a
        callback.
        """
        # By its cause: the one who sets it may not have come to its reason yet. In a forked child
        # nobody runs them if that was in the parent.
        cause = self._cause
        if cause is not None and not is_left(cause.number):
            for callback in self._callbacks():
                callback.join()

    def _callbacks(self) -> list[Callback]:
        """Those that have not run yet, or are running."""
        entries = (self._entries.get(key) for key in list(self._entries))
        return [entry for entry in entries if type(entry) is Callback]

    # --- Family ---------------------------------------------------------------------------

    def child(self, *, timeout: float | None = None) -> CancelToken:
        """
        A token that is set when this one is, and can be set alone.

        Args:
            timeout: Seconds until the child sets itself, as for `CancelToken`.

        Returns:
            The child. The parent holds nothing of it: forget it, and it is gone.
        """
        child = CancelToken()
        child._link(self)
        if timeout is not None:
            child._limit(timeout)
        return child

    @classmethod
    def any(cls, *tokens: CancelToken) -> CancelToken:
        """
        A token that is set as soon as one of these is; of none, one that they never set.

        Raises:
            TypeError: If one of them is no token.
        """
        for token in tokens:
            if not isinstance(token, CancelToken):
                raise TypeError(f"any() wants tokens, not {token!r}")
        child = cls()
        for token in tokens:
            child._link(token)
        return child

    def _link(self, parent: CancelToken, *, strongly: bool = False) -> None:
        """
        Hear a parent. Strongly: the parent holds this token until it is unlinked or sealed.
        """
        self._parents += (parent,)
        parent._entries[self._key] = self if strongly else _ChildRef(self, parent._entries)
        held = parent._entries.get(_CAUSE)
        if held is None:
            return
        if held is _SEALED:  # it has ended: nothing sets it any more
            parent._entries.pop(self._key, None)
            self._parents = self._parents[:-1]
            return
        assert isinstance(held, Cause)
        parent._claim(held)  # so that no child is ever seen set before its parent
        self._set_by(held)

    def _unlink(self) -> None:
        """Hear no ancestor any more, and have no deadline."""
        for parent in self._parents:
            parent._entries.pop(self._key, None)
        self._parents = ()
        self._deadline = None

    def _seal(self) -> bool:
        """Make sure that nothing sets the token any more, and unlink it; whether nothing had."""
        held = self._entries.setdefault(_CAUSE, _SEALED)
        if held is not _SEALED:  # who set it may not have come to its reason yet; see `_claim`
            self._reason = held.reason  # type: ignore[attr-defined]
        self._unlink()
        return held is _SEALED

    def _limit(self, timeout: float | None) -> None:
        """Have the token set itself after some seconds, from now."""
        span = _clock.seconds(timeout)
        if span is None:
            return
        self._deadline = deadline = time.monotonic() + span
        if span <= 0:
            self._set_by(self._expired())
        else:
            try:
                _clock.add_deadline(deadline, self)
            except BaseException:  # there is no thread for it
                self._deadline = None
                raise

    def _lineage(self) -> list[CancelToken]:
        found: list[CancelToken] = [self]
        seen = {self._key}
        for token in found:  # grows as it goes
            for parent in token._parents:
                if parent._key not in seen:
                    seen.add(parent._key)
                    found.append(parent)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        away = messages.reduce(self)
        if away is not None:
            return away
        raise TypeError(
            "a CancelToken cannot be pickled or copied: it belongs to its process and its group; "
            "let @cancellable inject the token where the function runs, or use current_token()"
        )

    is_set = cancelled
    set = cancel


_setting: dict[int, tuple[CancelToken, Cause]] = {}  # the cancels that are under way


def after_fork() -> None:
    """
    In a forked child: what a thread of the parent's was about to set is set here as well.

    Its callbacks are left to the parent.
    """
    _callbacks.after_fork()
    for token, cause in list(_setting.values()):
        if token._cause is cause:
            token._claim(cause)
            token._spread(cause)
    _setting.clear()


class _Messages(threading.local):
    """
    Whose message the calling thread writes or reads, if it does: a group's to its workers.

    Attributes:
        writing: The group's token, and the number that the workers know it by.
        reading: Finds the token of a number.
    """

    writing: tuple[CancelToken, int] | None = None
    reading: Callable[[int], CancelToken] | None = None

    def reduce(self, token: CancelToken) -> tuple[Any, ...] | None:
        """How a token is pickled, if it may be."""
        if self.writing is None or self.writing[0] is not token:
            return None
        return _find, (self.writing[1],)


messages = _Messages()


def _find(number: int) -> CancelToken:
    if messages.reading is None:
        raise TypeError("a CancelToken can be read by the worker process alone that it was sent to")
    return messages.reading(number)


CancelToken.NEVER = CancelToken()
CancelToken.NEVER._seal()


class _ChildRef(weakref.ref[CancelToken]):
    """A parent's weak hold on a child, which takes itself off the parent's list."""

    __slots__ = ("entries", "key")

    entries: dict[int, object]
    key: int

    def __new__(cls, child: CancelToken, entries: dict[int, object]) -> _ChildRef:
        self = super().__new__(cls, child, _forget)
        self.entries = entries
        self.key = child._key
        return self


def _forget(reference: weakref.ref[CancelToken]) -> None:
    # Runs wherever the last reference to the child is dropped, in the middle of anything.
    if isinstance(reference, _ChildRef):
        reference.entries.pop(reference.key, None)

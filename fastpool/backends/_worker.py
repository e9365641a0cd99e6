"""A worker process: the far side of `processes`."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator
from multiprocessing.connection import Connection
from typing import Any

from fastpool import _clock
from fastpool._errors import in_words, is_a
from fastpool._frames import Call, looking, place, show
from fastpool._scope import current, this_thread
from fastpool._token import CancelToken, Cause, messages
from fastpool.backends._wire import (
    FOLLOWS,
    PROTOCOL,
    SHORT,
    Far,
    Shared,
    dump_error,
    dump_reason,
    load_reason,
)
from fastpool.backends.threads import shutdown
from fastpool.exceptions import Cancelled

__all__ = ["main"]

SWITCH = 0.001  # seconds: a task that computes lets the thread in that brings a cancel
INNERMOST = 50  # calls of a stack that are told
LAST_WORDS = 0.2  # seconds that tasks have to clean up when the parent has gone

Message = tuple[Any, ...]
Outcome = tuple[str, object]  # a word for it, and the value, the error or the reason

EMPTY = contextvars.Context()
PLAIN: Message = ({}, None, None)  # no keyword arguments, timeout nor variables


GROUP = object()  # that of a task: it is in another process, but a group in here is inside it


class GroupToken(CancelToken):
    """The token of a group as its tasks have it here: one that sets it tells the parent."""

    __slots__ = ("_tell",)

    def __init__(self, tell: Callable[[Cause], None]) -> None:
        super().__init__()
        self._tell = tell

    def _set_by(
        self, cause: Cause, run: Callable[[Callable[[], object]], object] | None = None
    ) -> bool:
        if not self.cancelled():
            self._tell(cause)
        return super()._set_by(cause, run)


class Place:
    """Where a task is: its own token is a child of its group's."""

    __slots__ = ("_group", "_thread", "_token")

    def __init__(self, parent: CancelToken, thread: object) -> None:
        self._token = CancelToken()
        self._token._link(parent, strongly=True)
        self._group = GROUP
        self._thread: object = thread

    def end(self) -> None:
        """The task has ended: nothing sets its token any more, and no callback runs after it."""
        self._thread = None
        if not self._token._seal():
            self._token._close_callbacks()


class Calls:
    """
    The calls of one message, by their numbers. Each has a place, made when somebody asks for it.

    Asked for by the thread that runs them, by one that has the context of a call, and by the one
    that hears; `setdefault` decides who has made it.
    """

    __slots__ = (
        "_thread",
        "at",
        "calls",
        "kept",
        "last",
        "over",
        "places",
        "sent",
        "token",
        "values",
    )

    def __init__(self, token: CancelToken, calls: list[Any]) -> None:
        self.token = token  # the group's
        self.calls = calls
        self.at = -1  # the one that runs
        self.places: dict[int, Place] = {}
        self.values: list[object] = []  # what they have returned, the first ones first
        self.last: Outcome | None = None  # what the one after these came to, if that is no value
        # Written with `Worker._answering` held: how many of the values have gone home, while
        # another call ran; and that the answer has been given.
        self.sent = 0
        self.over = False
        self._thread = this_thread()

    def task(self, index: int) -> Place:
        """Where a call is. The name is what contexts ask by, see `Places`."""
        place = self.places.get(index)
        if place is None:
            fresh = Place(self.token, self._thread)
            place = self.places.setdefault(index, fresh)
            if place is not fresh:
                fresh.end()
            # Looked at after it can be found: who ends the call does the reverse.
            if self.at != index:
                self.places.pop(index, None)
                place.end()
        return place

    def heard(self, number: int) -> CancelToken:
        """The token of a call; its group's, as long as nobody has asked for its own."""
        place = self.places.get(number)
        return self.token if place is None else place._token

    def disown(self) -> None:
        """In a forked child: the call that runs is its last, and none of them is its own."""
        self.kept = self.calls.copy()  # code of theirs may run as they go: not in the fork
        self.calls.clear()

    def end(self, number: int) -> None:
        """A call has ended."""
        self.at = -1
        place = self.places.pop(number, None)
        if place is not None:
            place.end()

    def failed(self, number: int, error: BaseException) -> tuple[str, object]:
        """What a call comes to that has raised."""
        heard = self.heard(number)
        if is_a(error, Cancelled) and heard.cancelled():
            late = heard is not self.token and heard._set_itself()
            return ("late", dump_error(error)) if late else ("cancelled", None)
        return "error", dump_error(error)


class Worker:
    """
    One process: its main thread runs calls, another hears of cancels meanwhile.

    The main one alone writes, but for `_tokens` and `_cancelled`, by single atomic operations.
    """

    def __init__(self, calls: Connection, control: Connection, shared: Any) -> None:
        self._calls = calls
        self._control = control
        self._shared = shared
        self._main = threading.get_ident()
        self._told = threading.Event()  # of all that was ordered
        # Guards the writing to `calls`: what runs may set a group's token in any thread. Held while
        # something is written; who may come in the middle of that leaves its message in `_outbox`.
        self._answering = threading.Lock()
        self._outbox: deque[bytes] = deque()
        self._functions: dict[int, Callable[..., Any]] = {}
        self._unreadable: dict[int, Far] = {}  # functions that could not be read, and why
        # By the number of the run: set by the thread that hears, used by the one that runs.
        self._tokens: dict[int, CancelToken] = {}
        self._batch: Calls | None = None  # those that run, or ran last
        self._cancelled: dict[int, Far] = {}  # tasks that are not to begin, and why

    def disown(self) -> None:
        """In a forked child, which must not answer in this process's name, nor keep its pipes."""
        self._answering = threading.Lock()
        self._shared = Shared()  # one that nobody else sees
        self._calls.close()
        self._control.close()
        if self._batch is not None:
            self._batch.disown()

    # --- Hearing ---------------------------------------------------------------------------

    def hear(self) -> None:
        """
        Take orders, until the parent is gone. The process ends with that, whatever it ends by:
        nobody could stop what runs in here any more, and it would outlive the parent.
        """
        try:
            self._take_orders()
            for run in list(self._tokens):
                self._cancel(run, dump_reason("the process that wanted it has gone"), failed=False)
            time.sleep(LAST_WORDS)
        except BaseException as error:
            _say(error)
        finally:
            os._exit(1)

    def _take_orders(self) -> None:
        while True:
            try:
                order = self._control.recv_bytes()
            except (EOFError, OSError):
                return
            self._follow(*pickle.loads(order))

    def _follow(self, word: str, *rest: Any) -> None:
        """What an order says."""
        if word == "cancel":
            self._cancel(*rest)
        elif word == "cancel task":
            self._cancel_task(*rest)
        elif word == "all told":
            self._told.set()
        elif word == "so far":
            batch = self._batch
            if batch is not None:  # code of theirs may run in pickling: not here
                _clock.run_in_helper(functools.partial(self._send_so_far, batch))
        elif word == "where":
            with contextlib.suppress(OSError):  # nobody is left to hear it
                self._control.send_bytes(pickle.dumps((*rest, self._where()), PROTOCOL))

    def _cancel(self, run: int, reason: Far, failed: bool) -> None:
        token = self._token_of(run)
        # Not the token's own, which would tell the parent.
        cause = _cause(token, reason, failed=failed)
        CancelToken._set_by(token, cause, _clock.run_in_helper)

    def _cancel_task(self, number: int, reason: Far) -> None:
        self._cancelled[number] = reason
        batch = self._batch
        # Looked at after it was noted: it has begun, or does not begin.
        if batch is not None and batch.at == number:
            token = batch.task(number)._token
            token._set_by(_cause(token, reason, failed=False), _clock.run_in_helper)

    def _token_of(self, run: int) -> CancelToken:
        token = self._tokens.get(run)
        if token is None:
            token = self._tokens.setdefault(run, GroupToken(functools.partial(self._tell, run)))
        return token

    def _tell(self, run: int, cause: Cause) -> None:
        """A task has set its group's token: the parent is to know."""
        reason = dump_reason(cause.reason)
        message = pickle.dumps(("set", run, cause.failure is not None, reason), PROTOCOL)
        self._outbox.append(message)
        self._empty_outbox()

    def _empty_outbox(self) -> None:
        """Send what is there, unless who is at it does."""
        while self._outbox and self._answering.acquire(blocking=False):
            try:
                self._send_outbox()
            finally:
                self._answering.release()

    def _send_outbox(self) -> None:
        while self._outbox:
            with contextlib.suppress(OSError):  # nobody is left to hear it
                self._calls.send_bytes(self._outbox.popleft())

    @contextlib.contextmanager
    def _writing(self) -> Generator[None, None, None]:
        """Write to `calls`, after what is to go ahead of it."""
        with self._answering:
            self._send_outbox()
            yield
        self._empty_outbox()

    def _where(self) -> str:
        """The main thread's stack, the innermost of it; empty if that cannot be told."""
        try:
            calls: list[Call] = []
            with looking():
                frame = sys._current_frames().get(self._main)
                while frame is not None and frame.f_code.co_filename != __file__:
                    calls.append(place(frame))
                    frame = frame.f_back
            return "".join(show(calls[INNERMOST - 1 :: -1]))[-SHORT:]
        except BaseException:  # whatever it is: this thread is to go on hearing
            return ""

    # --- Running ---------------------------------------------------------------------------

    def serve(self) -> None:
        """Run what comes, until there is nothing more to come."""
        with contextlib.suppress(EOFError, OSError):  # nobody is left to hear it
            while True:
                self._answer(self._calls.recv_bytes())

    def _answer(self, message: bytes) -> None:
        try:
            word, *rest = self._read(message)
        except BaseException:  # one of the arguments; each by itself, then
            self._send(pickle.dumps(("unread", 0.0), PROTOCOL))
            return
        if self._calls.closed:
            return  # reading it has forked, and this is the child
        if word == "run":
            del message
            self._run_batch(*rest)
        elif word == "again":
            assert self._batch is not None
            self._send(self._each(self._batch))
        else:  # there is nothing to do: keep nothing alive meanwhile
            self._batch = None
            if word == "end":
                self._forget()

    def _forget(self) -> None:
        """The group has ended."""
        # In this thread: it is about to have the token of the next one, and in the other a late
        # word about the group before could come between.
        for belongings in (self._tokens, self._functions, self._unreadable, self._cancelled):
            belongings.clear()

    def _send(self, answer: bytes) -> None:
        with self._writing():
            self._send_now(answer)

    def _send_now(self, answer: bytes) -> None:
        if len(answer) > SHORT:
            self._calls.send_bytes(FOLLOWS)
        self._calls.send_bytes(answer)

    def _run_batch(
        self,
        run: int,
        first: int,
        span: float | None,
        slice_: float,
        functions: dict[int, bytes],
        key: int | None,
        calls: list[Any],
    ) -> None:
        """Run what has come in one message, and send home what it comes to."""
        # A word of another group's may have come late; one of this one's may have come already.
        for old in [number for number in list(self._tokens) if number != run]:
            self._tokens.pop(old, None)
        for number in [number for number in list(self._cancelled) if number < first]:
            self._cancelled.pop(number, None)
        token = self._token_of(run)
        if span is not None and token.deadline is None:
            # To be asked for. When it passes the parent says so: with a clock of our own this
            # could be over before the parent knew why.
            token._deadline = time.monotonic() + span
        batch = self._batch = Calls(token, calls)
        self._learn(functions)
        begun = time.monotonic()
        batch.last = self._run_calls(batch, first, key, begun + slice_)
        took = time.monotonic() - begun
        calls.clear()
        while not batch.over:
            sent = batch.sent
            values, last = batch.values[sent:], batch.last
            try:
                if last is None:
                    answer = pickle.dumps(("values", took, values), PROTOCOL)
                else:
                    answer = pickle.dumps(("stopped", took, values, last), PROTOCOL)
            except BaseException:
                answer = self._each(batch)
            self._shared.over = True
            with self._writing():
                if batch.sent == sent:  # else some of it has gone home meanwhile
                    batch.over = True
                    self._send_now(answer)

    def _each(self, batch: Calls) -> bytes:
        """The answer, each outcome by itself, so that one that is no good spoils no other."""
        outcomes = [("value", value) for value in batch.values[batch.sent :]]
        if batch.last is not None:
            outcomes.append(batch.last)
        return pickle.dumps(("each", 0.0, list(map(self._encoded, outcomes))), PROTOCOL)

    def _send_so_far(self, batch: Calls) -> None:
        """Send home what calls have returned behind which one runs that takes its time."""
        values = batch.values.copy()
        outcomes = [self._encoded(("value", value)) for value in values]
        message = pickle.dumps(("so far", outcomes), PROTOCOL)
        with contextlib.suppress(OSError), self._writing():
            if not batch.over:
                batch.sent = len(values)
                self._send_now(message)

    def _read(self, message: bytes) -> Any:
        """What the parent has sent, which may have the token of a group in it."""
        messages.reading = self._token_of
        try:
            return pickle.loads(message)
        finally:
            messages.reading = None

    def _learn(self, functions: dict[int, bytes]) -> None:
        """Read functions that are new."""
        for key, pickled in functions.items():  # one may have been another's before
            self._functions.pop(key, None)
            self._unreadable.pop(key, None)
            try:
                self._functions[key] = self._read(pickled)
            except BaseException as error:
                self._unreadable[key] = dump_error(error)

    def _run_calls(
        self,
        batch: Calls,
        first: int,
        key: int | None,
        until: float,
    ) -> Outcome | None:
        """
        Run calls one after the other, until a moment has come or one of them has no value.

        Args:
            batch: The calls.
            first: The number of the first.
            key: The function of all of them, if each is but a tuple of arguments.
            until: When to go home with what there is, on `time.monotonic()`.

        Returns:
            What the last one came to, if that is no value.
        """
        fn = None if key is None else self._functions.get(key)
        shared, token, cancelled, values = self._shared, batch.token, self._cancelled, batch.values
        clock, fresh, append = time.monotonic, EMPTY.copy, values.append  # it is what a task costs
        recalled = False
        for number, call in enumerate(batch.calls, first):
            stop = token._reason is not None
            if values and (stop or clock() >= until):
                return None
            shared.at = batch.at = number  # said first, and looked for orders then
            if shared.ordered:
                self._catch_up()
                recalled = shared.recalled
            if recalled and values:
                return None  # this one has been taken back
            if fn is None or stop or number in cancelled:
                whole = call if key is None else (key, call)
                how, value = self._run_call(batch, number, whole)
                if how != "value":
                    return how, value
            else:
                try:
                    value = fresh().run(_call, (number, batch), fn, call)
                except BaseException as error:
                    return batch.failed(number, error)
                finally:
                    batch.at = -1
                    if batch.places:
                        batch.end(number)
            append(value)
        return None

    def _catch_up(self) -> None:
        """Hear which tasks have been cancelled by now: what is cancelled does not begin after."""
        self._shared.ordered = False  # first: what is ordered from here on is seen the next time
        self._told.clear()
        with contextlib.suppress(OSError), self._writing():
            self._calls.send_bytes(pickle.dumps(("ordered",), PROTOCOL))
        self._told.wait()  # if the parent has gone, the process ends meanwhile

    def _run_call(self, batch: Calls, number: int, call: Message | bytes) -> Outcome:
        """Run a call, with everything that may go along with it."""
        whole: Message
        try:
            whole = self._read(call) if isinstance(call, bytes) else call
        except BaseException as error:
            return "unread", ("arguments", dump_error(error))
        if len(whole) == 2:
            whole += PLAIN
        key, args, kwargs, timeout, variables = whole
        if key in self._unreadable:
            return "unread", ("function", self._unreadable[key])
        try:
            if number in self._cancelled or batch.token.cancelled():
                return "cancelled", None
            if timeout is not None:
                batch.task(number)._token._limit(timeout)
            context = EMPTY.copy()
            context.run(current.set, (number, batch))
            if variables is not None:
                context.run(_bind, *variables)
            return "value", context.run(self._functions[key], *args, **kwargs)
        except BaseException as error:
            return batch.failed(number, error)
        finally:
            batch.end(number)

    def _encoded(self, outcome: tuple[str, object]) -> bytes:
        """An outcome by itself, so that one that cannot be pickled spoils no other."""
        try:
            return pickle.dumps(outcome, PROTOCOL)
        except BaseException as error:
            return pickle.dumps(("unsent", _why(outcome[1], error)), PROTOCOL)


def _why(value: object, error: BaseException) -> tuple[str, str]:
    return f"returned a {type(value).__name__}", in_words(error)


def _say(error: BaseException) -> None:
    """Why the process ends."""
    text = "".join(["fastpool: a worker process ends\n", *traceback.format_exception(error)])
    # Not `sys.stderr`, whose lock another thread may hold; nor where nobody reads.
    if select.select([], [2], [], LAST_WORDS)[1]:
        os.write(2, text.encode("utf-8", "backslashreplace")[-select.PIPE_BUF :])


def _cause(token: CancelToken, reason: Far, *, failed: bool) -> Cause:
    value = load_reason(reason)
    failure = value if failed and isinstance(value, BaseException) else None
    return Cause(value, source=token._key, failure=failure)


def _call(place: tuple[int, Calls], fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    current.set(place)
    return fn(*args)


def _bind(logged: dict[str, Any], named: list[tuple[str, str, Any]]) -> None:
    """Set the variables that have come along."""
    if logged:
        from structlog.contextvars import bind_contextvars

        bind_contextvars(**logged)
    for module, name, value in named:
        getattr(importlib.import_module(module), name).set(value)


def _ignore(signum: int, frame: object) -> None:
    """Ctrl-C is the parent's. Not `SIG_IGN`, which programs started from here would inherit."""


def _warm_up() -> None:
    """
    Do once what a failure takes. The first time is five times as slow as the next ones, and who
    waits for the real one are all its siblings.
    """
    token = CancelToken()
    token.cancel(load_reason(dump_reason(ValueError("to be warm"))))
    try:
        token.sleep(0)
    except Cancelled as error:
        traceback.format_exception(error)  # while it has frames: the other one takes off ours
        dump_error(error)


def main(calls: Connection, control: Connection, shared: Any, start: bytes) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, _ignore)
    if hasattr(signal, "pthread_sigmask"):  # it was started with that blocked
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sys.setswitchinterval(SWITCH)
    worker = Worker(calls, control, shared)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=worker.disown)
    threading.Thread(target=worker.hear, name="fastpool-control", daemon=True).start()
    word: tuple[str, object] = "hello", os.getpid()
    try:
        initializer, initargs = pickle.loads(start)
        if initializer is not None:
            pickle.loads(initializer)(*initargs)
    except BaseException as error:
        word = "failed", dump_error(error)
    with contextlib.suppress(OSError):  # the parent has gone, or this is a child of a fork
        calls.send_bytes(pickle.dumps(word, PROTOCOL))
        if word[0] == "hello":
            _warm_up()
            worker.serve()
    if "fastpool.backends.processes" in sys.modules:  # the interpreter would wait for idle ones
        shutdown()

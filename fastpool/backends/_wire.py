"""What goes to a worker process and comes back, as bytes."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import pickle
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from fastpool._cancellable import Cancellable, Injecting, rewrap
from fastpool._errors import add_note, in_words, strip
from fastpool._task import label
from fastpool.exceptions import describe

__all__ = [
    "FOLLOWS",
    "LONG",
    "PROTOCOL",
    "SHORT",
    "Far",
    "Shared",
    "cannot_return",
    "dump_error",
    "dump_function",
    "dump_reason",
    "load_error",
    "load_reason",
]

PROTOCOL = pickle.HIGHEST_PROTOCOL
SHORT = 16_384  # bytes, which go in one piece: to receive more takes as long as its sender does
LONG = 65_536  # bytes, which a pipe takes: to send more takes as long as its reader does
FOLLOWS = b"long"  # the message before a long one


class Shared(ctypes.Structure):
    """
    What a worker and its lane see of each other without a message.

    Attributes:
        at: The number of the call that the worker is at.
        ordered: Whether there are orders that it is to hear before it begins another one.
        recalled: Whether it is to begin no other one of those that it has.
        over: Whether the last one is over, and what they came to is on its way home.
    """

    _fields_ = [
        ("at", ctypes.c_longlong),
        ("ordered", ctypes.c_bool),
        ("recalled", ctypes.c_bool),
        ("over", ctypes.c_bool),
    ]

    if TYPE_CHECKING:
        at: int
        ordered: bool
        recalled: bool
        over: bool


class Far(NamedTuple):
    """
    An exception on its way home.

    Attributes:
        pickled: The exception itself; None if that cannot be pickled, or not read again.
        kind: The name of its class.
        text: What it says.
        why: Why it cannot come itself, if it cannot.
        traceback: As text.
    """

    pickled: bytes | None
    kind: str
    text: str
    why: str
    traceback: str


def dump_function(fn: Callable[..., Any]) -> bytes:
    """
    A function as bytes: its name, where it has one, or with cloudpickle all of it.

    Raises:
        TypeError: If it cannot be sent.
    """
    try:
        return pickle.dumps(fn, PROTOCOL)
    except Exception as error:
        try:
            cloudpickle = importlib.import_module("cloudpickle")
        except ModuleNotFoundError:
            raise TypeError(
                f"{label(fn)}() cannot be sent to a worker process: {in_words(error)}; define it at"
                " the top of a module, or have it sent by value: pip install fastpool[processes]"
            ) from error
        file = io.BytesIO()
        try:
            _by_value(cloudpickle)(file, PROTOCOL).dump(fn)
        except Exception as wrong:
            why = in_words(wrong)
            raise TypeError(f"{label(fn)}() cannot be sent to a worker process: {why}") from wrong
        return file.getvalue()


def _by_value(cloudpickle: Any) -> Any:
    """cloudpickle's pickler, to which what we have decorated would be the bare function."""

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc] # a class of an optional package
        def reducer_override(self, obj: Any) -> Any:
            if not issubclass(type(obj), Injecting):
                return super().reducer_override(obj)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] # nor has it stubs
            if issubclass(type(obj), Cancellable):
                try:
                    pickle.dumps(obj, PROTOCOL)
                except Exception:  # it has no name
                    return rewrap, (obj.__wrapped__, *obj._self_place)
            return obj.__reduce__()

    return Pickler


def dump_error(error: BaseException) -> Far:
    """An exception as it goes home, in the thread that caught it. Raises nothing."""
    strip(error)  # of our frames, which nobody looks for there, and which take long to write out
    try:
        lines = "".join(traceback.format_exception(error))
    except BaseException:  # its own code
        lines = describe(error)
    return _dump(error)._replace(traceback=lines)


def _dump(error: BaseException) -> Far:
    """The same without the traceback, which is what takes long."""
    try:
        text = str(error)
    except BaseException:
        text = describe(error)
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    try:
        pickled = pickle.dumps(error, PROTOCOL)
        if type(pickle.loads(pickled)) is type(error):
            return Far(pickled, kind, text, "", "")
        why = "it comes out of its pickle as something else"
    except BaseException as wrong:
        why = in_words(wrong)
    return Far(None, kind, text, why, "")


def dump_reason(reason: object) -> Far:
    """
    Why something was cancelled, as it goes along with an order. Raises nothing.

    It is short: whoever gives the order must not wait until it is read, since its reader may be
    what does not stop.
    """
    if isinstance(reason, BaseException):
        far = _dump(reason)
    else:
        far = Far(None, type(reason).__qualname__, describe(reason), "", "")
        with contextlib.suppress(BaseException):
            far = far._replace(pickled=pickle.dumps(reason, PROTOCOL))
    if far.pickled is not None and len(far.pickled) > SHORT:
        far = far._replace(pickled=None)
    return far._replace(text=far.text[: SHORT // 16], why="")


def load_reason(far: Far) -> object:
    """The reason itself, or what it says if it cannot be read here. Raises nothing."""
    with contextlib.suppress(BaseException):
        if far.pickled is not None:
            return pickle.loads(far.pickled)
    return f"{far.kind}: {far.text}"


def load_error(far: Far, task: str, worker: str) -> BaseException:
    """The exception that a task left in a worker, with its traceback there as a note."""
    error: BaseException | None = None
    why = far.why
    if far.pickled is not None:
        try:
            loaded: object = pickle.loads(far.pickled)
            if isinstance(loaded, BaseException):
                error = loaded
        except BaseException as wrong:
            why = in_words(wrong)
    if error is None:
        error = cannot_return(task, f"raised {far.kind}: {far.text}", why)
    add_note(error, f"the traceback in {worker}:\n{far.traceback.rstrip()}")
    return error


def cannot_return(task: str, what: str, why: str) -> TypeError:
    """What a task fails with whose outcome cannot come home."""
    return TypeError(f"task {task!r} {what}, which cannot be sent back from its process: {why}")

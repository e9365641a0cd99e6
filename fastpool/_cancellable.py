"""How the token reaches the function."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import re
import reprlib
import sys
from collections.abc import Callable
from inspect import Parameter
from types import CodeType, FunctionType, MethodType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Concatenate,
    ForwardRef,
    Generic,
    ParamSpec,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    overload,
)

import wrapt

from fastpool import _marks
from fastpool._errors import strip
from fastpool._scope import current_token, enter, is_own, leave
from fastpool._token import CancelToken
from fastpool._whole import whole

__all__ = ["UNRUNNABLE", "Cancellable", "Injecting", "cancellable", "refuse", "rewrap"]

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")


class _Owner(Protocol):
    """What may stand before a token: anything but a token, which to checkers lacks this."""

    def __sizeof__(self) -> int: ...


S = TypeVar("S", bound=_Owner)

_signature: Callable[..., inspect.Signature] = inspect.signature
_annotations: Callable[..., dict[str, Any]] = inspect.get_annotations
if sys.version_info >= (3, 14):
    from annotationlib import Format

    # Annotations are evaluated late there, and may use names that only checkers import.
    _signature = functools.partial(_signature, annotation_format=Format.FORWARDREF)
    _annotations = functools.partial(_annotations, format=Format.FORWARDREF)


class Injecting:
    """
    What a decorated function and a bound one have in common.

    Both are proxies: an attribute that is not defined here, and does not begin with `_self_`,
    is the wrapped function's, also when it is set.
    """

    if TYPE_CHECKING:
        __wrapped__: Any  # Any: whatever was decorated
        # The token's parameter, and its place among the positional ones; None: keyword-only.
        _self_place: tuple[str, int | None]
        _self_parent: Any  # the decorated function that was bound

    def with_token(self, token: CancelToken, /, *args: Any, **kwargs: Any) -> Any:
        """
        Call the function with a token, which is current during the call.

        What the call raises is reported to the token: it is recorded, and the token set. Not
        so if the token is current because this thread made it so: then the call just raises.

        Args:
            token: The token; the other arguments are the function's.

        Returns:
            What the function returns.

        Raises:
            TypeError: If `token` is no `CancelToken`.
            BaseException: What the function raises, the very object.
        """
        if not isinstance(token, CancelToken):
            raise TypeError(
                f"with_token() wants a CancelToken first, not {reprlib.repr(token)}; "
                f"to use the current one, call {_name(self.__wrapped__)}() itself"
            )
        if self._self_parent is None and self._self_place[1] == 1:
            # Since Python 3.13 @classmethod makes a plain method of us, which passes our own
            # attributes on as they are: the class is lost.
            first = next(iter(self.__signature__.parameters))
            if first == "cls" and args and not isinstance(args[0], type):
                raise TypeError(
                    f"{_name(self.__wrapped__)}.with_token() does not know its class; put "
                    "@cancellable above @classmethod, or call it under use_token(token)"
                )
        if is_own(token):
            return self._self_inject(token, args, kwargs)
        scope = enter(token)
        try:
            return self._self_inject(token, args, kwargs)
        except BaseException as error:
            strip(error)
            token._report(error)
            raise
        finally:
            try:
                leave(scope)
            except BaseException:  # what a signal handler raised
                whole(leave, scope)
                raise
            finally:
                del self, token, args, kwargs, scope  # the token has the error as its reason now

    def _self_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        param, index = self._self_place
        if index is None and param in kwargs:
            # To checkers a keyword-only token is an optional argument like any other.
            token = kwargs.pop(param)
            if isinstance(token, CancelToken):
                return self.with_token(token, *args, **kwargs)
            if token is not None:
                raise TypeError(
                    f"{_name(self.__wrapped__)}() wants a CancelToken as {param!r}, not "
                    f"{reprlib.repr(token)}; without one it takes the current token"
                )
        return self._self_inject(current_token(), args, kwargs)

    @_marks.calls_out
    def _self_inject(
        self, token: CancelToken, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        fn, parent = self.__wrapped__, self._self_parent
        param, index = self._self_place
        if parent is not None and index is not None and isinstance(fn, MethodType):
            if index:
                index -= 1
            else:  # a class has `fetch = fetch`: the object is what follows the token
                fn, args = parent.__wrapped__, (fn.__self__, *args)
        try:
            if index is None or index > len(args):  # keyword-only, or `self` came by keyword
                return fn(*args, **{param: token}, **kwargs)
            return fn(*args[:index], token, *args[index:], **kwargs)
        except TypeError as error:
            self._self_refuse_token(error, args, kwargs)
            raise

    def _self_refuse_token(
        self, error: TypeError, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Where a call could not be made since it was given the token, say how it is to be made."""
        traceback = error.__traceback__
        by_hand = self._self_place[0] in kwargs or any(isinstance(a, CancelToken) for a in args)
        if by_hand and traceback is not None and traceback.tb_next is None:
            name = _name(self.__wrapped__)
            raise TypeError(
                f"{name}() is given its token by itself; to name one, write "
                f"{name}.with_token(token, ...)"
            ) from error

    @property
    def __signature__(self) -> inspect.Signature:
        signature = _signature(_function(self.__wrapped__))
        parameters = [p for p in signature.parameters.values() if p.name != self._self_place[0]]
        return signature.replace(parameters=parameters)

    if not TYPE_CHECKING:  # to checkers they are plain attributes of every object

        @property
        def __annotations__(self):
            return self._self_strip(_annotations(_function(self.__wrapped__)))

        @property
        def __annotate__(self):  # Python 3.14
            fn = _function(self.__wrapped__)
            return lambda format, /: (
                self.__annotations__
                if format == Format.VALUE
                else self._self_strip(inspect.get_annotations(fn, format=format))
            )

    def _self_strip(self, annotations: dict[str, Any]) -> dict[str, Any]:
        return {name: kind for name, kind in annotations.items() if name != self._self_place[0]}

    def __repr__(self) -> str:
        return f"<cancellable {self.__wrapped__!r}>"

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    # By identity; wrapt compares what is wrapped, so we would equal the bare function.
    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__


class _BoundCancellable(Injecting, wrapt.BoundFunctionWrapper[..., Any]):
    """A decorated method, as an object or its class gives it."""

    @_marks.calls_out
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        fn = self.__wrapped__
        if type(fn) is MethodType and self._self_parent._self_place[1] == 1:
            try:
                return fn(current_token(), *args, **kwargs)  # the short way, for most methods
            except TypeError as error:
                self._self_refuse_token(error, args, kwargs)
                raise
        return self._self_call(args, kwargs)

    @property
    def __func__(self) -> Any:  # where `inspect` looks for the signature of a method
        return self._self_parent

    @property
    def __signature__(self) -> inspect.Signature:
        signature: inspect.Signature = self._self_parent.__signature__
        if isinstance(self.__wrapped__, MethodType):
            signature = signature.replace(parameters=[*signature.parameters.values()][1:])
        return signature

    def __reduce__(self) -> tuple[Any, ...]:
        fn = self.__wrapped__
        owner = fn.__self__ if isinstance(fn, MethodType) else self._self_owner
        if getattr(owner, fn.__name__, None) != self:
            raise pickle.PicklingError(
                f"cannot pickle {_name(fn)}(): {reprlib.repr(owner)} has something else under "
                "that name; decorate the method in its class"
            )
        return getattr, (owner, fn.__name__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if not isinstance(self.__wrapped__, MethodType):
            return self
        owner = copy.deepcopy(self.__wrapped__.__self__, memo)
        return self._self_parent.__get__(owner, self._self_owner)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _BoundCancellable):
            return NotImplemented
        same: bool = self.__wrapped__ == other.__wrapped__
        return same and self._self_parent is other._self_parent

    def __hash__(self) -> int:
        return hash(self.__wrapped__)


if TYPE_CHECKING:

    class Cancellable(Generic[P, R_co]):
        __name__: str
        __qualname__: str
        __module__: str

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
        def with_token(self, token: CancelToken, /, *args: P.args, **kwargs: P.kwargs) -> R_co:
            """Call the function with a token, which is current in the call and told if it fails."""
            ...

    _TokenElsewhere: Any  # Any: checkers know one class of them
else:

    class Cancellable(Injecting, wrapt.FunctionWrapper):
        """
        What `cancellable` makes of a function: the same without its token.

        It is written like `Callable` in annotations: `Cancellable[[str], bytes]`.
        """

        __bound_function_wrapper__ = _BoundCancellable

        def __init__(self, fn, param, index):
            super().__init__(fn, None)  # None: what wrapt's own `__call__` would call
            self._self_place = param, index

        def __get__(self, instance, owner=None):
            if instance is None and type(self.__wrapped__) is FunctionType:
                return self  # as a function does
            return super().__get__(instance, owner)

        # The short way, for a token that comes first: wrapt's own `__call__` takes three times
        # as long, and every attribute that is read of a proxy costs as much as a call.
        @_marks.calls_out
        def __call__(self, /, *args, **kwargs):
            try:
                return self.__wrapped__(current_token(), *args, **kwargs)
            except TypeError as error:
                self._self_refuse_token(error, args, kwargs)
                raise

        def __reduce__(self):
            name = getattr(self.__wrapped__, "__qualname__", "<object>")
            if "<" not in name:
                return name
            raise pickle.PicklingError(
                f"cannot pickle {_name(self.__wrapped__)}(): functions are pickled by name, and "
                "a lambda, a local function, a partial or an object has none that can be looked "
                "up; write a function at the top level of a module, and decorate that"
            )

    class _TokenElsewhere(Cancellable):
        """The token does not come first."""

        def __call__(self, /, *args, **kwargs):
            return self._self_call(args, kwargs)


class _Decorator(Protocol):
    @overload
    def __call__(self, fn: Callable[Concatenate[CancelToken, P], R], /) -> Cancellable[P, R]: ...
    @overload
    def __call__(
        self, fn: Callable[Concatenate[S, CancelToken, P], R], /
    ) -> Callable[Concatenate[S, P], R]: ...
    @overload
    def __call__(
        self, fn: Callable[Concatenate[type[T], CancelToken, P], R], /
    ) -> Callable[Concatenate[type[T], P], R]: ...
    @overload  # the token stands among the keywords, or is of another kind to checkers
    def __call__(self, fn: Callable[P, R], /) -> Callable[P, R]: ...


@overload
def cancellable(fn: Callable[Concatenate[CancelToken, P], R], /) -> Cancellable[P, R]: ...
@overload
def cancellable(
    fn: Callable[Concatenate[S, CancelToken, P], R], /
) -> Callable[Concatenate[S, P], R]: ...
@overload
def cancellable(
    fn: Callable[Concatenate[type[T], CancelToken, P], R], /
) -> Callable[Concatenate[type[T], P], R]: ...
@overload
def cancellable(fn: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def cancellable(*, param: str | None = None) -> _Decorator: ...
def cancellable(fn: Any = None, /, *, param: str | None = None) -> Any:
    """
    Give a function a cancel token, and take the token's parameter out of its signature.

    A direct call, `fetch(url)`, fills it with the current token, and checks nothing by itself.
    `fetch.with_token(token, url)` names one, and sets it if the call fails.

    The token is gone for type checkers too; one among the keywords stays, as optional. They know
    `with_token` of functions, not of methods, and before `**kwargs: T` they want the token to be
    positional-only (`token: CancelToken, /`).

    Args:
        fn: A function, a method (above or below `@classmethod` and `@staticmethod`), a
            `functools.partial`, or an object with a `__call__`.
        param: The token's parameter. If not given: the one annotated `CancelToken`, optional
            or not, else an unannotated one named `token`. It must be the first (after a first
            one named `self` or `cls`), or keyword-only with a default.

    Returns:
        The function without that parameter. It pickles by name, if it can be found by it.

    Raises:
        TypeError: If it is not clear which parameter is the token's, or that stands elsewhere;
            if the function is decorated already; if it is `async def`, or a generator function.
    """
    if fn is None:
        return functools.partial(_decorate, param=param)
    return _decorate(fn, param)


def _decorate(fn: Any, param: str | None) -> Any:
    function = _function(fn)
    if not callable(function):
        raise TypeError(
            f"@cancellable wants a function, not {reprlib.repr(fn)}; it goes below @property, and "
            "the token's parameter is named by @cancellable(param='event')"
        )
    name = _name(fn)
    if isinstance(_innermost(fn), Injecting):
        raise TypeError(f"{name}() is @cancellable already; decorate it once")
    _refuse_unrunnable(fn)
    try:
        parameters = list(_signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}() does not tell its parameters; write a function around it: "
            f"def task(token): {name}(...)"
        ) from error
    token = _find_token(fn, parameters, param)
    index = None if token.kind is Parameter.KEYWORD_ONLY else parameters.index(token)
    if index is None:
        misplaced = token.default is Parameter.empty
    else:
        owned = parameters[0].name in ("self", "cls")
        misplaced = not isinstance(fn, classmethod) <= index <= owned
    if misplaced:
        raise TypeError(
            f"{token.name!r}, the token of {name}(), must be the first parameter (after self or "
            "cls), or keyword-only with a default"
        )
    if type(fn) is MethodType and isinstance(fn.__func__, FunctionType):
        # Bound too early: decorate the function, and bind that.
        inner = rewrap(fn.__func__, token.name, None if index is None else index + 1)
        return inner.__get__(fn.__self__, type(fn.__self__))
    return rewrap(fn, token.name, index)


def rewrap(fn: Any, param: str, index: int | None) -> Any:
    """The wrapper of a function whose token is known to be that parameter, at that index."""
    kind: Any = Cancellable if index == 0 else _TokenElsewhere
    return kind(fn, param, index)


def _find_token(fn: Any, parameters: list[Parameter], param: str | None) -> Parameter:
    single = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if param is None:
        names = getattr(inspect.unwrap(_innermost(fn)), "__globals__", {})
        unannotated = [p for p in single if p.name == "token" and p.annotation is p.empty]
        found = [p for p in single if _means_token(p.annotation, names)] or unannotated
    else:
        found = [p for p in single if p.name == param]
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(p.name for p in found)
        raise TypeError(
            f"{_name(fn)}() has more than one parameter for a token: {several}; "
            f"say which with @cancellable(param={found[0].name!r})"
        )
    raise TypeError(
        f"{_name(fn)}() has no parameter {'for a token' if param is None else repr(param)}; "
        "annotate one as in (token: CancelToken, ...), or name it: @cancellable(param='event')"
    )


# A token in a string that can't be evaluated, alone or in a union.
_TOKEN_IN_TEXT = re.compile(
    r"""(?:[\w.]*\b(?:Optional|Union)\[)?[\w.|,\s'"]*\bCancelToken\b(?!\.)[\w.|,\s'"]*\]?"""
)


def _means_token(annotation: Any, names: dict[str, Any]) -> bool:
    """Whether an annotation means a token, optional or not; `names` are those it may use."""
    if isinstance(annotation, ForwardRef):
        annotation = annotation.__forward_arg__
    if isinstance(annotation, str):
        try:
            return _means_token(eval(annotation, names), names)
        except Exception:  # imported for checkers only, most likely
            return _TOKEN_IN_TEXT.fullmatch(annotation) is not None
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return any(_means_token(part, names) for part in get_args(annotation))
    return annotation is CancelToken


# Functions whose body does not run when they are called.
UNRUNNABLE = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def refuse(fn: object, caller: str = "submit") -> None:
    """
    Raise if something is not a function that a worker can run.

    Args:
        fn: What was given as the function.
        caller: The name of the method that was given it.

    Raises:
        TypeError: If it can't be called, is `async def`, or a generator function.
    """
    if type(fn) is FunctionType:
        if not fn.__code__.co_flags & UNRUNNABLE:
            return
    elif isinstance(fn, Injecting):
        return  # looked at when it was decorated
    elif not callable(fn):
        raise TypeError(
            f"{caller}() wants the function itself, not its result {reprlib.repr(fn)}; "
            f"write {caller}(fetch, url), not {caller}(fetch(url))"
        )
    _refuse_unrunnable(fn)


def _refuse_unrunnable(fn: Any) -> None:
    code = getattr(_innermost(fn), "__code__", None)
    flags = code.co_flags & UNRUNNABLE if isinstance(code, CodeType) else 0
    if flags & inspect.CO_COROUTINE:
        raise TypeError(
            f"{_name(fn)}() is async def, and fastpool runs blocking functions; make it a plain "
            "def, and run that from async code with await fastpool.aio.run(...)"
        )
    if flags:
        raise TypeError(
            f"{_name(fn)}() is {'an async' if flags & inspect.CO_ASYNC_GENERATOR else 'a'} "
            "generator function: its body runs when it is iterated, so outside the task; "
            "return a list instead"
        )


_CLASS_LEVEL: tuple[Any, ...] = (classmethod, staticmethod)


def _function(fn: Any) -> Any:
    """What a class method or static method is made of."""
    return fn.__func__ if isinstance(fn, _CLASS_LEVEL) else fn


def _innermost(fn: Any) -> Any:
    """The function under partials and methods; of an object that can be called, its `__call__`."""
    while True:
        if isinstance(fn, Injecting):
            return fn
        if isinstance(fn, functools.partial):
            fn = fn.func
        elif isinstance(fn, MethodType) or isinstance(fn, _CLASS_LEVEL):  # noqa: SIM101
            fn = fn.__func__
        elif hasattr(fn, "__code__"):
            return fn
        else:
            return type(fn).__call__


def _name(fn: Any) -> str:
    """How a message calls a function: without that in which it is defined."""
    name = getattr(fn, "__qualname__", None) or getattr(_innermost(fn), "__qualname__", "")
    return str(name).rpartition("<locals>.")[2]

"""
How the token reaches a decorated function, and what else stays as it was.
"""

import abc
import asyncio
import contextlib
import copy
import dataclasses
import doctest
import functools
import inspect
import multiprocessing
import operator
import os
import pickle
import pydoc
import subprocess
import sys
import textwrap
import typing
import weakref
from typing import Annotated, Optional, Union

import pytest

from fastpool import Cancelled, CancelToken, cancellable, current_token, use_token
from fastpool._cancellable import Cancellable, refuse

# --- Decorated in every way there is ------------------------------------------------------


@cancellable
def fetch(token: CancelToken, url: str, retries: int = 3) -> list[object]:
    """
    Fetch a page.

    >>> fetch("u")[1:]
    ['u', 3]
    """
    return [token, url, retries]


@cancellable
def keyword(url: str, retries: int = 3, *, token: CancelToken = CancelToken.NEVER):
    """Take the token by keyword."""
    return [token, url, retries]


@cancellable
def positional(token, url, retries=3, /):
    return [token, url, retries]


class Crawler:
    """Has a method of every kind."""

    base = "class"

    def __init__(self, base="object"):
        self.base = base

    @cancellable
    def method(self, token: CancelToken, url: str, retries: int = 3) -> list[object]:
        """
        Crawl a page.

        >>> Crawler().method("u")[1:]
        ['u', 3]
        """
        assert self.base == "object"
        return [token, url, retries]

    @cancellable
    def keyword(self, url: str, retries: int = 3, *, token: CancelToken = CancelToken.NEVER):
        assert self.base == "object"
        return [token, url, retries]

    @cancellable
    @classmethod
    def over_class(cls, token: CancelToken, url: str, retries: int = 3) -> list[object]:
        """Crawl by class."""
        assert cls.base == "class"
        return [token, url, retries]

    @classmethod
    @cancellable
    def under_class(cls, token: CancelToken, url: str, retries: int = 3) -> list[object]:
        """Crawl by class."""
        assert cls.base == "class"
        return [token, url, retries]

    @cancellable
    @staticmethod
    def over_static(token: CancelToken, url: str, retries: int = 3) -> list[object]:
        """Crawl without."""
        return [token, url, retries]

    @staticmethod
    @cancellable
    def under_static(token: CancelToken, url: str, retries: int = 3) -> list[object]:
        """Crawl without."""
        return [token, url, retries]

    @cancellable
    def __call__(self, token: CancelToken, url: str, retries: int = 3) -> list[object]:
        return [token, url, retries]

    @property
    @cancellable
    def current(self, token):
        """The token."""
        return token


class Plain:
    """Nothing of it is decorated."""

    def method(self, token: CancelToken, url: str, retries: int = 3) -> list[object]:
        return [token, url, retries]

    def __call__(self, token: CancelToken, url: str, retries: int = 3) -> list[object]:
        return [token, url, retries]


def plain(token: CancelToken, url: str, retries: int = 3) -> list[object]:
    return [token, url, retries]


def timed(fn):
    @functools.wraps(fn)
    def call(*args, **kwargs):
        return fn(*args, **kwargs)

    return call


crawler = Crawler()

# All of these are to be called with a URL, and perhaps a number.
METHODS = {
    "method": crawler.method,
    "method of class": functools.partial(Crawler.method, crawler),
    "keyword method": crawler.keyword,
    "over classmethod": Crawler.over_class,
    "over classmethod, of object": crawler.over_class,
    "over staticmethod": Crawler.over_static,
    "over staticmethod, of object": crawler.over_static,
    "under staticmethod": Crawler.under_static,
    "under staticmethod, of object": crawler.under_static,
    "bound earlier": cancellable(Plain().method),
}
FUNCTIONS = {
    "function": fetch,
    "keyword": keyword,
    "positional": positional,
    "over partial": cancellable(functools.partial(plain, retries=3)),
    "over object": cancellable(Plain()),
    "over another decorator": cancellable(timed(plain)),
    "lambda": cancellable(lambda token, url, retries=3: [token, url, retries]),
    "by name": cancellable(param="event")(lambda event, url, retries=3: [event, url, retries]),
    "with brackets": cancellable()(plain),
}
UNDER_CLASS = {
    "under classmethod": Crawler.under_class,
    "under classmethod, of object": crawler.under_class,
}
WITH_TOKEN = METHODS | FUNCTIONS
del WITH_TOKEN["method of class"]
CALLS = (
    METHODS
    | FUNCTIONS
    | UNDER_CLASS
    | {
        "object": crawler,
        "under partial": functools.partial(fetch, retries=3),
        "under another decorator": timed(fetch),
    }
)


def every(kinds):
    return pytest.mark.parametrize("fn", kinds.values(), ids=kinds.keys())


def run(source):
    """
    Run source code as a module of its own, and return what it calls `fn`.
    """
    names = {"__name__": "made_here"}
    exec(compile(textwrap.dedent(source), "made_here.py", "exec", dont_inherit=True), names)
    return names["fn"]


# --- Finding the token --------------------------------------------------------------------


@pytest.mark.parametrize(
    "annotation",
    [
        CancelToken,
        Optional[CancelToken],  # noqa: UP045 - as people write it
        Union[None, CancelToken],  # noqa: UP007
        CancelToken | None,
        Annotated[CancelToken, "the stop signal"],
        Optional["CancelToken"],
        "CancelToken",
        "fastpool.CancelToken | None",
    ],
)
def test_token_is_found_by_annotation(annotation):
    """
    A parameter annotated `CancelToken`, optional or not, is the token's, whatever its name.
    """

    def fn(stop, token): ...

    fn.__annotations__["stop"] = annotation

    assert list(inspect.signature(cancellable(fn)).parameters) == ["token"]


@pytest.mark.parametrize(
    ("imports", "annotation"),
    [
        ("from fastpool import CancelToken", "CancelToken"),
        ("from fastpool import CancelToken", "None | CancelToken"),
        ("from fastpool import CancelToken", "'CancelToken'"),
        ("import fastpool", "fastpool.CancelToken | None"),
        ("import fastpool as fp", "fp.CancelToken"),
        ("import fastpool as fp; from typing import Optional", "Optional[fp.CancelToken]"),
        ("import fastpool as fp; import typing", "typing.Union[None, fp.CancelToken]"),
    ],
)
@pytest.mark.parametrize("condition", ["True", "TYPE_CHECKING"])
def test_token_is_found_by_annotation_in_a_string(condition, imports, annotation):
    """
    Late annotations count too, even if their names are imported for type checkers only.
    """
    fn = run(
        f"from __future__ import annotations\n"
        f"from typing import TYPE_CHECKING\n"
        f"if {condition}: {imports}\n"
        f"def fn(stop: {annotation}, url: Unknown): ..."
    )

    assert list(inspect.signature(cancellable(fn)).parameters) == ["url"]


@pytest.mark.parametrize("annotation", ["Stop", "Maybe"])
def test_token_is_found_under_another_name(annotation):
    """
    A string may use any name that the module has for it.
    """
    fn = run(
        f"from __future__ import annotations\n"
        f"from fastpool import CancelToken as Stop\n"
        f"Maybe = Stop | None\n"
        f"def fn(stop: {annotation}, url: Unknown): ..."
    )

    assert list(inspect.signature(cancellable(fn)).parameters) == ["url"]


@pytest.mark.skipif(sys.version_info < (3, 14), reason="annotations are evaluated at once")
def test_token_is_found_by_annotation_evaluated_late():
    """
    From Python 3.14 on a name that is only imported for type checkers needs no string.
    """
    fn = cancellable(
        run(
            """
            from typing import TYPE_CHECKING
            if TYPE_CHECKING:
                from fastpool import CancelToken
            def fn(stop: CancelToken | None, url: str): ...
            """
        )
    )

    assert str(inspect.signature(fn)) == "(url: str)"
    assert fn.__annotations__ == {"url": str}
    assert typing.get_type_hints(fn) == {"url": str}


@pytest.mark.parametrize(
    "annotation",
    [
        str,
        list[CancelToken],
        type[CancelToken],
        "list[CancelToken]",
        "Callable[[CancelToken], None]",
        "tuple[int, CancelToken, Unknown]",
        "CancelToken.Kind",
        "MyCancelToken",
        "not an expression",
    ],
)
def test_other_annotations_mean_no_token(annotation):
    """
    A parameter annotated otherwise is not the token's, not even one named `token`.
    """

    def fn(token): ...

    fn.__annotations__["token"] = annotation

    with pytest.raises(TypeError, match=r"fn\(\) has no parameter for a token"):
        cancellable(fn)


def test_another_class_of_the_same_name_is_no_token():
    """
    A string is looked up, where it can be, before it is taken at its word.
    """
    fn = run("class CancelToken: ...\ndef fn(stop: 'CancelToken', token): ...")

    with pytest.raises(TypeError, match="must be the first parameter"):
        cancellable(fn)


def test_named_parameter_goes_before_annotated_one():
    """
    `param=` says which parameter is the token's, whatever the annotations say.
    """

    @cancellable(param="event")
    def fn(event: object, token: CancelToken) -> None: ...

    assert str(inspect.signature(fn)) == f"(token: {CancelToken.__module__}.CancelToken) -> None"


def test_annotated_collections_of_tokens_are_no_tokens():
    """
    `*tokens` and `**tokens` take what the caller gives.
    """

    @cancellable
    def fn(token, *tokens: CancelToken, **named: CancelToken):
        return token, tokens, named

    mine = CancelToken()

    assert fn(mine, mine=mine) == (CancelToken.NEVER, (mine,), {"mine": mine})


@pytest.mark.parametrize(
    ("source", "param", "message"),
    [
        ("def fn(): ...", None, r"fn\(\) has no parameter for a token"),
        ("def fn(url): ...", None, r"fn\(\) has no parameter for a token"),
        ("def fn(*token): ...", None, r"fn\(\) has no parameter for a token"),
        ("def fn(url, token=None): ...", "stop", r"fn\(\) has no parameter 'stop'"),
        ("def fn(a: CancelToken, b: CancelToken): ...", None, r"more than one .*: a, b; .*'a'"),
        ("def fn(a: CancelToken, *, b: CancelToken=0): ...", None, r"fn\(\) has more than one"),
        ("def fn(url, token): ...", None, r"'token', the token of fn\(\), must be the first"),
        ("def fn(url, stop: CancelToken): ...", None, r"'stop', the token of fn\(\), must be"),
        ("def fn(this, token): ...", None, r"must be the first parameter \(after self or cls\)"),
        ("def fn(self, url, token): ...", None, r"'token', the token of fn\(\), must be"),
        ("def fn(url, event): ...", "event", r"'event', the token of fn\(\), must be the first"),
        ("def fn(url, *, token): ...", None, "or keyword-only with a default"),
    ],
)
def test_unclear_token_is_refused(source, param, message):
    """
    None, several or a misplaced one is a `TypeError` that names the function.
    """
    fn = run(f"from fastpool import CancelToken\n{source}")

    with pytest.raises(TypeError, match=message):
        cancellable(fn) if param is None else cancellable(param=param)(fn)


def test_class_method_needs_its_class_before_the_token():
    """
    What `@classmethod` passes first can't be the token.
    """

    def fn(token, cls): ...

    with pytest.raises(TypeError, match=r"'token', the token of fn\(\), must be the first"):
        cancellable(classmethod(fn))


def test_message_names_method_with_its_class():
    """
    A method is called what its class calls it, wherever the class stands.
    """
    with pytest.raises(TypeError, match=r"^Robot\.crawl\(\) has no parameter for a token"):

        class Robot:
            @cancellable
            def crawl(self, url): ...


# --- What can't be decorated, or run ------------------------------------------------------


async def coroutine(token): ...


def generator(token):
    yield


async def async_generator(token):
    yield


class AsyncCall:
    async def __call__(self, token): ...


UNRUNNABLE = {
    "async def": (coroutine, r"coroutine\(\) is async def.*fastpool\.aio"),
    "generator": (generator, r"generator\(\) is a generator function.*return a list"),
    "async generator": (async_generator, r"\(\) is an async generator function.*return a list"),
    "partial": (functools.partial(coroutine), r"coroutine\(\) is async def"),
    "method": (AsyncCall().__call__, r"AsyncCall\.__call__\(\) is async def"),
    "object": (AsyncCall(), r"AsyncCall\.__call__\(\) is async def"),
    "partial of object": (functools.partial(AsyncCall()), "is async def"),
}


@pytest.mark.parametrize(("fn", "message"), UNRUNNABLE.values(), ids=UNRUNNABLE.keys())
def test_function_that_only_starts_is_refused(fn, message):
    """
    A call of `async def` or a generator function runs nothing, so neither can be a task.
    """
    with pytest.raises(TypeError, match=message):
        cancellable(fn)
    with pytest.raises(TypeError, match=message):
        refuse(fn)


@pytest.mark.parametrize("kind", [classmethod, staticmethod])
def test_coroutine_under_classmethod_is_refused(kind):
    """
    The decorator looks under `@classmethod` and `@staticmethod`.
    """
    with pytest.raises(TypeError, match=r"coroutine\(\) is async def"):
        cancellable(kind(coroutine))


@every(
    CALLS
    | {
        "plain function": plain,
        "plain method": Plain().method,
        "plain object": Plain(),
        "class": Plain,
        "builtin": len,
        "method of builtin": "".join,
        "object of builtin": operator.itemgetter(0),
        "context manager": contextlib.contextmanager(generator),
    }
)
def test_what_can_be_called_may_be_submitted(fn):
    """
    Decorated or not, any callable is fine for `submit`.
    """
    assert refuse(fn) is None


def test_submitting_a_result_is_explained():
    """
    What can't be called is probably the result of a call, and the message says so.
    """
    with pytest.raises(TypeError) as error:
        refuse(404)

    assert str(error.value) == (
        "submit() wants the function itself, not its result 404; "
        "write submit(fetch, url), not submit(fetch(url))"
    )


def test_message_for_a_result_is_short_and_names_the_caller():
    """
    However big the result, the message stays short.
    """
    with pytest.raises(TypeError, match=r"^map\(\) wants .* write map\(fetch, url\)") as error:
        refuse(b"x" * 100_000, "map")

    assert len(str(error.value)) < 200


@pytest.mark.parametrize("builtin", [print, len, dict.get, iter])
def test_builtin_is_refused(builtin):
    """
    A builtin takes no token, and some do not even tell what they take.
    """
    with pytest.raises(TypeError, match=rf"{builtin.__name__}\(\)"):
        cancellable(builtin)


@every({"number": 404, "name": "event", "property": property(plain)})
def test_what_is_no_function_is_refused(fn):
    """
    Only a function can be decorated; the message says what else may have been meant.
    """
    with pytest.raises(TypeError, match=r"wants a function, not .*below @property.*param='event'"):
        cancellable(fn)


@every(
    {
        "function": fetch,
        "keyword": keyword,
        "method": crawler.method,
        "method of class": Crawler.method,
        "over classmethod": Crawler.over_class,
        "under classmethod": Crawler.under_class,
        "partial": functools.partial(fetch, "u"),
        "classmethod": classmethod(fetch),
        "staticmethod": staticmethod(fetch),
    }
)
def test_decorating_twice_is_refused(fn):
    """
    A function that has its token can't be given another.
    """
    with pytest.raises(TypeError, match=r"is @cancellable already"):
        cancellable(fn)


# --- Calling ------------------------------------------------------------------------------


@every(CALLS)
def test_direct_call_uses_the_current_token(fn):
    """
    A direct call passes the current token, and all else as it came.
    """
    token = CancelToken()

    with use_token(token):
        inside = fn("u")
    outside = fn("u")

    assert inside == [token, "u", 3]
    assert outside == [CancelToken.NEVER, "u", 3]


@every(CALLS)
def test_wrong_call_is_the_functions_own_error(fn):
    """
    A call that does not fit raises as it would without the decorator.
    """
    with pytest.raises(TypeError):
        fn()
    with pytest.raises(TypeError):
        fn(CancelToken.NEVER, "u", 3, 4)


@every(WITH_TOKEN)
def test_named_token_is_passed_and_current_during_the_call(fn):
    """
    `with_token` passes the token it is given, which no caller sees.
    """
    outer, token = CancelToken(), CancelToken()

    with use_token(outer):
        result = fn.with_token(token, "u")
        after = current_token()

    assert result == [token, "u", 3]
    assert after is outer


def test_named_token_is_current_below():
    """
    What a function calls has the token that the function was called with.
    """

    @cancellable
    def outer(token):
        return fetch("u")[0], current_token()

    token = CancelToken()

    assert outer.with_token(token) == (token, token)
    assert current_token() is CancelToken.NEVER


def test_place_is_restored_when_the_call_raises():
    """
    A token is current no longer than its call, however that ends.
    """

    @cancellable
    def fails(token):
        raise ValueError("bad header")

    with pytest.raises(ValueError, match="bad header"):
        fails.with_token(CancelToken())

    assert current_token() is CancelToken.NEVER


@pytest.mark.parametrize("given", [None, "u", CancelToken])
def test_with_token_wants_a_token(given):
    """
    Whoever forgets the token learns it before anything runs.
    """
    with pytest.raises(TypeError, match=r"with_token\(\) wants a CancelToken first, not"):
        fetch.with_token(given, "u")


def test_direct_call_checks_nothing():
    """
    A function runs under a set token, until it checks it.
    """
    token = CancelToken()
    token.cancel()

    with use_token(token):
        result = fetch("u")

    assert result == [token, "u", 3]


def test_optional_parameter_still_gets_the_token():
    """
    A default of the token's parameter stands for no call of the decorated function.
    """

    @cancellable
    def fn(token: CancelToken | None = None, url: str = "u"):
        return token, url

    assert fn() == (CancelToken.NEVER, "u")
    assert fn("v") == (CancelToken.NEVER, "v")


@every({"function": keyword, "method": crawler.keyword})
def test_keyword_token_given_by_hand_is_as_with_token(fn):
    """
    Type checkers let a keyword-only token be given, so it is taken; `None` is the current one.
    """
    token = CancelToken()

    assert fn("u", token=token) == [token, "u", 3]
    assert fn("u", token=None) == [CancelToken.NEVER, "u", 3]
    with pytest.raises(TypeError, match="wants a CancelToken"):
        fn("u", token=404)
    with pytest.raises(TypeError, match="given its token by itself"):
        fn.with_token(token, "u", token=token)


def test_self_may_come_by_keyword():
    """
    `C.method(self=c)` is unusual, and works.
    """
    assert Crawler.method(self=crawler, url="u") == [CancelToken.NEVER, "u", 3]


def test_arguments_may_be_called_anything():
    """
    The decorator takes no keyword for itself.
    """

    @cancellable
    def fn(stop: CancelToken, /, **kwargs):
        return kwargs

    names = {"self": 1, "fn": 2, "args": 3, "kwargs": 4, "token": 5, "param": 6, "stop": 7}

    assert fn(**names) == names
    assert fn.with_token(CancelToken(), **names) == names


def test_function_in_a_class_is_bound_like_any():
    """
    A function that was decorated outside takes the object as its first visible argument.
    """

    class Page:
        fetch = fetch

    page = Page()
    token = CancelToken()

    assert page.fetch(5) == [CancelToken.NEVER, page, 5]
    assert page.fetch.with_token(token, 5) == [token, page, 5]
    assert Page.fetch("u") == [CancelToken.NEVER, "u", 3]
    assert list(inspect.signature(page.fetch).parameters) == ["retries"]


def test_property_may_stand_over_it():
    """
    A property whose getter takes a token.
    """
    token = CancelToken()

    with use_token(token):
        assert crawler.current is token


def test_abstract_methods_stay_abstract():
    """
    `@abstractmethod` works below and above.
    """

    class Base(abc.ABC):
        @cancellable
        @abc.abstractmethod
        def below(self, token): ...

        @abc.abstractmethod
        @cancellable
        def above(self, token): ...

    assert Base.__abstractmethods__ == {"above", "below"}


def test_methods_are_inherited_and_overridden():
    """
    `super()` finds the decorated method of the base.
    """

    class Spider(Crawler):
        @cancellable
        def method(self, token: CancelToken, url: str, retries: int = 5) -> list[object]:
            return super().method(url + "!", retries)

    token = CancelToken()

    assert Spider().method.with_token(token, "u") == [token, "u!", 5]
    assert Spider.over_class("u") == [CancelToken.NEVER, "u", 3]


@every(UNDER_CLASS)
def test_with_token_under_classmethod_works_or_says_why_not(fn):
    """
    Since Python 3.13 `@classmethod` hides its class from an attribute of the function below.
    """
    token = CancelToken()

    if sys.version_info < (3, 13):
        assert fn.with_token(token, "u") == [token, "u", 3]
    else:
        with pytest.raises(TypeError, match="put @cancellable above @classmethod"):
            fn.with_token(token, "u")
        assert not token.cancelled()


# --- Looking like the function ------------------------------------------------------------


@every(CALLS)
def test_token_is_not_in_the_signature(fn):
    """
    `inspect.signature` shows what a caller gives, for every kind of function.
    """
    names = list(inspect.signature(fn).parameters)

    assert names == ["url", "retries"]


def test_self_stays_in_the_signature_of_an_unbound_method():
    """
    Seen on the class, a method still takes its object.
    """
    assert (
        str(inspect.signature(Crawler.method))
        == "(self, url: str, retries: int = 3) -> list[object]"
    )
    assert str(inspect.signature(crawler.method)) == "(url: str, retries: int = 3) -> list[object]"


@every(
    {
        "function": fetch,
        "keyword": keyword,
        "method": crawler.method,
        "of class": Crawler.method,
        "classmethod": Crawler.over_class,
        "under classmethod": Crawler.under_class,
        "staticmethod": Crawler.over_static,
        "under staticmethod": Crawler.under_static,
        "wraps": timed(fetch),
    }
)
def test_token_is_not_in_the_annotations(fn):
    """
    `__annotations__`, and the type hints made of them, know no token.
    """
    hints = {"url": str, "retries": int, "return": list[object]}
    if "keyword" in fn.__name__:
        del hints["return"]

    assert fn.__annotations__ == hints
    assert inspect.get_annotations(fn) == hints
    assert typing.get_type_hints(fn) == hints


def test_type_hints_do_not_need_the_tokens_import():
    """
    A token imported for type checkers alone does not spoil the hints of the others.
    """
    fn = cancellable(
        run(
            """
            from __future__ import annotations
            def fn(token: CancelToken, url: str) -> bytes: ...
            """
        )
    )

    assert typing.get_type_hints(fn) == {"url": str, "return": bytes}


def test_annotations_of_the_bare_function_stay():
    """
    Nothing is taken from the function itself.
    """
    bare = inspect.unwrap(fetch)

    assert list(bare.__annotations__) == ["token", "url", "retries", "return"]
    assert list(inspect.signature(bare).parameters) == ["token", "url", "retries"]


def test_names_and_documentation_are_the_functions():
    """
    A decorated function is called, and calls itself, what the function does.
    """
    assert (fetch.__name__, fetch.__qualname__) == ("fetch", "fetch")
    assert fetch.__module__ == __name__
    assert inspect.getdoc(fetch).startswith("Fetch a page.")
    assert crawler.method.__qualname__ == "Crawler.method"
    assert "function fetch" in repr(fetch)
    assert isinstance(fetch, Cancellable)
    assert isinstance(keyword, Cancellable)


def test_inspect_takes_it_for_a_function():
    """
    What looks for functions and methods finds it.
    """
    assert inspect.isfunction(fetch)
    assert inspect.isroutine(fetch)
    assert inspect.ismethod(crawler.method)
    assert inspect.isfunction(Crawler.method)
    assert not inspect.isgeneratorfunction(fetch)
    assert not inspect.iscoroutinefunction(fetch)
    assert inspect.getsource(fetch).startswith("@cancellable\ndef fetch")
    assert inspect.getfullargspec(fetch).args == ["url", "retries"]
    assert inspect.getfullargspec(crawler.method).args == ["self", "url", "retries"]
    assert inspect.signature(fetch).bind("u").arguments == {"url": "u"}


def test_help_shows_it_without_the_token():
    """
    `help()` of functions and classes.
    """
    of_function = pydoc.plain(pydoc.render_doc(fetch))
    of_class = pydoc.plain(pydoc.render_doc(Crawler))

    assert "fetch(url: str, retries: int = 3) -> list[object]" in of_function
    assert "Fetch a page." in of_function
    assert "method(self, url: str, retries: int = 3)" in of_class
    assert "over_class(url: str, retries: int = 3)" in of_class
    assert "under_class(url: str, retries: int = 3)" in of_class
    assert "over_static(url: str, retries: int = 3)" in of_class
    assert "token" not in of_class.replace("The token.", "")


def test_help_for_the_class_of_them_all():
    """
    `help()` of the class itself, whose instances hide their attributes.
    """
    text = pydoc.plain(pydoc.render_doc(Cancellable))

    assert "the same without its token" in text
    assert "with_token(" in text


def test_doctests_are_found():
    """
    Examples in the docstrings of functions and methods run.
    """
    module = sys.modules[__name__]
    found = {
        test.name: test for test in doctest.DocTestFinder().find(module, "this", extraglobs={})
    }

    for name in ("this.fetch", "this.Crawler.method"):
        assert doctest.DocTestRunner().run(found[name]).attempted == 1


def test_wraps_over_it_keeps_name_and_signature():
    """
    Other decorators may stand above, with `functools.wraps`.
    """
    above = timed(fetch)

    assert above.__name__ == "fetch"
    assert above.__wrapped__ is fetch
    assert inspect.signature(above) == inspect.signature(fetch)


def test_attributes_are_the_functions():
    """
    What is set on a decorated function is set on the function.
    """

    def bare(token): ...

    fn = cancellable(bare)
    fn.route = "/"

    assert bare.route == fn.route == "/"


def test_it_can_be_subscripted_in_annotations():
    """
    `Cancellable[[str], bytes]` is written as `Callable[[str], bytes]` is.
    """
    assert typing.get_origin(Cancellable[[str], bytes]) is Cancellable


# --- Comparing, copying, pickling ---------------------------------------------------------


def test_functions_compare_and_hash_by_identity():
    """
    A decorated function equals itself, and not the function in it.
    """
    bare = inspect.unwrap(fetch)
    other = cancellable(bare)

    assert fetch == fetch
    assert operator.ne(fetch, fetch) is False
    assert fetch != bare
    assert bare != fetch
    assert fetch != other
    assert len({fetch, fetch, other, bare}) == 3


class Holder:
    decorated = fetch


@dataclasses.dataclass
class Job:
    url: str
    run: typing.Any = fetch


def test_function_that_a_class_has_as_well_is_still_itself():
    """
    Read from a class it is the very function, as any function is, and pickles as that.
    """
    job = pickle.loads(pickle.dumps(Job("u")))

    assert Holder.decorated is fetch
    assert Crawler.method is Crawler.__dict__["method"]
    assert pickle.loads(pickle.dumps(Holder.decorated)) is fetch
    assert pickle.loads(pickle.dumps(Crawler.method)) is Crawler.method
    assert job.run is fetch


def test_methods_compare_and_hash_as_methods_do():
    """
    Two bound methods are equal if object and function are the same.
    """
    other = Crawler()

    assert crawler.method == crawler.method
    assert operator.ne(crawler.method, crawler.method) is False
    assert crawler.method != other.method
    assert crawler.method != crawler.keyword
    assert crawler.method != Crawler.method
    assert Crawler.method == Crawler.method
    assert Crawler.over_class == crawler.over_class
    assert Crawler.under_class == crawler.under_class
    assert Crawler.over_static == crawler.over_static
    assert crawler.method != inspect.unwrap(crawler.method)
    assert crawler.method != "method"
    assert len({crawler.method, crawler.method, other.method, Crawler.method}) == 3


def test_methods_made_of_one_function_differ():
    """
    Decorated twice over, a function makes two methods, whatever is in them.
    """

    def bare(self, token): ...

    class Page:
        fetch = cancellable(bare)
        again = cancellable(bare)

    page = Page()

    assert page.fetch != page.again


def test_methods_of_equal_objects_differ():
    """
    The object of a bound method counts by identity, and need not be hashable.
    """

    class Page(list):
        @cancellable
        def fetch(self, token): ...

    page = Page()

    assert page.fetch == page.fetch
    assert page.fetch != Page().fetch
    assert hash(page.fetch) == hash(page.fetch)


def test_functions_can_be_referred_to_weakly():
    """
    A weak reference is alive as long as the decorated function.
    """
    fn = cancellable(lambda token: token)
    reference = weakref.ref(fn)
    alive = reference() is fn
    del fn

    assert alive
    assert reference() is None
    assert weakref.WeakSet([fetch]).pop() is fetch


@pytest.mark.parametrize("copies", [copy.copy, copy.deepcopy])
@every(METHODS | FUNCTIONS | UNDER_CLASS)
def test_copies_work_like_the_original(fn, copies):
    """
    Every kind can be copied, as attributes of dataclasses and configurations are.
    """
    assert copies(fn)("u") == [CancelToken.NEVER, "u", 3]


@every({"function": fetch, "keyword": keyword, "lambda": FUNCTIONS["lambda"]})
def test_function_is_its_own_copy(fn):
    """
    As with plain functions, a copy is the function itself.
    """
    assert copy.copy(fn) is fn
    assert copy.deepcopy(fn) is fn
    assert copy.deepcopy({"task": [fn]}) == {"task": [fn]}


def test_deep_copy_of_a_method_has_a_copy_of_its_object():
    """
    As with plain methods, a deep copy is bound to a copy.
    """
    owner = Crawler()
    owner.callback = owner.method

    twin = copy.deepcopy(owner)

    assert twin.callback.__self__ is twin
    assert twin.callback == twin.method
    assert copy.copy(owner.method) == owner.method
    assert copy.deepcopy(Crawler.over_class) == Crawler.over_class


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_functions_pickle_by_name(protocol):
    """
    A function comes back as the very object; so does one in a container, or in a partial.
    """
    back = pickle.loads(pickle.dumps({fetch: keyword}, protocol))
    call = pickle.loads(pickle.dumps(functools.partial(fetch, "u"), protocol))

    assert back == {fetch: keyword}
    assert next(iter(back)) is fetch
    assert call() == [CancelToken.NEVER, "u", 3]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@every(
    {
        "method": Crawler.method,
        "over classmethod": Crawler.over_class,
        "under classmethod": Crawler.under_class,
        "over staticmethod": Crawler.over_static,
        "under staticmethod": Crawler.under_static,
    }
)
def test_methods_of_a_class_pickle_by_name(fn, protocol):
    """
    What a class gives equals what comes back.
    """
    assert pickle.loads(pickle.dumps(fn, protocol)) == fn


def test_bound_methods_pickle_with_their_object():
    """
    A bound method takes its object along, as any method does.
    """
    back = pickle.loads(pickle.dumps(crawler.method))

    assert back("u") == [CancelToken.NEVER, "u", 3]
    assert type(back.__self__) is Crawler
    assert back.__self__ is not crawler


@every({name: FUNCTIONS[name] for name in ("lambda", "over partial", "over object", "by name")})
def test_function_without_a_name_of_its_own_says_why_it_cannot_be_pickled(fn):
    """
    A lambda, a partial and an object can't be found by name, and the error says so.
    """
    with pytest.raises(pickle.PicklingError, match=r"cannot pickle .*\(\): .* by name.*lambda"):
        pickle.dumps(fn)


def test_local_function_says_why_it_cannot_be_pickled():
    """
    A function in a function can't be found by name either.
    """

    @cancellable
    def local(token): ...

    with pytest.raises(pickle.PicklingError, match=r"cannot pickle local\(\): .*local function"):
        pickle.dumps(local)


renamed = cancellable(plain)


def test_function_under_another_name_cannot_be_pickled():
    """
    Under the function's own name stands the bare one, so it would come back without token.
    """
    with pytest.raises(pickle.PicklingError, match="not the same object"):
        pickle.dumps(renamed)


def test_method_decorated_later_cannot_be_pickled():
    """
    Its object has the bare method under that name, so it would come back without token.
    """
    with pytest.raises(pickle.PicklingError, match="decorate the method in its class"):
        pickle.dumps(METHODS["bound earlier"])


SENT = {
    "function": fetch,
    "keyword": keyword,
    "method": crawler.method,
    "object": crawler,
    "over classmethod": Crawler.over_class,
    "under classmethod": Crawler.under_class,
    "over staticmethod": Crawler.over_static,
    "under staticmethod": Crawler.under_static,
    "partial": functools.partial(fetch, retries=3),
}


def in_the_other_process(fn, url):
    """
    What of a call's result can be sent home.
    """
    token, *rest = fn(url)
    return token is CancelToken.NEVER, os.getpid(), rest


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_functions_run_in_other_processes(method):
    """
    Every kind that has a name can be sent to a pool of processes.
    """
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot start processes by {method}")
    with multiprocessing.get_context(method).Pool(1) as pool:
        plain_result = pool.apply_async(len, ("u",)).get(timeout=60)
        results = {
            name: pool.apply_async(in_the_other_process, (fn, "u")).get(timeout=60)
            for name, fn in SENT.items()
        }
        pool.close()
        pool.join()

    assert plain_result == 1
    for never, process, rest in results.values():
        assert never
        assert process != os.getpid()
        assert rest == ["u", 3]


# --- Neighbours ---------------------------------------------------------------------------


def test_it_works_without_the_c_extension():
    """
    wrapt has a build in pure Python, for some free-threaded versions the only one.
    """
    code = """
        import inspect, pickle, sys
        from test_cancellable import CALLS, SENT, WITH_TOKEN, CancelToken, copy, fetch, keyword

        token = CancelToken()
        for name, fn in CALLS.items():
            assert fn("u") == [CancelToken.NEVER, "u", 3], name
            assert list(inspect.signature(fn).parameters) == ["url", "retries"], name
        for name, fn in WITH_TOKEN.items():
            assert fn.with_token(token, "u") == [token, "u", 3], name
            assert copy.deepcopy(fn)("u") == [CancelToken.NEVER, "u", 3], name
        for name, fn in SENT.items():
            assert pickle.loads(pickle.dumps(fn))("u") == [CancelToken.NEVER, "u", 3], name
        assert list(fetch.__annotations__) == ["url", "retries", "return"]
        assert fetch == fetch != inspect.unwrap(fetch)
        assert inspect.getdoc(keyword) == "Take the token by keyword."
        import wrapt.__wrapt__ as chosen
        assert "_wrappers" not in str(chosen.FunctionWrapper.__init__), chosen
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={
            **os.environ,
            "WRAPT_DISABLE_EXTENSIONS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
        capture_output=True,
        text=True,
        timeout=200,
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_cancelled_leaves_a_direct_call():
    """
    A function that checks is stopped by the token it was called under.
    """

    @cancellable
    def checks(token):
        token.check()

    token = CancelToken()
    token.cancel("enough")

    with use_token(token), pytest.raises(Cancelled) as error:
        checks()

    assert error.value.token is token
    assert error.value.reason == "enough"


def test_event_loop_can_call_it_in_a_thread():
    """
    `asyncio.to_thread` takes it for a function, and brings the context along.
    """
    token = CancelToken()

    async def main():
        with use_token(token):
            return await asyncio.to_thread(fetch, "u")

    assert asyncio.run(main()) == [token, "u", 3]


class Page:
    """Has a decorated method."""

    @cancellable
    def resize(self, token, width):
        return width


@cancellable
def crop(token, width):
    return width


@cancellable
def turn(width, *, token=None):
    return width, token


@pytest.mark.parametrize("name", ["crop", "resize"])
@pytest.mark.parametrize("keyword", [False, True])
def test_token_given_by_hand_is_refused_with_the_way_to_name_one(name, keyword):
    """
    The function takes it from its context; the error says how to give it another.
    """
    fn = crop if name == "crop" else Page().resize
    call = {True: lambda: fn(404, token=CancelToken()), False: lambda: fn(CancelToken(), 404)}

    with pytest.raises(TypeError, match=rf"{name}\(\) is given its token.*{name}\.with_token"):
        call[keyword]()


def test_type_error_of_the_function_itself_is_left_alone():
    """
    Also where it was given a token.
    """

    @cancellable
    def wrong(token, other):
        return 1 + other

    token = CancelToken()
    with pytest.raises(TypeError, match="unsupported operand"):
        wrong(token)
    with pytest.raises(TypeError, match="missing 1 required"):
        wrong()

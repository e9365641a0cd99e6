"""How an error goes to `sys.unraisablehook` when there is nobody to raise it to."""

from __future__ import annotations

import weakref
from typing import NoReturn

__all__ = ["unraisable"]


class _Marker:
    __slots__ = ("__weakref__",)


class _Raiser:
    """Raises an error where Python itself has nobody to give it to."""

    def __init__(self, error: BaseException, source: object) -> None:
        self.error = error
        self.source = source

    def __call__(self, reference: object) -> NoReturn:
        error, self.error = self.error, RuntimeError()
        try:
            raise error
        finally:
            del error, self

    def __repr__(self) -> str:
        return repr(self.source)


def unraisable(error: BaseException, source: object) -> None:
    """
    Report an exception that nobody can be given.

    Args:
        error: What was raised.
        source: What raised it; the report shows its `repr`.

    Source:
        The hook's arguments cannot be made in Python, so this goes the way that the
        interpreter goes by itself: an exception in a weak reference's callback.
    """
    marker = _Marker()
    reference = weakref.ref(marker, _Raiser(error, source))
    del marker
    del reference

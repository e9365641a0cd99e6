"""Text on its way to a terminal."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["plain", "some"]


def plain(text: str) -> str:
    """A text in one line, without the characters by which it could steer a terminal."""
    return text if text.isprintable() else "".join(filter(str.isprintable, text))


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

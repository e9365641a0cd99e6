"""Text on its way to a terminal."""

from __future__ import annotations

__all__ = ["plain"]


def plain(text: str) -> str:
    """A text in one line, without the characters by which it could steer a terminal."""
    return text if text.isprintable() else "".join(filter(str.isprintable, text))

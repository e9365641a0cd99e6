"""Text on its way to a terminal or a page."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["plain", "some"]


# What would break a line, reorder it, or fail to be encoded: control characters, line separators,
# marks that turn the direction of the text, halves of a character.
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(text: str) -> str:
    """A text in one line, without the characters by which it could steer a terminal or a page."""
    return text if text.isprintable() else _CONTROLS.sub("", text)


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

"""Where a thread waits that waits for files as well: a file descriptor that another makes ready."""

from __future__ import annotations

import errno
import os
import sys
import weakref
from collections.abc import Callable

__all__ = ["Descriptor", "after_fork"]


class Descriptor:
    """
    A gate for one who waits in `select` or `poll`: a file descriptor that becomes readable.

    Opening it is one write that cannot block, so it may happen wherever a `Gate` may be opened.
    Only the finalizer closes it: who is about to open it holds it, so the number cannot have
    become another file's by then.
    """

    __slots__ = ("__weakref__", "_fds", "_opened")

    def __init__(self) -> None:
        self._fds: tuple[int, ...] = ()
        self._opened = False  # read in a forked child alone
        self._fds = _make_descriptors()
        _descriptors[id(self)] = weakref.ref(self)

    def fileno(self) -> int:
        if not self._fds:  # see `renew`
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._fds[0]

    def open(self) -> None:
        """Make it readable."""
        self._opened = True
        for fd in self._fds[-1:]:
            try:
                os.write(fd, _ONE)
            except OSError:
                return  # it is full, so it is readable; or somebody has closed what is not theirs

    def clear(self) -> None:
        """Be unreadable again, until it is opened once more."""
        self._opened = False
        try:
            while len(os.read(self._fds[0], 8)) == 8 and len(self._fds) > 1:
                pass
        except BlockingIOError:
            return

    def renew(self) -> None:
        """In a forked child: become another file than the parent's, under the same number."""
        fds, self._fds = self._fds, ()  # and so it stays, should the system refuse
        try:
            fresh = _make_descriptors()
        except OSError:  # there may be no free number but its own
            for fd in fds:
                os.close(fd)
            fresh = _make_descriptors()
        # The higher one first, since the lower one's may have come by its number.
        for old, new in zip(reversed(fds), reversed(fresh), strict=True):
            if new != old:
                os.dup2(new, old, inheritable=False)
                os.close(new)
        self._fds = fds
        if self._opened:
            self.open()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        _descriptors.pop(id(self), None)
        for fd in self._fds:
            try:
                close(fd)
            except OSError:
                continue


_descriptors: dict[int, weakref.ref[Descriptor]] = {}  # all there are, for `after_fork`
_ONE = (1).to_bytes(8, sys.byteorder)  # what an eventfd takes, and a pipe as well


def _make_descriptors() -> tuple[int, ...]:
    """One to read from and one to write to; an eventfd is both."""
    if sys.platform == "linux":
        return (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),)
    fds = os.pipe()
    for fd in fds:
        os.set_blocking(fd, False)
    return fds


def after_fork() -> None:
    """In a forked child: whatever is opened here must not wake anybody in the parent."""
    for reference in list(_descriptors.values()):
        descriptor = reference()
        if descriptor is not None:
            try:
                descriptor.renew()
            except OSError:
                continue  # who asks for its number is told

"""Where tasks run. A backend provides lanes; the group keeps the queue they take from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastpool._lane import Lane
    from fastpool._run import Run
    from fastpool.backends.processes import Processes

__all__ = ["Backend", "Processes"]


@runtime_checkable
class Backend(Protocol):
    """
    Serves groups with lanes.

    A lane pulls tasks from a group's queue (`Run.take`) until there are none, runs them where
    the backend runs things, and reports each (`Run.succeeded`, `Run.failed`; `Run.perform` does
    both here); what it took and did not begin it gives back (`Run.give_back`). A group is over
    when its queue is empty, or its token set, and no lane is at work; so "leaving has waited
    for everything" means the same on every backend.
    """

    slots: int
    """How many lanes are worth having; what `max_workers` is by default."""

    remote: bool
    """Whether calls and results are pickled on their way."""

    def start_lane(self, run: Run, enlist: Callable[[Lane], None]) -> None:
        """
        Have one more lane serve a group: `enlist(lane)`, then start it.

        It begins with `run.begin(lane)`, which is False if nobody needs it any more, and ends
        with `run.rest(lane)` (stays, idle, until its gate opens) or `run.dismiss(lane)`; if what
        serves it raises, with `run.lane_failed(lane, error)`.
        Must not block for long, nor run a task in the calling thread.

        Raises:
            Exception: What the system says if it cannot be started. If that comes only after
                `enlist`, the gate of a lane that stays is opened, for its thread is there.
        """
        ...

    def cancel(self, run: Run) -> None:
        """The group's token is set: tell where its tasks run. Must not block; may come twice."""
        ...

    def escalate(self, run: Run, level: int) -> bool:
        """
        Stop what did not stop by itself: 1 interrupts softly, 2 kills.

        Returns:
            False if that is not possible here.
        """
        ...

    def end(self, run: Run) -> None:
        """The group is over, no lane at work: take the idle ones back, forget its token."""
        ...

    def abandon(self, run: Run) -> None:
        """The group goes on without what still runs: use nothing of it again."""
        ...


if not TYPE_CHECKING:

    def __getattr__(name):
        # It brings along what starts processes, which nobody needs who stays with threads.
        if name != "Processes":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from fastpool.backends.processes import Processes

        globals()[name] = Processes
        return Processes

    def __dir__():
        return sorted({*globals(), *__all__})

"""
Small faults for the library, each of which a model must find.
"""

import contextlib
import inspect
import types
from typing import NamedTuple

from fastpool import (
    _arrivals,
    _bounded,
    _callbacks,
    _clock,
    _items,
    _ledger,
    _run,
    _stream,
    _submitter,
    _taskgroup,
    _token,
    _waiting,
)
from fastpool.backends import processes, threads


class Mutant(NamedTuple):
    """
    What is wrong, the model that finds it, and the text of a module before and after.

    One that is rare shows where a thread stops between two instructions of very many, so that
    it takes ten times as many orders to be sure to find it.
    """

    name: str
    model: str
    module: types.ModuleType
    before: str
    after: str
    rare: bool = False


MUTANTS = [
    Mutant(
        "a sleeper looks before it can be found",
        "cancel_against_wait",
        _token,
        """
        key = self._add_sleeper(gate)
        try:
            if self._reason is None:
                gate.wait(span)
""",
        """
        sleeps = self._reason is None
        key = self._add_sleeper(gate)
        try:
            if sleeps:
                gate.wait(span)
""",
    ),
    Mutant(
        "two cancels win",
        "cancel_against_cancel",
        _token,
        """
        held = self._entries.setdefault(_CAUSE, cause)
        if held""",
        """
        held = self._entries.get(_CAUSE, cause)
        self._entries[_CAUSE] = held
        if held""",
    ),
    Mutant(
        "the cancel that lost returns before the token is set",
        "cancel_against_cancel",
        _token,
        "        if held is not _SEALED:\n            # The winner",
        "        if held is cause:\n            # The winner",
    ),
    Mutant(
        "the state is seen before the reason",
        "cancel_against_cancel",
        _token,
        "# The winner may not have got that far yet, and whoever lost must find it set too.\n",
        "\n            self._reason = 'cancelled'\n",
        rare=True,
    ),
    Mutant(
        "a callback is registered after the look",
        "cancel_against_register",
        _token,
        """
        self._entries[entry.key] = entry
        if self._reason is not None:
""",
        """
        late = self._reason is not None
        self._entries[entry.key] = entry
        if late:
""",
    ),
    Mutant(
        "two threads claim a callback",
        "cancel_against_unregister",
        _callbacks,
        "        return self._claims.setdefault(None, mine) == mine\n",
        """
        claimed = None in self._claims
        self._claims.setdefault(None, mine)
        return not claimed
""",
    ),
    Mutant(
        "a callback that was taken back runs",
        "cancel_against_unregister",
        _callbacks,
        """        if not self.claim(mine):
            return
        if not self.slow and not self._begun:
            self._again = self._call()
""",
        """        if not self.slow and not self._begun and self.function is not None:
            self._again = self._call()
        if not self.claim(mine):
            return
""",
    ),
    Mutant(
        "closing does not wait for the callback",
        "cancel_against_close",
        _callbacks,
        "        while not self.finished and",
        "        while self.function is None and not self.finished and",
    ),
    Mutant(
        "a callback wakes who waits for it and is finished then",
        "cancel_against_close",
        _callbacks,
        """
            self.finished = True
            for gate in self._waiters:
                gate.open()
""",
        """
            for gate in self._waiters:
                gate.open()
            self.finished = True
""",
    ),
    Mutant(
        "a child is linked after the look",
        "cancel_against_child",
        _token,
        """
        parent._entries[self._key] = self if strongly else _ChildRef(self, parent._entries)
        held = parent._entries.get(_CAUSE)
""",
        """
        held = parent._entries.get(_CAUSE)
        parent._entries[self._key] = self if strongly else _ChildRef(self, parent._entries)
""",
    ),
    Mutant(
        "a child is seen set before its parent",
        "cancel_against_child",
        _token,
        "        parent._claim(held)  #",
        "        #",
        rare=True,
    ),
    Mutant(
        "a cancel does not go past a child that is just being set",
        "cancel_of_parent_against_child",
        _token,
        """
                    child._claim(reason)
                    if child._cause is not None:
""",
        """
                    if child._claim(reason):
""",
    ),
    Mutant(
        "a cancel stumbles over a child that goes",
        "cancel_against_forgetting",
        _token,
        """
        for key in list(self._entries):
            entry = self._entries.get(key)
            child = entry()""",
        """
        for key in self._entries:
            entry = self._entries.get(key)
            child = entry()""",
    ),
    Mutant(
        "a group that was left keeps its deadline",
        "deadline_against_last_task",
        _run,
        "        self.token._seal()\n",
        "",
    ),
    Mutant(
        "a group closes while somebody submits",
        "submit_against_exit",
        _run,
        "not self.calling and self.at_rest() and not closing.setdefault(GOES_ON, False)",
        "self.at_rest()",
    ),
    Mutant(
        "a submit is refused whose task has run",
        "submit_against_exit",
        _run,
        "            if any(withdrawn):  #",
        "            if withdrawn:  #",
        rare=True,
    ),
    Mutant(
        "a submit looks twice at a bound that the end takes away",
        "submit_against_exit_of_bounded",
        _submitter,
        "            run.submit_bounded(task, fn, bounded)\n",
        "            run.submit_bounded(task, fn, run.bounded)\n",
        rare=True,
    ),
    Mutant(
        "a group closes while somebody waits for room",
        "submit_against_exit_of_bounded",
        _run,
        "                self.call_for((task,), task)\n\n        if not self.while_open(submit):\n",
        "                self.call_for((task,), task)\n\n        if submit():\n",
    ),
    Mutant(
        "the end takes failures away while they are looked at",
        "report_against_exit",
        _run,
        "        self.failures, self.strays = [], []  #",
        "        self.failures.clear()  #",
    ),
    Mutant(
        "places for calls are lost as others are abandoned",
        "abandoning_against_map",
        _items,
        """
        states.extend([PENDING] * count)
        if self.states is not states:""",
        """
        self.states += [PENDING] * count
        if False:""",
    ),
    Mutant(
        "who abandons calls does not look what has come meanwhile",
        "abandoning_against_map",
        _items,
        "        states.extend([PENDING] * (len(old) - len(states)))  #",
        "        #",
    ),
    Mutant(
        "a worker that has looked for something to run stands in no line for room",
        "wait_against_leaving",
        _run,
        "        queue.line_up(gate)\n        queue.wake()\n        if helped:\n",
        "        queue.wake()\n        if helped:\n",
    ),
    Mutant(
        "the token is set before the failure is recorded",
        "two_failures_at_once",
        _ledger,
        "            stop = True\n            tells =",
        "            stop = self.token._fail(error)\n            tells =",
    ),
    Mutant(
        "the last failure wins",
        "two_failures_at_once",
        _ledger,
        "            failures.append(Failure(task, error))\n",
        "            failures.insert(0, Failure(task, error))\n",
    ),
    Mutant(
        "the token is set before the task is done",
        "two_failures_at_once",
        _ledger,
        "            if task is not None and not task._state:\n",
        "            if task is None:\n",
    ),
    Mutant(
        "failures are out of sight for a moment",
        "two_failures_at_once",
        _taskgroup,
        "        return self._failures if self._run.over else failures\n",
        "        return self._failures or tuple(self._run.failures)\n",
    ),
    Mutant(
        "a worker that waits runs nothing",
        "nested_groups_on_one_worker",
        _run,
        "        if task._taken or self.pool is None or",
        "        if self.pool is lane.pool or",
    ),
    Mutant(
        "two groups lease one pool",
        "lease_against_lease",
        threads,
        "        pool = take_last(self._crew.idle)\n",
        "        pool = next(reversed(self._crew.idle), None)\n",
    ),
    Mutant(
        "a pool is given back before its threads",
        "lease_against_lease",
        threads,
        """
        for resting in (run.recalled, run.idle):  # what goes in last is used first
""",
        """
        self._crew.idle[pool] = None
        for resting in (run.recalled, run.idle):  # what goes in last is used first
""",
    ),
    Mutant(
        "an idle pool ends and stays on the list",
        "lease_against_end_of_idle_pool",
        threads,
        "            del self.crew.idle[self]  # whoever takes it off owns it\n",
        "            self.crew.idle[self]\n",
    ),
    Mutant(
        "an idle pool ends and is taken off the list then",
        "lease_against_end_of_idle_pool",
        threads,
        """
            del self.crew.idle[self]  # whoever takes it off owns it
        except KeyError:
            return
        self.end()
""",
        """
            if self not in self.crew.idle:
                return
            self.end()
            del self.crew.idle[self]
        except KeyError:
            return
""",
        rare=True,
    ),
    Mutant(
        "a lane that parks does not look again",
        "parking_against_submit",
        _run,
        "            lane.at_work = self.idle.pop(lane, lane) is None\n",
        "            lane.at_work = self.idle.pop(lane, None) is not None\n",
    ),
    Mutant(
        "who waits for a task does not look again",
        "parking_against_submit",
        _waiting,
        "        if task.done() or token.cancelled():\n            return\n        if lane",
        "        if lane",
    ),
    Mutant(
        "an iterator that is closed leaves its tasks alone",
        "closing_of_imap_against_a_result",
        _stream,
        "                    chunk.task(number % CHUNK).cancel(",
        "                    str(",
    ),
    Mutant(
        "an iterator takes one item too many",
        "closing_of_imap_against_a_result",
        _stream,
        "        for ahead in range(before, self.window):\n",
        "        for ahead in range(before, self.window + 1):\n",
    ),
    Mutant(
        "who takes values does not look again",
        "arrivals_against_sleep",
        _arrivals,
        "                if self.ended:\n                    return\n",
        "",
    ),
    Mutant(
        "a value is told before it can be found",
        "arrivals_against_sleep",
        threads,
        """
                arrive(first + index)
                if asleep:
                    listener.wake()  # type: ignore[union-attr] # there is one
""",
        """
                if asleep:
                    listener.wake()
                arrive(first + index)
""",
    ),
    Mutant(
        "who waits for room does not hear the group",
        "cancel_against_full_queue",
        _run,
        "for heard in dict.fromkeys((token, self.token))]",
        "for heard in (token,)]",
    ),
    Mutant(
        "nobody is told of the room that a worker makes",
        "room_against_producers",
        _bounded,
        """            raise
        if self.waiting:
            self.wake()
""",
        """            raise
""",
    ),
    Mutant(
        "who waits for room looks before it can be found",
        "room_against_producers",
        _run,
        """
            queue.line_up(gate)
            if lane is not None:
                self.helpers[gate] = lane
            while True:  # said first and looked at then
                token.check()
                self.check_open(fn)  # before the room: a cancelled queue may be emptied, too
                if queue.take_room(entry):
                    return
                self.sleep_for_room""",
        """
            while True:
                token.check()
                self.check_open(fn)
                if queue.take_room(entry):
                    return
                queue.line_up(gate)
                self.sleep_for_room""",
    ),
    Mutant(
        "who takes room looks before others can see it",
        "producers_against_bound",
        _bounded,
        """
        promised[entry] = (most, me)
        ahead = 0
        if len(promised) > 1:  # of those who look at once, each counts who came before
            for other in list(promised):
                if other is entry:
                    break
                ahead += promised.get(other, (0,))[0]  # what is gone is in the queue by now
""",
        """
        ahead = 0
        if promised:
            for other in list(promised):
                ahead += promised.get(other, (0, 0))[0]
""",
    ),
    Mutant(
        "a promise is given up before the call is there",
        "producers_against_bound",
        _run,
        """
            self.queue.append(task)
            queue.give_room(task)
""",
        """
            queue.give_room(task)
            self.queue.append(task)
""",
    ),
    Mutant(
        "there is room for one more than the bound",
        "producers_against_bound",
        _bounded,
        "        room = self.limit - ahead",
        "        room = self.limit + 1 - ahead",
    ),
    Mutant(
        "who came last gets room first",
        "producers_in_line",
        _bounded,
        "            for gate in list(self.waiting):\n",
        "            for gate in reversed(list(self.waiting)):\n",
    ),
    Mutant(
        "all who wait are told of room at once",
        "producers_in_line",
        _bounded,
        "                    gate.open()\n                    return\n",
        "                    gate.open()\n",
    ),
    Mutant(
        "a worker looks before it says what it takes",
        "cancel_of_task_against_its_start",
        threads,
        """
        lane.at = entry
        entry._taken = True
        if run.disturbed or token._reason is not None:
""",
        """
        looks = run.disturbed or token._reason is not None
        lane.at = entry
        entry._taken = True
        if looks:
""",
        rare=True,
    ),
    Mutant(
        "a task is cancelled that a worker has taken",
        "cancel_of_task_against_its_start",
        _ledger,
        """
            decided = task._taken or task._lane is not None or bool(task._state)
            verdict =""",
        """
            decided = bool(task._state)
            verdict =""",
    ),
    Mutant(
        "who cancels a task looks before it says so",
        "cancel_of_task_against_its_start",
        _ledger,
        """
            claim = self.claim(task)
            # Who ran it, or withdrew it, took the claim away with it, but has left a lane or a
            # state.
            decided = task._taken or task._lane is not None or bool(task._state)
""",
        """
            decided = task._taken or task._lane is not None or bool(task._state)
            claim = self.claim(task)
""",
        rare=True,
    ),
    Mutant(
        "a waiter runs what a worker has taken",
        "waiter_against_worker",
        _run,
        """
        if task._taken or self.pool is None or self.pool is not lane.pool or task.done():
            return False
        with self.slot_for(lane) as inner:
            if inner is None:
                return False
            if self.stopping():
                return False
            claim = self.claim(task)
            decided = task._taken or task._lane is not None or bool(task._state)
            if decided or claim""",
        """
        if self.pool is not lane.pool:
            return False
        with self.slot_for(lane) as inner:
            if inner is None:
                return False
            claim = self.claim(task)
            if task._state or claim""",
    ),
    Mutant(
        "a waiter runs what a worker has begun",
        "waiter_against_worker",
        _run,
        "            if decided or claim.decide(inner) is not inner:\n",
        "            if decided:\n",
        rare=True,
    ),
    Mutant(
        "what a lane has just taken is not waited for",
        "waiting_for_group_against_end_of_tasks",
        _run,
        "            fence.lanes.update(self.lanes)  #",
        "            #",
    ),
    Mutant(
        "who adds a deadline looks for a thread and has it found then",
        "deadline_against_end_of_idle_clock",
        _clock,
        """
        self.arrivals.append(entry)
        # Many that are far off, and lifted by now for the most part, are to be swept out.
        if entry[0] < self._wakes_at or len(self.arrivals) > 100:
            self.gate.open()
        if not self._looks():
""",
        """
        looks = self._looks()
        self.arrivals.append(entry)
        if entry[0] < self._wakes_at:
            self.gate.open()
        if not looks:
""",
        rare=True,
    ),
    Mutant(
        "a clock that has ended counts as one that is to come",
        "deadline_against_end_of_idle_clock",
        _clock,
        "(latest is not None and not latest.began)",
        "latest is not None",
    ),
    Mutant(
        "a clock that ends does not look again",
        "deadline_against_end_of_idle_clock",
        _clock,
        """
            while self.arrivals and self.turns.setdefault("clock", turn) is turn:
""",
        """
            for _ in range(self.turns.setdefault("clock", turn) is turn):
""",
        rare=True,
    ),
    Mutant(
        "a clock is still to come when it has looked",
        "deadlines_that_start_the_clock",
        _clock,
        """
        turn.began = True
        try:
            while self.arrivals and self.turns.setdefault("clock", turn) is turn:
""",
        """
        try:
            while self.arrivals and self.turns.setdefault("clock", turn) is turn:
                turn.began = True
""",
    ),
    Mutant(
        "an idle helper ends with a job on its way",
        "callback_against_end_of_idle_helper",
        _clock,
        """
                if _idle_helpers.pop(self, self) is None:
                    return
""",
        """
                _idle_helpers.pop(self, None)
                return
""",
    ),
    Mutant(
        "the death of a worker is looked for before its last answer",
        "death_of_worker_against_its_answer",
        processes,
        """
            if until is None and (awaited in ready or far.calls.poll()):
                reply""",
        """
            if far.sentinel in ready:
                raise EOFError
            if until is None and (awaited in ready or far.calls.poll()):
                reply""",
    ),
    Mutant(
        "what a worker has not begun is lost with it",
        "death_of_worker_against_its_answer",
        processes,
        "        *before, last = map(handle, self._batch[: at + 1])\n",
        "        *before, last = map(handle, self._batch)\n",
    ),
    Mutant(
        "what a dead worker was at runs again",
        "death_of_worker_against_its_answer",
        processes,
        "        if at < 0:\n            return WorkerDied",
        "        if at < 1:\n            return WorkerDied",
    ),
    Mutant(
        "a task that has its value dies with its worker",
        "death_of_worker_against_half_a_batch",
        processes,
        "                    self._first, self._batch = self._first + ended, self._batch[ended:]\n",
        "                    str(ended)\n",
        rare=True,
    ),
    Mutant(
        "half a batch is dropped",
        "death_of_worker_against_half_a_batch",
        processes,
        "                    self._report_each(run, far, answer[1])\n",
        "",
    ),
    Mutant(
        "half a batch is given to the wrong tasks",
        "death_of_worker_against_half_a_batch",
        processes,
        "        for at, outcome in zip(self._batch, outcomes, strict=False):\n",
        "        for at, outcome in zip(self._batch[::-1], outcomes, strict=False):\n",
    ),
    Mutant(
        "a cancel is passed on for the task behind",
        "cancel_of_task_against_its_answer",
        processes,
        "enumerate(self._batch, self._first)}",
        "enumerate(self._batch, self._first + 1)}",
    ),
    Mutant(
        "a worker is not told that somebody cancels",
        "cancel_of_task_against_the_one_before_it",
        processes,
        "            far.shared.ordered = True  # after",
        "            str(far)  # after",
    ),
    Mutant(
        "a worker that asks is told before it is looked at what there is",
        "cancel_of_task_against_the_one_before_it",
        processes,
        """
                    self._asked = True
""",
        """
                    far.tell("all told")
""",
        rare=True,
    ),
    Mutant(
        "a batch that has come home is sent again when its worker dies",
        "cancel_of_task_against_its_answer",
        processes,
        "        if not self._batch:\n            return None  #",
        "        #",
        rare=True,
    ),
    Mutant(
        "a task that is killed for not stopping has failed",
        "cancel_of_task_against_its_answer",
        processes,
        """
            if self._killed or (overdue and own is not None and own.cancelled()):
                run.stopped(task, self)
                continue
            if overdue:
""",
        """
            if self._killed:
                run.stopped(task, self)
                continue
            if overdue and own is None:
""",
    ),
]


@contextlib.contextmanager
def applied(mutant):
    """Give the library that fault meanwhile."""
    source = inspect.getsource(mutant.module)
    assert source.count(mutant.before) == 1, f"{mutant.name}: its text is to be brought up to date"
    file = mutant.module.__file__
    right = dict(_codes(compile(source, file, "exec")))
    wrong = dict(_codes(compile(source.replace(mutant.before, mutant.after), file, "exec")))
    (name,) = (name for name in right if not _alike(right[name], wrong[name]))
    fn = mutant.module
    for part in name.split("."):
        fn = inspect.getattr_static(fn, part)
    fn = getattr(fn, "fget", fn)
    was, fn.__code__ = fn.__code__, wrong[name]
    try:
        yield
    finally:
        fn.__code__ = was


def _codes(code):
    """The code of functions of a module and its classes, by their names in it."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_flags & inspect.CO_NEWLOCALS:
                yield constant.co_qualname, constant
            else:
                yield from _codes(constant)


def _alike(one, other):
    """Whether the code of two functions is the same, wherever it stands."""
    if not isinstance(one, types.CodeType):
        return type(one) is type(other) and one == other
    return (
        (one.co_code, one.co_names) == (other.co_code, other.co_names)
        and len(one.co_consts) == len(other.co_consts)
        and all(map(_alike, one.co_consts, other.co_consts))
    )

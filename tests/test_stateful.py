"""
Whatever is done in whatever order: tokens, scopes and groups against a model that is sequential.

Hypothesis makes up the steps; the same ones each time. The model knows the rules and no threads:
each step is brought to its end before the next, by tasks that do what they are told.
"""

import contextlib
import gc
import itertools
import queue
import sys
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from staging import fail, until

import fastpool
from fastpool import (
    Cancelled,
    CancelToken,
    CollectAll,
    FailFast,
    FirstSuccess,
    GroupClosedError,
    TaskCancelledError,
    TaskGroup,
    cancellable,
    current_token,
    shield,
)

# From Python 3.14 on Hypothesis may take what it holds itself, in each thread, for let go.
pytestmark = pytest.mark.filterwarnings("ignore:It looks like `register_random`")

PROFILE = settings(derandomize=True, database=None, deadline=None, print_blob=False)
LIMIT = 60  # seconds; ends a hang
FAR = 3600.0  # seconds; a deadline passes when the test says so, as the clock would

index = st.integers(min_value=0, max_value=1000)


@pytest.fixture(autouse=True)
def no_token_is_left():
    """The errors that steps have caught are cycles, and the clock waits for their deadlines."""
    yield
    gc.collect()


def pick(items, number):
    """One of them, by any number; the last one is number zero."""
    return items[-1 - number % len(items)]


def expire(token):
    """The deadline passes, as the clock has it pass; nothing if it was lifted."""
    if token._due() is not None:
        token._expire()


# --- Tokens, callbacks, scopes --------------------------------------------------------------------


class Switch:
    """What a token should be."""

    def __init__(self, *parents, due=None):
        self.parents = list(parents)
        self.children = []
        self.reason = None
        self.by_itself = False  # set by its own deadline
        self.due = due  # seconds
        self.callbacks = []
        for parent in parents:
            parent.children.append(self)
            self.reason = self.reason or parent.reason
        if due is not None and due <= 0:
            self.expire()

    def expire(self):
        """Its own deadline passes."""
        self.by_itself = self.reason is None
        return self.turn(TimeoutError)

    def turn(self, reason):
        """Set it and all below it; gives the callbacks that are to run then, in their order."""
        if self.reason is not None:
            return []
        self.reason = reason
        reached = [self]
        for switch in reached:
            for child in switch.children:
                if child.reason is None:
                    child.reason = reason
                    reached.append(child)
        callbacks = [each for switch in reached for each in switch.callbacks]
        return sorted(callbacks, key=lambda each: each.number, reverse=True)

    def detach(self):
        """The end of a scope."""
        for parent in self.parents:
            parent.children.remove(self)
        self.parents = []
        self.due = None

    def nearest(self):
        """Its deadline, or that of the nearest ancestor."""
        found = [] if self.due is None else [self.due]
        found += [due for parent in self.parents if (due := parent.nearest()) is not None]
        return min(found, default=None)


class Note:
    """A callback as it should go: what it does, where, and whether it is still to run."""

    def __init__(self, number, action, argument=0, current=None):
        self.number, self.action, self.argument = number, action, argument
        self.current = current
        self.waits = True

    def take_back(self):
        """Whether it never runs."""
        told, self.waits = self.waits, False
        return told


ACTIONS = ["note", "raise", "cancel", "unregister", "close", "register", "child"]


class Tokens(RuleBasedStateMachine):
    """Each step is made twice: with the library, and in the model. Both keep a log."""

    def __init__(self):
        super().__init__()
        self.tokens, self.switches = [CancelToken()], [Switch()]
        self.registrations, self.notes = [], []  # made by steps; by callbacks:
        self.nested = []
        self.log, self.expected = [], []
        self.scopes = []  # each: what it is, its token, its switch
        self.numbers = itertools.count()
        self.hook = sys.unraisablehook
        sys.unraisablehook = lambda broken: self.log.append(str(broken.exc_value))

    def teardown(self):
        while self.scopes:
            self.leave_scope(echo=False)
        sys.unraisablehook = self.hook

    def current(self):
        return self.scopes[-1][1] if self.scopes else CancelToken.NEVER

    def add(self, token, switch):
        self.tokens.append(token)
        self.switches.append(switch)

    def act(self, note):
        """A callback runs."""
        self.log.append((note.number, current_token()))
        if note.action == "raise":
            raise ValueError("broken")
        if note.action == "cancel":
            self.log.append(pick(self.tokens, note.argument).cancel(f"by {note.number}"))
        elif note.action == "unregister":
            self.log.append(pick(self.registrations, note.argument).unregister())
        elif note.action == "close":
            pick(self.registrations, note.argument).close()
        elif note.action == "register":
            token = pick(self.tokens, note.argument)
            self.nested.append(token.on_cancel(lambda: self.log.append("nested")))
        elif note.action == "child":
            self.log.append(pick(self.tokens, note.argument).child().cancelled())

    def run(self, notes):
        """They run in the model."""
        for note in notes:
            if not note.take_back():
                continue
            if note.action == "nested":
                self.expected.append("nested")
                continue
            self.expected.append((note.number, note.current))
            if note.action == "raise":
                self.expected.append("broken")
            elif note.action == "cancel":
                switch = pick(self.switches, note.argument)
                told = switch.reason is None
                self.run(switch.turn(f"by {note.number}"))
                self.expected.append(told)
            elif note.action == "unregister":
                self.expected.append(pick(self.notes, note.argument).take_back())
            elif note.action == "close":
                pick(self.notes, note.argument).take_back()
            elif note.action == "register":
                switch = pick(self.switches, note.argument)
                self.put(switch, Note(next(self.numbers), "nested"))
            elif note.action == "child":
                self.expected.append(pick(self.switches, note.argument).reason is not None)

    def put(self, switch, note):
        """It is registered in the model."""
        switch.callbacks.append(note)
        if switch.reason is not None:
            self.run([note])

    # The steps.

    @rule(timeout=st.sampled_from([None, FAR, 2 * FAR, 0, -1]))
    def make(self, timeout):
        self.add(CancelToken(timeout=timeout), Switch(due=timeout))

    @rule(parent=index, timeout=st.sampled_from([None, FAR, 2 * FAR, 0]))
    def make_child(self, parent, timeout):
        switch = Switch(pick(self.switches, parent), due=timeout)
        self.add(pick(self.tokens, parent).child(timeout=timeout), switch)

    @rule(parents=st.lists(index, max_size=3))
    def make_any(self, parents):
        tokens = [pick(self.tokens, number) for number in parents]
        switch = Switch(*(pick(self.switches, number) for number in parents))
        self.add(CancelToken.any(*tokens), switch)

    @rule(number=index, reason=st.sampled_from(["enough", "rain", None]))
    def cancel(self, number, reason):
        switch = pick(self.switches, number)
        told = switch.reason is None
        self.run(switch.turn(reason or "cancelled"))

        assert pick(self.tokens, number).cancel(reason) is told

    @rule(number=index)
    def fail_under(self, number):
        """A call that is handed the token fails; the current token is told nothing by that."""
        switch, token = pick(self.switches, number), pick(self.tokens, number)
        error = ValueError("root")
        if token is not self.current():
            self.run(switch.turn(error))

        with contextlib.suppress(ValueError):
            cancellable(lambda token: fail(error)).with_token(token)

    @rule(number=index)
    def pass_deadline(self, number):
        switch, token = pick(self.switches, number), pick(self.tokens, number)
        if switch.due is not None and switch.reason is None:
            self.run(switch.expire())
        expire(token)  # its callbacks run in a helper
        until(lambda: len(self.log) >= len(self.expected))

    @rule(number=index, action=st.sampled_from(ACTIONS), argument=index)
    def register(self, number, action, argument):
        if action in ("unregister", "close") and not self.registrations:
            action = "note"
        note = Note(next(self.numbers), action, argument, self.current())
        registration = pick(self.tokens, number).on_cancel(lambda: self.act(note))
        self.put(pick(self.switches, number), note)
        self.registrations.append(registration)
        self.notes.append(note)

    @precondition(lambda self: self.registrations)
    @rule(number=index, how=st.sampled_from(["unregister", "close"]))
    def take_back_one(self, number, how):
        told = getattr(pick(self.registrations, number), how)()

        expected = pick(self.notes, number).take_back()
        assert told is (expected if how == "unregister" else None)

    @precondition(lambda self: len(self.scopes) < 5)
    @rule(
        kind=st.sampled_from(["use_token", "timeout", "shield"]),
        number=index,
        seconds=st.sampled_from([None, FAR, 0]),
    )
    def enter_scope(self, kind, number, seconds):
        if kind == "use_token":
            scope, switch = fastpool.use_token(pick(self.tokens, number)), None
            expected = pick(self.switches, number)
        elif kind == "timeout":
            scope = fastpool.timeout(seconds)
            around = self.switch_of(self.current())
            expected = switch = Switch(*([around] if around else []), due=seconds)
        else:
            scope = fastpool.shield(seconds)
            expected = switch = Switch(due=seconds)
        token = scope.__enter__()
        if switch is not None:
            self.add(token, switch)
        self.scopes.append((scope, token, expected))

    def switch_of(self, token):
        for mine, switch in zip(self.tokens, self.switches, strict=True):
            if mine is token:
                return switch
        return None

    @precondition(lambda self: self.scopes)
    @rule(echo=st.booleans())
    def leave_scope(self, echo):
        """By its end, or by the `Cancelled` that its token raises."""
        scope, _, switch = self.scopes.pop()
        raised = None
        if echo:
            try:
                fastpool.checkpoint()
            except Cancelled as error:
                raised = error
        assert (raised is not None) is (echo and switch.reason is not None)
        left = None
        try:
            if not scope.__exit__(type(raised) if raised else None, raised, None):
                left = raised
        except TimeoutError as error:
            left = error

        is_own = not isinstance(scope, fastpool.use_token)
        if raised is not None and is_own and switch.by_itself:
            assert type(left) is TimeoutError
            assert left.__cause__ is raised
        else:
            assert left is raised
        if is_own:
            switch.detach()

    @invariant()
    def is_as_the_model_says(self):
        assert self.log == self.expected
        for token, switch in zip(self.tokens, self.switches, strict=True):
            assert token.cancelled() is (switch.reason is not None)
            if switch.reason is TimeoutError:
                assert type(token.reason) is TimeoutError
            else:
                assert token.reason == switch.reason
            due, left = switch.nearest(), token.remaining()
            assert (left is None) is (due is None)
            assert due is None or max(due, 0) - 600 < left <= max(due, 0)
            assert token.wait(0) is token.cancelled()
        assert current_token() is self.current()


def test_tokens_callbacks_and_scopes_follow_the_model():
    """
    States, reasons, deadlines, which callbacks ran in which order, and what scopes let out.
    """
    run_machine(Tokens, settings=settings(PROFILE, max_examples=400, stateful_step_count=40))


# --- Groups ---------------------------------------------------------------------------------------


def is_meant(error, meant):
    """Whether it is that error, or one of that class."""
    return error is meant or type(error) is meant


class Puppet:
    """A task that does what it is told, and how it should stand."""

    def __init__(self, reaction):
        self.reaction = reaction  # "deaf", or what it does when it is cancelled
        self.state = "queued"
        self.error = None
        self.told = False  # its own token is set
        self.timed_out = False  # by its own deadline
        self.orders = queue.SimpleQueue()
        self.token = None  # its own, once it runs
        self.started = threading.Event()
        self.handle = None

    def __call__(self):
        """What the task runs, by its orders: to return, to raise, or to look at its token."""
        self.token = current_token()
        with self.token.on_cancel(lambda: self.orders.put(("cancelled", None))):
            self.started.set()
            while True:
                order, what = self.orders.get(timeout=LIMIT)
                if order == "value":
                    return what
                if order == "error":
                    raise what
                if self.reaction == "swallows":
                    return "swallowed"
                if self.reaction == "fails":
                    raise OSError("of the clean-up")
                if self.reaction == "leaves":
                    self.token.check()

    @property
    def is_over(self):
        return self.state not in ("queued", "running")


class Show:
    """A group, and how it should stand."""

    def __init__(self, group, policy, workers, around):
        self.group, self.policy, self.workers, self.around = group, policy, workers, around
        self.puppets = []
        self.failures = []  # lists, by time; those of one list at the same time, in any order
        self.winner = None
        self.turned = around.turned and "outside" if around else None  # the token, by what

    def running(self):
        return [each for each in self.puppets if each.state == "running"]


@cancellable
def perform(token, puppet):
    """Run a puppet, as a decorated function."""
    assert token is current_token()
    return puppet()


class Groups(RuleBasedStateMachine):
    """Groups in the bodies of groups, and tasks that end when the test says so."""

    def __init__(self):
        super().__init__()
        self.shows = []  # the innermost last
        self.ended = []

    def teardown(self):
        try:
            while self.shows:
                self.leave(how="cancel")
        finally:
            while self.shows:  # what the model says is wrong: they are to be left all the same
                show = self.shows.pop()
                for puppet in show.puppets:
                    puppet.orders.put(("value", 404))
                with contextlib.suppress(BaseException):
                    show.group.__exit__(None, None, None)

    # What comes of a step, in the model, and the wait until the library has come to it.

    def fill(self, show):
        """Queued tasks start while there is a worker."""
        for each in show.puppets:
            if each.state == "queued" and show.turned is None and self.room(show):
                each.state = "running"
                assert each.started.wait(timeout=LIMIT)

    def room(self, show):
        return len(show.running()) < show.workers

    def turn(self, show, how):
        """The group's token is set, and those of the groups inside it."""
        inside = self.shows[self.shows.index(show) :]
        for each in inside:
            if each.turned is None:
                each.turned = how if each is show else "outside"
        for each in inside:
            self.tell_all(each)
            for puppet in each.puppets:
                if puppet.is_over and puppet.handle:
                    self.settle(puppet)

    def tell_all(self, show):
        """Everything of a group is cancelled; what comes of that comes at the same time."""
        together = []
        show.failures.append(together)
        for puppet in show.puppets:
            if puppet.state == "queued":
                puppet.state = "cancelled"
            elif puppet.state == "running":
                self.tell(show, puppet, together)

    def tell(self, show, puppet, together=None, *, timed_out=False):
        """A running task's own token is set; it does as it does."""
        if puppet.told:
            return
        puppet.told, puppet.timed_out = True, timed_out
        if puppet.reaction == "deaf":
            return
        if puppet.reaction == "leaves" and not timed_out:
            puppet.state = "cancelled"
        elif puppet.reaction == "swallows":
            self.succeed(show, puppet, "swallowed")
        else:
            kind = TimeoutError if puppet.reaction == "leaves" else OSError
            self.fail(show, puppet, kind, together)

    def succeed(self, show, puppet, value):
        puppet.state, puppet.value = "value", value
        if type(show.policy) is FirstSuccess and show.turned is None:
            show.winner = puppet
            self.settle(puppet)
            self.turn(show, "policy")

    def fail(self, show, puppet, error, together=None):
        puppet.state, puppet.error = "failed", error
        if together is None:
            show.failures.append([(puppet, error)])
        else:
            together.append((puppet, error))
        is_exit = isinstance(error, SystemExit)
        if show.turned is None and (type(show.policy) is FailFast or is_exit):
            self.settle(puppet)
            self.turn(show, "policy")

    def settle(self, puppet):
        with shield():
            assert puppet.handle.wait(timeout=LIMIT)

    # The steps.

    @precondition(lambda self: len(self.shows) < 3)
    @rule(
        policy=st.sampled_from([FailFast(), CollectAll(), FirstSuccess()]),
        workers=st.integers(min_value=1, max_value=3),
    )
    def enter(self, policy, workers):
        group = TaskGroup(workers, policy=policy, timeout=FAR)
        around = self.shows[-1] if self.shows else None
        group.__enter__()
        self.shows.append(Show(group, policy, workers, around))

    @precondition(lambda self: self.shows)
    @rule(
        which=index,
        reactions=st.lists(
            st.sampled_from(["deaf", "leaves", "swallows", "fails"]), min_size=1, max_size=6
        ),
        how=st.sampled_from(["submit", "map", "timeout"]),
    )
    def submit(self, which, reactions, how):
        show = pick(self.shows, which)
        puppets = [Puppet(reaction) for reaction in reactions]
        if show.turned is not None:
            expected = Cancelled if self.shows[-1].turned is not None else GroupClosedError
            for call in (show.group.submit, lambda fn, each: show.group.map(fn, [each])):
                with pytest.raises(expected):
                    call(perform, puppets[0])
            return
        if how == "map":
            handles = show.group.map(perform, puppets).tasks
        else:
            submitter = show.group.with_options(timeout=FAR) if how == "timeout" else show.group
            handles = [submitter.submit(perform, puppet) for puppet in puppets]
        for puppet, handle in zip(puppets, handles, strict=True):
            puppet.handle, puppet.limited = handle, how == "timeout"
            show.puppets.append(puppet)
        self.fill(show)

    def running(self):
        return [(show, each) for show in self.shows for each in show.running()]

    @precondition(lambda self: self.running())
    @rule(
        orders=st.lists(
            st.tuples(index, st.sampled_from(["value", "value", "error", "error", "cancelled"])),
            min_size=1,
            max_size=4,
        )
    )
    def end_some(self, orders):
        """Running tasks are told to return, to fail, or to raise `Cancelled`, one by one."""
        for which, order in orders:
            if self.running():
                self.finish(*pick(self.running(), which), order)

    @precondition(lambda self: self.running())
    @rule(which=index)
    def exit_one(self, which):
        """A running task is told to leave the program."""
        self.finish(*pick(self.running(), which), "exit")

    def finish(self, show, puppet, order):
        if order == "value":
            puppet.orders.put(("value", 404))
            self.settle(puppet)
            self.succeed(show, puppet, 404)
        else:
            error = {"error": ValueError, "exit": SystemExit, "cancelled": Cancelled}[order]("told")
            puppet.orders.put(("error", error))
            self.settle(puppet)
            if order == "cancelled" and puppet.told and puppet.timed_out:
                self.fail(show, puppet, TimeoutError)
            elif order == "cancelled" and puppet.told:
                puppet.state = "cancelled"
            else:
                self.fail(show, puppet, error)
        self.fill(show)

    @precondition(lambda self: any(show.puppets for show in self.shows))
    @rule(which=index)
    def cancel_task(self, which):
        show, puppet = pick([(s, each) for s in self.shows for each in s.puppets], which)
        told = not puppet.is_over and not puppet.told

        assert puppet.handle.cancel("not needed") is told
        if puppet.state == "queued":
            puppet.state = "cancelled"
        elif told:
            self.tell(show, puppet)
        if puppet.is_over:
            self.settle(puppet)
        self.fill(show)

    @precondition(lambda self: any(each.limited for _, each in self.running()))
    @rule(which=index)
    def time_out_task(self, which):
        show, puppet = pick([pair for pair in self.running() if pair[1].limited], which)
        expire(puppet.token)
        self.tell(show, puppet, timed_out=True)
        if puppet.is_over:
            self.settle(puppet)
        self.fill(show)

    @precondition(lambda self: self.running())
    @rule(which=index, how=st.sampled_from(["inside", "deadline"]))
    def stop(self, which, how):
        """The group is cancelled, or its deadline passes; where something runs, or it is dull."""
        show, _ = pick(self.running(), which)
        if how == "inside":
            assert show.group.cancel("enough") is (show.turned is None)
        else:
            expire(show.group.token)
        self.turn(show, how)

    @precondition(lambda self: self.shows and self.shows[-1].puppets)
    @rule(how=st.sampled_from(["end", "error", "check", "cancel"]))
    def leave(self, how):
        """The innermost block ends, by itself or by an exception."""
        show = self.shows[-1]
        if how == "check" and show.turned is None:
            how = "end"
        while show.running() if how == "end" else self.stubborn(show):
            self.finish(show, (show.running() if how == "end" else self.stubborn(show))[0], "value")
        if how == "cancel":
            show.group.cancel("over")
            self.turn(show, "inside")
        raised = None
        if how == "error":
            raised = KeyError("body")
            show.failures.append([(None, raised)])
            if show.turned is None:
                show.turned = "policy"
                self.tell_all(show)  # as the block is left, and not before
        elif how == "check" and show.turned is not None:
            with pytest.raises(Cancelled) as caught:
                fastpool.checkpoint()
            raised = caught.value
        left = None
        try:
            if not show.group.__exit__(type(raised) if raised else None, raised, None):
                left = raised
        except BaseException as error:
            left = error
        self.shows.pop()
        self.ended.append(show)

        self.check_what_left(show, left, raised)

    def stubborn(self, show):
        """Those that would not hear a cancel."""
        return [each for each in show.running() if each.reaction == "deaf" or each.told]

    def check_what_left(self, show, left, raised):
        """The first of the rules that applies."""
        failures = [each for together in show.failures for each in together]
        exits = [error for _, error in failures if isinstance(error, SystemExit)]
        of_the_body = [error for puppet, error in failures if puppet is None]
        kind = type(show.policy)
        if exits:
            assert left is exits[0]
        elif kind is FirstSuccess and of_the_body:
            assert left is of_the_body[0]
        elif failures and kind is FailFast:
            first = next(together for together in show.failures if together)
            assert any(is_meant(left, error) for _, error in first)
        elif failures and not (kind is FirstSuccess and show.winner):
            assert left.exceptions == tuple(each.exception for each in show.group.failures)
        elif show.turned == "deadline":
            assert type(left) is TimeoutError
        elif show.turned == "outside":
            assert type(left) is Cancelled
        else:
            assert left is None

    @invariant()
    def is_as_the_model_says(self):
        for show in self.shows + self.ended[-1:]:
            group = show.group
            assert group.token.cancelled() is (show.turned is not None)
            assert group.winner is (show.winner.handle if show.winner else None)
            recorded = iter(group.failures)
            for together in show.failures:
                found = {
                    each.task: each.exception for each in itertools.islice(recorded, len(together))
                }
                assert len(found) == len(together)
                for puppet, error in together:
                    assert is_meant(found[puppet and puppet.handle], error)
            assert next(recorded, None) is None
            for puppet in show.puppets:
                self.check_handle(puppet)
        assert current_token() is (self.shows[-1].group.token if self.shows else CancelToken.NEVER)

    def check_handle(self, puppet):
        task, is_set = puppet.handle, current_token().cancelled()
        assert task.done() is puppet.is_over
        assert task.running() is (puppet.state == "running")
        assert task.cancelled() is (puppet.state == "cancelled")
        assert puppet.started.is_set() or puppet.state in ("queued", "cancelled")
        if puppet.state == "value":
            assert task.result() == puppet.value
        elif puppet.state == "failed":
            error = task.exception()
            assert is_meant(error, puppet.error)
        elif puppet.state == "cancelled":
            with pytest.raises(Cancelled if is_set else TaskCancelledError):
                task.result()
        else:
            with pytest.raises(Cancelled if is_set else TimeoutError):
                task.result(timeout=0)


def test_groups_tasks_and_policies_follow_the_model():
    """
    What each handle says, what is recorded, who wins, what starts, and what leaves each block.
    """
    run_machine(Groups, settings=settings(PROFILE, max_examples=300, stateful_step_count=30))

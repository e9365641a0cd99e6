"""
Small programs of a few threads that act on a few tokens, and what may come of them.

What a token promises is written down here once more, step by step and without threads: a program's
threads take these steps in every possible order, and what came of a real run must be among the
ends that they come to.

Source:
    Lincheck, of the Kotlin coroutines: generated programs, and a search for a sequential
    explanation.
"""

import functools
import random
from typing import NamedTuple

from interleave import together

from fastpool import CancelToken

# Who is whose parent, and where there is a callback from the start.
PARENTS = {"root": None, "child": "root", "grandchild": "child"}
CALLBACKS = {"of root": "root", "of grandchild": "grandchild"}
KINDS = ("cancel", "check", "register", "unregister", "child")


class Call(NamedTuple):
    """One call of a thread's: its kind, and on which token or callback."""

    kind: str
    on: str
    name: str  # of the call, of which there is one in the program


@functools.cache
def generate(count, seed):
    """So many programs, each with several things that may come of it."""
    chance = random.Random(seed)
    programs = []
    while len(programs) < count:
        program = make(chance, threads=chance.choice((2, 2, 3)))
        if sum(map(len, program)) < 5:  # of more calls, too much may come
            ends = allowed(program)
            if len(ends) >= 4:
                programs.append((program, ends))
    return programs


def make(chance, threads):
    """A tuple of calls for each thread, the first of which is a cancel."""
    program = []
    for thread in range(threads):
        calls = []
        for number in range(chance.randint(1, 3)):
            kind = chance.choice(KINDS) if program or calls or thread else "cancel"
            on = chance.choice(list(CALLBACKS if kind == "unregister" else PARENTS))
            calls.append(Call(kind, on, f"{thread}.{number}"))
        program.append(tuple(calls))
    return tuple(program)


# --- What comes of it -----------------------------------------------------------------------------


def run(program):
    """
    What the calls of each thread give, the callbacks in the order in which they ran, and why each
    token is set at last.
    """
    tokens, made, ran = {}, {}, []
    for name, parent in PARENTS.items():
        tokens[name] = CancelToken() if parent is None else tokens[parent].child()
    kept = {
        name: tokens[on].on_cancel(lambda name=name: ran.append(name))
        for name, on in CALLBACKS.items()
    }

    def act(call):
        match call.kind:
            case "cancel":
                return tokens[call.on].cancel(call.name), tuple(ran)
            case "check":
                return tokens[call.on].reason
            case "register":
                kept[call.name] = tokens[call.on].on_cancel(lambda: ran.append(call.name))
                return tuple(ran)
            case "unregister":
                return kept[call.on].unregister()
            case "child":
                made[call.name] = tokens[call.on].child()
                return made[call.name].reason

    results = together(*[lambda calls=calls: tuple(map(act, calls)) for calls in program])
    return tuple(results), tuple(ran), reasons({**tokens, **made})


def reasons(tokens):
    return frozenset((name, token.reason) for name, token in tokens.items())


# --- What may come of it --------------------------------------------------------------------------


class State(NamedTuple):
    """Where a program is; every part of it is a tuple, so that states can be told apart."""

    causes: tuple  # of each token by its name: the call that set it, and not None
    callbacks: tuple  # (name, token, number, whether somebody has claimed it)
    ran: tuple
    numbers: int
    threads: tuple  # (results, step of the current call, what that keeps in mind)


def allowed(program):
    """All that may come of a program."""
    callbacks = tuple((name, on, at, False) for at, (name, on) in enumerate(CALLBACKS.items()))
    start = State((), callbacks, (), len(callbacks), (((), 0, None),) * len(program))
    ends, seen, left = set(), {start}, [start]
    while left:
        state = left.pop()
        going = False
        for thread, calls in enumerate(program):
            results, step, kept = state.threads[thread]
            if len(results) == len(calls):
                continue
            going = True
            call = calls[len(results)]
            for then in STEPS[call.kind](state, call, step, kept):
                after, goes = then
                if isinstance(goes, Result):
                    goes = ((*results, goes.value), 0, None)
                else:
                    goes = (results, *goes)
                threads = (*state.threads[:thread], goes, *state.threads[thread + 1 :])
                after = after._replace(threads=threads)
                if after not in seen:
                    seen.add(after)
                    left.append(after)
        if not going:
            causes = dict(state.causes)
            made = {
                call.name: call.on for calls in program for call in calls if call.kind == "child"
            }
            reasons = {(name, causes.get(made.get(name, name))) for name in (*PARENTS, *made)}
            results = tuple(results for results, *_ in state.threads)
            ends.add((results, state.ran, frozenset(reasons)))
    return ends


class Result(NamedTuple):
    """What a call returns."""

    value: object


def check(state, call, step, kept):
    yield state, Result(dict(state.causes).get(call.on))


def unregister(state, call, step, kept):
    claimed = claim(state, call.on)
    yield claimed or state, Result(claimed is not None)


def child(state, call, step, kept):
    # The child is linked first and looks then, but nobody else can tell.
    yield state, Result(dict(state.causes).get(call.on))


def register(state, call, step, kept):
    if step == 0:  # the number says which is the younger
        yield state._replace(numbers=state.numbers + 1), (1, state.numbers)
    elif step == 1:
        entry = (call.name, call.on, kept, False)
        yield state._replace(callbacks=(*state.callbacks, entry)), (2, None)
    elif step == 2:
        claimed = claim(state, call.name) if call.on in dict(state.causes) else None
        yield (claimed, (3, None)) if claimed else (state, (4, None))
    elif step == 3:
        yield state._replace(ran=(*state.ran, call.name)), (4, None)
    else:
        yield state, Result(state.ran)


def cancel(state, call, step, kept):
    causes = dict(state.causes)
    if step == 0:
        if call.on in causes:
            yield state, Result((False, state.ran)) if kept else (0, True)
        else:
            yield set_token(state, call.on, call.name), (1, None)
    elif step == 1:  # what is below, one after the other, the nearest first
        for name, parent in PARENTS.items():
            if parent in causes and name not in causes and is_below(name, call.on):
                yield set_token(state, name, causes[parent]), (1, None)
                return
        pending = [
            (number, name)
            for name, on, number, claimed in state.callbacks
            if causes.get(on) == call.name and not claimed
        ]
        yield state, (2, tuple(name for _, name in sorted(pending, reverse=True)))
    elif step == 2 and kept:
        claimed = claim(state, kept[0])
        yield (claimed, (3, kept)) if claimed else (state, (2, kept[1:]))
    elif step == 3:
        yield state._replace(ran=(*state.ran, kept[0])), (2, kept[1:])
    else:
        yield state, Result((True, state.ran))


STEPS = {
    "cancel": cancel,
    "check": check,
    "register": register,
    "unregister": unregister,
    "child": child,
}


def set_token(state, name, cause):
    return state._replace(causes=(*state.causes, (name, cause)))


def is_below(name, other):
    while name is not None and name != other:
        name = PARENTS[name]
    return name is not None


def claim(state, name):
    """The state in which a callback is claimed; None if it was before."""
    callbacks = []
    won = False
    for entry in state.callbacks:
        if entry[0] == name and not entry[3]:
            won = True
            entry = (*entry[:3], True)
        callbacks.append(entry)
    return state._replace(callbacks=tuple(callbacks)) if won else None

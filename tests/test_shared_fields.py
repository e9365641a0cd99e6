"""
What protects each field that changes: the table in the design page names them all, and no others.
"""

import ast
import functools
import itertools
import re
import subprocess
import sys
import sysconfig
import threading
from collections import defaultdict, deque

import pytest
from pages import ROOT
from staging import start

PACKAGE = ROOT / "fastpool"
PAGE = (ROOT / "docs" / "design.md").read_text().partition("\n## What is protected by what\n")[2]
KINDS = ("made", "one thread", "one way", "atomic", "lock")
ROWS = re.findall(rf"^\| `(\S+)` \| (.+) \| ({'|'.join(KINDS)}): (.+) \|$", PAGE, re.MULTILINE)

MAKING = ("__init__", "__new__")  # as long as these run, nobody else has the object
EMPTY = re.compile(r"(\{\}|\[\]|deque\(\)|set\(\)|itertools\.count\(.*|.*WeakKeyDictionary.*)$")
CONTAINER = re.compile(r"[{\[]|deque\(|set\(|itertools\.count\(")  # in an object, filled or not

# Whose fields these are, where a function writes to those of another object than its own.
# What is no name of these is no object of ours, or of a class that has no field of that name.
OBJECTS = {
    "at": "Task",
    "args[5]": "",
    "batch": "Calls",
    "calls": "_Calls",
    "turn": "_Turn",
    "entry": "Task Callback",
    "far": "WorkerProcess",
    "fence": "Fence",
    "far.shared": "Shared",
    "future": "_Call",
    "group": "TaskGroup",
    "guarded": "Run",
    "handler": "",
    "helper": "_Helper",
    "inner": "Lane",
    "items": "Items",
    "lane": "Lane",
    "note": "Note",
    "place": "Scope",
    "pool": "_Pool",
    "run": "Run",
    "scope": "Scope",
    "self._shared": "Shared",
    "self._worker_handler": "",
    "self.threads": "_GrowingPool",
    "shared": "Shared",
    "source": "Source",
    "task": "Task _Item",
    "thread": "_WorkerThread",
    "token": "CancelToken",
    "_guard": "_Guard",
    "_local": "",
    "_marks": "_marks",
    "_threads": "",
    "messages": "",
    "_token.messages": "",
}

parse = functools.cache(ast.parse)


class Class:
    """What its source says of a class, or of a module as a whole."""

    def __init__(self, bases=()):
        self.bases = bases
        self.fields = set()  # all there are
        self.containers = {}  # those that are made empty, and as what
        self.changes = defaultdict(set)  # what is done to a field once it was made: =, +=, del


def targets(node):
    """What a statement assigns to, and how."""
    found = []
    match node:
        case ast.Assign():
            found = [(target, "=") for target in node.targets]
        case ast.Delete():
            found = [(target, "del") for target in node.targets]
        case ast.AugAssign():
            found = [(node.target, "+=")]
        case ast.For() | ast.comprehension() | ast.AnnAssign(value=ast.AST()):
            found = [(node.target, "=")]
        case ast.withitem(optional_vars=ast.AST()):
            found = [(node.optional_vars, "=")]
    for target, how in found:
        for each in ast.walk(target):
            if isinstance(each, (ast.Attribute, ast.Name)) and not isinstance(each.ctx, ast.Load):
                yield each, how


def value_of(node):
    """What is assigned, as text."""
    value = getattr(node, "value", None)
    return "" if value is None or not isinstance(value, ast.AST) else ast.unparse(value)


def read(sources):
    """
    All classes of some modules, by name, and the modules; with what changes in them.

    Args:
        sources: The text of each module, by its name.
    """
    known = defaultdict(list)
    foreign = []  # what is written to other objects: in which module, to whose, what, and how

    def visit(module, owner, function, node, globals_):
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.ClassDef):
                cls = Class([ast.unparse(base).partition("[")[0] for base in inner.bases])
                known[inner.name].append(cls)
                visit(module, cls, None, inner, ())
                continue
            if isinstance(inner, (ast.FunctionDef, ast.Lambda)):
                shared = [each for each in ast.walk(inner) if isinstance(each, ast.Global)]
                names = {name for each in shared for name in each.names}
                here = function or getattr(inner, "name", "lambda")
                visit(module, owner, here, inner, names)
                continue
            for target, how in targets(inner):
                note(module, owner, function, inner, target, how, globals_)
            visit(module, owner, function, inner, globals_)

    def note(module, owner, function, node, target, how, globals_):
        if isinstance(target, ast.Name):
            place = module if function is None and owner is None else owner
            if function is None:
                place.fields.add(target.id)
                if owner is None and EMPTY.match(value_of(node)):
                    place.containers[target.id] = value_of(node)
            elif target.id in globals_:
                module.changes[target.id].add(how)
            return
        whose = ast.unparse(target.value)
        if whose == "self" and owner is not None:
            owner.fields.add(target.attr)
            if function not in MAKING:
                owner.changes[target.attr].add(how)
            elif CONTAINER.match(value_of(node)):
                owner.containers[target.attr] = value_of(node)
        elif function is not None:
            foreign.append((whose, target.attr, how))

    for name, source in sources.items():
        module = Class()
        known[name].append(module)
        tree = parse(source)
        visit(module, None, None, tree, ())
        for cls in (each for each in ast.walk(tree) if isinstance(each, ast.ClassDef)):
            for each in cls.body:
                if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "__slots__":
                    known[cls.name][-1].fields.update(ast.literal_eval(each.value))
                elif isinstance(each, ast.AnnAssign):
                    known[cls.name][-1].fields.add(each.target.id)
                elif isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "_fields_":
                    names = [ast.literal_eval(field.elts[0]) for field in each.value.elts]
                    known[cls.name][-1].fields.update(names)
    return known, foreign


def lineage(known, name):
    """A class and those that it derives from, as far as they are ours."""
    yield name
    for cls in known.get(name, ()):
        for base in cls.bases:
            yield from lineage(known, base)


def said(rows):
    """The kind of protection that the table names for each field, by class and name."""
    kinds = {}
    for owner, fields, kind, _ in rows:
        for field in ["*"] if fields == "all" else re.findall(r"`(\w+)`", fields):
            kinds.setdefault((owner, field), set()).add(kind)
    return kinds


def what_is_wrong(sources, rows):
    """Every field that changes and is not in the table, is there and is none, or adds in place."""
    known, foreign = read(sources)
    kinds = said(rows)
    ours = {field for classes in known.values() for cls in classes for field in cls.fields}
    changes = defaultdict(set)
    for name, classes in known.items():
        for cls in classes:
            for field in {*cls.changes, *cls.containers}:
                changes[name, field] |= cls.changes.get(field, set())
    wrong = []
    for whose, field, how in foreign:
        if field not in ours:
            continue  # of an object that is not ours
        names = OBJECTS.get(whose)
        if names is None:
            wrong.append(f"{whose}.{field} is written, and OBJECTS does not say what {whose} is")
            continue
        for name in names.split():
            for cls in lineage(known, name):
                if any(field in one.fields for one in known[cls]):
                    changes[cls, field].add(how)
    for (name, field), hows in sorted(changes.items()):
        found = set()
        for cls in lineage(known, name):
            found |= kinds.get((cls, field), set()) | kinds.get((cls, "*"), set())
        if not found:
            wrong.append(f"nothing protects {name}.{field}")
        elif "+=" in hows and not found & {"one thread", "lock"}:
            wrong.append(f"{name}.{field} is added to in place, which no {found} protects")
    for name, field in kinds:
        every = {
            f for cls in lineage(known, name) for one in known.get(cls, ()) for f in one.fields
        }
        if name not in known or (field != "*" and field not in every):
            wrong.append(f"there is no {name}.{field}")
    return wrong


GOES_THROUGH = {"all", "any", "enumerate", "filter", "frozenset", "iter", "map", "max", "min"}
GOES_THROUGH |= {"set", "sorted", "sum", "tuple", "zip"}


DEQUE, DICT = {"d"}, {"{"}
BOTH = DEQUE | DICT


def gone_through(sources, rows):
    """Where a container that others change meanwhile is gone through, item by item."""
    known, _ = read(sources)
    kinds = said(rows)

    def is_shared(node, owner, module, unsafe):
        """Whether several threads write to it, or to what it is a view of, and it is made so."""
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            (".items", ".keys", ".values")
        ):
            return is_shared(node.func.value, owner, module, unsafe)
        if isinstance(node, ast.Name):
            classes, field = [module], node.id
        elif isinstance(node, ast.Attribute):
            whose, field = ast.unparse(node.value), node.attr
            classes = [owner] if whose == "self" else OBJECTS.get(whose, "").split()
        else:
            return False
        for name in (each for cls in classes if cls for each in lineage(known, cls)):
            made = {cls.containers.get(field, "[")[0] for cls in known.get(name, ())}
            if made & unsafe and "atomic" in kinds.get((name, field), ()):
                return True
        return False

    def visit(module, owner, node):
        for inner in ast.iter_child_nodes(node):
            through = []
            if isinstance(inner, (ast.For, ast.comprehension)):
                through = [(inner.iter, BOTH)]
            elif isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name):
                if inner.func.id in GOES_THROUGH:
                    through = [(argument, BOTH) for argument in inner.args]
                elif inner.func.id == "list":  # takes a dictionary, or a view of one, in one go
                    through = [(argument, DEQUE) for argument in inner.args]
            elif isinstance(inner, ast.Call) and ast.unparse(inner.func).endswith(".copy"):
                through = [(inner.func.value, DICT)]  # may collect garbage on Python 3.11
            for what, unsafe in through:
                if is_shared(what, owner, module, unsafe):
                    found.append(f"{module}: {ast.unparse(what)}, line {what.lineno}")
            visit(module, inner.name if isinstance(inner, ast.ClassDef) else owner, inner)

    found = []
    for module, source in sources.items():
        visit(module, None, parse(source))
    return found


TAKEN_AWAY = {"above", "at", "backend", "bounded", "closing", "entry", "leaves", "notice", "room"}
ANYBODYS = {"around", "lane", "place._run", "run", "self._run", "self.run", "serving"}
GROUPS_AND_LANES = {"Lane", "Ledger", "Run", "_Lane"}


def looked_at_twice(sources):
    """Where a field of a group or a lane is used that may be `None` by now, seen or not."""
    found = []

    def visit(module, owner, node):
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, (ast.Attribute, ast.Subscript)):
                field = inner.value
                if isinstance(field, ast.Attribute) and field.attr in TAKEN_AWAY:
                    whose = ast.unparse(field.value)
                    if whose in ANYBODYS or (whose == "self" and owner in GROUPS_AND_LANES):
                        found.append(f"{module}: {ast.unparse(inner)}, line {inner.lineno}")
            visit(module, inner.name if isinstance(inner, ast.ClassDef) else owner, inner)

    for module, source in sources.items():
        visit(module, None, parse(source))
    return found


SOURCES = {path.stem: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_field_that_changes_is_in_the_table():
    """
    Whatever is written after its object was made, or filled, is named with what protects it.
    """
    assert len(ROWS) == PAGE.count("\n| `")
    assert what_is_wrong(SOURCES, ROWS) == []


@pytest.mark.parametrize(
    ("before", "after", "wrong"),
    [
        pytest.param(
            "        self.reason = reason\n",
            "        self.reason = reason\n\n    def turn(self):\n        self.turned = True\n",
            "nothing protects _Withdrawn.turned",
            id="a new field that changes",
        ),
        pytest.param(
            "        self.reason = reason\n",
            "        self.reason = reason\n        self.seen = {}\n",
            "nothing protects _Withdrawn.seen",
            id="a new container",
        ),
        pytest.param(
            "        self.halted = True\n",
            "        self.halted += 1\n",
            "Ledger.halted is added to in place, which no {'one way'} protects",
            id="a field that is added to in place",
        ),
        pytest.param(
            "            lane.context = None\n",
            "            lane.stays = False\n",
            "nothing protects Lane.stays",
            id="a field of another object",
        ),
        pytest.param(
            "            lane.context = None\n",
            "            somebody.context = None\n",
            "somebody.context is written, and OBJECTS does not say what somebody is",
            id="a field of nobody knows what",
        ),
        pytest.param(
            "untold",
            "unheard",
            "there is no Ledger.untold",
            id="a field that is gone",
        ),
    ],
)
def test_field_without_protection_is_found(before, after, wrong):
    """
    The table must be brought up to date with the source.
    """
    assert before in SOURCES["_ledger"]

    changed = SOURCES | {"_ledger": SOURCES["_ledger"].replace(before, after)}

    assert wrong in what_is_wrong(changed, ROWS)


def test_no_container_is_gone_through_while_others_change_it():
    """
    It is copied first, by an operation that is atomic.
    """
    assert gone_through(SOURCES, ROWS) == []


@pytest.mark.parametrize(
    ("module", "before", "after"),
    [
        ("_taskgroup", "in _dropped.copy():", "in list(_dropped):"),
        ("_taskgroup", "list(_open_runs):\n        if", "_open_runs:\n        if"),
        ("_run", "tuple(self.failures)", "tuple(self.lanes)"),
        ("_dump", "in list(run.lanes) if", "in run.lanes if"),
        ("_dump", "in list(run.lanes) if", "in run.lanes.copy() if"),
    ],
)
def test_container_that_is_gone_through_is_found(module, before, after):
    """
    A dictionary is not gone through, in C neither, and a deque not even by `list`.
    """
    assert before in SOURCES[module]

    changed = SOURCES | {module: SOURCES[module].replace(before, after)}

    assert len(gone_through(changed, ROWS)) == 1


def test_no_class_is_a_container_that_others_change():
    """
    Without a GIL `list` takes what a dictionary has in one go, but of one that is derived item by
    item. The queue has a `copy` of its own that begins anew.
    """
    derived = {
        (node.name, base)
        for text in SOURCES.values()
        for node in ast.walk(parse(text))
        if isinstance(node, ast.ClassDef)
        for base in (ast.unparse(each).partition("[")[0] for each in node.bases)
        if base in {"dict", "list", "set", "deque", "defaultdict", "OrderedDict"}
    }

    assert derived == {("BoundedQueue", "deque")}


def test_what_others_take_away_is_looked_at_once():
    """
    What a group or a lane has is read into a name before it is used, for it may be gone then.
    """
    assert looked_at_twice(SOURCES) == []


@pytest.mark.parametrize(
    ("module", "before", "after"),
    [
        ("_run", "            queue.give_room(entry)", "            self.bounded.give_room(entry)"),
        ("_waiting", "{room.name!r}", "{lane.room.name!r}"),
        ("_run", "            backend.end(self)", "            self.backend.end(self)"),
    ],
)
def test_what_is_looked_at_twice_is_found(module, before, after):
    """
    Without a GIL it may be taken away between two looks.
    """
    assert before in SOURCES[module]

    changed = SOURCES | {module: SOURCES[module].replace(before, after)}

    assert len(looked_at_twice(changed)) == 1


# --- What is relied on ----------------------------------------------------------------------------

ROUNDS = 20_000


def raced(*fns):
    """What each function returns of so many calls, all in threads of their own at the same time."""
    together = threading.Barrier(len(fns))

    def run(fn, results):
        together.wait(timeout=60)
        results.extend(fn(number) for number in range(ROUNDS))

    outcomes = [[] for _ in fns]
    threads = [threading.Thread(target=run, args=pair) for pair in zip(fns, outcomes, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return outcomes


def takes_by_pop(number, entries):
    return entries.pop(number, None)


def takes_by_del(number, entries):
    try:
        del entries[number]
    except KeyError:
        return None
    return number


@pytest.mark.parametrize("takes", [takes_by_pop, takes_by_del])
def test_each_entry_of_a_dictionary_is_taken_by_one(takes):
    """
    Of two threads that pop or delete an entry, one is told that it was there.
    """
    entries = {number: number for number in range(ROUNDS)}
    one, other = raced(*[functools.partial(takes, entries=entries)] * 2)

    assert all((a is None) != (b is None) for a, b in zip(one, other, strict=True))
    assert entries == {}


def test_first_in_a_dictionary_stays():
    """
    Of two threads that set a default, both get what one of them has put there.
    """
    entries = {}
    one, other = raced(*[lambda number: entries.setdefault(number, object())] * 2)

    assert all(a is b for a, b in zip(one, other, strict=True))


def test_each_number_is_counted_once():
    """
    `next` of a counter gives a number to one thread alone.
    """
    following = itertools.count().__next__
    one, other = raced(*[lambda number: following()] * 2)

    assert sorted(one + other) == list(range(2 * ROUNDS))


def delete_first(queue):
    try:
        del queue[0]
    except IndexError:
        return 0
    return 1


def pop_first(queue):
    try:
        queue.popleft()
    except IndexError:
        return 0
    return 1


@pytest.mark.parametrize("takes", [delete_first, pop_first])
def test_each_place_in_a_deque_is_taken_once(takes):
    """
    Whoever pops or deletes the first entry has it, whatever is appended meanwhile.
    """
    queue = deque()

    def add(number):
        queue.append(number)
        return 0

    taken = raced(add, *[lambda number: takes(queue)] * 2)

    assert sum(map(sum, taken)) + len(queue) == ROUNDS


COPIES = {
    "dict.copy": ({}, dict.copy),
    "list(dict)": ({}, list),
    "list(items)": ({}, lambda entries: [key for key, _ in list(entries.items())]),
    "[*dict]": ({}, lambda entries: [*entries]),
    "deque.copy": (deque(), deque.copy),
    "list.copy": ([], list.copy),
    "tuple(list)": ([], tuple),
}


@pytest.mark.parametrize("name", COPIES)
def test_copy_is_made_in_one_go(name):
    """
    What another thread adds is in a copy up to some moment, and not after.
    """
    empty, copy = COPIES[name]
    entries = empty.copy()
    add = entries.append if name.startswith(("deque", "list.", "tuple")) else entries.setdefault
    looking, added = threading.Event(), threading.Event()

    def look():
        wrong = looks = 0
        while looks < 100 or not added.is_set():
            seen = list(copy(entries))
            wrong += seen != list(range(len(seen)))
            looks += 1
            looking.set()
        return wrong

    thread, outcome = start(look)
    assert looking.wait(timeout=60)
    for number in range(ROUNDS):
        add(number)
    added.set()
    thread.join(timeout=60)

    assert outcome == [0]
    assert len(entries) == ROUNDS


# --- Without a GIL --------------------------------------------------------------------------------

LOOK = """
import sys, threading
import fastpool, fastpool.futures, fastpool.backends.processes, structlog, wrapt
from fastpool import TaskGroup, cancellable

@cancellable
def task(token):
    return threading.current_thread() is not threading.main_thread()

structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
with TaskGroup() as group:
    batch = group.map(task.with_token, [group.token] * 10)
assert all(batch.results())
assert not sys._is_gil_enabled()
"""


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python always has a GIL"
)
def test_import_leaves_the_gil_off():
    """
    Neither fastpool nor what it imports has the interpreter turn the GIL on.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOOK], capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stderr) == (0, "")

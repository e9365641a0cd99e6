"""
Small faults in the heart of the library, made by rule: each must fail a test, or be explained.

    python tests/mutation.py record RECORD [TEST...]
    python tests/mutation.py run RECORD [--only _token.py] [--match TEXT] [--seconds 60] [--log LOG]

The first runs the suite, or some tests again, and notes which test runs which line. The second
makes the mutants, by operators of `cosmic-ray` and two of our own. Against each the tests are run
that run its line, the quickest first, until one fails or so many seconds of tests are through.
What survives and is not in survivors.toml is printed, and what is there and survives no more;
then the exit status is 1.

Needs Linux, Python 3.12, `cosmic-ray` and what the tests need.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import faulthandler
import functools
import itertools
import json
import os
import queue
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SURVIVORS = ROOT / "tests" / "survivors.toml"
MODULES = (
    "_token.py",
    "_scope.py",
    "_task.py",
    "_taskgroup.py",
    "_run.py",
    "_ledger.py",
    "_bounded.py",
    "backends/threads.py",
    "backends/processes.py",
    "backends/_process.py",
    "backends/_worker.py",
    "backends/_wire.py",
)
# They run in worker processes, which go from test to test, and do not hear of the next one.
FAR = ("_worker.py", "_wire.py")
WATCHED = 120.0  # seconds that a test may take as its lines are noted
SLOW = 15.0  # seconds; a test that takes longer is not run against mutants
HANG = 10.0  # seconds more than three times what it took, after which a test is taken to hang
FEW = 400  # tests; what can be found quickly is found by these
LOST = 3000.0  # seconds after which the tests of one mutant are given up
MEMORY = 16 << 30  # bytes that they may take, since a mutant may ask for any amount

OPERATORS = (
    "DropStatement",
    "ReturnNothing",
    "core/AddNot",
    "core/ReplaceUnaryOperator_Delete_Not",
    "core/ReplaceAndWithOr",
    "core/ReplaceOrWithAnd",
    "core/ReplaceTrueWithFalse",
    "core/ReplaceFalseWithTrue",
    "core/ReplaceBreakWithContinue",
    "core/ReplaceContinueWithBreak",
    "core/ExceptionReplacer",
    "core/ZeroIterationForLoop",
    "core/NumberReplacer",
    "core/ReplaceComparisonOperator_Eq_NotEq",
    "core/ReplaceComparisonOperator_NotEq_Eq",
    "core/ReplaceComparisonOperator_Is_IsNot",
    "core/ReplaceComparisonOperator_IsNot_Is",
    "core/ReplaceComparisonOperator_Lt_LtE",
    "core/ReplaceComparisonOperator_LtE_Lt",
    "core/ReplaceComparisonOperator_Gt_GtE",
    "core/ReplaceComparisonOperator_GtE_Gt",
    "core/ReplaceBinaryOperator_Add_Sub",
    "core/ReplaceBinaryOperator_Sub_Add",
    "core/ReplaceBinaryOperator_Mul_Div",
    "core/ReplaceBinaryOperator_Div_Mul",
)


# --- In the processes of a test run ---------------------------------------------------------------

RECORDING = os.environ.get("FASTPOOL_LINES")  # a folder
LIMITS = os.environ.get("FASTPOOL_LIMITS")  # a file: the seconds that each test may take
ERRORS = os.dup(2) if LIMITS else 2  # before the test run takes what is written there


def runner():
    """Which of the processes that run tests this is, or is a child of; none for their parent."""
    return os.environ.get("PYTEST_XDIST_WORKER")


def note_lines():
    """Write down each line of fastpool that this process runs, once for each test."""
    package = f"{ROOT / 'fastpool'}{os.sep}"
    monitoring = sys.monitoring
    file = None  # a descriptor, which nobody is warned of where it stays open
    seen = set()

    def note(code, line):
        nonlocal file
        name = code.co_filename
        if not name.startswith(package):
            return monitoring.DISABLE
        far = name.endswith(FAR)
        # Before the first test, in one that leaves no descriptor, or as the interpreter ends.
        with suppress(OSError, AttributeError):
            now = Path(RECORDING, f"{runner()}.now")  # here: it is not known as a process starts
            if far:
                this = os.stat(now).st_mtime_ns, name, line
                if this in seen:
                    return None
                seen.add(this)
            test = now.read_text()
            if file is None:
                path = Path(RECORDING, f"{os.getpid()}.lines")
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(file, f"{test}\t{name.removeprefix(package)}\t{line}\n".encode())
        return None if far else monitoring.DISABLE

    def forked():
        nonlocal file
        file = None
        monitoring.restart_events()

    monitoring.use_tool_id(monitoring.COVERAGE_ID, "mutation")
    monitoring.register_callback(monitoring.COVERAGE_ID, monitoring.events.LINE, note)
    monitoring.set_events(monitoring.COVERAGE_ID, monitoring.events.LINE)
    os.register_at_fork(after_in_child=forked)


def pytest_runtest_logstart(nodeid):
    """From here on lines are run by this test; or it has so long until it is taken to hang."""
    if RECORDING and runner():
        now = Path(RECORDING, f"{runner()}.now")
        now.write_text(nodeid)
        os.utime(now, ns=(time.time_ns(),) * 2)  # the system counts in steps of milliseconds
        sys.monitoring.restart_events()
    elif LIMITS:
        faulthandler.dump_traceback_later(limits()[nodeid], exit=True, file=ERRORS)


@functools.cache
def limits():
    """The seconds that each test may take against a mutant."""
    return json.loads(Path(LIMITS).read_text())


def pytest_runtest_logreport(report):
    """Note how a test ended; against a mutant, the first failure is enough."""
    if RECORDING and not runner():
        with Path(RECORDING, "reports").open("a") as file:
            file.write(f"{report.nodeid}\t{report.duration}\t{report.outcome}\n")
    elif not RECORDING and report.failed:
        print("\nkilled by", report.nodeid, flush=True)
        os._exit(1)


# --- Recording ------------------------------------------------------------------------------------


def start_tests(*arguments, tree=ROOT, path=(), **options):
    """Start tests of a tree in a process of their own."""
    paths = os.pathsep.join(map(str, [*path, tree, tree / "tests"]))
    environment = {**os.environ, "PYTHONPATH": paths, **options.pop("env", {})}
    command = [sys.executable, "-m", "pytest", "-c", "tox.ini", "-q", "-p", "mutation"]
    return subprocess.Popen([*command, *arguments], cwd=tree, env=environment, **options)


def reports(folder, arguments, **options):
    """Run tests: the seconds that each took, and which did not pass."""
    ends = f"--timeout={WATCHED:.0f}", "--timeout-method=thread"
    start_tests("-n", "3", *ends, *arguments, env={"FASTPOOL_LINES": str(folder)}, **options).wait()
    seconds: dict[str, float] = defaultdict(float)
    others = set()
    for line in Path(folder, "reports").read_text().splitlines():
        test, took, outcome = line.rsplit("\t", 2)
        seconds[test] += float(took)
        if outcome != "passed":
            others.add(test)
    return seconds, others


def record(path, arguments):
    """Note in a file how long each test takes, and which lines of fastpool it runs."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as again:
        site = Path(folder, "site")
        site.mkdir()
        Path(site, "sitecustomize.py").write_text(
            f"import runpy\nrunpy.run_path({__file__!r})['note_lines']()\n"
        )
        seconds, useless = reports(folder, arguments, path=[site])
        if useless:  # some bear no watching: lines take longer so, and stacks are deeper
            useless = reports(again, sorted(useless))[1]
        # One that puts mutants of its own into the text fails with any other text.
        useless.update(test for test in seconds if "mutant" in test)
        tests = read_record(path) if path.exists() else {}
        for test, took in seconds.items():
            tests[test] = (took, defaultdict(set))
        for file in Path(folder).glob("*.lines"):
            for line in file.read_text().splitlines():
                test, module, number = line.rsplit("\t", 2)
                if test in seconds and test not in useless:
                    tests[test][1][module].add(int(number))
    lines = {
        test: {name: sorted(ran) for name, ran in of.items()} for test, (_, of) in tests.items()
    }
    sources = {module: source(module) for _, of in tests.values() for module in of}
    took = {test: round(took, 3) for test, (took, _) in tests.items()}
    path.write_text(json.dumps({"seconds": took, "lines": lines, "sources": sources}))
    print(f"{len(seconds)} tests in {sum(seconds.values()):.0f} s, {len(useless)} of no use here")


def read_record(path):
    """For each test the seconds that it took, and the lines of each module as they are now."""
    record = json.loads(path.read_text())
    moved: dict[str, dict[int, int]] = {}
    for module, text in record["sources"].items():
        moved[module] = {}
        if (ROOT / "fastpool" / module).exists():
            before, after = text.splitlines(), source(module).splitlines()
            same = difflib.SequenceMatcher(None, before, after, autojunk=False)
            for old, new, size in same.get_matching_blocks():
                moved[module].update((old + at + 1, new + at + 1) for at in range(size))
    return {
        test: (
            record["seconds"][test],
            defaultdict(
                set,
                {
                    module: {moved[module][line] for line in ran if line in moved[module]}
                    for module, ran in lines.items()
                },
            ),
        )
        for test, lines in record["lines"].items()
    }


def source(module):
    """The text of a module."""
    return (ROOT / "fastpool" / module).read_text()


# --- Mutants --------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    """A name that stays when lines move; the lines of its statement and its function; the text."""

    name: str
    module: str
    lines: tuple[range, ...]
    text: str


def operators():
    """Those of `cosmic-ray`, and two that it has not."""
    import parso.python.tree as nodes
    from cosmic_ray.operators.operator import Operator
    from cosmic_ray.plugins import get_operator

    class ReplaceStatement(Operator):
        def mutation_positions(self, node):
            if node.type == "simple_stmt" and self.fits(node.children[0]):
                yield node.children[0].start_pos, node.end_pos

        def mutate(self, node, _):
            old = node.children[0]
            prefix = old.get_first_leaf().prefix
            node.children[0] = nodes.Keyword(self.new, old.start_pos, prefix)
            return node

        @classmethod
        def examples(cls):
            return ()

    class DropStatement(ReplaceStatement):
        new = "pass"

        def fits(self, statement):
            if statement.type == "expr_stmt":  # to drop a local name is an error at once
                return statement.children[0].type != "name"
            return statement.type in ("raise_stmt", "del_stmt", "atom_expr")

    class ReturnNothing(ReplaceStatement):
        new = "return None"

        def fits(self, statement):
            # Who asks whether it is true is told the same by False.
            return statement.type == "return_stmt" and statement.children[1].get_code() != " False"

    own = {one.__name__: one for one in (DropStatement, ReturnNothing)}
    return [(own.get(name) or get_operator(name))() for name in OPERATORS]


def mutants(module):
    """Each mutant of a module that is another program than it, and than the mutants before it."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    before = source(module)
    tree, places, seen = get_ast(before), places_of(before), {program(before)}
    names: Counter[str] = Counter()
    for operator in operators():
        found = (operator.mutation_positions(node) for node in ast_nodes(tree))
        for occurrence, ((line, _), _) in enumerate(itertools.chain.from_iterable(found)):
            where, lines = places[line]
            if not where:
                continue  # of the module itself, no function's
            text = mutate_code(before, operator, occurrence)
            made = program(text)
            if made and made not in seen:
                seen.add(made)
                name = f"{module} {where}: {change(before, text)}"
                names[name] += 1
                again = f" ({names[name]})" if names[name] > 1 else ""
                yield Mutant(name + again, module, lines, text)


def places_of(source):
    """For each line the function that it is in, the lines of its statement and of the function."""
    places = defaultdict(lambda: ("", ()))

    def visit(node, path, function, of_class):
        for child in ast.iter_child_nodes(node):
            inner, around, again = path, function, of_class
            if isinstance(child, ast.stmt | ast.ExceptHandler):
                body = getattr(child, "body", None)
                end = body[0].lineno if body else child.end_lineno + 1
                lines = range(child.lineno, max(end, child.lineno + 1))
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    inner, around = [*path, child.name], range(end, child.end_lineno + 1)
                    again = isinstance(child, ast.ClassDef)
                # What a function takes, or a class says outside of its functions, is run as the
                # module is imported, and tried by who calls it.
                by = (
                    around
                    if isinstance(child, ast.FunctionDef)
                    else function
                    if of_class
                    else lines
                )
                for line in lines:
                    places[line] = (".".join(path), (by, function))
            visit(child, inner, around, again)

    visit(ast.parse(source), [], range(0), of_class=False)
    return places


def program(source):
    """What a text does, however it is written; nothing if it is no program."""

    def of(code):
        constants = (of(one) if hasattr(one, "co_code") else repr(one) for one in code.co_consts)
        return code.co_code, code.co_names, code.co_varnames, tuple(constants)

    try:
        return of(compile(source, "", "exec"))
    except SyntaxError:
        return None


def change(before, after):
    """What lines become, on one line."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    changed: dict[str, list[str]] = {"-": [], "+": [], "@": []}
    for line in list(lines)[2:]:
        changed[line[0]].append(line[1:].partition("  # ")[0].strip())
    return f"{' '.join(changed['-'])}  ->  {' '.join(changed['+'])}"


# --- Running them ---------------------------------------------------------------------------------


def tests_of(mutant, tests, seconds):
    """
    The tests that run its lines, as some lists; what fails in one makes the next needless.

    The quickest ones of the two files that have most of them; the quickest of all, as many as
    take so long together; the quickest case of each, as many as take thirty times as long; and
    of all cases as many as take ten times as long.
    """
    found: list[tuple[float, str]] = []
    for lines in mutant.lines:
        found = found or sorted(
            (took, test)
            for test, (took, ran) in tests.items()
            if took <= SLOW and not ran.get(mutant.module, set()).isdisjoint(lines)
        )
    first: dict[str, tuple[float, str]] = {}
    for took, test in found:
        first.setdefault(test.partition("[")[0], (took, test))
    quick = within(seconds, found)
    each = within(30 * seconds, list(first.values()))
    most = within(10 * seconds, found)
    files = [file for file, _ in Counter(map(file_of, quick)).most_common(2)]
    few = [test for test in quick[:FEW] if file_of(test) in files]
    # Some share a server, as long as they come one after the other.
    return [sorted(some, key=file_of) for some in (few, quick, each, most) if some]


def within(seconds, found):
    """The first tests, as many as take no longer together."""
    until = itertools.accumulate(took for took, _ in found)
    return [test for (_, test), total in zip(found, until, strict=True) if total <= seconds]


def file_of(test):
    """Where a test is written."""
    return test.partition("::")[0]


def copy_tree(folder):
    """A copy of what the tests need."""
    names = (".ci", "fastpool", "tests", "docs", "examples", "benchmarks")
    for name in names:
        shutil.copytree(ROOT / name, folder / name)
    for file in ROOT.glob("*.*"):
        if file.is_file():
            shutil.copy(file, folder)
    return folder


def killer(mutant, limits, tree):
    """What fails with the mutant in this copy of the tree, as one line; nothing if it survives."""
    path = tree / "fastpool" / mutant.module
    path.write_text(mutant.text)
    shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)  # as long, and as old
    names, said, times = tree / "names", tree / "said", tree / "limits"
    names.write_text("\n".join(limits))
    times.write_text(json.dumps(limits))
    # The plug-in of hypothesis takes as long to import as the rest, and is not needed to run it.
    without = [f"-pno:{name}" for name in ("cacheprovider", "hypothesispytest")]
    with said.open("w") as output:
        run = start_tests(
            *(f"@{names}", *without, "--timeout=0", "-ofaulthandler_timeout=0"),
            tree=tree,
            env={"FASTPOOL_LIMITS": str(times)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
        )
    try:
        if run.wait(timeout=LOST) == 0:
            return ""
    except subprocess.TimeoutExpired:
        return f"hung for {LOST} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        shutil.copy(ROOT / "fastpool" / mutant.module, path)
    lines = [line for line in said.read_text(errors="replace").splitlines() if line]
    last = lines[-1].strip() if lines else f"exit code {run.returncode}"
    return next((line for line in lines if line.startswith("killed by")), last)


def run(tests, known, modules, match, seconds, jobs, log):
    """The mutants that survive, in their order; what came of each is written to a log."""
    from fastpool import TaskGroup

    log.touch()
    judged = dict(line.split("\t")[2:] for line in log.read_text().splitlines())
    survivors = []
    with (
        tempfile.TemporaryDirectory() as folder,
        log.open("a", 1) as told,
        TaskGroup(jobs, max_queued=jobs) as group,
    ):
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(jobs):
            trees.put(copy_tree(Path(folder, str(number))))

        def killed(mutant, some, tree):
            return killer(mutant, {test: HANG + 3 * tests[test][0] for test in some}, tree)

        def judge(mutant):
            if mutant.name in judged:
                return judged[mutant.name]
            rounds, tries = tests_of(mutant, tests, seconds), 1
            if mutant.name in known or mutant is sound:
                # To see that it still survives, it need not take so long; but on a machine that
                # is busy any test may fail, and is not believed at once.
                rounds, tries = rounds[:2], 3
            tree, start = trees.get(), time.monotonic()
            try:
                for _ in range(tries):
                    by = next(filter(None, (killed(mutant, some, tree) for some in rounds)), "")
                    if not by:
                        break
            finally:
                trees.put(tree)
            took = time.monotonic() - start
            count = max(map(len, rounds), default=0)
            told.write(f"{took:.0f} s\t{count} tests\t{mutant.name}\t{by}\n")
            return by

        submitted = []
        for module in modules:
            text = source(module)
            sound = Mutant(f"{module} as it is", module, (range(1, len(text)),), text)
            passes = group.submit(judge, sound)
            tasks = [
                (mutant, group.submit(judge, mutant))
                for mutant in mutants(module)
                if match in mutant.name
            ]
            submitted.append((module, passes, tasks))
        for module, passes, tasks in submitted:  # only now: some take as long as all the others
            if passes.result():
                raise RuntimeError(f"{module} as it is fails {passes.result()}")
            left = [mutant.name for mutant, task in tasks if not task.result()]
            print(f"{module}: {len(tasks)} mutants, {len(left)} survived", flush=True)
            survivors += left
    return survivors


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("record", "run"))
    parser.add_argument("record", type=Path)
    parser.add_argument("tests", nargs="*", default=["tests"], help="which to record again")
    parser.add_argument("--only", action="append", help="a module", choices=MODULES)
    parser.add_argument("--match", default="", help="a text in the names of the mutants")
    parser.add_argument("--seconds", type=float, default=60)
    # Twice as many as there are processors: most of the time is spent on those that hang.
    parser.add_argument("--jobs", type=int, default=2 * (os.cpu_count() or 1))
    parser.add_argument(
        "--log",
        type=Path,
        default=os.devnull,
        help="a file of what came of each; what stands there is not run again, so take a new one"
        " once the library or its tests have changed",
    )
    options = parser.parse_args()
    if options.command == "record":
        record(options.record, options.tests)
        return 0
    modules = options.only or MODULES
    known = {
        name
        for reason in tomllib.loads(SURVIVORS.read_text()).values()
        for name in reason["survivors"]
        if name.split()[0] in modules and options.match in name
    }
    survivors = run(
        read_record(options.record),
        *(known, modules, options.match, options.seconds, options.jobs),
        options.log,
    )
    new = [name for name in survivors if name not in known]
    gone = sorted(known.difference(survivors))
    for title, names in (("SURVIVED, and is not explained", new), ("Explained, and dead", gone)):
        print(f"\n=== {title}: {len(names)}", *names, sep="\n")
    return bool(new or gone)


if __name__ == "__main__":
    sys.exit(main())

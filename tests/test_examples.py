"""
The example programs, run as a user runs them.
"""

import gzip
import hashlib
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
from blocked import is_blocked
from staging import start as begin

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def start(name, *arguments, **keywords):
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / name), *map(os.fspath, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **keywords,
    )


def run(name, *arguments, **keywords):
    """Run an example to its end: its exit code, what it printed, what it said beside that."""
    with start(name, *arguments, **keywords) as process:
        out, err = process.communicate(timeout=200)
    return process.returncode, out, os.fsdecode(err)


def checksums(*arguments, **keywords):
    return run("checksums.py", *arguments, **keywords)


@pytest.fixture
def tree(tmp_path):
    """A folder with files of all sorts of names."""
    root = tmp_path / "tree"
    (root / "sub" / "deeper").mkdir(parents=True)
    for name in ("plain", "with space", "new\nline", "back\\slash", "sub/inner", "sub/deeper/x"):
        (root / name).write_bytes(name.encode() * 1000)
    (root / os.fsdecode(b"not-utf8-\xff")).write_bytes(b"bytes")
    (root / "empty").touch()
    return root


# --- The short ones -------------------------------------------------------------------------------


def test_stop_all_tasks():
    """
    All ten stop in an orderly way, and the pool goes on.
    """
    code, out, err = run("stop_all_tasks.py", "1")

    assert (code, err) == (0, "")
    assert out.count(b"has put its things away") == 10
    assert b"10 tasks were stopped" in out
    assert b"the same pool goes on: 1024" in out


def test_stop_all_if_one_fails():
    """
    The block raises the one failure, and the nine others have stopped.
    """
    code, out, err = run("stop_all_if_one_fails.py")

    assert (code, err) == (0, "")
    assert b"the block raised: task 5 found something wrong in turn 2" in out
    assert out.count(b"task[") == 10
    assert b"failures: 1" in out


def test_wait_for_a_batch():
    """
    A batch is waited for, the group goes on, and everything has run in the end.
    """
    files = len(list(EXAMPLES.glob("*.py")))

    code, out, err = run("wait_for_a_batch.py")

    assert (code, err) == (0, "")
    assert f"the first batch is done: {files} files".encode() in out
    assert f"everything has run: {files} files more".encode() in out
    assert b"the same digests: True" in out


def test_shut_down_and_count_threads():
    """
    The count of threads is in the end what it was.
    """
    code, out, err = run("shut_down_and_count_threads.py")

    assert (code, err) == (0, "")
    assert b"threads before: 1\n" in out
    assert b"cannot submit pow() to group 'squares'" in out
    assert b"threads after: 1\n" in out


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_service_hashes_what_it_is_given_until_it_is_told_to_stop(tmp_path, told):
    """
    It stops in good order, with the exit code of the signal, and leaves nothing half done.
    """
    spool = tmp_path / "spool"
    spool.mkdir()
    with start("serve_until_stopped.py", spool) as service:
        said = [service.stdout.readline()]
        for name in ("one", "two"):
            whole = tmp_path / name
            whole.write_bytes(name.encode())
            whole.rename(spool / name)  # so that it is never seen half written
            said.append(service.stdout.readline())
        service.send_signal(told)
        rest, errors = service.communicate(timeout=60)

    assert said[0] == b"serving\n"
    assert service.returncode == 128 + told
    assert rest == b""
    assert os.fsdecode(errors) == ("" if told == signal.SIGTERM else "stopped by Ctrl-C\n")
    for name in ("one", "two"):
        digest = hashlib.sha256(name.encode()).hexdigest()
        assert f"{digest} {name}\n".encode() in said
        assert (spool / f"{name}.done").read_bytes() == name.encode()


# --- first_success.py -----------------------------------------------------------------------------


def test_first_mirror_that_has_the_file_wins():
    """
    A slow one is cancelled, and one that fails stops nobody.
    """
    code, out, err = run("first_success.py")

    assert (code, err) == (0, "")
    assert b"  slow: cancelled\n" in out
    assert b"  good: has it\n" in out
    assert b"good was first, with 630 bytes\n" in out


def test_every_failure_is_told_where_no_mirror_has_the_file():
    """
    That is no success.
    """
    code, out, err = run("first_success.py", "failing", "failing")

    assert (code, err) == (1, "nobody has the file\n")
    assert out.count(b"  failing: failed, HTTP Error 503") == 2
    assert b"was first" not in out


def test_mirror_that_there_is_not_is_refused():
    """
    The message says which there are.
    """
    code, out, err = run("first_success.py", "quick")

    assert (code, out) == (2, b"")
    assert "no mirror is 'quick'; choose from: slow, failing, good" in err


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks into /proc")
def test_ctrl_c_ends_requests_that_are_under_way():
    """
    Nobody waits for what is left of the minute.
    """
    with start("first_success.py", "slow", "slow") as process:
        process.stdout.readline()
        opened = Path(f"/proc/{process.pid}/fd")
        # Two that listen, and both ends of two connections.
        until(lambda: sum("socket:" in (target(link) or "") for link in opened.iterdir()) >= 6)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=50)

    assert (process.returncode, out, err) == (130, b"", b"interrupted\n")


# --- error_budget.py ------------------------------------------------------------------------------


def test_bad_records_within_the_budget_stop_nothing():
    """
    Each is named, and all the others are checked.
    """
    code, out, err = run("error_budget.py")

    assert (code, out) == (1, b"994 records are good, 497350 in all\n")
    assert err.splitlines() == [
        f"error_budget: record {number} is bad: 'rubbish'" for number in range(150, 1000, 150)
    ]


def test_job_gives_up_when_its_budget_is_exceeded():
    """
    What comes after is not begun.
    """
    code, out, err = run("error_budget.py", "--budget", "3")

    assert code == 2
    assert 500 < int(out.split()[0]) < 900
    assert err.splitlines()[:5] == [
        "error_budget: gave up: more than 3 records are bad",
        *(f"error_budget: record {number} is bad: 'rubbish'" for number in (150, 300, 450, 600)),
    ]


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b'{"amount": 5}\n{"amount": 7}\n', 0, ""),
        (b'{"amount": 5}\n{"amount": null}\n{"amount": 7}\n', 1, "record 2 is bad"),
        (b'{"amount": 5}\n{"amount": 7}\n' + b"\xff\n", 2, "cannot read"),
    ],
)
def test_records_are_read_from_a_file(tmp_path, content, code, said):
    """
    What the file itself fails with is not lost among the bad records.
    """
    (tmp_path / "records").write_bytes(content)

    done = run("error_budget.py", tmp_path / "records")

    assert done[0] == code
    assert said in done[2]
    assert "Traceback" not in done[2]


def test_ctrl_c_says_how_far_the_records_have_come(tmp_path):
    """
    While it waits for more of them.
    """
    os.mkfifo(tmp_path / "records")
    with (
        start("error_budget.py", tmp_path / "records") as process,
        open(tmp_path / "records", "wb", buffering=0) as records,
    ):
        records.write(b'{"amount": 5}\n')
        # What comes in a line of fastpool's is held back, and a read of the file's waits on.
        until(lambda: is_blocked(process.pid, process=process.pid))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=50)

    assert process.returncode == 130
    assert out in (b"", b"0 records are good, 0 in all\n", b"1 records are good, 5 in all\n")
    assert err == b"error_budget: interrupted\n"


# --- find_corrupt_archive.py ----------------------------------------------------------------------


@pytest.fixture(params=[(), ("--processes",)], ids=["threads", "processes"])
def find_corrupt(request):
    """Runs it, on threads and on processes."""
    return lambda *arguments: run("find_corrupt_archive.py", *arguments, *request.param)


def write_zip(path, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", content)


def write_tar(path, content):
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("inner")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


WRITERS = {".zip": write_zip, ".tar.gz": write_tar, ".tgz": write_tar}


@pytest.fixture
def archives(tmp_path):
    """A folder of archives that are as they should be, and of other things."""
    root = tmp_path / "archives"
    (root / "sub").mkdir(parents=True)
    for number in range(5):
        for suffix, write in WRITERS.items():
            write(root / ("sub" if number % 2 else "") / f"{number}{suffix}", os.urandom(20_000))
    (root / "no-archive").write_bytes(b"corrupt")
    os.mkfifo(root / "pipe.zip")
    return root


def turn_a_byte(path):
    """In the middle of the contents."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def empty(path):
    path.write_bytes(b"")


def test_sound_archives_are_counted(archives, find_corrupt):
    """
    All are read, and nothing else is.
    """
    code, out, err = find_corrupt(archives)

    assert (code, err) == (0, "")
    assert out.startswith(b"15 archives, ")


def test_corrupt_archive_is_found_whatever_is_wrong_with_it(archives):
    """
    A wrong byte, an end that is missing, nothing at all, in each kind of archive.
    """
    spoilt = []
    for number, spoil in {0: turn_a_byte, 2: cut, 4: empty}.items():
        for suffix in WRITERS:
            spoilt.append(archives / f"{number}{suffix}")
            spoil(spoilt[-1])

    code, out, err = run("find_corrupt_archive.py", archives, "--keep-going")

    assert (code, err) == (1, "")
    assert [line.split(b": ")[1] for line in out.splitlines()] == [
        repr(str(path)).encode() for path in sorted(spoilt)
    ]


def test_first_corrupt_archive_ends_the_search(archives, find_corrupt):
    """
    Of several one is named; what has not begun by then is not read.
    """
    for number in range(5):
        turn_a_byte(archives / ("sub" if number % 2 else "") / f"{number}.zip")

    code, out, err = find_corrupt(archives)

    assert (code, err) == (1, "")
    assert out.count(b"corrupt: ") == out.count(b"\n") == 1


def test_search_that_keeps_going_names_all(archives, find_corrupt):
    """
    In the order of their names.
    """
    spoilt = [archives / "0.zip", archives / "2.tar.gz", archives / "sub" / "1.tgz"]
    for path in spoilt:
        turn_a_byte(path)

    code, out, err = find_corrupt(archives, "--keep-going")

    assert (code, err) == (1, "")
    assert [line.split(b": ")[1] for line in out.splitlines()] == [
        repr(str(path)).encode() for path in spoilt
    ]


def test_trouble_that_is_no_corruption_has_a_code_of_its_own(archives, find_corrupt):
    """
    A folder that is not there, an archive that cannot be opened, a wrong number of workers.
    """
    folder = find_corrupt(archives / "none")
    (archives / "4.tgz").unlink()
    (archives / "4.tgz").symlink_to("/proc/self/mem")
    turn_a_byte(archives / "2.tar.gz")
    both = find_corrupt(archives, "--keep-going")

    assert folder == (2, b"", f"cannot read {str(archives / 'none')!r}: {os.strerror(2)}\n")
    assert both[0] == 2
    assert both[1].startswith(f"corrupt: {str(archives / '2.tar.gz')!r}".encode())
    assert f"cannot read {str(archives / '4.tgz')!r}" in both[2]
    assert "--workers must be 1 or more" in find_corrupt(archives, "--workers", "0")[2]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks into /proc")
@pytest.mark.parametrize("pool", [[], ["--processes"]], ids=["threads", "processes"])
def test_ctrl_c_ends_the_search(tmp_path, pool):
    """
    In the middle of an archive that takes minutes, and no process is left of it.
    """
    huge = tmp_path / "huge.tar.gz"
    write_huge(huge)
    with start("find_corrupt_archive.py", tmp_path, *pool, start_new_session=True) as process:
        until(lambda: is_open(huge, process.pid))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: the workers get it, too
        out, err = process.communicate(timeout=60)
    until(lambda: not group_is_alive(process.pid))

    assert (process.returncode, out, err) == (130, b"", b"interrupted\n")


def write_huge(path):
    """Terabytes of zeros, of which every gigabyte is the same few bytes."""
    member = tarfile.TarInfo("zeros")
    member.size = 1 << 42
    with gzip.open(path, "wb") as head:
        head.write(member.tobuf())
    piece = gzip.compress(bytes(1 << 26))
    with path.open("ab") as file:
        for _ in range(1 << 12):
            file.write(piece)


def is_open(path, session):
    """Whether a process of a session has a file open."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == session and any(
                target(link) == str(path) for link in (folder / "fd").iterdir()
            ):
                return True
        except OSError:
            continue
    return False


def group_is_alive(number):
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


# --- checksums.py ---------------------------------------------------------------------------------


def test_manifest_is_true_and_in_order(tree):
    """
    Every file is there once, under its name relative to the folder, with its digest.
    """
    code, out, err = checksums(tree)

    lines = dict(reversed(line.split(b"  ", 1)) for line in out.splitlines())
    assert (code, err) == (0, "")
    assert list(lines) == sorted(lines)
    assert lines[b"sub/deeper/x"].decode() == hashlib.sha256(b"sub/deeper/x" * 1000).hexdigest()
    assert lines[b"new\\nline"][:1] == lines[b"back\\\\slash"][:1] == b"\\"
    assert b"not-utf8-\xff" in lines
    assert len(lines) == 8


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum to compare with")
def test_manifest_is_what_sha256sum_reads(tree, tmp_path):
    """
    `sha256sum --check` in the folder finds all of it right.
    """
    checksums(tree, "-o", tmp_path / "manifest")

    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", str(tmp_path / "manifest")],
        cwd=tree,
        timeout=200,
        check=False,
    )

    assert done.returncode == 0


def test_check_passes_on_what_was_written(tree):
    """
    A manifest written into its own folder leaves itself out, and verifies.
    """
    for _ in range(2):
        written = checksums(tree, "--output", tree / "manifest")

    code, out, err = checksums(tree, "--check", tree / "manifest")

    assert written[:2] == (0, b"")
    assert (code, out) == (0, b"")
    assert "8 checked, all as they should be" in err


def test_manifest_leaves_itself_out_however_it_is_spelled(tree):
    """
    Another way to write the folder, or a link to the manifest, makes no other file of it.
    """
    for _ in range(2):
        checksums("../tree", "-o", "manifest", cwd=tree)
    (tree.parent / "link").symlink_to(tree / "manifest")
    again = checksums(tree, "-o", tree.parent / "link")

    assert again[0] == 0
    assert (tree.parent / "link").is_symlink()
    assert checksums(tree, "--check", tree / "manifest")[0] == 0


def test_manifest_may_be_read_by_whoever_may_read_new_files(tree, tmp_path):
    """
    It gets the mode that any new file gets.
    """
    checksums(tree, "-o", tmp_path / "manifest")
    (tmp_path / "other").touch()

    assert (tmp_path / "manifest").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_manifest_goes_into_a_pipe_without_replacing_it(tree, tmp_path):
    """
    What is there and is no file takes the manifest as it is.
    """
    os.mkfifo(tmp_path / "pipe")
    with start("checksums.py", tree, "-o", tmp_path / "pipe") as process:
        manifest = (tmp_path / "pipe").read_bytes()
        process.wait(timeout=200)

    assert process.returncode == 0
    assert len(manifest.splitlines()) == 8
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("output", "why"), [("none/manifest", "there is no folder"), ("tree", "it is a folder")]
)
def test_place_where_nothing_can_be_written_is_refused_first(tree, tmp_path, output, why):
    """
    The message names what was asked for, and nothing is hashed before.
    """
    (tree / "plain").unlink()
    (tree / "plain").symlink_to("/proc/self/mem")  # would be the first trouble

    code, out, err = checksums(tree, "-o", tmp_path / output)

    assert (code, out) == (2, b"")
    assert f"cannot write {str(tmp_path / output)!r}: {why}" in err


def test_reader_that_goes_away_is_no_trouble(tree):
    """
    As with other programs, nothing is said then.
    """
    with start("checksums.py", tree) as process:
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=200)

    assert (process.returncode, err) == (141, b"")


def test_check_reads_what_other_programs_write(tree):
    """
    Capital letters in a checksum, comments, and a mark for binary files.
    """
    good = hashlib.sha256((tree / "plain").read_bytes()).hexdigest().upper()
    (tree / "manifest").write_text(f"# made elsewhere\n{good} *plain\n")

    assert checksums(tree, "--check", tree / "manifest")[0] == 0


def test_check_never_opens_what_is_no_file(tree):
    """
    A pipe in the place of a file is a mismatch; to read it would wait for ever.
    """
    checksums(tree, "-o", tree / "manifest")
    (tree / "plain").unlink()
    os.mkfifo(tree / "plain")

    code, _, err = checksums(tree, "--check", tree / "manifest")

    assert code == 1
    assert "'plain' is no file any more" in err


@pytest.mark.parametrize("trouble", ["differs", "is missing"])
def test_check_stops_at_a_mismatch_and_names_the_file(tree, trouble):
    """
    A changed or missing file ends it with exit code 1.
    """
    checksums(tree, "-o", tree / "manifest")
    if trouble == "differs":
        (tree / "new\nline").write_text("changed")
    else:
        (tree / "new\nline").unlink()

    code, out, err = checksums(tree, "--check", tree / "manifest")

    assert (code, out) == (1, b"")
    assert f"checksums: 'new\\nline' {trouble}" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"0" * 64 + b"  /etc/passwd", "line 2: '/etc/passwd' leads out"),
        (b"0" * 64 + b"  sub/../../x", "line 2: 'sub/../../x' leads out"),
        (b"\\" + b"0" * 64 + b"  ..", "line 2: '..' leads out"),
        (b"rubbish", "line 2: not a checksum and a name"),
        (b"0" * 63 + b"  x", "line 2: not a checksum and a name"),
        (b"0" * 64 + b"  x\0", "line 2: not a checksum and a name"),
        (b"\\" + b"0" * 64 + b"  a\\tb", "line 2: not a checksum and a name"),
    ],
)
def test_manifest_that_is_not_to_be_trusted_is_refused(tree, line, message):
    """
    Nothing outside the folder is read; the message names the line.
    """
    good = hashlib.sha256((tree / "plain").read_bytes()).hexdigest().encode()
    (tree / "manifest").write_bytes(good + b"  plain\n" + line + b"\n")

    code, out, err = checksums(tree, "--check", tree / "manifest")

    assert (code, out) == (2, b"")
    assert message in err


def test_empty_manifest_verifies_nothing(tree):
    """
    It is no success.
    """
    (tree / "manifest").touch()

    code, _, err = checksums(tree, "--check", tree / "manifest")

    assert code == 2
    assert "no checksums in it" in err


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="nothing that cannot be read")
def test_unreadable_file_stops_everything(tree, tmp_path):
    """
    A file that cannot be read is named; nothing is printed, nothing is written.
    """
    (tree / "plain").unlink()
    (tree / "plain").symlink_to("/proc/self/mem")

    printed = checksums(tree)
    written = checksums(tree, "-o", tmp_path / "manifest")

    assert printed[:2] == written[:2] == (2, b"")
    assert "plain': Input/output error" in printed[2]
    assert os.listdir(tmp_path) == ["tree"]


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="nothing that cannot be read")
def test_keep_going_leaves_out_what_cannot_be_read(tree, tmp_path):
    """
    Every such file is named, the manifest has the others, and the exit code tells.
    """
    for name in ("plain", "sub/inner"):
        (tree / name).unlink()
        (tree / name).symlink_to("/proc/self/mem")

    printed = checksums(tree, "--keep-going")
    written = checksums(tree, "-k", "-o", tmp_path / "manifest")

    assert printed[0] == written[0] == 2
    assert printed[1] == (tmp_path / "manifest").read_bytes()
    assert len(printed[1].splitlines()) == 6
    assert b"plain" not in printed[1]
    assert printed[2].splitlines() == [
        f"checksums: cannot read {str(tree / 'plain')!r}: Input/output error",
        f"checksums: cannot read {str(tree / 'sub/inner')!r}: Input/output error",
        "checksums: the manifest lacks 2 that could not be read",
    ]
    assert checksums(tree, "--check", tmp_path / "manifest")[0] == 0


def test_keep_going_names_every_mismatch(tree):
    """
    In a fixed order, with how many there are.
    """
    checksums(tree, "-o", tree / "manifest")
    (tree / "with space").write_text("changed")
    (tree / "plain").write_text("changed")
    (tree / "sub/inner").unlink()

    code, out, err = checksums(tree, "--check", tree / "manifest", "--keep-going")

    lines = err.splitlines()
    assert (code, out) == (1, b"")
    assert lines[0].startswith("checksums: 'plain' differs: expected ")
    assert lines[1] == "checksums: 'sub/inner' is missing"
    assert lines[2].startswith("checksums: 'with space' differs: expected ")
    assert lines[3:] == ["checksums: 3 of 8 are not as they should be"]


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="nothing that cannot be read")
def test_keep_going_tells_by_its_exit_code_that_something_cannot_be_read(tree):
    """
    That is worse than a file that differs.
    """
    checksums(tree, "-o", tree / "manifest")
    (tree / "plain").write_text("changed")
    (tree / "with space").unlink()
    (tree / "with space").symlink_to("/proc/self/mem")

    code, _, err = checksums(tree, "--check", tree / "manifest", "-k")

    assert code == 2
    assert "2 of 8 are not as they should be" in err


def test_keep_going_has_nothing_to_go_on_with_where_there_is_no_folder(tmp_path):
    """
    A manifest that was there stays as it is.
    """
    (tmp_path / "manifest").write_text("as it was")

    code, out, err = checksums(tmp_path / "none", "-k", "-o", tmp_path / "manifest")

    assert (code, out) == (2, b"")
    assert f"cannot read {str(tmp_path / 'none')!r}: No such file" in err
    assert (tmp_path / "manifest").read_text() == "as it was"


@pytest.mark.parametrize("keep_going", [False, True])
def test_tree_is_read_no_further_than_its_files_are_hashed(keep_going):
    """
    However many files there are, a hundred are known that wait to be hashed.
    """
    program = runpy.run_path(str(EXAMPLES / "checksums.py"))
    hash_next = threading.Semaphore(0)
    found, hashed = [], []

    def find():
        for number in range(300):
            found.append(number)
            yield number

    def hash_one(number):
        assert hash_next.acquire(timeout=30)
        hashed.append(number)

    thread, outcome = begin(program["for_each"], hash_one, find(), 2, keep_going)
    most = []
    for rounds in range(0, 150, 50):
        # Two are at work, a hundred wait, and one has been read that there is no room for.
        until(lambda rounds=rounds: len(found) >= rounds + 2 + program["AHEAD"])
        most.append(len(found) - rounds)
        for _ in range(50):
            hash_next.release()
        until(lambda rounds=rounds: len(hashed) == rounds + 50)
    for _ in range(150):
        hash_next.release()
    thread.join(30)

    assert max(most) <= 2 + program["AHEAD"] + 1
    assert outcome == [[]]
    assert sorted(hashed) == list(range(300))


def test_what_is_no_file_is_left_out_with_a_note(tree):
    """
    A named pipe is never opened, a link to a folder not followed, and a broken one passed over.
    """
    os.mkfifo(tree / "pipe")
    (tree / "broken").symlink_to("nowhere")
    (tree / "loop").symlink_to(tree, target_is_directory=True)

    code, out, err = checksums(tree)

    assert code == 0
    assert len(out.splitlines()) == 8
    assert err.count("left out") == 2
    assert "pipe" in err
    assert "broken" in err


def test_wrong_arguments_are_refused(tree):
    """
    A folder that is none, a number of workers that is none, two jobs at once.
    """
    assert checksums(tree / "none")[0] == 2
    assert "--workers must be 1 or more" in checksums(tree, "--workers", "0")[2]
    assert "leave out --output" in checksums(tree, "--check", "m", "--output", "n")[2]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks into /proc")
def test_ctrl_c_stops_everything_at_once(tree, tmp_path):
    """
    SIGINT in the middle of a file of a terabyte ends the program; nothing is written.
    """
    with open(tree / "huge", "wb") as huge:
        huge.truncate(1 << 40)
    with start("checksums.py", tree, "-o", tmp_path / "manifest") as process:
        opened = Path(f"/proc/{process.pid}/fd")
        until(lambda: str(tree / "huge") in map(target, opened.iterdir()))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=200)

    assert (process.returncode, out) == (130, b"")
    assert b"interrupted" in err
    assert b"Traceback" not in err
    assert os.listdir(tmp_path) == ["tree"]


def target(link):
    """Where a link leads; nowhere if it has just gone."""
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return None


def until(condition):
    """Wait for what nothing signals."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)

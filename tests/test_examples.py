"""
The example programs, run as a user runs them.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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

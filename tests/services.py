"""
Real database servers, from the system's packages, for as long as the tests run.
"""

import contextlib
import glob
import importlib
import os
import pwd
import shutil
import subprocess
import tempfile

import pytest
from staging import until

# Set to "required" where a missing server is a failure: there a skipped test would hide it.
SERVICES = "FASTPOOL_SERVICES"


def missing(what):
    """Skip the tests for want of something; or fail, where nothing may be missing."""
    if os.environ.get(SERVICES) == "required":
        pytest.fail(f"{SERVICES} is 'required', and there is no {what}")
    pytest.skip(f"there is no {what}", allow_module_level=True)


def client(name, needs=""):
    """A client library, for a test file to import."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return missing(f"{name}{needs} ({error})")


def program(name):
    """The path of a server's program, or None. Debian keeps PostgreSQL's out of PATH."""
    kept = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)
    return shutil.which(name) or next(iter(kept), None)


@contextlib.contextmanager
def folder():
    """An empty folder of whoever runs the servers, and that user's name; None: it is us."""
    # PostgreSQL refuses to be root's. In the system's own folder, since the path of a Unix
    # socket has no more than a hundred characters.
    user = "nobody" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="fastpool-") as path:
        if user is not None:
            entry = pwd.getpwnam(user)
            os.chown(path, entry.pw_uid, entry.pw_gid)
        yield path, user


# Runs a command until its own input ends, as it does when the tests are killed.
GUARD = ["sh", "-c", '"$@" & read nothing; kill -INT $!; wait $!', "sh"]


@contextlib.contextmanager
def running(command, path, user, answers):
    """A server, from when it answers until it has ended."""
    with open(os.path.join(path, "log"), "w+") as log:
        guard = subprocess.Popen(
            [*GUARD, *command], cwd=path, user=user, stdin=subprocess.PIPE, stdout=log, stderr=log
        )
        try:
            until(answers, within=30)
            log.seek(0)
            assert answers(), log.read()
            yield
        finally:
            guard.stdin.close()
            guard.wait(timeout=30)


@contextlib.contextmanager
def postgres():
    """A PostgreSQL server; gives what to connect to it with."""
    initdb, server, ready = map(program, ["initdb", "postgres", "pg_isready"])
    if not (initdb and server and ready):
        missing("PostgreSQL server; on Debian, install the package postgresql")
    with folder() as (path, user):
        data = os.path.join(path, "data")
        subprocess.run(
            [initdb, "-D", data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"],
            cwd=path,
            user=user,
            check=True,
            capture_output=True,
        )
        options = {
            "listen_addresses": "",
            "unix_socket_directories": path,
            "fsync": "off",
            "shared_buffers": "1MB",
        }
        command = [server, "-D", data, *(f"--{name}={value}" for name, value in options.items())]

        def answers():
            return subprocess.run([ready, "-q", "-h", path], check=False).returncode == 0

        with running(command, path, user, answers):
            yield f"host={path} user=tester dbname=postgres"


@contextlib.contextmanager
def redis():
    """A Redis server; gives the path of its socket."""
    server, client = map(program, ["redis-server", "redis-cli"])
    if not (server and client):
        missing("Redis server; on Debian, install the package redis-server")
    with folder() as (path, user):
        sock = os.path.join(path, "redis.sock")
        command = [server, "--port", "0", "--unixsocket", sock, "--unixsocketperm", "777"]
        command += ["--save", "", "--appendonly", "no", "--dir", path]

        def answers():
            asked = subprocess.run(
                [client, "-s", sock, "ping"], check=False, capture_output=True, timeout=10
            )
            return asked.stdout == b"PONG\n"

        with running(command, path, user, answers):
            yield sock

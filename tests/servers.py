"""
Real servers that stall where a test wants them to, and how to know that a thread is blocked.
"""

import contextlib
import functools
import os
import socket
import ssl
import subprocess
import tempfile
import threading
import time

from staging import start, until

from fastpool import CancelToken, _syscalls, use_token

# The system calls in which a thread waits for a socket, and for nothing else.
_WAITING = {
    number
    for number, name in _syscalls._NUMBERS[os.uname().machine].items()
    if name in {"accept", "accept4", "connect", "poll", "ppoll", "read", "recvfrom", "recvmsg"}
    or name in {"sendmsg", "sendto", "write"}
}


def descriptors():
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))


def _look(number):
    """The system call that a thread sits in, and how often it has gone to sleep so far."""
    with open(f"/proc/self/task/{number}/syscall") as file:
        call = file.read()
    with open(f"/proc/self/task/{number}/status") as file:
        slept = next(line for line in file if line.startswith("voluntary_ctxt_switches"))
    return call, slept


def is_blocked(number):
    """Whether the thread with that native number sleeps in a call for a socket, and goes on to."""
    seen = _look(number)
    call = seen[0].split()[0]
    if not call.isdigit() or int(call) not in _WAITING:
        return False
    time.sleep(0.005)
    return _look(number) == seen


def cancel_while_blocked(act):
    """
    Run a function in a thread under a token, and cancel that once the thread is blocked.

    Returns:
        What the function returned or raised.
    """
    token = CancelToken()

    def run():
        with use_token(token):
            return act()

    thread, outcome = start(run)
    until(lambda: outcome or is_blocked(thread.native_id))
    assert not outcome, outcome
    token.cancel("enough")
    thread.join(timeout=10)
    assert outcome, "it hangs"
    return outcome[0]


@contextlib.contextmanager
def served(talk, listener=None):
    """
    A server that talks to one client after the other, and keeps its connections until the end.

    Args:
        talk: Called with each connection, in the server's thread. It may be closed.
        listener: Where to listen instead of at a port of its own.

    Returns:
        A context manager, which gives the address.
    """
    if listener is None:
        listener = socket.create_server(("127.0.0.1", 0))
    with contextlib.ExitStack() as ending:

        def run():
            while True:
                try:
                    connection = ending.enter_context(listener.accept()[0])
                except OSError:
                    return
                with contextlib.suppress(OSError):
                    talk(connection)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            listener.close()


@contextlib.contextmanager
def full(family, address):
    """The address of a listener whose queue is full, so that connecting hangs."""
    with contextlib.ExitStack() as ending:
        listener = ending.enter_context(socket.socket(family))
        listener.bind(address)
        listener.listen(0)
        for _ in range(3):
            filler = ending.enter_context(socket.socket(family))
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()


def read_request(connection):
    """Read from an HTTP client to the end of its headers."""
    seen = b""
    while b"\r\n\r\n" not in seen:
        seen += connection.recv(65536)
    return seen


@functools.cache
def certificate():
    """
    A certificate for localhost, made now, and its key.

    Returns:
        The server's TLS context and one that trusts it.
    """
    with tempfile.TemporaryDirectory() as folder:
        key, made = os.path.join(folder, "key.pem"), os.path.join(folder, "cert.pem")
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
             "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
             "-addext", "keyUsage=critical,digitalSignature,keyCertSign",
             "-keyout", key, "-out", made],
            check=True,
            capture_output=True,
        )  # fmt: skip
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(made, key)
        return server, ssl.create_default_context(cafile=made)

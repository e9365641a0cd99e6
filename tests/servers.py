"""
Real servers that stall where a test wants them to.
"""

import contextlib
import functools
import os
import socket
import ssl
import subprocess
import tempfile
import threading


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
def refusing():
    """An address that refuses every connection; it is taken meanwhile, so that no other listens."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        yield silent.getsockname()


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
    """Read from an HTTP client to the end of its headers; an error if it goes before that."""
    seen = b""
    while b"\r\n\r\n" not in seen:
        more = connection.recv(65536)
        if not more:
            raise ConnectionError(f"the client has gone after {seen!r}")
        seen += more
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

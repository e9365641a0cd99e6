"""
The HTTP clients that fastpool has a module for, each used as its own users do.
"""

import contextlib

import httpx
import requests
import urllib3
from servers import certificate, read_request, served

from fastpool.blocking.with_httpx import HTTPTransport
from fastpool.blocking.with_requests import HTTPAdapter
from fastpool.blocking.with_urllib3 import PoolManager


class Urllib3:
    """`with Urllib3() as client`: so with all of them."""

    name = "urllib3"

    def __init__(self, *, single=False, retries=None):
        self._options = {"maxsize": 1, "block": True} if single else {}
        self._options["retries"] = urllib3.Retry(3) if retries is None else retries

    def __enter__(self):
        self.own = PoolManager(ssl_context=certificate()[1], **self._options)
        return self

    def __exit__(self, *error):
        self.own.clear()

    def get(self, url):
        return self.own.request("GET", url).data

    def post(self, url, data):
        return self.own.request("POST", url, body=data).data

    @contextlib.contextmanager
    def stream(self, url):
        response = self.own.request("GET", url, preload_content=False)
        try:
            yield response.stream(1)
        finally:
            response.close()
            response.release_conn()


class Trusting(HTTPAdapter):
    """An adapter that trusts the tests' certificate."""

    def init_poolmanager(self, *args, **kwargs):
        super().init_poolmanager(*args, ssl_context=certificate()[1], **kwargs)


class Requests:
    name = "requests"

    def __init__(self, *, single=False, retries=None):
        self._options = {"pool_maxsize": 1, "pool_block": True} if single else {}
        self._options["max_retries"] = urllib3.Retry(3) if retries is None else retries

    def __enter__(self):
        self.own = requests.Session()
        for prefix in ("http://", "https://"):
            self.own.mount(prefix, Trusting(**self._options))
        return self

    def __exit__(self, *error):
        self.own.close()

    def get(self, url):
        return self.own.get(url).content

    def post(self, url, data):
        return self.own.post(url, data=data).content

    @contextlib.contextmanager
    def stream(self, url):
        with self.own.get(url, stream=True) as response:
            yield response.iter_content(1)


class Httpx:
    name = "httpx"

    def __init__(self, *, single=False, retries=3):
        limits = httpx.Limits(max_connections=1 if single else None)
        self._transport = HTTPTransport(certificate()[1], limits=limits, retries=retries)

    def __enter__(self):
        self.own = httpx.Client(transport=self._transport, follow_redirects=True, timeout=None)
        return self

    def __exit__(self, *error):
        self.own.close()

    def get(self, url):
        return self.own.get(url).content

    def post(self, url, data):
        return self.own.post(url, content=data).content

    @contextlib.contextmanager
    def stream(self, url):
        with self.own.stream("GET", url) as response:
            yield response.iter_bytes(1)


CLIENTS = [Urllib3, Requests, Httpx]

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nwhole"


@contextlib.contextmanager
def answering(*answers, secure=False):
    """
    A server that says the first of the answers to whom connects first, and so on, then `WHOLE`.

    What it says need not be all that was announced; then it says no more, and keeps the connection.

    Returns:
        A context manager, which gives the server's URL and the list of the requests it has read.
    """
    asked = []
    left = list(answers)

    def talk(connection):
        if secure:
            connection = certificate()[0].wrap_socket(connection, server_side=True)
            ending.enter_context(connection)
        asked.append(read_request(connection))
        answer = left.pop(0) if left else WHOLE
        if answer is None:
            connection.close()
        else:
            connection.sendall(answer)

    with contextlib.ExitStack() as ending, served(talk) as (host, port):
        yield f"http{'s' * secure}://{host}:{port}/", asked

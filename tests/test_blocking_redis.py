"""
redis-py on a real server: whatever a client waits for hears the token, and is not tried again.
"""

import os
import random
import socket
import threading

import pytest
import services
from blocked import cancel_while_blocked, ended, is_blocked, under
from interrupted import in_child
from pages import ROOT, run
from servers import certificate, full, served
from staging import start, until

from fastpool import Cancelled, CancelToken, TaskGroup, blocking, current_token, use_token

redis = services.client("redis")
backoff = services.client("redis.backoff")
retry = services.client("redis.retry")

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")

NAME = "under-test"
WHERE = "FASTPOOL_TESTS_REDIS"


@pytest.fixture
def watcher(redis_socket):
    """A client as redis-py makes it, to ask the server about others."""
    with redis.Redis(unix_socket_path=redis_socket) as watcher:
        watcher.flushall()
        watcher.config_resetstat()
        yield watcher


@pytest.fixture
def client(redis_socket):
    made = redis.Redis(
        unix_socket_path=redis_socket, client_name=NAME, socket_timeout=50, decode_responses=True
    )
    with blocking.redis_client(made) as client:
        yield client


def mine(watcher):
    """What the server says of the connections under test."""
    return [each for each in watcher.client_list() if each["name"] == NAME]


def count_blocked(watcher):
    return sum("b" in each["flags"] for each in mine(watcher))


def count_made(watcher):
    """How many connections others have made since the test began."""
    return watcher.info("stats")["total_connections_received"]


# --- What is interrupted --------------------------------------------------------------------------


def pops(client):
    return client.blpop("jobs")


def pops_for_long(client):
    return client.blpop("jobs", timeout=50)


def pops_by_name(client):
    return client.execute_command("BLPOP", "jobs", 0)


def moves(client):
    return client.blmove("jobs", "done", 0)


def reads_stream(client):
    return client.xread({"jobs": "$"}, block=0)


def pops_on_one_connection(client):
    with client.client() as single:
        return single.blpop("jobs")


def waits_for_replicas(client):
    return client.wait(1, 0)


def waits_in_pipeline(client):
    with client.pipeline(transaction=False) as pipeline:
        return pipeline.set("a", 1).blpop("jobs").execute()


@pytest.mark.parametrize(
    "call",
    [
        pops,
        pops_for_long,
        pops_by_name,
        pops_on_one_connection,
        waits_in_pipeline,
        moves,
        reads_stream,
        waits_for_replicas,
    ],
)
def test_cancel_ends_the_command_which_is_not_tried_again(call, client, watcher):
    """
    Its connection is closed; the client opens another.
    """
    token = CancelToken()
    thread, outcome = under(token, call, client)
    until(lambda: count_blocked(watcher) == 1 and is_blocked(thread.native_id))
    token.cancel("enough")
    error = ended(thread, outcome)

    assert type(error) is Cancelled
    assert error.reason == "enough"
    assert isinstance(error.__context__, redis.ConnectionError)
    until(lambda: not mine(watcher))
    assert count_made(watcher) == 1
    assert client.echo("hello") == "hello"


def listens(pubsub):
    return list(pubsub.listen())


def gets_message(pubsub):
    while pubsub.get_message(timeout=None)["type"] == "subscribe":
        pass


def gets_message_for_long(pubsub):
    while pubsub.get_message(timeout=50)["type"] == "subscribe":
        pass


@pytest.mark.parametrize("call", [listens, gets_message, gets_message_for_long])
def test_cancel_ends_the_wait_for_a_message(call, client, watcher):
    """
    The subscription is over, and nobody subscribes again.
    """
    token = CancelToken()
    with client.pubsub() as pubsub:
        pubsub.subscribe("news")
        thread, outcome = under(token, call, pubsub)
        until(lambda: len(mine(watcher)) == 1 and is_blocked(thread.native_id))
        token.cancel()

        assert type(ended(thread, outcome)) is Cancelled
        until(lambda: not mine(watcher))
        assert count_made(watcher) == 1


def test_subscription_is_there_again_when_messages_are_wanted_again(client, watcher):
    """
    As redis-py does it after any loss of the connection.
    """
    token = CancelToken()
    with client.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe("news")
        thread, outcome = under(token, listens, pubsub)
        until(lambda: len(mine(watcher)) == 1 and is_blocked(thread.native_id))
        token.cancel()
        assert type(ended(thread, outcome)) is Cancelled

        reader, messages = start(lambda: next(pubsub.listen()))
        until(lambda: watcher.publish("news", "hello"))

        assert ended(reader, messages)["data"] == "hello"


def test_only_the_connection_of_the_call_is_closed(client, watcher):
    """
    Another thread's call on the same client goes on.
    """
    other, got = start(client.blpop, "other")
    until(lambda: count_blocked(watcher) == 1)
    token = CancelToken()
    thread, outcome = under(token, pops, client)
    until(lambda: count_blocked(watcher) == 2)
    token.cancel()

    assert type(ended(thread, outcome)) is Cancelled
    until(lambda: count_blocked(watcher) == 1)
    watcher.rpush("other", "item")
    assert ended(other, got) == ("other", "item")


def test_failure_of_a_sibling_ends_the_command(client, watcher):
    """
    A task needs nothing around it.
    """

    def fails():
        until(lambda: count_blocked(watcher) == 1)
        raise ValueError("bad header")

    with pytest.raises(ValueError, match="bad header"), TaskGroup() as group:
        popped = group.submit(pops, client)
        group.submit(fails)

    assert popped.cancelled()


def test_client_of_the_documentation_is_as_shown(redis_socket, watcher):
    """
    It is made to hear the token, and used in a task.
    """
    page = run(ROOT / "docs" / "blocking.md")
    watcher.rpush("orders", "chair")
    with redis.Redis(unix_socket_path=redis_socket) as client:
        assert page["workshop"](client) == (b"orders", b"chair")


# --- Making connections ---------------------------------------------------------------------------


def silent(connection):
    """A server that takes the connection and says nothing."""


def test_stalled_connecting_is_left_at_a_cancel():
    """
    The listener's queue is full, so the connection stays pending.
    """
    with full(socket.AF_INET, ("127.0.0.1", 0)) as (host, port):
        client = blocking.redis_client(redis.Redis(host, port, socket_connect_timeout=None))

        assert type(cancel_while_blocked(client.ping)) is Cancelled


def test_stalled_greeting_is_left_at_a_cancel():
    """
    The server takes the connection, and does not answer.
    """
    with served(silent) as (host, port):
        client = blocking.redis_client(redis.Redis(host, port, socket_timeout=50))

        assert type(cancel_while_blocked(client.ping)) is Cancelled


def test_stalled_handshake_is_left_at_a_cancel():
    """
    The server takes the connection, and never answers the client's hello.
    """
    with served(silent) as (host, port):
        client = blocking.redis_client(
            redis.Redis(host, port, socket_timeout=50, ssl=True, ssl_cert_reqs="none")
        )

        assert type(cancel_while_blocked(client.ping)) is Cancelled


def test_stalled_answer_by_tls_is_left_at_a_cancel():
    """
    The server has shaken hands, and does not answer.
    """
    kept = []

    def talk(connection):
        kept.append(certificate()[0].wrap_socket(connection, server_side=True))
        kept[-1].recv(1)

    with served(talk) as (host, port):
        client = blocking.redis_client(
            redis.Redis(host, port, socket_timeout=50, ssl=True, ssl_cert_reqs="none")
        )
        outcome = cancel_while_blocked(client.ping, ready=lambda: kept)
        kept[0].close()

    assert type(outcome) is Cancelled


def test_pause_before_a_retry_is_left_at_a_cancel(tmp_path):
    """
    A server that is not there is tried again, after a pause, unless the token is set.
    """
    client = blocking.redis_client(
        redis.Redis(
            unix_socket_path=str(tmp_path / "nobody"),
            retry=retry.Retry(backoff.ConstantBackoff(50), 3),
        )
    )

    error = cancel_while_blocked(client.ping, among=None)

    assert type(error) is Cancelled
    assert isinstance(error.__context__, redis.ConnectionError)


def test_retries_go_on_without_a_cancel(tmp_path):
    """
    As many as the client was told to make.
    """
    client = blocking.redis_client(
        redis.Redis(
            unix_socket_path=str(tmp_path / "nobody"),
            retry=retry.Retry(backoff.ConstantBackoff(0.001), 3),
        )
    )

    with use_token(CancelToken()), pytest.raises(redis.ConnectionError):
        client.ping()


# --- What is not interrupted ----------------------------------------------------------------------


def test_set_token_runs_no_command(client, watcher):
    """
    Not even on a connection that is there.
    """
    token = CancelToken()
    with use_token(token):
        assert client.set("a", "1")
        token.cancel()
        with pytest.raises(Cancelled):
            client.set("a", "2")

    assert watcher.get("a") == b"1"
    assert client.get("a") == "1"


def pops_while_watching(client):
    with client.pipeline() as pipeline:
        pipeline.watch("a")
        return pipeline.blpop("jobs")


def cancels_while_watching(client):
    with client.pipeline() as pipeline:
        pipeline.watch("a")
        current_token().cancel()
        pipeline.get("a")


def test_pipeline_that_watches_gives_its_connection_back(redis_socket, watcher, unraised):
    """
    Its last word would be a command, which no longer can be sent.
    """
    made = redis.Redis(unix_socket_path=redis_socket, max_connections=1)
    with blocking.redis_client(made) as client:
        assert type(cancel_while_blocked(pops_while_watching, client)) is Cancelled
        with use_token(CancelToken()), pytest.raises(Cancelled):
            cancels_while_watching(client)
        assert client.ping() is True
        with client.pipeline() as pipeline:
            pipeline.watch("a")
            assert pipeline.get("a") is None
        assert client.ping() is True
    assert not unraised


def test_answer_that_nobody_awaits_is_nobody_elses(client, watcher):
    """
    A connection on which one is still to come is closed.
    """
    token = CancelToken()
    connection = client.connection_pool.get_connection()
    with use_token(token):
        connection.send_command("BLPOP", "jobs", 0)
        token.cancel()
        with pytest.raises(Cancelled):
            connection.read_response()
    client.connection_pool.release(connection)

    until(lambda: not mine(watcher))
    assert client.echo("hello") == "hello"


@pytest.mark.usefixtures("hasty")
def test_no_cancel_ever_hits_the_next_command(client, watcher):
    """
    Cancels against returning, in many rounds: each answer is that of its own command.
    """
    chance = random.Random(7)
    meeting = threading.Barrier(2, timeout=60)
    tokens = [CancelToken() for _ in range(1000)]
    came = {"cancelled": 0, "done": 0}

    def cancels():
        for token in tokens:
            meeting.wait()
            for _ in range(chance.randrange(3000)):
                pass
            token.cancel()

    def asks():
        for number, token in enumerate(tokens):
            meeting.wait()
            try:
                with use_token(token):
                    assert client.echo(f"inside {number}") == f"inside {number}"
                came["done"] += 1
            except Cancelled:
                came["cancelled"] += 1
            assert client.echo(f"after {number}") == f"after {number}"

    canceller, reader = start(cancels), start(asks)

    assert ended(*canceller) is None
    assert ended(*reader) is None
    assert all(came.values()), came


def test_client_that_was_used_hears_the_token(redis_socket, watcher):
    """
    What it has open is closed, for a connection does not begin to hear.
    """
    with redis.Redis(unix_socket_path=redis_socket, client_name=NAME, socket_timeout=50) as client:
        client.ping()
        assert blocking.redis_client(client) is client
        assert blocking.redis_client(client) is client  # once more is no harm
        assert mine(watcher) == []
        token = CancelToken()
        thread, outcome = under(token, pops, client)
        until(lambda: count_blocked(watcher) == 1)
        token.cancel()

        assert type(ended(thread, outcome)) is Cancelled


def test_pool_that_waits_for_a_connection_is_as_good(redis_socket, watcher):
    """
    A `BlockingConnectionPool` has its place back after a cancel.
    """
    pool = redis.BlockingConnectionPool(
        1,
        timeout=50,
        connection_class=redis.UnixDomainSocketConnection,
        path=redis_socket,
        client_name=NAME,
    )
    client = blocking.redis_client(redis.Redis.from_pool(pool))
    for _ in range(3):
        token = CancelToken()
        thread, outcome = under(token, pops, client)
        until(lambda: count_blocked(watcher) == 1)
        token.cancel()
        assert type(ended(thread, outcome)) is Cancelled
        until(lambda: not mine(watcher))

    assert client.ping()
    client.close()


def test_what_is_no_client_is_refused(redis_socket):
    """
    The message says what is wanted.
    """
    with pytest.raises(TypeError, match=r"wants a redis\.Redis, not 'redis'"):
        blocking.redis_client("redis")
    with pytest.raises(TypeError, match=r"wants a redis\.Redis, not <redis\.asyncio"):
        blocking.redis_client(redis.asyncio.Redis())
    with (
        redis.Redis(unix_socket_path=redis_socket, single_connection_client=True) as single,
        pytest.raises(TypeError, match="leave out single_connection_client"),
    ):
        blocking.redis_client(single)


def test_interrupts_says_what_to_call_instead(client):
    """
    Which connection a client will use, nobody knows beforehand.
    """
    with client.pubsub() as pubsub:
        for what in (client, pubsub, redis.Connection()):
            with pytest.raises(TypeError, match=r"redis_client\(client\)"):
                CancelToken().interrupts(what)
    with pytest.raises(TypeError, match="hears the current token already"):
        CancelToken().interrupts(client.connection_pool.make_connection())


# --- Ctrl-C ---------------------------------------------------------------------------------------


def pops_in_main_thread(group, ready):
    made = redis.Redis(unix_socket_path=os.environ[WHERE], client_name=NAME, socket_timeout=50)
    with blocking.redis_client(made) as client:
        group.submit(says_when_it_waits, ready)
        try:
            pops(client)
        finally:
            with use_token(CancelToken.NEVER):
                print(client.echo("usable").decode())


def says_when_it_waits(ready):
    with redis.Redis(unix_socket_path=os.environ[WHERE]) as watcher:
        until(lambda: count_blocked(watcher) == 1)
    ready()


def pops_in_task(group, ready):
    group.submit(pops_in_main_thread, group, ready).result()


@pytest.mark.parametrize("body", [pops_in_main_thread, pops_in_task])
def test_ctrl_c_ends_the_command(body, redis_socket, monkeypatch):
    """
    In the main thread as in a task; the client is usable.
    """
    monkeypatch.setenv(WHERE, redis_socket)

    assert in_child(body) == "usable\ninterrupted\n"

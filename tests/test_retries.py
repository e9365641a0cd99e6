"""
Retries by other people's packages, in tasks: the pause hears the token, and no cancel is retried.
"""

import threading

import pytest
import stamina
import tenacity

import fastpool
from fastpool import TaskGroup

PREDICATES = {
    "the default": {},
    "of a class": {"retry": tenacity.retry_if_exception_type(ConnectionError)},
    "of all but a class": {"retry": tenacity.retry_if_not_exception_type(ValueError)},
    "of anything": {"retry": tenacity.retry_if_exception(lambda error: True)},
}


@pytest.fixture(autouse=True)
def quiet():
    """stamina logs each retry, by structlog if that is there."""
    stamina.instrumentation.set_on_retry_hooks([])
    yield
    stamina.instrumentation.set_on_retry_hooks(None)


class Attempts:
    """A call that fails each time, or sleeps until it is told to stop."""

    def __init__(self, sleeps):
        self.count = 0
        self.begun = threading.Event()
        self.paused = threading.Event()
        self.sleeps = sleeps

    def __call__(self):
        self.count += 1
        self.begun.set()
        if self.sleeps:
            fastpool.sleep(60)
        raise ConnectionError("no answer")

    def pause(self, seconds):
        self.paused.set()
        fastpool.sleep(seconds)


def by_tenacity(attempts, seconds, **options):
    wait = tenacity.wait_fixed(seconds)
    return tenacity.Retrying(sleep=attempts.pause, wait=wait, **options)(attempts)


def by_stamina(attempts, seconds, on):
    for attempt in stamina.retry_context(
        on=on, attempts=None, timeout=None, wait_initial=0, wait_max=0, wait_jitter=0
    ):
        if attempt.num > 1:
            attempts.pause(seconds)
        with attempt:
            attempts()


CALLS = [
    *(
        pytest.param(by_tenacity, options, id=f"tenacity, {name}")
        for name, options in PREDICATES.items()
    ),
    pytest.param(by_stamina, {"on": ConnectionError}, id="stamina, of a class"),
    pytest.param(by_stamina, {"on": lambda error: True}, id="stamina, of anything"),
]


@pytest.mark.parametrize(("call", "options"), CALLS)
def test_cancel_ends_the_pause(call, options):
    """
    The call is not made again, however long the pause would have been.
    """
    attempts = Attempts(sleeps=False)
    with TaskGroup() as group:
        task = group.submit(call, attempts, 60, **options)
        assert attempts.paused.wait(30)
        group.cancel()

    assert task.cancelled()
    assert attempts.count == 1


@pytest.mark.parametrize("seconds", [0, 60])
@pytest.mark.parametrize(("call", "options"), CALLS)
def test_cancel_is_never_retried(call, options, seconds):
    """
    It ends an attempt, and no other follows, though the predicate says so and there is no pause.
    """
    attempts = Attempts(sleeps=True)
    with TaskGroup() as group:
        task = group.submit(call, attempts, seconds, **options)
        assert attempts.begun.wait(30)
        group.cancel()

    assert task.cancelled()
    assert attempts.count == 1


@pytest.mark.parametrize(("call", "options"), CALLS)
def test_pause_is_a_plain_sleep_outside_of_groups(call, options):
    """
    Nobody cancels there, and the attempts go on.
    """
    attempts = Attempts(sleeps=False)

    def enough(error):
        if attempts.count == 3:
            raise KeyError
        return True

    options = (
        {"on": enough} if call is by_stamina else {"retry": tenacity.retry_if_exception(enough)}
    )
    with pytest.raises(KeyError):
        call(attempts, 0.001, **options)

    assert attempts.count == 3

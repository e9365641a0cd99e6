"""
Cancels against entering and leaving `token.interrupts`, as many rounds as wanted.

    python tests/rounds.py --rounds 30000
"""

import argparse
import random
import sys
import threading

from fastpool import Cancelled, CancelToken


def play(rounds, seed=1):
    """
    How often the cancel came before, into and after the block; raises at a late interruption,
    one made twice, or a success of a block that was interrupted.
    """
    chance = random.Random(seed)
    meeting = threading.Barrier(2, timeout=60)
    tokens = [CancelToken() for _ in range(rounds)]
    delays = [chance.randrange(200) for _ in range(rounds)]
    came = {"before": 0, "into": 0, "after": 0}

    def cancels():
        for token, delay in zip(tokens, delays, strict=True):
            meeting.wait()
            for _ in range(delay):
                pass
            token.cancel()
            meeting.wait()

    other = threading.Thread(target=cancels)
    other.start()
    trouble = None
    for token, delay in zip(tokens, reversed(delays), strict=True):
        made, inside, left = [], [], []

        def interrupt(made=made, left=left):
            made.append(bool(left))

        meeting.wait()
        try:
            with token.interrupts(interrupt):
                inside.append(True)
                for _ in range(delay):
                    pass
            left.append(True)
            how = "after"
        except Cancelled:
            left.append(True)
            how = "into" if inside else "before"
        made_by_then = len(made)
        meeting.wait()
        if any(made) or len(made) != made_by_then or len(made) > 1:
            trouble = f"{how}: interrupted {made_by_then} times in time, {len(made)} in all"
        if how == "after" and made:
            trouble = "success of a block that was interrupted"
        came[how] += 1
    other.join()
    if trouble:
        raise AssertionError(trouble)
    return came


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30_000)
    rounds = parser.parse_args().rounds
    sys.setswitchinterval(1e-6)  # or the two take turns as they meet
    came = play(rounds)
    print(came)
    assert all(came.values()), "not every order was tried"
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Signals that end a training after it has saved, and not later than asked for."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(SystemExit):
    """A signal stopped the training after it saved a checkpoint; the exit status is 128 plus the signal's number."""


@contextmanager
def caught_signals(grace: float) -> Iterator[list[int]]:
    """Within the context SIGTERM and SIGINT are only noted in the list; a second SIGINT interrupts at once.

    ``grace`` seconds after the first the process ends whatever it is doing: a process whose peers died waits for them in vain.
    """
    caught: list[int] = []
    timers: list[threading.Timer] = []

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and caught:
            raise KeyboardInterrupt
        if not caught:
            timers.append(threading.Timer(grace, _leave, (number, grace)))
            timers[0].daemon = True
            timers[0].start()
        caught.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for timer in timers:
            timer.cancel()


def _leave(number: int, grace: float) -> None:
    name = signal.Signals(number).name
    sys.stderr.write(f"appa-lite: error: not saved within {grace:g} s of {name} (training.grace): the last checkpoint stands\n")
    sys.stderr.flush()
    os._exit(128 + number)

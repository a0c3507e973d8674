"""A first signal stops in an orderly way, a second one kills."""

import os
import signal
import subprocess
import sys

import pytest

from cmt_aqr.training.signals import stop_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_at_once_unless_it_is_deferred(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), stop_signals():
        os.kill(os.getpid(), number)
    reached = []
    with stop_signals() as stop, stop.deferred():
        os.kill(os.getpid(), number)
        reached.append(stop.is_set)
        with pytest.raises(KeyboardInterrupt), stop.immediate():
            reached.append("never")
    assert reached == [True]
    assert signal.getsignal(number) is before


def test_a_second_signal_kills():
    code = """
import os, signal
from cmt_aqr.training.signals import stop_signals
with stop_signals() as stop, stop.deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    print("first", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("second", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "first\n")

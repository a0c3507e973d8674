import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from cmt_aqr.locks import exclusive_lock

HOLD = """
import sys, time
from pathlib import Path
from cmt_aqr.locks import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), on_wait=print):
    print("mine", flush=True)
    time.sleep(60)
"""


def never(holder: str) -> None:
    raise AssertionError(f"waited for {holder}")


def test_a_free_lock_is_taken_at_once_and_leaves_no_file(tmp_path):
    lock = tmp_path / "lock"
    for _ in range(2):
        with exclusive_lock(lock, on_wait=never):
            assert lock.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        assert not lock.exists()


def test_who_waits_is_told_for_whom_and_may_give_up(tmp_path):
    lock, told = tmp_path / "lock", []
    me = f"process {os.getpid()} on {socket.gethostname()}"
    with exclusive_lock(lock, on_wait=never):
        with (
            pytest.raises(ZeroDivisionError),
            exclusive_lock(lock, on_wait=lambda holder: told.append(holder) or 1 / 0),
        ):
            raise AssertionError("two hold the lock")
        assert told == [me] and lock.exists()


def test_one_at_a_time(tmp_path):
    lock, inside, most, told = tmp_path / "lock", [], [], []

    def work() -> None:
        for _ in range(30):
            with exclusive_lock(lock, on_wait=told.append):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 180 and max(most) == 1 and told
    assert not lock.exists()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    lock, told = tmp_path / "lock", []
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "mine\n"

        def kill(name: str) -> None:
            told.append(name)
            holder.send_signal(signal.SIGKILL)

        with exclusive_lock(lock, on_wait=kill):
            assert told == [f"process {holder.pid} on {socket.gethostname()}"]
    finally:
        holder.kill()
        holder.wait()

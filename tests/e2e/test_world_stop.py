"""A world that is stopped, killed, short of space or written twice at once, through the command line."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are counted through /proc"),
]

SMALL = (
    "--scenes=6", "--val-scenes=1", "--samples-per-scene=12", "--image-size=320x180", "--sweeps=2",
    "--lidar-columns=180", "--workers=2",
)  # fmt: skip


def start(out: Path, *options: str, **arguments) -> subprocess.Popen:
    """The command in a session of its own, whose processes can be counted."""
    command = [sys.executable, "-m", "cmt_aqr.synthetic", str(out), *SMALL, *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, **arguments)


def members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(of) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def wait_until_writing(out: Path, process: subprocess.Popen) -> None:
    partial = out.with_name(f".{out.name}.part")
    assert wait_for(lambda: any(partial.glob("samples/*/*.jpg")), 90), process.communicate(timeout=60)
    assert len(members(process.pid)) >= 3  # itself and two workers


def digest(out: Path) -> dict[str, str]:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "world"
    process = start(out)
    assert "samples/s" in process.communicate(timeout=300)[1] and process.returncode == 0
    return digest(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stop_leaves_no_process_and_nothing_that_the_next_run_keeps(tmp_path, whole, number):
    out = tmp_path / "world"
    process = start(out)
    wait_until_writing(out, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert wait_for(lambda: not members(process.pid), 5), "a process still runs"
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130 and errors.strip() == "interrupted"
        assert os.listdir(tmp_path) == []
    again = start(out)
    assert "Traceback" not in again.communicate(timeout=300)[1] and again.returncode == 0
    assert os.listdir(tmp_path) == ["world"] and digest(out) == whole


def test_two_at_once_both_succeed_and_one_says_that_it_waits(tmp_path, whole):
    out = tmp_path / "world"
    first = start(out)
    wait_until_writing(out, first)
    second = start(out)
    said = second.communicate(timeout=300)[1]
    assert first.wait(timeout=60) == 0 and second.returncode == 0
    assert f"{out} is being written by process {first.pid} on {os.uname().nodename}: waiting for it" in said
    assert "is there now" in said
    assert os.listdir(tmp_path) == ["world"] and digest(out) == whole


def test_a_killed_worker_is_one_sentence(tmp_path):
    out = tmp_path / "world"
    process = start(out)
    wait_until_writing(out, process)
    busiest = max(members(process.pid), key=lambda pid: 0 if pid == process.pid else resident(pid))
    os.kill(busiest, signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2 and errors.count("\n") == 1
    assert f"{out}: a process that recorded the world was killed, most likely by lack of memory" in errors
    assert "fewer workers than 2" in errors
    assert wait_for(lambda: not members(process.pid), 5) and os.listdir(tmp_path) == []


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def test_no_space_for_a_file_is_one_sentence(tmp_path):
    out = tmp_path / "world"
    process = start(out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.count("\n") == 1
    assert f"error: {out}: the world cannot be written: {tmp_path}/.world.part/" in errors
    assert "file too large; nothing is kept" in errors
    assert wait_for(lambda: not members(process.pid), 5) and os.listdir(tmp_path) == []

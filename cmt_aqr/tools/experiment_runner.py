"""Runs the jobs of a plan in processes of their own, several at a time."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cmt_aqr.data.failures import SUITES
from cmt_aqr.errors import UserError
from cmt_aqr.evaluation.nuscenes_eval import METRICS_FILE
from cmt_aqr.failure_report import REPORT_FILE
from cmt_aqr.tools.experiment_plan import Plan, Variant, settings_of

REPOSITORY = Path(__file__).parents[2]
# Seconds that a run has to save a checkpoint after a signal.
GRACE = 30.0
STOPPED = 130  # exit status of train.py after a signal


@dataclass
class Progress:
    """What the slots share.

    Attributes:
        deadline: of `time.monotonic`; None: none.
        is_stopped: set when no more runs may start.
        failed: names of the runs that ended with an error, with the last line that they printed.
        left: runs that were stopped or not started.
    """

    deadline: float | None
    is_stopped: threading.Event = field(default_factory=threading.Event)
    failed: list[str] = field(default_factory=list)
    left: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def run_plan(plan: Plan, out: Path, slots: Sequence[int | None], *, limit: float | None) -> int:
    """Run what is not finished; returns 0 when all runs are finished, 130 when some are left, 2 when one failed.

    Args:
        slots: each has one run at a time, on the GPU of this number; None: on the CPU.
        limit: seconds after which all runs are stopped; they can be resumed.
    """
    for script in ("train.py", "test.py"):
        if not (REPOSITORY / script).is_file():
            raise UserError(f"{REPOSITORY / script} does not exist: experiments run from a checkout of the project")
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    jobs = [job for job in plan.jobs if not result_file(plan, run_folder(out, *job)).is_file()]
    for job in jobs:
        waiting.put(job)
    print(f"{len(jobs)} of {len(plan.jobs)} runs to do, {min(len(slots), len(jobs))} at a time", flush=True)
    progress = Progress(None if limit is None else time.monotonic() + limit)
    threads = [threading.Thread(target=_work, args=(plan, out, slot, waiting, progress)) for slot in slots]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        progress.is_stopped.set()
        for thread in threads:
            thread.join()
    left = progress.left + waiting.qsize()
    for line in progress.failed:
        print(f"failed: {line}")
    if left:
        print(f"{left} runs are left; the same command resumes them")
    return 2 if progress.failed else STOPPED if left else 0


def run_folder(out: Path, variant: Variant, seed: int) -> Path:
    """The folder of a run."""
    return out / variant.name / f"seed_{seed}"


def result_file(plan: Plan, folder: Path) -> Path:
    """The file that exists once a run is finished."""
    return folder / "test" / (REPORT_FILE if plan.failures else METRICS_FILE)


def commands(plan: Plan, out: Path, variant: Variant, seed: int) -> list[list[str]]:
    """The command lines of a run: training, then testing."""
    folder = run_folder(out, variant, seed)
    settings = ["--set", *settings_of(plan, variant), f"seed={seed}"]
    train = ["train.py", variant.config, "--work-dir", str(folder), "--resume", *settings]
    test = ["test.py", variant.config, "--checkpoint", str(folder / "latest.pt"), "--out", str(folder / "test")]
    for failure in plan.failures:
        test += ["--failures" if failure in SUITES else "--failure", failure]
    # Keys of training only.
    kept = [entry for entry in settings if not entry.startswith(("data.drop_", "data.failures"))]
    return [[sys.executable, *train], [sys.executable, *test, *kept]]


def _work(plan: Plan, out: Path, slot: int | None, waiting: queue.SimpleQueue, progress: Progress) -> None:
    """Run jobs until there are no more, or the time is up."""
    while not _is_over(progress):
        try:
            variant, seed = waiting.get_nowait()
        except queue.Empty:
            return
        name = f"{variant.name}, seed {seed}"
        folder = run_folder(out, variant, seed)
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        print(f"{name}: started on {'the CPU' if slot is None else f'GPU {slot}'}", flush=True)
        for command in commands(plan, out, variant, seed):
            status = _run(command, folder / "output.txt", slot, progress)
            if status:
                break
        with progress.lock:
            if status == 0:
                print(f"{name}: finished after {time.monotonic() - start:.0f} s", flush=True)
            elif status == STOPPED or _is_over(progress):
                progress.left += 1
                print(f"{name}: stopped", flush=True)
            else:
                lines = (folder / "output.txt").read_text(errors="replace").splitlines()
                progress.failed.append(f"{name}: status {status}, {lines[-1] if lines else 'no output'}")
                print(f"failed: {progress.failed[-1]}", flush=True)


def _run(command: list[str], output: Path, slot: int | None, progress: Progress) -> int:
    """Run one command line and stop it when the time is up; returns its exit status."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "" if slot is None else str(slot)}
    with output.open("a") as stream:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this program alone, which stops the runs
        )
        while process.poll() is None:
            if _is_over(progress):
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                return STOPPED
            time.sleep(0.2)
    return process.returncode


def _is_over(progress: Progress) -> bool:
    if progress.deadline is not None and time.monotonic() >= progress.deadline:
        progress.is_stopped.set()
    return progress.is_stopped.is_set()

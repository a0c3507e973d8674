"""kill -9 of trainings on the CPU: whatever the moment, the resumed run ends with the weights of an uninterrupted one.

    python -m tests.e2e.faults.kill --moments 50 --save-phases --torchrun-moments 10

Three tables: random moments of one process, spread over the phases of a run; every file operation of its saves; and
random moments of one of two processes under torchrun with --max-restarts. A run is good when the weights, the optimizer
state and the step of latest.pt equal the reference to the last bit and log.jsonl has every step and evaluation once.
Exit status 1 if one is not.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from tests.e2e.conftest import World, one_thread
from tests.e2e.faults.kill_phases import AFTER, BEFORE, BETWEEN, EVALUATION, SAVE, START, Watch, label
from tests.e2e.faults.kill_runs import (
    finish,
    is_same_run,
    make_world,
    preload,
    reached_step,
    start,
    start_forking_torchrun,
    start_plain,
    start_torchrun,
    wait,
)
from tests.e2e.faults.kill_saves import kill_at_operation

SEED = 2026
# How many of twenty moments fall into each phase.
SHARES = {START: 2, BEFORE: 2, AFTER: 8, SAVE: 3, BETWEEN: 2, EVALUATION: 3}
# Longest wait for a run to come to a phase, seconds.
LIMIT = 300
# The run was faster than the uninterrupted one, and was not killed.
ENDED = "had ended"
# More file operations than a run has.
ALL = 1000


def plan(moments: int, timeline: list[tuple[str, float]], rng: random.Random) -> list[tuple[int, float]]:
    """Random moments: (number of the phase in the timeline, seconds after its begin).

    Args:
        timeline: label and duration of every phase of an uninterrupted run.
    """
    pool = [name for name, share in SHARES.items() for _ in range(share)]
    rng.shuffle(pool)
    drawn = []
    for moment in range(moments):
        wanted = pool[moment % len(pool)]
        numbers = [number for number, (name, _) in enumerate(timeline) if name == wanted]
        (number,) = rng.choices(numbers, [timeline[number][1] for number in numbers])
        drawn.append((number, rng.random() * timeline[number][1]))
    return drawn


def kill_at(watch: Watch, rank: int, number: int, delay: float, is_over) -> str:
    """Wait for a phase of a process, then for a while, and kill the process; the phase that it was in."""
    deadline = time.monotonic() + LIMIT
    while watch.number(rank) < number and not is_over():
        assert time.monotonic() < deadline, "the run does not get to the phase"
        time.sleep(0.001)
    time.sleep(delay)
    if is_over():
        return ENDED
    os.kill(watch.process(rank), signal.SIGKILL)
    return label(watch, rank)


class Tally:
    """Counts of good and bad runs by phase, printed as the rows of a Markdown table."""

    def __init__(self, title: str):
        self.title = title
        self.good: Counter[str] = Counter()
        self.all: Counter[str] = Counter()

    def add(self, phase: str, good: bool, work_dir: Path, note: str) -> None:
        """Count a run and print a line on it; remove its work dir unless it is of use to find out what went wrong."""
        self.good[phase] += good
        self.all[phase] += 1
        print(f"{self.title} {self.all.total()}: {phase}, {note}: {'identical' if good else 'DIFFERENT'}")
        if good:
            remove(work_dir)

    def is_perfect(self) -> bool:
        """Whether all runs were good."""
        return self.good == self.all

    def table(self) -> str:
        """Rows: phase, killed, identical."""
        rows = [f"| {phase} | {count} | {self.good[phase]} |" for phase, count in self.all.items()]
        total = f"{self.title}: {self.good.total()} of {self.all.total()} identical"
        return "\n".join([total, "| killed | runs | identical |", "|---|---|---|", *sorted(rows)])


def remove(work_dir: Path) -> None:
    """Remove a work dir and the files beside it."""
    shutil.rmtree(work_dir)
    for ending in (".out", ".watch"):
        Path(f"{work_dir}{ending}").unlink(missing_ok=True)


def check_fork(world: World, folder: Path) -> list[tuple[str, float]]:
    """Run once without a kill, as plain ``python train.py`` and in a fork; both must be the same. Phases of the run."""
    assert wait(start_plain(world, folder / "whole")) == 0, (folder / "whole.out").read_text()
    watch, begin = Watch(folder / "fork.watch"), time.monotonic()
    assert wait(start(world, folder / "fork", prepare=watch.install)) == 0, (folder / "fork.out").read_text()
    print(f"a run of {reached_step(folder / 'fork')} steps takes {time.monotonic() - begin:.1f} s")
    assert is_same_run(folder / "fork", folder / "whole"), "a forked run differs from python train.py"
    return watch.timeline(0)


def at_random_moments(world: World, folder: Path, moments: int, timeline: list[tuple[str, float]]) -> Tally:
    """Runs of one process, killed at random moments and resumed."""
    tally, pending = Tally("moment"), plan(moments, timeline, random.Random(SEED))
    while pending:
        number, delay = pending.pop()
        work_dir = folder / f"moment_{tally.all.total()}"
        watch = Watch(Path(f"{work_dir}.watch"))
        workers = int(tally.all.total() % 5 == 4)  # some runs leave an orphaned data worker behind
        process = start(world, work_dir, f"data.workers={workers}", prepare=watch.install)
        ended = []
        phase = kill_at(watch, 0, number, delay, partial(has_ended, process, ended))
        if phase == ENDED:
            pending.append((number, delay / 2))
            remove(work_dir)
            continue
        wait(process)
        note = f"phase {number} + {delay:.3f} s, {workers} workers, resumed at step {reached_step(work_dir)}"
        tally.add(phase, finish(world, work_dir, folder / "whole"), work_dir, note)
    return tally


def has_ended(process: int, ended: list[int]) -> bool:
    """Whether a forked process has ended; it is waited for only once."""
    if not ended and os.waitpid(process, os.WNOHANG)[0]:
        ended.append(process)
    return bool(ended)


def at_file_operations(world: World, folder: Path, limit: int) -> Tally:
    """Runs killed at each file operation of their saves, until a run has no more of them, or at the first ``limit``."""
    tally = Tally("operation")
    for number in range(limit):
        work_dir = folder / f"operation_{number}"
        status = wait(start(world, work_dir, prepare=partial(kill_at_operation, number)))
        if status == 0:
            break
        operation = Path(f"{work_dir}.out").read_text().splitlines()[-1]
        note = f"resumed at step {reached_step(work_dir)}"
        good = status == -signal.SIGKILL and finish(world, work_dir, folder / "whole")
        tally.add(operation, good, work_dir, note)
    return tally


def under_torchrun(world: World, folder: Path, moments: int, plain_moments: int) -> Tally:
    """Runs of two processes of which one is killed; torchrun starts both again and they resume by themselves.

    Args:
        plain_moments: so many of them, the last, are started by the command torchrun, which takes a minute; the others
            and the uninterrupted run by torchrun's code in forks.
    """
    whole, tally, rng = folder / "whole_2", Tally("torchrun moment"), random.Random(SEED + 1)
    watch = Watch(Path(f"{whole}.watch"))
    assert wait(start_forking_torchrun(world, whole, watch)) == 0, Path(f"{whole}.out").read_text()
    plans = [plan(moments, watch.timeline(rank), random.Random(SEED + 1)) for rank in range(2)]
    for moment in range(moments):
        work_dir, rank = folder / f"torchrun_{moment}", rng.randrange(2)
        watch, (number, delay) = Watch(Path(f"{work_dir}.watch")), plans[rank][moment]
        ended = []
        is_plain = moment >= moments - plain_moments
        process = (start_torchrun if is_plain else start_forking_torchrun)(world, work_dir, watch)
        phase = kill_at(watch, rank, number, delay, partial(has_ended, process, ended))
        reached = reached_step(work_dir)
        status = 0 if ended else wait(process)
        good = status == 0 and watch.restarts() == 1 and is_same_run(work_dir, whole)
        note = f"process {rank}, phase {number} + {delay:.3f} s, step {reached}, {watch.restarts()} restart"
        tally.add(phase, good, work_dir, note)
    return tally


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=50, help="random moments of one process")
    parser.add_argument(
        "--save-phases", nargs="?", type=int, const=ALL, default=0, help="the first file operations of saves, or all"
    )
    parser.add_argument("--torchrun-moments", type=int, default=0, help="random moments of one of two processes")
    parser.add_argument("--plain-torchrun", type=int, default=2, help="so many of these by the command torchrun")
    parser.add_argument("--folder", type=Path, help="where runs go (default: a temporary folder)")
    arguments = parser.parse_args()
    os.environ.update(one_thread())
    torch.set_num_threads(1)
    preload()
    sys.stdout.reconfigure(line_buffering=True)
    folder = Path(tempfile.mkdtemp(prefix="kill_", dir=arguments.folder))
    world = make_world(folder)
    timeline = check_fork(world, folder)
    tallies = [at_random_moments(world, folder, arguments.moments, timeline)]
    if arguments.save_phases:
        tallies.append(at_file_operations(world, folder, arguments.save_phases))
    if arguments.torchrun_moments:
        tallies.append(under_torchrun(world, folder, arguments.torchrun_moments, arguments.plain_torchrun))
    for tally in tallies:
        print(f"\n{tally.table()}")
    is_perfect = all(tally.is_perfect() for tally in tallies)
    if is_perfect:
        shutil.rmtree(folder)
    return 0 if is_perfect else 1


if __name__ == "__main__":
    sys.exit(main())

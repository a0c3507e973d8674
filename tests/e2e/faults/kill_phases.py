"""In which phase a run is, seen from outside: a small table in a file mapped into memory, which the run keeps."""

import mmap
import os
import struct
import time
from pathlib import Path

import train as train_script

START, BEFORE, AFTER = "in the start", "in a step before the first checkpoint", "in a step after it"
SAVE, BETWEEN, EVALUATION = "in a save", "between two epochs", "in an evaluation"
STEP = "step"
# The table holds places in this list.
NAMES = (START, STEP, SAVE, BETWEEN, EVALUATION)
# Of each process: its id, its restarts, how many phases it began; then (phase, time of its begin) of each.
HEAD, ENTRY = struct.Struct("qqq"), struct.Struct("qd")
MAX_PHASES, MAX_RANKS = 100, 2
WATCH_VARIABLE = "KILL_WATCH"
SIZE = HEAD.size + MAX_PHASES * ENTRY.size


class Watch:
    """The phases of one run, in a file that the run and its observer map."""

    def __init__(self, path: Path):
        self.path = path
        with open(os.open(path, os.O_RDWR | os.O_CREAT), "r+b") as file:
            file.truncate(MAX_RANKS * SIZE)
            self._memory = mmap.mmap(file.fileno(), MAX_RANKS * SIZE)

    def install(self) -> None:
        """Make train.py of this process announce its phases; one that torchrun started again only counts itself."""
        rank, restarts = (int(os.environ.get(name, 0)) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
        process, _, count = self._head(rank)
        if restarts:
            HEAD.pack_into(self._memory, rank * SIZE, process, restarts, count)
            return
        HEAD.pack_into(self._memory, rank * SIZE, os.getpid(), 0, 0)
        self._enter(rank, START)
        for name, phase, then in (
            ("train_step", STEP, None),
            ("save_run", SAVE, BETWEEN),
            ("evaluate_split", EVALUATION, BETWEEN),
        ):
            setattr(train_script, name, self._announced(getattr(train_script, name), rank, phase, then))

    def number(self, rank: int) -> int:
        """Number of the current phase, from 0; -1 before the first."""
        return self._head(rank)[2] - 1

    def process(self, rank: int) -> int:
        """Id of the process."""
        return self._head(rank)[0]

    def restarts(self) -> int:
        """How often torchrun has started the processes again."""
        return max(self._head(rank)[1] for rank in range(MAX_RANKS))

    def labels(self, rank: int) -> list[str]:
        """The phases so far, in their order."""
        labels, is_saved = [], False
        for number in range(self.number(rank) + 1):
            name = NAMES[self._entry(rank, number)[0]]
            is_saved |= name == BETWEEN
            labels.append({False: BEFORE, True: AFTER}[is_saved] if name == STEP else name)
        return labels

    def timeline(self, rank: int) -> list[tuple[str, float]]:
        """Label and duration of every phase that has ended."""
        begins = [self._entry(rank, number)[1] for number in range(self.number(rank) + 1)]
        return [(name, end - begin) for name, begin, end in zip(self.labels(rank), begins, begins[1:], strict=False)]

    def _announced(self, function, rank: int, phase: str, then: str | None):
        def announced(*arguments):
            self._enter(rank, phase)
            result = function(*arguments)
            if then is not None:
                self._enter(rank, then)
            return result

        return announced

    def _enter(self, rank: int, phase: str) -> None:
        process, restarts, count = self._head(rank)
        ENTRY.pack_into(
            self._memory, rank * SIZE + HEAD.size + count * ENTRY.size, NAMES.index(phase), time.monotonic()
        )
        HEAD.pack_into(self._memory, rank * SIZE, process, restarts, count + 1)

    def _head(self, rank: int) -> tuple[int, int, int]:
        return HEAD.unpack_from(self._memory, rank * SIZE)

    def _entry(self, rank: int, number: int) -> tuple[int, float]:
        return ENTRY.unpack_from(self._memory, rank * SIZE + HEAD.size + number * ENTRY.size)


def label(watch: Watch, rank: int) -> str:
    """The phase that a process is in, or was in when it ended."""
    labels = watch.labels(rank)
    return labels[-1] if labels else START

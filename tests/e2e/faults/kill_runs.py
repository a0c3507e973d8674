"""Starts the trainings that are killed, and compares what they leave with an uninterrupted one."""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.run as torchrun

import train as train_script
from cmt_aqr.synthetic import generate_world
from tests.e2e.conftest import REPOSITORY, SMALL, World, one_thread, read_lines, world_settings
from tests.e2e.faults.kill_phases import WATCH_VARIABLE, Watch

# Four epochs of three steps, saved and pruned after each, evaluated after the second and the fourth.
SETTINGS = (
    "training.epochs=4",
    "training.keep_checkpoints=1",
    "training.schedule=one_cycle",
    "training.ema_decay=0.9",
    "evaluation.num_pictures=0",
)
# A step of one process in two passes; a process of two has one frame a step.
TWO_PASSES = ("training.accumulation=2", "model.dropout=0.1")
PARTS = ("model", "ema", "optimizer", "scaler", "step")
# Values of the log that are measured.
MEASURED = ("time", "data_time", "step_time", "memory_gib")
TORCHRUN = ("--standalone", "--nproc_per_node=2", "--max-restarts=3")
# What every forked process would import for itself; spconv alone takes 10 s.
LAZY_IMPORTS = (
    "nuscenes.eval.detection.evaluate",
    "spconv.pytorch",
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
    "torch._dynamo",
)


def preload() -> None:
    """Import once what every forked process would import for itself."""
    for name in LAZY_IMPORTS:
        importlib.import_module(name)


def make_world(folder: Path) -> World:
    """The world of the end-to-end tests in a folder of its own."""
    generate_world(folder / "world", world_settings(), progress=False)
    settings = (*SMALL, *SETTINGS, f"data.root={folder / 'world'}", f"data.index_dir={folder / 'index'}")
    return World(folder / "world", settings)


def start(world: World, work_dir: Path, *settings: str, prepare: Callable[[], None] = lambda: None) -> int:
    """Fork a process that trains or resumes; returns its id. A fork saves the time that the imports take.

    Args:
        prepare: called in the new process before the training.
    """

    def run() -> int:
        sys.argv = command_line(world, work_dir, *TWO_PASSES, *settings)
        prepare()
        return train_script.main()

    return fork(run, work_dir)


def start_plain(world: World, work_dir: Path) -> int:
    """Start ``python train.py``; returns the id of the process."""
    command = [sys.executable, str(REPOSITORY / "train.py"), *command_line(world, work_dir, *TWO_PASSES)[1:]]
    return fork(functools.partial(os.execve, sys.executable, command, one_thread()), work_dir)


def start_torchrun(world: World, work_dir: Path, watch: Watch) -> int:
    """Start the command torchrun with two processes that announce their phases; returns the id of torchrun."""
    module = "tests.e2e.faults.kill_worker"
    command = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN, "-m", module]
    command += command_line(world, work_dir, resumes=False)[1:]
    environment = one_thread() | {WATCH_VARIABLE: str(watch.path)}
    return fork(functools.partial(os.execve, sys.executable, command, environment), work_dir)


def start_forking_torchrun(world: World, work_dir: Path, watch: Watch) -> int:
    """As :func:`start_torchrun`, but torchrun and its processes are forks of this one: seconds instead of a minute."""

    def train(*_) -> None:
        sys.argv = command_line(world, work_dir, resumes=False)
        watch.install()
        if status := train_script.main():
            sys.exit(status)

    def run() -> int:
        launch = torchrun.elastic_launch
        torchrun.elastic_launch = lambda config, entrypoint: launch(config, train)
        torchrun.run(torchrun.parse_args([*TORCHRUN, "--start-method=fork", "train.py"]))
        return 0

    return fork(run, work_dir)


def command_line(world: World, work_dir: Path, *settings: str, resumes: bool = True) -> list[str]:
    """What a user would type, so that a restarted run resumes; under torchrun it does so by itself."""
    resume = ("--resume",) if resumes else ()
    return ["train.py", *world.arguments("--work-dir", str(work_dir), *resume, settings=settings)]


def fork(run: Callable[[], int], work_dir: Path) -> int:
    """Fork a process with the exit status ``run()`` and its output in ``work_dir``.out; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        output = os.open(f"{work_dir}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout.reconfigure(line_buffering=True)
        status = run()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def wait(process: int) -> int:
    """Exit status of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def finish(world: World, work_dir: Path, whole: Path) -> bool:
    """Resume a killed run; whether it ends like the uninterrupted one."""
    return wait(start(world, work_dir)) == 0 and is_same_run(work_dir, whole)


def is_same_run(work_dir: Path, whole: Path) -> bool:
    """Whether two runs left the same checkpoint, to the last bit, and the same numbers in their logs."""
    return same(*map(state, (work_dir, whole))) and log_values(work_dir) == log_values(whole)


def state(work_dir: Path) -> dict:
    """What must be equal in latest.pt."""
    content = torch.load(work_dir / "latest.pt", weights_only=True)
    return {part: content[part] for part in PARTS}


def log_values(work_dir: Path) -> list[dict]:
    """The training steps of a log, then its evaluations, without what is measured."""
    lines = [line for kind in ("train", "eval") for line in read_lines(work_dir / "log.jsonl", kind)]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def reached_step(work_dir: Path) -> int:
    """Step of the checkpoint that a run resumes from, 0 without one."""
    return state(work_dir)["step"] if (work_dir / "latest.pt").exists() else 0


def same(left, right) -> bool:
    """Whether two trees of tensors and values are equal to the last bit."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right

"""kill -9 of trainings on the CPU: whatever the moment, the resumed run ends with the weights of an uninterrupted one.

    python -m tests.e2e.faults.kill --moments 50 --torchrun-moments 10

Three tables: random moments of one process, every file operation of the saves of one process, and random moments of
one of two processes under torchrun with --max-restarts. Exit status 1 if one of them differs.
"""

import argparse
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import train as train_script
from cmt_aqr.synthetic import generate_world
from tests.e2e.conftest import SMALL, World, one_thread, world_settings

SEED = 2026
# Four epochs of three steps, saved and pruned after each, evaluated after the second and the fourth.
SETTINGS = ("training.epochs=4", "training.keep_checkpoints=1", "evaluation.num_pictures=0")
PARTS = ("model", "optimizer", "scaler", "step")


def preload() -> None:
    """Import once what every forked process would import for itself."""
    for name in (
        "nuscenes.eval.detection.evaluate",
        "tensorboard.compat.proto.event_pb2",
        "tensorboard.summary.writer.record_writer",
        "torch._dynamo",
    ):
        importlib.import_module(name)


def make_world(folder: Path) -> World:
    """The world of the end-to-end tests in a folder of its own."""
    generate_world(folder / "world", world_settings(), progress=False)
    settings = (*SMALL, *SETTINGS, f"data.root={folder / 'world'}", f"data.index_dir={folder / 'index'}")
    return World(folder / "world", settings)


def start(world: World, work_dir: Path, *settings: str, prepare: Callable[[], None] = lambda: None) -> int:
    """Fork a process that trains or resumes; returns its id. A fork saves the seconds that importing PyTorch takes.

    Args:
        prepare: called in the new process before the training.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        output = os.open(f"{work_dir}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["train.py", *world.arguments("--work-dir", str(work_dir), "--resume", settings=settings)]
        prepare()
        status = train_script.main()
    finally:
        os._exit(status)


def wait(process: int) -> int:
    """Exit status of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def state(work_dir: Path) -> dict:
    """What must be equal in latest.pt."""
    content = torch.load(work_dir / "latest.pt", weights_only=True)
    return {part: content[part] for part in PARTS}


def same(left, right) -> bool:
    """Whether two trees of tensors and values are equal to the last bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def finish(world: World, work_dir: Path, reference: dict) -> bool:
    """Resume a killed run; whether it ends like the reference."""
    status = wait(start(world, work_dir))
    return status == 0 and same(state(work_dir), reference)


def at_random_moments(world: World, folder: Path, moments: int) -> int:
    """Number of runs that were killed after a random time and ended like an uninterrupted one."""
    begin = time.monotonic()
    assert wait(start(world, folder / "whole")) == 0, (folder / "whole.out").read_text()
    duration = time.monotonic() - begin
    reference, rng, good = state(folder / "whole"), random.Random(SEED), 0
    print(f"an uninterrupted run takes {duration:.1f} s and {reference['step']} steps")
    for moment in range(moments):
        work_dir, delay = folder / f"moment_{moment}", rng.uniform(0, duration)
        workers = int(moment % 5 == 4)  # some runs leave an orphaned data worker behind
        process = start(world, work_dir, f"data.workers={workers}")
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        status = wait(process)
        reached = state(work_dir)["step"] if (work_dir / "latest.pt").exists() else 0
        is_good = finish(world, work_dir, reference)
        good += is_good
        end = "killed" if status == -signal.SIGKILL else f"had ended with status {status}"
        print(
            f"moment {moment}: {delay:.2f} s, {workers} workers, {end}, resumed at step {reached}: {verdict(is_good)}"
        )
        clean(work_dir, is_good)
    return good


def at_file_operations(world: World, folder: Path) -> tuple[int, int]:
    """Runs killed right before each file operation of the checkpoints: (ended like the reference, all)."""
    reference, good, count = state(folder / "whole"), 0, 0
    while True:
        work_dir = folder / f"operation_{count}"
        status = wait(start(world, work_dir, prepare=partial(kill_before_operation, count)))
        if status == 0:  # the run has no more operations
            clean(work_dir, True)
            return good, count
        reached = state(work_dir)["step"] if (work_dir / "latest.pt").exists() else 0
        operation = Path(f"{work_dir}.out").read_text().splitlines()[-1]
        is_good = status == -signal.SIGKILL and finish(world, work_dir, reference)
        good, count = good + is_good, count + 1
        print(f"before {operation}, resumed at step {reached}: {verdict(is_good)}")
        clean(work_dir, is_good)


def kill_before_operation(number: int) -> None:
    """Make this process kill itself before the file operation of this number on a checkpoint."""
    seen = 0

    def watch(module, name: str, kind: str, path_of: Callable, leave: Callable = lambda *arguments: None) -> None:
        """Count the calls of a function on checkpoints; before the chosen one, ``leave`` something and end."""
        original = getattr(module, name)

        def watched(*arguments, **options):
            nonlocal seen
            path = str(path_of(*arguments))
            if ".pt" in path:
                if seen == number:
                    leave(*arguments)
                    print(f"\n{kind} {Path(path).name}", flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1
            return original(*arguments, **options)

        setattr(module, name, watched)

    def leave_half(_, writer) -> None:
        writer._file.write(b"PK half of a checkpoint")
        writer.flush()

    watch(torch, "save", "the second half of", lambda _, writer: writer._file.name, leave_half)
    watch(os, "fsync", "fsync of", path_of_descriptor)
    watch(os, "replace", "renaming to", lambda source, target: target)
    watch(Path, "unlink", "removing", lambda path, **_: path)


def path_of_descriptor(file) -> str:
    """Path of an open file or its number."""
    return os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")


def under_torchrun(world: World, folder: Path, moments: int) -> int:
    """Runs of two processes of which one was killed; torchrun restarts both. Number that ended like the reference."""
    rng, good = random.Random(SEED + 1), 0
    begin = time.monotonic()
    assert torchrun(world, folder / "whole_2").wait() == 0, (folder / "whole_2.out").read_text()
    duration, reference = time.monotonic() - begin, state(folder / "whole_2")
    print(f"two processes: an uninterrupted run takes {duration:.1f} s")
    for moment in range(moments):
        work_dir, delay, victim = folder / f"torchrun_{moment}", rng.uniform(0.2, 0.95) * duration, rng.randrange(2)
        launcher = torchrun(world, work_dir)
        time.sleep(delay)
        children = sorted(children_of(launcher.pid))
        if len(children) > victim:
            os.kill(children[victim], signal.SIGKILL)
        reached = state(work_dir)["step"] if (work_dir / "latest.pt").exists() else 0
        is_good = launcher.wait() == 0 and same(state(work_dir), reference)
        good += is_good
        end = f"process {victim} killed" if len(children) > victim else "had ended"
        print(f"moment {moment}: {delay:.1f} s, {end}, restarted at step {reached}: {verdict(is_good)}")
        clean(work_dir, is_good)
    return good


def torchrun(world: World, work_dir: Path) -> subprocess.Popen:
    """Start two processes that torchrun starts again when one dies."""
    command = world.command("train.py", "--work-dir", str(work_dir), "--resume", processes=2)
    command.insert(command.index("--standalone"), "--max-restarts=3")
    with open(f"{work_dir}.out", "w") as output:
        return subprocess.Popen(command, env=one_thread(), stdout=output, stderr=output)


def children_of(parent: int) -> list[int]:
    """Ids of the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def verdict(is_good: bool) -> str:
    """One word for a table."""
    return "identical" if is_good else "DIFFERENT"


def clean(work_dir: Path, is_good: bool) -> None:
    """Remove a run that ended well; others stay for inspection."""
    if is_good:
        shutil.rmtree(work_dir, ignore_errors=True)
        Path(f"{work_dir}.out").unlink(missing_ok=True)


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=50, help="random moments of one process")
    parser.add_argument("--torchrun-moments", type=int, default=0, help="random moments of one of two processes")
    parser.add_argument("--folder", type=Path, help="where runs go (default: a temporary folder)")
    arguments = parser.parse_args()
    os.environ.update(one_thread())
    torch.set_num_threads(1)
    preload()
    sys.stdout.reconfigure(line_buffering=True)
    folder = Path(tempfile.mkdtemp(prefix="kill_", dir=arguments.folder))
    world = make_world(folder)
    results = {"random moments": (at_random_moments(world, folder, arguments.moments), arguments.moments)}
    results["file operations of the saves"] = at_file_operations(world, folder)
    if arguments.torchrun_moments:
        good = under_torchrun(world, folder, arguments.torchrun_moments)
        results["random moments, two processes"] = good, arguments.torchrun_moments
    for name, (good, count) in results.items():
        print(f"{name}: {good} of {count} identical")
    is_good = all(good == count for good, count in results.values())
    clean(folder, is_good)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Trainings with two processes of which the second one meets something that is not finite in step 4.

    python -m tests.e2e.faults.failing_rank FOLDER <arguments of train.py>

Runs all cases and writes, for each of them, FOLDER/<case>.json: the exit statuses, the seconds that the last process
took to end after the first, and whether the weights of both stayed as they were. FOLDER/<case>/ is the work dir,
<case>.<rank>.out and .err hold what the processes printed.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

import torch

import train as train_script
from cmt_aqr.losses import matcher
from tests.e2e.faults.kill_runs import preload

CASES = ("gradient", "loss", "matching")
STEP = 4
MATCHING_ERROR = (
    "the matching cost of decoder layer 0, sample 0, task 0 is not finite: "
    "the network's output or the boxes contain NaN or infinity"
)


def install(case: str) -> None:
    """Make this process fail in its step 4."""
    compute, costs = train_script.compute_losses, matcher.matching_costs
    current = []

    def failing_losses(run, batch):
        current[:] = [run.step]
        terms, metrics = compute(run, batch)
        if run.step == STEP and case == "gradient":
            terms["loss_bbox"] = terms["loss_bbox"] + torch.sqrt(terms["loss_bbox"] * 0)
        if run.step == STEP and case == "loss":
            terms["loss_bbox"] = terms["loss_bbox"] * torch.inf
        return terms, metrics

    def failing_costs(*arguments, **options):
        found = costs(*arguments, **options)
        return found * torch.nan if current == [STEP] and case == "matching" else found

    train_script.compute_losses, matcher.matching_costs = failing_losses, failing_costs


def compare_weights(report: Path) -> None:
    """Write to ``report`` whether a step that is stopped leaves the weights of this process as they were before it."""
    step, stop = train_script.train_step, train_script.stop_at_failed_step
    before = []

    def watched_step(run, batch):
        before[:] = [parameter.detach().clone() for parameter in run.model.parameters()]
        return step(run, batch)

    def watched_stop(run, *arguments):
        is_untouched = all(map(torch.equal, before, run.model.parameters()))
        report.write_text(json.dumps(is_untouched))
        stop(run, *arguments)

    train_script.train_step, train_script.stop_at_failed_step = watched_step, watched_stop


def start(rank: int, port: int, case: str, folder: Path, arguments: list[str]) -> int:
    """Fork one of the two processes; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for descriptor, ending in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{case}.{rank}.{ending}", os.O_WRONLY | os.O_CREAT), descriptor)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(port)
        sys.argv = ["train.py", f"--work-dir={folder / case}", *arguments]
        compare_weights(folder / f"{case}.{rank}.untouched")
        if rank == 1:
            install(case)
        status = train_script.main()
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdout.flush()
        os._exit(status)


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    """Run all cases."""
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    preload()
    for case in CASES:
        port = free_port()
        ranks = [start(rank, port, case, folder, arguments) for rank in range(2)]
        statuses, ends = {}, []
        for _ in ranks:
            process, status = os.wait()
            statuses[ranks.index(process)] = os.waitstatus_to_exitcode(status)
            ends.append(time.monotonic())
        untouched = [json.loads((folder / f"{case}.{rank}.untouched").read_text()) for rank in range(2)]
        result = {"statuses": [statuses[0], statuses[1]], "seconds": ends[1] - ends[0], "untouched": untouched}
        (folder / f"{case}.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A training step that cannot be applied: its report, what is kept of it, and its replay.

``failed_step_N.pt`` holds the batches of all processes and the weights before the step; it is loaded without running
code from it.
"""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from cmt_aqr.boxes import Targets
from cmt_aqr.data.sample import Batch
from cmt_aqr.errors import UserError, describe_os_error
from cmt_aqr.files import atomic_path
from cmt_aqr.losses.criterion import total_loss
from cmt_aqr.losses.matcher import NonFiniteError
from cmt_aqr.run import Run, compute_losses, split_batch
from cmt_aqr.training.checkpoint_checks import CheckpointError, find_non_finite
from cmt_aqr.training.distributed import RankInfo, any_process, gather, leave_after_main
from cmt_aqr.training.optim import set_training_mode
from cmt_aqr.training.run_folder import LATEST

FORMAT = "cmt_aqr failed step 1"
NUM_SHOWN = 5


class TrainingStopped(UserError):
    """The run cannot continue: a loss or a gradient is not finite."""


def stop_at_failed_step(run: Run, batch: Batch, reason: str | None, terms: dict[str, Tensor]) -> NoReturn:
    """Keep the batch of a step that was not applied and end the run; to be called in all processes.

    Args:
        batch: of this process.
        reason: what is not finite in this process, with its value; None where all is finite, but not in another one.
        terms: loss terms of this process; empty where there is no loss.

    Raises:
        TrainingStopped: in the main process; names the step, the samples, the terms, the checkpoint that is whole, and
            the command that replays the step.
        SystemExit: in the others.
    """
    batches = gather([asdict(batch.to("cpu"))])
    reasons = gather([reason])
    path = run.work_dir / f"failed_step_{run.step}.pt"
    facts = [
        f"step {run.step}: {describe_reasons(reasons)}",
        "samples " + ", ".join(token for one in batches for token in one["tokens"]),
    ]
    if terms:
        facts.append(", ".join(f"{name} {value.item():.4g}" for name, value in terms.items()))
    if run.rank_info.is_main:
        facts += ["the step was not applied", describe_whole_checkpoint(run)]
        state = {"format": FORMAT, "step": run.step, "batches": batches, "model": run.model.state_dict()}
        try:
            with atomic_path(path) as partial:
                torch.save(state, partial)
            facts.append(f"replay it with {replay_command(run.work_dir, path)}")
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            facts.append(f"{path} could not be written: {str(error).splitlines()[0]}")
    any_process(False)  # no process exits before the file is written
    if not run.rank_info.is_main:
        leave_after_main()
    raise TrainingStopped("; ".join(facts))


def describe_reasons(reasons: list[str | None]) -> str:
    """What the processes found: once where all found the same, else for each process that found something."""
    if reasons[0] is not None and len(set(reasons)) == 1:
        return reasons[0]
    return ", ".join(f"{reason} in process {rank}" for rank, reason in enumerate(reasons) if reason is not None)


def describe_whole_checkpoint(run: Run) -> str:
    """Which checkpoint a run can be resumed from."""
    if run.saved_step is None:
        return "no checkpoint was saved yet"
    return f"{run.work_dir / LATEST} (step {run.saved_step}) is whole"


def replay_command(work_dir: Path, path: Path) -> str:
    """Command line that replays a failed step."""
    config = work_dir / "config.yaml"
    return shlex.join(["python", "train.py", str(config), "--work-dir", str(work_dir), "--replay", str(path)])


def replay(run: Run, path: Path) -> NoReturn:
    """Run the forward and backward pass of a failed step once more and print what is not finite.

    The weights are those before the step. The processes' batches are run one after the other; with several processes
    a loss is then normalised by its own batch instead of by the mean over the processes.

    Raises:
        TrainingStopped: always; whether the step fails again.
        CheckpointError: the file cannot be read or belongs to another model.
    """
    state = read_failed_step(path)
    try:
        run.model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit this model: {str(error).splitlines()[-1].strip()}") from None
    run.step = state["step"]
    world_size = len(state["batches"])
    is_finite = True
    for rank, content in enumerate(state["batches"]):
        run.rank_info = RankInfo(rank, world_size, run.rank_info.device)
        batch = Batch(**content | {"targets": [Targets(**target) for target in content["targets"]]})
        print(f"step {run.step}, process {rank} of {world_size}, samples {', '.join(batch.tokens)}")
        is_finite &= replay_batch(run, batch)
    outcome = "everything is finite this time" if is_finite else "it fails again, see above"
    raise TrainingStopped(f"{path}: step {run.step} was replayed: {outcome}")


def read_failed_step(path: Path) -> dict[str, Any]:
    """Content of a failed_step_N.pt; CheckpointError where the file is missing, damaged or something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(describe_os_error(error)) from None
    except Exception as error:  # torch reports damage as RuntimeError, EOFError, KeyError or UnpicklingError
        raise CheckpointError(f"{path}: damaged: {str(error).splitlines()[0]}") from None
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != FORMAT:
        raise CheckpointError(f"{path}: not a failed_step_N.pt (format: {found!r}, expected {FORMAT!r})")
    return state


def replay_batch(run: Run, batch: Batch) -> bool:
    """Forward and backward pass of one batch; prints terms, norm and names, returns whether all of it is finite."""
    training = run.config.training
    set_training_mode(run.model, (*training.freeze, *training.norm_eval))
    weights = find_non_finite(run.model.state_dict())[0]
    print(f"  weights that are not finite: {first(weights)}")
    run.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    parts = split_batch(run, batch)
    for part in parts:
        try:
            terms, _ = compute_losses(run, part)
        except NonFiniteError as error:
            print(f"  {error}")
            return False
        run.scaler.scale(total_loss(terms) / len(parts)).backward()
        sums = {name: sums.get(name, 0) + value.detach() / len(parts) for name, value in terms.items()}
    for name, value in sums.items():
        print(f"  {name} {value.item():.6g}")
    run.scaler.unscale_(run.optimizer)
    gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    norm = nn.utils.get_total_norm(list(gradients.values()))
    print(f"  gradient norm {norm.item():.6g}")
    names = find_non_finite(gradients)[0]
    print(f"  gradients that are not finite: {first(names)}")
    return bool(norm.isfinite()) and not weights


def first(names: list[str]) -> str:
    """The first names, for a message."""
    if not names:
        return "none"
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(names[:NUM_SHOWN]) + more

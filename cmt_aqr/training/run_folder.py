"""The folder of a run: whether it may be used, what a checkpoint of it holds, which ones are kept."""

import re
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from cmt_aqr.config import Config, to_tree
from cmt_aqr.strict_yaml import differences
from cmt_aqr.training.checkpoint import CheckpointError, load_checkpoint, load_into, save_checkpoint

LATEST = "latest.pt"
# What a checkpoint must hold for a run to go on from it.
RUN_STATE = ("config", "model", "optimizer", "scaler", "step")
# Keys of the model that are a matter of speed and memory.
SPEED = ("model.attention", "model.activation_checkpointing", "model.camera.activation_checkpointing")
# Keys that may change when a run goes on: where things are, how often to look, how fast; not what is learnt.
MAY_CHANGE = (
    *SPEED, "name", "data.root", "data.index_dir", "data.workers", "data.val_split", "data.synthetic.workers",
    "evaluation", "training.eval_every", "training.init_from", "training.keep_checkpoints", "training.log_every",
    "training.save_every",
)  # fmt: skip


def find_checkpoint(work_dir: Path, config: Config, *, resume: bool, overwrite: bool) -> dict | None:
    """The checkpoint to go on from, or None for a new run; refuses to mix two runs in one folder."""
    latest = work_dir / LATEST
    if not latest.exists():
        return None
    if overwrite and not resume:
        return None
    state = load_checkpoint(latest)
    if not resume:
        raise CheckpointError(
            f"{latest}: this work dir holds a run at step {state['step']}; --resume goes on with it, --overwrite "
            "starts anew, --work-dir names another folder"
        )
    if lost := [key for key in RUN_STATE if key not in state]:
        raise CheckpointError(f"{latest}: weights only, without {', '.join(lost)}: a run cannot go on from it")
    changed = [
        change
        for change in differences(state["config"], to_tree(config))
        if not re.match(rf"({'|'.join(map(re.escape, MAY_CHANGE))})[.:]", change)
    ]
    if changed:
        raise CheckpointError(
            f"{latest}: the run was started with other settings: {'; '.join(changed[:3])} (checkpoint against now)"
        )
    return state


def remove_run(work_dir: Path) -> None:
    """Remove the checkpoints and evaluations of the run that is overwritten; its log is kept under another name."""
    for path in (work_dir / LATEST, *work_dir.glob("epoch_*.pt")):
        path.unlink(missing_ok=True)
    shutil.rmtree(work_dir / "eval", ignore_errors=True)


def make_work_dir(work_dir: Path) -> None:
    """Make the folder, and try to write there: better now than after the first epoch."""
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=work_dir):
            pass
    except OSError as error:
        raise CheckpointError(f"--work-dir {work_dir}: cannot be written: {error.strerror}") from None


def save(work_dir: Path, config: Config, model, optimizer, scaler, step: int, steps_per_epoch: int) -> None:
    """Write latest.pt and, at the end of an epoch, epoch_N.pt; remove epochs beyond the number to keep."""
    state = {
        "config": to_tree(config),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "step": step,
    }
    if step % steps_per_epoch == 0:  # before latest.pt: a run killed in between does the epoch again
        weights = {"config": state["config"], "model": state["model"]}
        save_checkpoint(work_dir / f"epoch_{step // steps_per_epoch}.pt", weights)
    save_checkpoint(work_dir / LATEST, state)
    kept = sorted(work_dir.glob("epoch_*.pt"), key=lambda path: int(path.stem.removeprefix("epoch_")))
    for path in kept[: -config.training.keep_checkpoints]:
        path.unlink()


def restore(state: dict, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
    """Load a checkpoint into everything that it holds; returns the number of finished steps."""
    load_into(model, state["model"], LATEST)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state["step"]

"""The folder of a run: whether it may be used, what a checkpoint of it holds, which ones are kept."""

import re
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from cmt_aqr.config import Config, to_tree
from cmt_aqr.strict_yaml import differences
from cmt_aqr.training.checkpoint import load_checkpoint, load_into, save_checkpoint
from cmt_aqr.training.checkpoint_checks import CheckpointError, check_optimizer, check_scaler, check_step

LATEST = "latest.pt"
EVALUATIONS = "eval"
# Names of what a run writes; everything else in a work dir is the user's.
EPOCH = re.compile(r"epoch_(0|[1-9][0-9]*)")
EVALUATION_FILES = re.compile(r"submission\.json|metrics\.json|\.(submission|metrics)\.json\.part")
PICTURES = "pictures"
PAGE_FILE = "report.html"
PICTURE_FILES = re.compile(r"[0-9]{2,}_[^/]{1,16}\.jpg")
# What a checkpoint must hold for a run to resume from it.
RUN_STATE = ("config", "model", "optimizer", "scaler", "step")
# Keys of the model that are a matter of speed and memory.
SPEED = (
    "model.attention", "model.activation_checkpointing", "model.camera.activation_checkpointing",
    "model.lidar.sparse_backend",
)  # fmt: skip
# Keys that may change when a run resumes: paths, how often to evaluate, how fast; not what is learned.
MAY_CHANGE = (
    *SPEED, "name", "data.root", "data.index_dir", "data.workers", "data.val_split", "data.synthetic.workers",
    "evaluation", "training.accumulation", "training.compile", "training.eval_every", "training.init_from",
    "training.keep_checkpoints", "training.log_every", "training.save_every",
)  # fmt: skip


def find_checkpoint(work_dir: Path, config: Config, *, resume: bool, overwrite: bool) -> dict | None:
    """The checkpoint to resume from, or None for a new run; refuses to mix two runs in one folder.

    Raises:
        CheckpointError: latest.pt is damaged or holds no run, or one that was started with other settings.
    """
    latest = work_dir / LATEST
    if not latest.exists():
        return None
    if overwrite and not resume:
        return None
    state = _load_latest(latest)
    if not resume:
        at_step = f" at step {state['step']}" if "step" in state else ""
        raise CheckpointError(
            f"{latest}: this work dir holds a run{at_step}; --resume continues it, --overwrite starts anew, "
            "--work-dir names another folder"
        )
    needed = (*RUN_STATE, *(("ema",) if config.training.ema_decay is not None else ()))
    if missing := [key for key in needed if key not in state]:
        raise CheckpointError(f"{latest}: weights only, without {', '.join(missing)}: a run cannot resume from it")
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


def _load_latest(latest: Path) -> dict:
    """load_checkpoint, whose error names the newest weights beside the damaged file."""
    try:
        return load_checkpoint(latest)
    except CheckpointError as error:
        epochs = epoch_checkpoints(latest.parent)
        if not epochs:
            raise
        newest = epochs[max(epochs)]
        raise CheckpointError(f"{error}; training.init_from={newest} starts a new run from its weights") from None


def epoch_checkpoints(work_dir: Path) -> dict[int, Path]:
    """Number of the epoch -> its checkpoint; names such as epoch_best.pt are the user's and left out."""
    found = {}
    for path in work_dir.glob("epoch_*.pt"):
        if (match := EPOCH.fullmatch(path.stem)) and path.is_file():
            found[int(match[1])] = path
    return found


def remove_run(work_dir: Path) -> None:
    """Remove the checkpoints and evaluations of the run that is overwritten; its log is kept under another name.

    Files that no run writes stay, and so do the folders that hold them.
    """
    for path in (work_dir / LATEST, work_dir / PAGE_FILE, *epoch_checkpoints(work_dir).values()):
        path.unlink(missing_ok=True)
    evaluations = work_dir / EVALUATIONS
    for folder in evaluations.glob("epoch_*"):
        if EPOCH.fullmatch(folder.name):
            remove_pictures(folder)
            _remove_files(folder, EVALUATION_FILES)
    _remove_files(evaluations, None)


def remove_pictures(folder: Path) -> None:
    """Remove the pictures of an earlier evaluation in this folder."""
    _remove_files(folder / PICTURES, PICTURE_FILES)


def _remove_files(folder: Path, names: re.Pattern | None) -> None:
    """Remove the files of these names, then the folder if it is empty."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if names is not None and names.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def make_work_dir(work_dir: Path) -> None:
    """Make the folder, and try to write there, so that an error does not wait until the end of the first epoch."""
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=work_dir):
            pass
    except OSError as error:
        raise CheckpointError(f"--work-dir {work_dir}: cannot be written: {error.strerror}") from None


def save(
    work_dir: Path, config: Config, model, optimizer, scaler, step: int, steps_per_epoch: int, average=None
) -> None:
    """Write latest.pt and, at the end of an epoch, epoch_N.pt; remove epochs beyond the number to keep.

    ``average``, the model with the running average of the weights, is saved instead of ``model`` in epoch_N.pt.
    """
    state = {
        "config": to_tree(config),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "step": step,
    }
    if average is not None:
        state["ema"] = average.state_dict()
    epoch, rest = divmod(step, steps_per_epoch)
    if rest == 0:  # before latest.pt: a run killed in between does the epoch again
        weights = {"config": state["config"], "model": state.get("ema", state["model"])}
        save_checkpoint(work_dir / f"epoch_{epoch}.pt", weights, previous=work_dir / LATEST)
    save_checkpoint(work_dir / LATEST, state)
    # A later epoch than this one is not of this run.
    kept = sorted((number, path) for number, path in epoch_checkpoints(work_dir).items() if number <= epoch)
    for _, path in kept[: -config.training.keep_checkpoints]:
        path.unlink(missing_ok=True)


def restore(
    state: dict,
    source: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: AveragedModel | None = None,
    *,
    total_steps: int,
) -> int:
    """Load a checkpoint into everything that it holds.

    Args:
        state: what :func:`find_checkpoint` gave.
        source: its file, for messages.
        average: of the weights, where the run keeps one.
        total_steps: steps of the whole run.

    Returns:
        The number of finished steps.

    Raises:
        CheckpointError: a part is of another model or optimizer, malformed, or not finite.
    """
    step = state["step"]
    check_step(step, str(source), total_steps)
    check_optimizer(state["optimizer"], optimizer, step, str(source))
    check_scaler(state["scaler"], scaler, str(source))
    load_into(model, state["model"], source)
    # The groups' settings follow from the configuration and the step, and differ between versions of PyTorch.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
    scaler.load_state_dict(state["scaler"])
    if average is not None:
        load_into(average.module, state["ema"], f"{source}: ema")
        average.n_averaged.fill_(step)
    return step

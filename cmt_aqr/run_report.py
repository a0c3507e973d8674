"""What a training run prints and logs: how it starts, a line for a step, where its results are."""

import torch
from torch import Tensor

from cmt_aqr.build import count_parameters
from cmt_aqr.evaluation.nuscenes_eval import METRICS_FILE
from cmt_aqr.run import Run, is_compiled, write_config
from cmt_aqr.training.distributed import reduce_mean
from cmt_aqr.training.logs import RunLog, read_log
from cmt_aqr.training.run_folder import LATEST, PAGE_FILE


def describe_results(run: Run, log: RunLog) -> str:
    """Where a finished run has left its results; empty in a process that is not the main one."""
    if not run.rank_info.is_main:
        return ""
    rows = [("weights", str(run.work_dir / LATEST))]
    evaluations = [line for line in read_log(log.path) if line["kind"] == "eval" and "error" not in line]
    if evaluations:
        last = evaluations[-1]
        folder = run.work_dir / "eval" / f"epoch_{last['epoch']}"
        rows.append(("scores", f"{folder / METRICS_FILE} (mAP {last['mAP']:.4f}, NDS {last['NDS']:.4f})"))
        places = {"pictures": folder / "pictures", "page": run.work_dir / PAGE_FILE}
        rows += [(name, str(path)) for name, path in places.items() if path.exists()]
    rows.append(("log", str(log.path)))
    return "\n".join(["finished", *(f"  {name:<8}  {place}" for name, place in rows)])


def log_step(run: Run, log: RunLog, metrics: dict[str, Tensor | float]) -> None:
    """One line of the log; tensors are averaged over the processes."""
    tensors = {name: value.double() for name, value in metrics.items() if isinstance(value, Tensor)}
    means = reduce_mean(torch.stack(list(tensors.values()))).tolist()
    values = metrics | dict(zip(tensors, means, strict=True))
    values["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    if run.scaler.is_enabled():
        values["skipped_steps"] = run.skipped_steps
        run.skipped_steps = 0
    log.record("train", run.step, epoch=run.step / run.steps_per_epoch, **values)


def describe(run: Run, log: RunLog, notes: list[str]) -> None:
    """Tell what is about to happen, and keep the resolved configuration."""
    config, rank_info = run.config, run.rank_info
    if rank_info.is_main:
        write_config(run.work_dir, config)
    log.print(
        f"{config.name}: {count_parameters(run.model) / 1e6:.1f} M parameters, "
        f"{rank_info.world_size} x {rank_info.device.type}, {config.training.precision}, "
        f"{config.training.epochs} epochs of {run.steps_per_epoch} steps, results in {run.work_dir}"
    )
    if run.model.lidar_branch is not None:
        log.print(run.model.lidar_branch.encoder.describe(rank_info.device))
    if run.model.aqr is not None:
        log.print(run.model.aqr.describe(rank_info.device))
    if is_compiled(config, rank_info.device):
        log.print("compiling in the first step, a minute or more (training.compile)")
    if run.step:
        log.print(f"resuming after step {run.step}")
    for note in notes:
        log.print(note)

"""One process or many: the only module that uses ``torch.distributed``.

Every function also works, without any set-up, in a single process.
"""

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cmt_aqr.config import ConfigError
from cmt_aqr.devices import choose_device
from cmt_aqr.errors import UserError

# How long a process waits for another: the first one may be writing indices and object databases meanwhile.
TIMEOUT = timedelta(hours=3)
# How long the processes wait for each other at the start.
JOIN_TIMEOUT = timedelta(minutes=5)
# torchrun stops all processes as soon as one leaves: seconds in which process 0 can still write what happened.
GRACE = 2.0


class DistributedError(UserError):
    """Another process did not join, or the connection to it was lost."""


@dataclass(frozen=True)
class RankInfo:
    """Who this process is.

    Attributes:
        rank: in [0, world_size).
        world_size: number of processes of the run.
        device: where this process computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0


@contextmanager
def process_group(device: str | None = None, *, advice: str = "start again") -> Iterator[RankInfo]:
    """Join the process group that ``torchrun`` describes in the environment, and leave it at the end.

    Args:
        device: ``cpu`` or ``cuda``; None takes CUDA when there is one. ``nccl`` joins tensors of GPUs, ``gloo`` those
            of hosts: what hosts tell each other does not wait for the GPUs.
        advice: what to do after a lost connection.

    Raises:
        ConfigError: CUDA was asked for and there is none, or there are fewer GPUs than processes on this host.
        DistributedError: a process did not join within JOIN_TIMEOUT, or the connection to one was lost.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _choose_device(device, local_rank)
    if world_size == 1:
        yield RankInfo(0, 1, chosen)
        return
    store = _join(rank, world_size)
    device_id = chosen if chosen.type == "cuda" else None
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=device_id,
        timeout=TIMEOUT,
    )
    try:
        yield RankInfo(rank, world_size, chosen)
        dist.barrier()
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise DistributedError(
            f"process {rank} of {world_size} lost the connection to another process, which was killed or failed; its "
            f"own message, if it left one, is above; {advice}"
        ) from None
    finally:
        dist.destroy_process_group()


def _join(rank: int, world_size: int) -> dist.Store:
    """Meet the other processes at MASTER_ADDR:MASTER_PORT; init_process_group alone would wait for TIMEOUT.

    The store outlives the processes that torchrun starts again: without a prefix of their own they would take the
    addresses of ended processes for those of new ones.
    """
    keys = [f"joined/{each}" for each in range(world_size)]
    missing = ""
    try:
        shared, _, _ = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", shared)
        store.set(keys[rank], "")
        try:
            store.wait(keys, JOIN_TIMEOUT)
        except dist.DistStoreError:
            absent = [str(each) for each, key in enumerate(keys) if not store.check([key])]
            missing = f", process {', '.join(absent)} did not join"
            raise
        return store
    except (dist.DistError, ValueError) as error:
        address = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
        reason = missing or f": {str(error).splitlines()[0].rstrip('.')}"
        raise DistributedError(
            f"process {rank} could not join the {world_size} processes expected at {address} within "
            f"{JOIN_TIMEOUT.total_seconds():.0f} s{reason}; start all of them with the same address, port and "
            "number of processes"
        ) from None


def is_restart() -> bool:
    """Whether ``torchrun --max-restarts`` started this process again, after one of the run's processes had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because of another process; gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def leave_after_main() -> NoReturn:
    """End a process that is not the main one, with exit status 2, after process 0 had time to print the reason."""
    time.sleep(GRACE)
    raise SystemExit(2)


def _choose_device(device: str | None, local_rank: int) -> torch.device:
    chosen = choose_device(device)
    if chosen.type == "cpu":
        return chosen
    if local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(
            [f"process {local_rank} of this host has no GPU: {count} GPUs are visible; lower --nproc_per_node"]
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def wrap(model: nn.Module, rank_info: RankInfo) -> nn.Module:
    """DistributedDataParallel when there are several processes, else the model itself.

    Buffers are not broadcast: each process keeps its own batch-norm statistics while training, as in the original, and
    process 0's go into the checkpoint; :func:`share_buffers` before an evaluation gives them to all.
    """
    if rank_info.world_size == 1:
        return model
    # Warned about weights whose last dimension is 1, for which both layouts are the same.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Its successor does not exist in PyTorch 2.11.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    ids = [rank_info.device.index] if rank_info.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


def gradient_sync(model: nn.Module, *, is_last: bool) -> AbstractContextManager:
    """Around a forward and backward pass of :func:`wrap`'s module: the last one of a step averages over processes."""
    return nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def share_buffers(model: nn.Module) -> None:
    """Copy process 0's buffers (batch-norm statistics) to all processes."""
    if _is_joined():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def reduce_mean(value: Tensor) -> Tensor:
    """Mean of a tensor over the processes; the gradient does not flow through it."""
    if not _is_joined():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def reduce_max(value: int) -> int:
    """Largest of one whole number a process; the hosts exchange it, whatever their GPUs do meanwhile."""
    if not _is_joined():
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def any_process(value: bool) -> bool:
    """True in all processes when it is true in one."""
    return bool(reduce_max(int(value)))


def gather(items: list[Any]) -> list[Any]:
    """Concatenate the lists of all processes, in the order of their ranks; every process gets the whole."""
    if not _is_joined():
        return items
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


@contextmanager
def main_first(rank_info: RankInfo) -> Iterator[None]:
    """Process 0 runs the block, then the others: for files that the first one writes and all read.

    Where process 0 fails, the others exit with status 2 and print nothing: process 0 prints the reason.
    """
    if not rank_info.is_main:
        if any_process(False):
            leave_after_main()
        yield
        return
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # the others may be gone already
            any_process(True)
        raise
    any_process(False)


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()

"""Worker processes that end with this one, however it ends."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing.connection import Connection


def run_jobs(
    function: Callable, jobs: Sequence[tuple], num_workers: int, on_done: Callable[[tuple], None]
) -> dict[tuple, object]:
    """Call a function for every job, in several processes.

    When this process stops, fails or is killed, the workers end at once, in the middle of what they do: the system
    closes the one end of a pipe that only this process holds, and every worker watches the other end.

    Args:
        function: a function of a module; called as ``function(*job)``.
        jobs: arguments, hashable.
        num_workers: processes, started by "spawn".
        on_done: called with each finished job, in this process.

    Returns:
        job -> what the function returned.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a worker was killed. Whatever the function raises, too.
    """
    context = multiprocessing.get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    with watched, held, ProcessPoolExecutor(num_workers, context, _end_with, (watched,)) as pool:
        try:
            futures = _submit(pool, function, jobs)
            for future in as_completed(futures):
                future.result()
                on_done(futures[future])
        except BaseException:
            held.close()
            raise
    return {job: future.result() for future, job in futures.items()}


def _submit(pool: ProcessPoolExecutor, function: Callable, jobs: Sequence[tuple]) -> dict[Future, tuple]:
    """Start all workers and give them the jobs. They must not hear Ctrl-C, which is for this process to act upon."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by what is started now
    try:
        return {pool.submit(function, *job): job for job in jobs}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _end_with(watched: Connection) -> None:
    threading.Thread(target=_wait_and_exit, args=(watched,), daemon=True).start()


def _wait_and_exit(watched: Connection) -> None:
    watched.poll(None)  # nothing is ever sent: it returns when the other end is closed
    os._exit(1)

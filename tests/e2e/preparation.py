"""Time and memory of preparing a data set with as many frames as nuScenes, as a Markdown table.

    python -m cmt_aqr.synthetic /tmp/tables --scenes 700 --val-scenes 150 --samples-per-scene 40 --tables-only
    python -m tests.e2e.preparation /tmp/tables

Each row is measured in a process of its own. A worker's share is the memory that it does not share with the process
that forked it, after it has read 500 frames.
"""

import argparse
import multiprocessing
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from cmt_aqr.config_data_checks import SYNTHETIC_SPLITS, SYNTHETIC_VERSION
from cmt_aqr.data.index import FrameIndex
from cmt_aqr.data.nuscenes import load_index
from cmt_aqr.nuscenes_tables import Tables

MIB = 2**20
NUM_READ = 500


def memory(field: str, process: str = "self") -> float:
    """MiB of a field of /proc/PROCESS/status or smaps_rollup, such as VmHWM or Private_Dirty."""
    file = "smaps_rollup" if field.startswith("Private") else "status"
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{process}/{file}").read_text(), re.M)[1]) / 1024


def open_split(root: Path, cache: Path, split: str, tables: Tables | None = None) -> FrameIndex:
    """The index of a split of the synthetic world."""
    return load_index(dataroot=root, version=SYNTHETIC_VERSION, split=split, cache_dir=cache, tables=tables)


class Frames(Dataset):
    """Reads frames of an index; says how much memory the worker has for itself."""

    def __init__(self, index: FrameIndex):
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> float:
        self.index.frame(item)
        return memory("Private_Dirty")


def build(root: Path, cache: Path) -> list[tuple[str, str]]:
    """Load the tables, build both indices, and read the first one in workers that this process forks."""
    start, tables = time.perf_counter(), Tables(root, SYNTHETIC_VERSION)
    tables.nusc  # noqa: B018
    rows = [
        ("devkit with checked tables", f"{time.perf_counter() - start:.0f} s, {memory('VmHWM'):.0f} MiB at its peak")
    ]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start, before = time.perf_counter(), memory("VmRSS")
    indices = [open_split(root, cache, split, tables) for split in SYNTHETIC_SPLITS]
    seconds, above = time.perf_counter() - start, memory("VmHWM") - before
    size = sum(index.path.stat().st_size for index in indices) / MIB
    count = sum(map(len, indices))
    rows.append(
        (f"index of {count} frames", f"{seconds:.0f} s, {above:.0f} MiB above the devkit, {size:.0f} MiB on disk")
    )
    rows.append(("a worker's share, devkit in memory", f"{share(indices[0]):.0f} MiB"))
    return rows


def share(index: FrameIndex) -> float:
    """MiB of the worker that needs most."""
    torch.set_num_threads(1)
    order = torch.randperm(len(index))[:NUM_READ].tolist()
    return max(map(float, DataLoader(Frames(index), sampler=order, batch_size=None, num_workers=2)))


def reopen(root: Path, cache: Path) -> list[tuple[str, str]]:
    """A second start: open the index, read one frame."""
    start = time.perf_counter()
    index = open_split(root, cache, SYNTHETIC_SPLITS[0])
    index.frame(len(index) // 2)
    rows = [("first frame of a second start", f"{time.perf_counter() - start:.2f} s")]
    rows.append(("a worker's share then", f"{share(index):.0f} MiB"))
    return rows


def in_process(run: Callable, *arguments: Path) -> list[tuple[str, str]]:
    """Call a function in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_call, (run, arguments))


def _call(run: Callable, arguments: tuple[Path, ...]) -> list[tuple[str, str]]:
    multiprocessing.current_process()._config["daemon"] = False  # a pool's process may not fork workers otherwise
    return run(*arguments)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="synthetic world, of tables alone for one of nuScenes' size")
    root = parser.parse_args().root
    cache = Path(tempfile.mkdtemp(prefix="preparation_"))
    try:
        rows = in_process(build, root, cache) + in_process(reopen, root, cache)
    finally:
        shutil.rmtree(cache)
    print("| what | measured |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()

"""Steps of a training in two processes of torchrun; each writes FOLDER/<rank>.json.

torchrun --nproc_per_node=2 -m tests.gpu.two_processes FOLDER [cpu]
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from cmt_aqr.run import build_run
from cmt_aqr.tools.bench_frames import made_up_batch
from cmt_aqr.training.distributed import any_process, gather, process_group, reduce_max
from tests.unit.test_training_compile import settings_of, with_boxes
from train import train_step

BOXES = ((7, 3), (2, 9))  # of the two frames of each process


def main() -> None:
    """Join, train three steps, say what this process has."""
    folder, device = Path(sys.argv[1]), (sys.argv[2:] or ["cuda"])[0]
    with process_group(device) as rank_info:
        config = settings_of("cameras", "training.compile=false")
        config = replace(config, training=replace(config.training, batch_size=4))
        torch.manual_seed(0)
        run = build_run(config, rank_info, folder)
        run.steps_per_epoch = 10
        batch = with_boxes(made_up_batch(config, 2, seed=rank_info.rank), BOXES[rank_info.rank])
        for _ in range(3):
            train_step(run, batch)
        found = {
            "weights": [float(parameter.detach().double().sum()) for parameter in run.model.parameters()],
            "largest": reduce_max(10 + rank_info.rank),
            "any": [any_process(rank_info.rank == 1), any_process(False)],
            "ranks": gather([rank_info.rank]),
            "loss": run.loss,
        }
        (folder / f"{rank_info.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

"""The tiny bundle that comes with the repository: its configuration, and the command that writes it again.

python -m tests.unit.golden.make_tiny
"""

import sys
from pathlib import Path

from cmt_aqr.golden.__main__ import main
from tests.parity.golden import REPOSITORY

FOLDER = Path(__file__).resolve().parent / "tiny"
CONFIG = REPOSITORY / "configs" / "synthetic_tiny.yaml"
# Every number is as small as the stage allows. The BEV grid is not square and covers less than the point range, so that
# rows and columns, and metric and stretched cells, differ.
SETTINGS = (
    "seed=7",
    "model.hidden_dim=16",
    "model.num_queries=20",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.ffn_dim=24",
    "model.depth_bins=4",
    "model.head_channels=8",
    "model.init=official",
    "model.tasks=[[car, truck, construction_vehicle, bus, trailer], "
    "[barrier, motorcycle, bicycle, pedestrian, traffic_cone]]",
    "model.lidar.voxel_size=[2.048, 2.56, 0.8]",
    "model.lidar.sparse_shape=[11, 32, 48]",
    "model.lidar.base_channels=4",
    "model.lidar.encoder_channels=[[6], [8], [8]]",
    "model.lidar.encoder_out_channels=6",
    "model.lidar.second_channels=[8, 8]",
    "model.lidar.neck_channels=[6, 6]",
    "model.camera.input_size=[32, 64]",
    "model.camera.channel_order=bgr",
    "model.camera.mean=[103.53, 116.28, 123.675]",
    "model.camera.std=[57.375, 57.12, 58.395]",
    "model.camera.base_channels=2",
    "model.denoising.num_dn=8",
    "model.denoising.max_groups=2",
    "model.attention.backend=dense",
    "evaluation.max_detections=40",
)


def export_tiny(folder: Path, *more: str) -> int:
    """Write the bundle; returns the exit status."""
    command = ["export", str(CONFIG), str(folder), "--train", "--points", "300", "--boxes", "3", *more]
    return main([*command, "--set", *SETTINGS])


if __name__ == "__main__":
    sys.exit(export_tiny(FOLDER, "--overwrite"))

"""The model and the frame that a bundle is made from."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cmt_aqr.boxes import Targets
from cmt_aqr.build import build_detector, evaluation_dataset
from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.config import Config
from cmt_aqr.data.nuscenes import load_index
from cmt_aqr.data.sample import DataError, collate
from cmt_aqr.golden.stages import Frame
from cmt_aqr.models.detector import Detector
from cmt_aqr.nuscenes_tables import read_splits, read_table
from cmt_aqr.tools.precision_report import make_frame
from cmt_aqr.training.checkpoint import load_into, load_weights

# Standard deviation of what is added to norms and biases of a new detector, so that none of them is 0 or 1.
SPREAD = 0.2
# Standard deviation of the weight generator's last layer times sqrt(C), so that its weights cover [-1, 1].
WEIGHT_SPREAD = 1.0


def load_detector(config: Config, path: str) -> Detector:
    """The detector with the weights of a checkpoint, in evaluation mode.

    Raises:
        CheckpointError: the file cannot be read or belongs to another model.
    """
    detector = build_detector(config.model)
    load_into(detector, load_weights(path), path)
    return detector.eval()


def draw_detector(config: Config, seed: int, frame: Frame) -> Detector:
    """A detector with random weights under which every mistake shows, in evaluation mode.

    Norms and biases are neither 1 nor 0, batch norms have the statistics of the frame, so that values are as large as
    in a trained model, and the weights of AQR differ from query to query.
    """
    torch.manual_seed(seed)
    detector = build_detector(config.model)
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.ndim == 1 and parameter.numel() > 1:
                parameter += SPREAD * torch.randn_like(parameter)
        if detector.aqr is not None:
            nn.init.normal_(detector.aqr.generator.linear.weight, std=WEIGHT_SPREAD / config.model.hidden_dim**0.5)
        settle_norms(detector, frame)
    return detector.eval()


def settle_norms(detector: Detector, frame: Frame) -> None:
    """Give all batch norms the statistics of a frame; they are in the branches and in the shared convolution.

    Computed in float64 and then rounded, so that every machine gives the norms the same numbers. Only the norms are in
    training mode: the sparse encoder stays in evaluation mode, in which it does not depend on spconv.
    """
    detector.double()
    norms = [module for module in detector.eval().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    detector.encode_images(frame.images)
    bev_map = detector.encode_points(frame.points)
    if bev_map is not None:
        detector.shared_conv(bev_map)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    detector.float()


def random_frame(config: Config, *, num_points: int, num_boxes: int) -> Frame:
    """A made-up frame: patches of colour, points around the ground, nuScenes' cameras, random boxes."""
    made = make_frame(config, torch.device("cpu"), num_points=num_points)
    generator = torch.Generator().manual_seed(config.seed)
    low, high = (torch.tensor(config.model.point_range).view(2, 3) * 0.9).unbind()
    centres = low + (high - low) * torch.rand(num_boxes, 3, generator=generator)
    sizes = 0.5 + 4 * torch.rand(num_boxes, 3, generator=generator)
    rest = 6 * torch.rand(num_boxes, 3, generator=generator) - 3  # yaw in radians, velocity in m/s
    labels = torch.randint(len(CLASSES), (num_boxes,), generator=generator)
    targets = Targets(torch.cat((centres, sizes, rest), dim=1), labels)
    return Frame(made.images, made.points, made.lidar2img, [targets])


def read_frame(config: Config, root: Path, token: str | None) -> tuple[Frame, str]:
    """One frame of a nuScenes-format data set as in evaluation, with the boxes of training, and its token.

    Args:
        token: of the sample; None: the first frame of the configuration's val_split, or of any split.

    Raises:
        DataError: there is no such folder or frame.
    """
    version = find_version(root, config.data.version)
    split = find_split(root / version, token, config.data.val_split)
    velocities = config.data.velocity_file
    velocity_file = None if velocities is None or not (root / velocities).is_file() else root / velocities
    with tempfile.TemporaryDirectory() as folder:
        index = load_index(
            dataroot=root,
            version=version,
            split=split,
            cache_dir=folder,
            cameras=CAMERAS,
            velocity_file=velocity_file,
        )
        number = 0 if token is None else index.tokens.index(token)
        sample = evaluation_dataset(config, index)[number]
        targets = index.frame(number).targets(config.data.train_boxes)
    batch = collate([replace(sample, targets=targets)])
    cameras: Tensor | None = batch.lidar2img if batch.images is not None else None
    return Frame(batch.images, batch.points, cameras, batch.targets), batch.tokens[0]


def find_version(root: Path, wanted: str) -> str:
    """Folder of the tables: the configuration's, else the only one there is."""
    found = sorted(path.parent.name for path in root.glob("*/sample.json"))
    if wanted in found:
        return wanted
    if len(found) != 1:
        there = f"has the versions {', '.join(found)}" if found else "has no folder with a sample.json"
        raise DataError(f"--data {root} {there}, data.version is {wanted!r}; use --set data.version=NAME")
    return found[0]


def find_split(folder: Path, token: str | None, preferred: str) -> str:
    """A split that holds the frame of a token; without a token, one that has frames."""
    scenes = {row["token"]: row["name"] for row in read_table(folder / "scene.json")}
    if token is None:
        wanted = set(scenes.values())
    else:
        samples = [row for row in read_table(folder / "sample.json") if row["token"] == token]
        if not samples:
            raise DataError(f"--token {token}: {folder / 'sample.json'} has no sample of this token")
        wanted = {scenes[samples[0]["scene_token"]]}
    splits = read_splits(folder)
    fitting = [name for name in (preferred, *splits) if wanted & set(splits.get(name, ()))]
    if not fitting:
        raise DataError(
            f"{folder}: no split of the devkit or of splits.json has the scenes {', '.join(sorted(wanted))}"
        )
    return fitting[0]

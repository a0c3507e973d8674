"""Arrays in, boxes out: a trained detector for people who have images, points and a calibration, and no data set.

predictor = Predictor.load("runs/synthetic_tiny/latest.pt")
result = predictor(images=images, points=points, lidar2img=lidar2img)
print(result.names, result.scores, result.boxes)
result.draw("detections.jpg")
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from safetensors import safe_open
from torch import Tensor

from cmt_aqr.attention import QueryWindows
from cmt_aqr.build import build_detector, check_device
from cmt_aqr.classes import CAMERAS
from cmt_aqr.config import Config, config_from_tree, load_config, naming_source, to_tree
from cmt_aqr.data.image_transforms import fixed_image_draw, image_matrix, transform_image
from cmt_aqr.devices import choose_device
from cmt_aqr.evaluation.postprocess import class_tables, find_best
from cmt_aqr.found import Found, find_kept, pack
from cmt_aqr.jobs import decoding_of, is_compiled, load_model, make_pipeline
from cmt_aqr.models.detector import Detector
from cmt_aqr.precision import PRECISIONS
from cmt_aqr.predictor_inputs import InputError, check_calibration, check_images, check_points
from cmt_aqr.result import Frame, Result, find_windows
from cmt_aqr.rotations import rotation_matrix
from cmt_aqr.synthetic.calibration import CAMERAS as MOUNTS
from cmt_aqr.synthetic.calibration import FULL_IMAGE_SIZE, LIDAR_ROTATION, LIDAR_TRANSLATION, intrinsic_matrix
from cmt_aqr.training.checkpoint import CheckpointError, load_weights_and_config

FRAME_KEYS = ("images", "points", "lidar2img", "image_size")


@dataclass(frozen=True)
class _Input:
    """One frame as the network reads it, and as the user gave it."""

    images: Tensor | None  # (V, H, W, 3) uint8
    points: Tensor | None  # (P, 5) float32
    lidar2img: Tensor | None  # (V, 4, 4) float64, to pixels of `images`
    frame: Frame


class Predictor:
    """A detector with its weights; make one with :meth:`load`.

    Attributes:
        config: the configuration of the model, and of the evaluation that gives precision and decoding.
        device: where it runs.
        model: the detector, in eval mode.
    """

    def __init__(self, model: Detector, config: Config, device: torch.device):
        self.model = model.to(device).eval()
        self.config = config
        self.device = device
        self._pipeline = make_pipeline(self.model, config, batch_size=1) if is_compiled(config, device) else None

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: str | Path | Config | None = None,
        device: str | torch.device | None = None,
        compile: Literal["auto", True, False] | None = None,
    ) -> "Predictor":
        """Load a detector.

        Args:
            path: a checkpoint of train.py, which holds its configuration, or .safetensors weights, which do not.
            config: a YAML file, the bare name of one in configs/, or a :class:`Config`; None: the checkpoint's own.
            device: None: CUDA where there is a GPU, else the CPU.
            compile: replaces the configuration's `evaluation.compile`. A compiled predictor takes a minute or more for
                its first frame, or for one with more points or voxels than before, and runs the frames of a batch one
                after the other.

        Raises:
            UserError: a missing or damaged file, weights without a configuration or of another model.
        """
        if config is None:
            config = _own_config(Path(path))
        elif not isinstance(config, Config):
            config = load_config(config)
        if compile is not None:
            config = _with_compile(config, compile)
        device = torch.device(device) if device else choose_device(None)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device is {device}, and there is no CUDA GPU; use 'cpu'")
        with naming_source(path):
            check_device(config.model, device)
        model = build_detector(config.model)
        load_model(model, config, path)
        return cls(model, config, device)

    def __call__(
        self,
        images: Sequence[ArrayLike | Tensor | None] | ArrayLike | Tensor | None = None,
        points: ArrayLike | Tensor | None = None,
        lidar2img: ArrayLike | Tensor | None = None,
        *,
        image_size: tuple[int, int] | None = None,
    ) -> Result:
        """Detect objects in one frame.

        A sensor that the model does not use is ignored. A sensor that it uses and that is None is missing: images are
        black and points are one point at the origin, as in training with dropped sensors.

        Args:
            images: six views in the order of ``cmt_aqr.classes.CAMERAS``, each (H, W, 3) uint8 of any size, with None
                for a missing view; or one array (6, H, W, 3). Channels R, G, B: nothing tells an image of OpenCV
                (B, G, R) from another, ``image[..., ::-1]`` reverses the order.
            points: (P, 4) x, y, z in metres in the LiDAR frame (x right, y forward, z up) and intensity 0 to 255, or
                (P, 5) with the seconds before now; sweeps lie in the LiDAR frame of now.
            lidar2img: (6, 4, 4), LiDAR frame to pixels of each view: intrinsics @ LiDAR to camera. Where no image is
                given it may be None: the cameras are then assumed to be mounted as on nuScenes' car.
            image_size: (height, width) in pixels that ``lidar2img`` of missing views belongs to; None: that of the
                first view that is there.

        Raises:
            InputError: one sentence on what is wrong with an array.
        """
        return self.batch([{"images": images, "points": points, "lidar2img": lidar2img, "image_size": image_size}])[0]

    @torch.inference_mode()
    def batch(self, frames: Sequence[Mapping]) -> list[Result]:
        """Detect objects in several frames at once.

        Args:
            frames: dictionaries with the arguments of :meth:`__call__`.

        Raises:
            InputError: one sentence on what is wrong with an array, with the number of its frame.
        """
        if isinstance(frames, Mapping) or not len(frames):
            raise InputError("batch: expected a list of at least one dictionary with images, points, lidar2img")
        inputs = [self._prepare(frame, f"frame {i}: " if len(frames) > 1 else "") for i, frame in enumerate(frames)]
        if self._pipeline is None:
            return self._detect(inputs)
        return [self._detect_compiled(one) for one in inputs]

    def _detect(self, inputs: list[_Input]) -> list[Result]:
        """All frames at once, in eager mode."""
        images = None if inputs[0].images is None else torch.stack([x.images for x in inputs]).to(self.device)
        points = None if inputs[0].points is None else [x.points.to(self.device) for x in inputs]
        lidar2img = None if images is None else torch.stack([x.lidar2img for x in inputs]).to(self.device)
        precision = PRECISIONS[self.config.evaluation.precision]
        with torch.autocast(self.device.type, dtype=precision, enabled=precision != torch.float32):
            pv_maps, bev_map = self.model.encode_images(images), self.model.encode_points(points)
            image_size = None if images is None else tuple(images.shape[2:4])
            cameras = self.model.make_cameras(pv_maps, lidar2img, image_size)
            geometry = self.model.compute_geometry(self.model.make_layout(bev_map, pv_maps), len(inputs), cameras)
            predictions = self.model.forward_with_geometry(bev_map, pv_maps, geometry)
        best = find_best(predictions, decoding_of(self.config), class_tables(predictions.classes, self.device))
        found = find_kept(pack(best, predictions.aqr_weights).cpu())
        return [_result(found[i], geometry.windows, i, given) for i, given in enumerate(inputs)]

    def _detect_compiled(self, given: _Input) -> Result:
        """One frame by the pipeline."""
        images = None if given.images is None else given.images[None]
        lidar2img = None if given.lidar2img is None else given.lidar2img[None]
        points = None if given.points is None else [given.points]
        self._pipeline.launch(images, points, lidar2img)
        (found,) = self._pipeline.read()
        return _result(found, self._pipeline.windows, 0, given)

    def _prepare(self, frame: Mapping, where: str) -> _Input:
        """Check a frame and bring it to the network's sizes."""
        unknown = [key for key in frame if key not in FRAME_KEYS]
        if unknown:
            raise InputError(f"{where}unknown key {unknown[0]!r}; expected {', '.join(FRAME_KEYS)}")
        model = self.config.model
        views = check_images(frame.get("images"), where) if model.camera is not None else None
        points = check_points(frame.get("points"), self.device, where) if model.lidar is not None else None
        if views is None and points is None:
            used = " and ".join(name for name, part in (("images", model.camera), ("points", model.lidar)) if part)
            raise InputError(f"{where}{used} missing: expected at least one sensor that the model uses")
        if model.lidar is not None and points is None:
            shown, points = None, torch.zeros(1, 5)
        else:
            shown = points
        if model.camera is None:
            return _Input(None, points, None, Frame(None, None, None, None, shown))
        return self._prepare_cameras(views, points, shown, frame, where)

    def _prepare_cameras(
        self, views: list | None, points: Tensor | None, shown: Tensor | None, frame: Mapping, where: str
    ) -> _Input:
        """The views at the network's size, with the calibration that follows them."""
        calibration = check_calibration(frame.get("lidar2img"), where)
        views = [None] * len(CAMERAS) if views is None else views
        size = frame.get("image_size") or next((view.shape[:2] for view in views if view is not None), None)
        if calibration is None:
            if any(view is not None for view in views):
                raise InputError(f"{where}lidar2img is missing; images need it, ({len(CAMERAS)}, 4, 4)")
            calibration, size = nuscenes_calibration(), FULL_IMAGE_SIZE[::-1]
        if size is None:
            raise InputError(
                f"{where}no view shows which pixels lidar2img belongs to: give image_size=(height, width), or "
                "leave lidar2img out"
            )
        final_size = self.config.model.camera.input_size
        images = np.zeros((len(views), *final_size, 3), dtype=np.uint8)
        to_network = []
        for view, out in zip(views, images, strict=True):
            draw = fixed_image_draw(image_size=size if view is None else view.shape[:2], final_size=final_size)
            if view is not None:
                transform_image(view, draw, out)
            to_network.append(image_matrix(draw))
        to_network = torch.stack(to_network)
        projections = torch.from_numpy(calibration)
        pixels = Frame(views, projections, to_network, tuple(size), shown)
        return _Input(torch.from_numpy(images), points, to_network @ projections, pixels)


def _result(found: Found, windows: QueryWindows | None, sample: int, given: _Input) -> Result:
    """What is returned for the frame that has this number in the windows' batch."""
    if windows is None:
        return Result(found.detections, found.aqr_weights, None, given.frame)
    size = tuple(given.images.shape[1:3])
    own = find_windows(windows, sample, found.queries, given.frame, size)
    return Result(found.detections, found.aqr_weights, own, given.frame)


def nuscenes_calibration() -> np.ndarray:
    """(6, 4, 4) LiDAR frame to pixels of images of 900 x 1600: cameras mounted as on nuScenes' car."""
    lidar2ego = _pose(LIDAR_TRANSLATION, LIDAR_ROTATION)
    matrices = []
    for mount in MOUNTS:
        intrinsic = np.eye(4)
        intrinsic[:3, :3] = intrinsic_matrix(mount, FULL_IMAGE_SIZE)
        matrices.append(intrinsic @ np.linalg.inv(_pose(mount.translation, mount.rotation)) @ lidar2ego)
    return np.stack(matrices)


def _pose(translation: Sequence[float], rotation: Sequence[float]) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3] = rotation_matrix(rotation)
    pose[:3, 3] = translation
    return pose


def _with_compile(config: Config, compile: Literal["auto", True, False]) -> Config:
    """The configuration with another `evaluation.compile`, checked as in a file."""
    tree = to_tree(config)
    tree["evaluation"]["compile"] = compile
    return config_from_tree(tree, "Predictor.load(compile=...)")


def _own_config(path: Path) -> Config:
    """The configuration inside a checkpoint."""
    tree = load_weights_and_config(path)[1]
    if tree is None:
        raise CheckpointError(f"{path}: weights alone, without a configuration: give config={_meant_config(path)}")
    return config_from_tree(tree, str(path))


def _meant_config(path: Path) -> str:
    """What to write for the configuration of weights; import_checkpoint notes its name in a .safetensors file."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            name = (file.metadata() or {}).get("config")
        if name:
            return f"'{name}'"
    return "the YAML file they were trained with, such as 'cmt_r50_800x320'"

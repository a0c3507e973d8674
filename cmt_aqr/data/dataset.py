"""Turn frames of an index into Samples: the sensors that are used are read and augmented."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cmt_aqr.box_format import BoxChoice
from cmt_aqr.data.failures.training import TrainingFailures
from cmt_aqr.data.frames import bare_sample, finish_images
from cmt_aqr.data.gt_sampling import GtSampler
from cmt_aqr.data.image_transforms import (
    ImageAugmentation,
    ImageDraw,
    draw_image_augmentation,
    fixed_image_draw,
)
from cmt_aqr.data.index import Frame, FrameIndex
from cmt_aqr.data.readers import image_size_of, load_points, read_views
from cmt_aqr.data.sample import DataError, Sample
from cmt_aqr.data.sampling import SampleKey
from cmt_aqr.data.scene_transforms import (
    ModalityDropout,
    SceneAugmentation,
    draw_dropout,
    draw_scene_augmentation,
    filter_points,
    filter_targets,
    shuffle_points,
    transform_scene,
)

# Frames drawn in place of an empty one before the data set is called empty.
MAX_REPLACEMENTS = 100
# Separates the random numbers of replacements from those of augmentation, whose last seed number is an attempt.
_REPLACEMENT_STREAM = 2**31


@dataclass(frozen=True)
class TrainingAugmentation:
    """All random steps that training applies to a sample; None switches a step off.

    Attributes:
        seed: of all draws; a sample's draws are a function of (seed, epoch, frame, position in the epoch) alone.
        point_range: x_min y_min z_min x_max y_max z_max in metres; points and box centres outside it are removed.
        image: resize, crop and flip of the views.
        scene: rotation, scale, translation and flips of the scene.
        dropout: blanking of a whole sensor.
        gt_sampler: objects pasted from other frames.
        gt_sampling_epochs: paste only in epochs below this number; the last epochs train on real scenes.
        failures: sensors that fail, after objects are pasted.
    """

    seed: int
    point_range: Sequence[float]
    image: ImageAugmentation | None = None
    scene: SceneAugmentation | None = None
    dropout: ModalityDropout | None = None
    gt_sampler: GtSampler | None = None
    gt_sampling_epochs: int = 0
    failures: TrainingFailures | None = None


class FrameDataset(Dataset[Sample]):
    """Samples of one split. Sensors that are not used are not read.

    Indexing takes a `SampleKey` or a bare frame index (epoch 0).
    """

    def __init__(
        self,
        index: FrameIndex,
        *,
        final_size: tuple[int, int] | None,
        num_sweeps: int | None,
        boxes: BoxChoice = "all",
        skip_empty_frames: bool = False,
        augmentation: TrainingAugmentation | None = None,
    ):
        """Set up.

        Args:
            index: frames of the split.
            final_size: (height, width) of the network's images; None: cameras are not used.
            num_sweeps: previous LiDAR sweeps added to the key frame's, most recent first; None: LiDAR is not used. The
                original's configs add ten and keep points near the car. It draws sweeps at random only where a frame
                lists more than it loads, which its index never does.
            boxes: which boxes are ground truth.
            skip_empty_frames: replace a training sample that ends without a box, see `_training_sample`.
            augmentation: random augmentation; None: evaluation.

        Raises:
            ValueError: neither sensor used, more sweeps than the index keeps, or sensor dropout with only one sensor.
        """
        if final_size is None and num_sweeps is None:
            raise ValueError("FrameDataset: final_size and num_sweeps are both None, expected at least one sensor")
        if num_sweeps is not None and not 0 <= num_sweeps <= index.max_sweeps:
            raise ValueError(f"FrameDataset: num_sweeps is {num_sweeps}, expected 0 to {index.max_sweeps}")
        if augmentation is not None and augmentation.dropout is not None and None in (final_size, num_sweeps):
            raise ValueError("FrameDataset: sensor dropout needs both sensors, but one is not used")
        self.index = index
        self._final_size = final_size
        self._num_sweeps = num_sweeps
        self._boxes = boxes
        self._skip_empty_frames = skip_empty_frames
        self._augmentation = augmentation

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: SampleKey | int) -> Sample:
        key = key if isinstance(key, SampleKey) else SampleKey(key)
        if self._augmentation is None:
            return self._evaluation_sample(self.index.frame(key.index))
        return self._training_sample(key, self._augmentation)

    def _evaluation_sample(self, frame: Frame) -> Sample:
        sample = bare_sample(frame, self._boxes)
        if self._num_sweeps is not None:
            sample = replace(sample, points=self._points(frame))
        if self._final_size is not None:
            draw = fixed_image_draw(image_size=image_size_of(frame), final_size=self._final_size)
            sample = finish_images(sample, read_views(frame, self.index.dataroot), draw)
        return sample

    def _training_sample(self, key: SampleKey, augmentation: TrainingAugmentation) -> Sample:
        """The augmented frame; if it is left without a box and those are skipped, the first drawn frame with a box.

        A replacement is any frame of the split, all equally likely, with an augmentation of its own. It depends on the
        seed and the key alone, so that it is the same in every worker and process, and after a resume.

        Raises:
            DataError: bad files, or no frame with a box in `MAX_REPLACEMENTS` draws.

        *Source*: mmdet3d `Custom3DDataset.prepare_train_data` (`filter_empty_gt`), `_rand_another`. *Quirk F33*.
        """
        sample = self._augmented_sample(self.index.frame(key.index), key, augmentation, ())
        if not self._skip_empty_frames or len(sample.targets.labels):
            return sample
        rng = np.random.default_rng((augmentation.seed, key.epoch, key.index, key.position, _REPLACEMENT_STREAM))
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            frame = self.index.frame(int(rng.integers(len(self.index))))
            sample = self._augmented_sample(frame, key, augmentation, (attempt,))
            if len(sample.targets.labels):
                return sample
        raise DataError(
            f"data.skip_empty_frames: none of {MAX_REPLACEMENTS} frames drawn from the split {self.index.split!r} has "
            f"a box to train on after augmentation, expected at least one; check data.train_boxes and "
            f"model.point_range, or set data.skip_empty_frames to false"
        )

    def _augmented_sample(
        self, frame: Frame, key: SampleKey, augmentation: TrainingAugmentation, attempt: tuple[int, ...]
    ) -> Sample:
        # One stream a step: switching a step off does not change what the others draw.
        entropy = (augmentation.seed, key.epoch, key.index, key.position, *attempt)
        seeds = np.random.SeedSequence(entropy).spawn(5)
        paste_rng, dropout_rng, scene_rng, image_rng, failure_rng = (np.random.default_rng(seed) for seed in seeds)
        sample = bare_sample(frame, self._boxes)
        drop_images, drop_points = (False, False)
        if augmentation.dropout is not None:
            drop_images, drop_points = draw_dropout(dropout_rng, augmentation.dropout)
        if self._num_sweeps is not None:
            sample = replace(sample, points=self._points(frame))
        views = None
        if self._final_size is not None and not drop_images:
            views = read_views(frame, self.index.dataroot)
        if augmentation.gt_sampler is not None and key.epoch < augmentation.gt_sampling_epochs:
            views = None if views is None else list(views)
            sample = augmentation.gt_sampler.paste(sample, views, paste_rng)
        if augmentation.failures is not None:
            sample, views = augmentation.failures.fail(frame, sample, views, failure_rng)
        if drop_points:
            sample = replace(sample, points=torch.zeros_like(sample.points))
        if augmentation.scene is not None:
            sample = transform_scene(sample, draw_scene_augmentation(scene_rng, augmentation.scene))
        sample = replace(sample, targets=filter_targets(sample.targets, augmentation.point_range))
        if self._skip_empty_frames and not len(sample.targets.labels):
            return sample  # it will be replaced, so the rest is skipped
        if sample.points is not None:
            points = filter_points(sample.points, augmentation.point_range)
            sample = replace(sample, points=shuffle_points(points, scene_rng))
        if self._final_size is not None:
            sample = finish_images(sample, views, self._image_draw(frame, image_rng, augmentation.image))
        return sample

    def _image_draw(self, frame: Frame, rng: np.random.Generator, image: ImageAugmentation | None) -> ImageDraw:
        size = image_size_of(frame)
        if image is None:
            return fixed_image_draw(image_size=size, final_size=self._final_size)
        return draw_image_augmentation(rng, image_size=size, final_size=self._final_size, augmentation=image)

    def _points(self, frame: Frame) -> Tensor:
        return load_points(frame, self.index.dataroot, num_sweeps=self._num_sweeps, close_radius=0.0)

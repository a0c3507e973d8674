"""Pictures of chosen frames, drawn while a split is predicted."""

from dataclasses import dataclass
from pathlib import Path

from cmt_aqr.boxes import Detections
from cmt_aqr.viz.box_groups import Style
from cmt_aqr.viz.pictures import draw_detections, write_picture


@dataclass
class PictureWriter:
    """Called with every batch and its detections; draws some frames as ``folder/<number>_<token>.jpg``.

    Attributes:
        tokens: sample tokens of the frames to draw; their order gives the numbers, so that the files of several
            processes, which see some of the frames each, are those of one.
        score_threshold: detections below are not drawn.
        has_truth: False: the frames are not annotated; there is no ground truth to draw.
        problem: why no more pictures are drawn; None as long as there is no problem.
    """

    folder: Path
    tokens: tuple[str, ...]
    score_threshold: float
    has_truth: bool = True
    problem: str | None = None

    def __call__(self, batch, detections: list[Detections]) -> None:
        """Draw the chosen frames of a batch.

        Args:
            batch: a :class:`cmt_aqr.data.sample.Batch` on the CPU; its tokens, images, points, lidar2img and targets.
            detections: of every frame of the batch, on the CPU.

        Raises:
            PictureError: a file cannot be written.
        """
        for i, token in enumerate(batch.tokens):
            if token not in self.tokens:
                continue
            picture = draw_detections(
                None if batch.images is None else batch.images[i],
                None if batch.points is None else batch.points[i],
                batch.lidar2img[i],
                detections=detections[i],
                targets=batch.targets[i] if self.has_truth else None,
                title=token,
                style=Style(score_threshold=self.score_threshold),
            )
            write_picture(self.folder / f"{self.tokens.index(token):02d}_{token[:16]}.jpg", picture)

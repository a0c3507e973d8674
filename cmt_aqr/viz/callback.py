"""Pictures of chosen frames, drawn while a split is predicted."""

from dataclasses import dataclass
from pathlib import Path

from cmt_aqr.boxes import Detections
from cmt_aqr.viz.pictures import draw_detections, write_picture


@dataclass
class PictureWriter:
    """Called with every batch and its detections; draws some frames as ``folder/<number>_<token>.jpg``.

    Attributes:
        tokens: sample tokens of the frames to draw.
        score_threshold: detections below are not drawn.
        written: the files.
    """

    folder: Path
    tokens: tuple[str, ...]
    score_threshold: float
    written: list[Path]

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
                targets=batch.targets[i],
                score_threshold=self.score_threshold,
                title=token,
            )
            path = self.folder / f"{len(self.written):02d}_{token[:16]}.jpg"
            write_picture(path, picture)
            self.written.append(path)

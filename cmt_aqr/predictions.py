"""What crosses from the model to the loss and to the decoding: task grouping, Predictions, DenoisingQueries.

Shape letters: B batch, L decoder layers, Q queries (denoising rows first, then the matching queries).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmt_aqr.box_format import CODE_SIZE
from cmt_aqr.classes import CLASSES

# Regression branches in box-code order, with their widths. The names are the original's; what they learn is in
# `Predictions` (Quirk Q1).
BOX_BRANCHES = {"center": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
CLASS_BRANCH = "cls_logits"

# Class indices of each task, e.g. ((0, 1, ..., 9),) for one task of ten classes.
TaskClasses = tuple[tuple[int, ...], ...]


def task_classes(tasks: Sequence[Sequence[str]]) -> TaskClasses:
    """Task grouping by names -> the same grouping by index into ``classes.CLASSES``.

    Raises:
        ValueError: a name is unknown, is used twice, or a task is empty.
    """
    names = [name for task in tasks for name in task]
    unknown = [name for name in names if name not in CLASSES]
    if unknown:
        raise ValueError(f"tasks name unknown classes {unknown}; known are {list(CLASSES)}")
    if len(set(names)) != len(names) or not names or not all(len(task) for task in tasks):
        raise ValueError(f"every task needs at least one class and no class twice, got {[list(t) for t in tasks]}")
    return tuple(tuple(CLASSES.index(name) for name in task) for task in tasks)


@dataclass(frozen=True)
class Predictions:
    """Raw network output of every decoder layer; float32 even under autocast (float64 for a float64 model).

    Attributes:
        tasks: one dict per task, every value (L, B, Q, width), layer -1 is the last one, queries in the order
            [denoising rows, matching queries]:

            - ``center`` (2): x, y of the box centre, metres, LiDAR frame, inside the point range.
            - ``height`` (1): log length, in [z_min, z_max] of the point range. *Quirk Q1*: the branch is referenced to
              the query's z and squashed like a height, but it learns the logarithm of the length.
            - ``dim`` (3): log width, z of the gravity centre (metres), log height. *Quirk Q1*.
            - ``rot`` (2): sin yaw, cos yaw, not normalised.
            - ``vel`` (2): vx, vy in m/s.
            - ``cls_logits`` (number of classes of the task): one sigmoid logit per class.
        classes: class indices of each task; ``cls_logits[..., i]`` of task t belongs to class ``classes[t][i]``.
        num_dn: number of denoising rows at the front of Q; 0 outside training.
        aqr_weights: (B, num_queries, 2) w_lidar, w_camera of the matching queries, not of the denoising rows;
            detached. None without AQR.
    """

    tasks: tuple[dict[str, Tensor], ...]
    classes: TaskClasses
    num_dn: int = 0
    aqr_weights: Tensor | None = None

    def codes(self, task: int) -> Tensor:
        """Box codes (L, B, Q, 10) of one task; the branches concatenated are already in code order (*Quirk Q1*)."""
        return torch.cat([self.tasks[task][name] for name in BOX_BRANCHES], dim=-1)

    def logits(self, task: int) -> Tensor:
        """Class logits (L, B, Q, number of classes of the task)."""
        return self.tasks[task][CLASS_BRANCH]


@dataclass(frozen=True)
class DenoisingQueries:
    """Noised ground truth as extra queries, padded to a constant number of rows.

    Rows: [padding rows, group 0, group 1, ...]; the matching queries follow them on the query axis. Every group has one
    slot per box of the fullest frame. A slot without a box in its frame is valid: it is a query at (0, 0, 0) that its
    group sees (*Quirk Q8*). A padding row only makes the shape constant: no other row sees it, no loss reads it.

    Attributes:
        reference_points: (B, num_dn, 3) in [0, 1].
        attention_mask: (Q, Q) bool, True = row may attend to column, Q = num_dn + num_queries.
        is_valid: (num_dn,) bool, False for padding rows.
        is_known: (B, num_dn) bool, True where the row stands for a box and enters the loss.
        boxes: (B, num_dn, 9) clean boxes, LiDAR frame; a unit box where not ``is_known``.
        labels: (B, num_dn) int64 class index, ``len(CLASSES)`` (background) where the noise was too large.
        clean_labels: (B, num_dn) int64 class index before the noise; background where not ``is_known``.
    """

    reference_points: Tensor
    attention_mask: Tensor
    is_valid: Tensor
    is_known: Tensor
    boxes: Tensor
    labels: Tensor
    clean_labels: Tensor

    @property
    def num_dn(self) -> int:
        """Number of rows, padding included."""
        return self.reference_points.shape[1]


assert sum(BOX_BRANCHES.values()) == CODE_SIZE

"""Hungarian matching of predictions to ground truth, for all decoder layers, samples and tasks at once.

Shape letters: T tasks, L decoder layers, B batch, G boxes of the fullest frame (at least 1), Q matching queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cmt_aqr.boxes import Targets, encode_boxes, pad_targets
from cmt_aqr.classes import CLASSES
from cmt_aqr.devices import HostCopy
from cmt_aqr.errors import UserError
from cmt_aqr.geometry import constant_like
from cmt_aqr.losses.focal import ALPHA, GAMMA, focal_cost
from cmt_aqr.predictions import Predictions, TaskClasses

# Components of the box code in the matching cost: all but the velocity (Quirk Q9).
COST_COMPONENTS = 8
UNMATCHED = -1


class NonFiniteError(UserError):
    """A matching cost is NaN or infinite, i.e. the network has diverged (Quirk Q14: the original silences this)."""


class ElsewhereError(NonFiniteError):
    """The matching of another process cannot be solved; that of this one can."""


@dataclass(frozen=True)
class PaddedTargets:
    """Ground truth of a batch in one tensor.

    Attributes:
        codes: (B, G, 10) box codes; those of a unit box at the origin where a frame has fewer boxes.
        labels: (B, G) int64 class index, ``len(CLASSES)`` where a frame has fewer boxes.
    """

    codes: Tensor
    labels: Tensor


def encode_targets(targets: Sequence[Targets], *, dtype: torch.dtype) -> PaddedTargets:
    """Stack the ground truth of a batch as box codes; the logarithms of the sizes are taken in ``dtype``."""
    boxes, labels = pad_targets(targets, max(1, *(len(target.boxes) for target in targets)), dtype=dtype)
    return PaddedTargets(encode_boxes(boxes), labels)


def class_table(classes: TaskClasses, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lookup by class index, background included.

    Returns:
        task (11,) int64: the task that owns the class, -1 for background and for classes of no task;
        local (11,) int64: index of the class inside its task, 0 where there is none.
    """
    task, local = [-1] * (len(CLASSES) + 1), [0] * (len(CLASSES) + 1)
    for index, members in enumerate(classes):
        for position, label in enumerate(members):
            task[label], local[label] = index, position
    table = torch.tensor([task, local]).to(device, non_blocking=True)
    return table[0], table[1]


def matching_costs(
    predictions: Predictions,
    targets: PaddedTargets,
    *,
    class_weight: float,
    box_weight: float,
    code_weights: Sequence[float],
    alpha: float = ALPHA,
    gamma: float = GAMMA,
) -> Tensor:
    """Cost of every pair of box and matching query, with the predictions of the task that owns the box.

    class_weight * focal cost + box_weight * L1 over the first eight code components, both sides multiplied by the
    code weights (*Quirk Q9*).

    Returns:
        (L, B, G, Q); without meaning where a frame has fewer boxes.

    *Source*: original `HungarianAssigner3D`.
    """
    task_of, local_of = class_table(predictions.classes, device=targets.labels.device)
    weights = constant_like(code_weights, targets.codes)[:COST_COMPONENTS]
    wanted = targets.codes[..., :COST_COMPONENTS] * weights
    costs = None
    for task in range(len(predictions.classes)):
        codes = predictions.codes(task)[:, :, predictions.num_dn :, :COST_COMPONENTS].detach().to(wanted.dtype)
        logits = predictions.logits(task)[:, :, predictions.num_dn :].detach().to(wanted.dtype)
        distances = torch.cdist(wanted.expand(len(codes), -1, -1, -1), codes * weights, p=1)
        is_mine = task_of[targets.labels] == task
        columns = local_of[targets.labels].masked_fill(~is_mine, 0)[None, :, None, :]
        class_costs = focal_cost(logits, alpha=alpha, gamma=gamma)
        class_costs = class_costs.take_along_dim(columns, dim=-1).transpose(-1, -2)
        cost = class_weight * class_costs + box_weight * distances
        costs = cost if costs is None else torch.where(is_mine[None, :, :, None], cost, costs)
    return costs


def solve(costs: np.ndarray, tasks: np.ndarray, num_tasks: int) -> np.ndarray:
    """Minimum-cost assignment per task, layer and sample.

    Args:
        costs: (L, B, G, Q).
        tasks: (B, G) task that owns each box, -1 for none.
        num_tasks: T.

    Returns:
        (T, L, B, Q) int64: the box of each query, index into its frame, or -1. Where a task has more boxes than there
        are queries, every query gets one and the most expensive boxes get none.

    Raises:
        NonFiniteError: a cost that matters is not finite; names layer and sample.
    """
    layers, batch, _, queries = costs.shape
    assigned = np.full((num_tasks, layers, batch, queries), UNMATCHED, dtype=np.int64)
    for sample in range(batch):
        for task in range(num_tasks):
            boxes = np.flatnonzero(tasks[sample] == task)
            if not len(boxes):
                continue
            for layer in range(layers):
                cost = costs[layer, sample, boxes]
                if not np.isfinite(cost).all():
                    raise NonFiniteError(
                        f"the matching cost of decoder layer {layer}, sample {sample}, task {task} is not finite: "
                        f"the network's output or the boxes contain NaN or infinity"
                    )
                rows, columns = linear_sum_assignment(cost)
                assigned[task, layer, sample, columns] = boxes[rows]
    return assigned


class Matching:
    """The matching of a batch while its costs travel to the host, all of them in one transfer.

    Args:
        predictions: all layers; denoising rows are skipped.
        targets: ground truth on the same device.
        code_weights: (10,) factors on the box code.
        class_weight, box_weight: factors of the focal and of the L1 cost.
        alpha, gamma: of the focal cost.
        reduce_mean: averages a float64 tensor over processes, so that all of them learn what one finds; None: there is
            one process.
    """

    def __init__(
        self,
        predictions: Predictions,
        targets: PaddedTargets,
        *,
        code_weights: Sequence[float],
        class_weight: float = 2.0,
        box_weight: float = 0.25,
        alpha: float = ALPHA,
        gamma: float = GAMMA,
        reduce_mean: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._num_tasks = len(predictions.classes)
        with torch.autocast(targets.codes.device.type, enabled=False):
            costs = matching_costs(
                predictions,
                targets,
                class_weight=class_weight,
                box_weight=box_weight,
                code_weights=code_weights,
                alpha=alpha,
                gamma=gamma,
            )
        tasks = class_table(predictions.classes, device=targets.labels.device)[0][targets.labels]
        outputs = [output.isfinite().all() for task in predictions.tasks for output in task.values()]
        is_solvable = (costs.isfinite() | (tasks < 0)[..., None]).all()
        own = torch.stack((torch.stack(outputs).all(), is_solvable)).double()
        everywhere = own if reduce_mean is None else reduce_mean(own)
        self._copy = HostCopy(costs, tasks, own, everywhere)

    def solve(self) -> Tensor:
        """Wait for the costs and assign.

        Returns:
            (T, L, B, Q) int64 **on the CPU**: index into the frame's boxes, or -1 for background.

        Raises:
            NonFiniteError: in all processes, where an output of the network or a cost is not finite in one of them.
        """
        costs, tasks, own, everywhere = self._copy.wait()
        if not own[0]:
            raise NonFiniteError("the output of the network is not finite")
        assigned = solve(costs.numpy(), tasks.numpy(), self._num_tasks)
        if everywhere.min() < 1:
            raise ElsewhereError("the matching of another process failed")
        return torch.from_numpy(assigned)

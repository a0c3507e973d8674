"""The training loss: matched focal and L1 terms on every decoder layer, and the same for denoising queries.

Shape letters: T tasks, L decoder layers, B batch, G boxes, Q matching queries, N denoising rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cmt_aqr.box_format import CODE_SIZE
from cmt_aqr.boxes import Targets, encode_boxes
from cmt_aqr.classes import CLASSES
from cmt_aqr.devices import to_device
from cmt_aqr.geometry import constant_like
from cmt_aqr.losses.focal import ALPHA, GAMMA, focal_loss, one_hot
from cmt_aqr.losses.matcher import UNMATCHED, Matching, PaddedTargets, class_table, encode_targets
from cmt_aqr.precision import at_least_float32
from cmt_aqr.predictions import DenoisingQueries, Predictions, TaskClasses

# Added to every normaliser (mmdet `weight_reduce_loss`): no positives then give 0 and not 0 / 0.
NORMALISER_EPS = torch.finfo(torch.float32).eps
# The original's value of pi in the normaliser of the denoising class loss (Quirk Q8).
ROUNDED_PI = 3.14159

DEFAULT_CODE_WEIGHTS = (2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)


def total_loss(terms: dict[str, Tensor]) -> Tensor:
    """Sum of all terms, 0-dim."""
    return torch.stack(tuple(terms.values())).sum()


def box_l1(codes: Tensor, wanted: Tensor, is_used: Tensor, code_weights: Tensor) -> Tensor:
    """Weighted L1 distance of box codes, summed over everything but the layers.

    A target component that is not finite (a velocity without annotation) has weight zero; the other components of
    that box still count. The original drops the whole box there, and its data pipeline writes 0 for unknown velocities.

    Args:
        codes: (L, B, N, 10).
        wanted: broadcastable to it.
        is_used: (L, B, N) bool or broadcastable, False = the row has no target.

    Returns:
        (L,).
    """
    counts = is_used[..., None] & wanted.isfinite()
    difference = torch.where(counts, codes - wanted, 0)
    return (difference.abs() * code_weights).sum((1, 2, 3))


class Criterion(nn.Module):
    """The loss of the original CMT.

    With K processes, ``reduce_mean`` averages a tensor over them. Every process then divides its own sums by the same
    normaliser, the mean over processes of the local counts; the mean over processes of a term, and of the gradients
    (what DDP computes), is then exactly the value one process gets for the whole batch. The original normalises by
    local counts, which is the default here.

    Args:
        classes: class indices of each task.
        code_weights: (10,) weights of the box code, in the loss and in the matching cost.
        cls_weight, box_weight: weights of the focal and of the L1 terms.
        dn_weight: factor on the denoising terms.
        cls_cost, box_cost: weights of the matching cost.
        background_weight: weight of a background query in the class normaliser (*Quirk Q9*).
        positive_threshold: of the denoising queries, enters their class normaliser (*Quirk Q8*).
        alpha, gamma: of the focal loss and cost.
        reduce_mean: averages a float64 tensor over processes; None keeps local counts.
        num_processes: K; the lower limits of the normalisers are 1 / K, so that they are 1 for the whole batch.
    """

    def __init__(
        self,
        *,
        classes: TaskClasses,
        code_weights: Sequence[float] = DEFAULT_CODE_WEIGHTS,
        cls_weight: float = 2.0,
        box_weight: float = 0.25,
        dn_weight: float = 1.0,
        cls_cost: float = 2.0,
        box_cost: float = 0.25,
        background_weight: float = 0.1,
        positive_threshold: float = 0.75,
        alpha: float = ALPHA,
        gamma: float = GAMMA,
        reduce_mean: Callable[[Tensor], Tensor] | None = None,
        num_processes: int = 1,
    ) -> None:
        super().__init__()
        if len(code_weights) != CODE_SIZE:
            raise ValueError(f"code_weights must have {CODE_SIZE} values, got {len(code_weights)}")
        self.classes = tuple(tuple(task) for task in classes)
        self.code_weights = tuple(code_weights)
        self.cls_weight = cls_weight
        self.box_weight = box_weight
        self.dn_weight = dn_weight
        self.cls_cost = cls_cost
        self.box_cost = box_cost
        self.background_weight = background_weight
        self.positive_threshold = positive_threshold
        self.alpha = alpha
        self.gamma = gamma
        self.reduce_mean = reduce_mean
        self.num_processes = num_processes

    def forward(
        self,
        predictions: Predictions,
        targets: Sequence[Targets],
        denoising: DenoisingQueries | None = None,
        *,
        counts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """All terms, weighted; their sum (:func:`total_loss`) is what to minimise.

        Args:
            predictions: of the detector; the loss is computed in their dtype, and in float32 for lower ones.
            targets: one record per sample, on the device of the predictions.
            denoising: what the detector was given.
            counts: (2 T + 1,) normalisers where these samples are part of a larger batch: the mean of :meth:`count`
                over its parts and processes; None: that of these samples over the processes.

        Returns:
            0-dim tensors: ``loss_cls``, ``loss_bbox`` of the last layer, ``d{i}.loss_cls``, ``d{i}.loss_bbox`` of the
            others; with denoising also ``dn_loss_cls``, ``dn_loss_bbox``, ``d{i}.dn_loss_cls``, ``d{i}.dn_loss_bbox``.

        Raises:
            NonFiniteError: the predictions are not finite, in any process (*Quirk Q14*).
            ValueError: the number of samples, tasks or denoising rows does not fit.
        """
        self._check(predictions, targets, denoising)
        predictions = replace(
            predictions,
            tasks=tuple({name: at_least_float32(x) for name, x in task.items()} for task in predictions.tasks),
        )
        like = predictions.tasks[0]["center"]
        with torch.autocast(like.device.type, enabled=False):
            padded = encode_targets(targets, dtype=like.dtype)
            if counts is None:
                counts = self.count(targets, denoising, num_queries=like.shape[2] - predictions.num_dn)
                counts = counts if self.reduce_mean is None else self.reduce_mean(counts)
            matching = self.start_matching(predictions, padded)
            others = {} if denoising is None else self._denoising_terms(predictions, denoising, counts[-1])
            assigned = to_device(matching.solve(), like.device)
            terms = self._matched_terms(predictions, padded, assigned, counts) | others
        return {
            (name if layer == len(like) - 1 else f"d{layer}.{name}"): value
            for name, values in terms.items()
            for layer, value in enumerate(values.unbind())
        }

    def compile_terms(self, *, backend: str = "inductor") -> None:
        """Compute the terms, not the matching, as graphs of torch.compile from now on."""
        self._matched_terms = torch.compile(self._matched_terms, backend=backend)
        self._denoising_terms = torch.compile(self._denoising_terms, backend=backend)

    def start_matching(self, predictions: Predictions, targets: PaddedTargets) -> Matching:
        """Compute the matching costs of all layers and tasks and begin to copy them to the host."""
        return Matching(
            predictions,
            targets,
            code_weights=self.code_weights,
            class_weight=self.cls_cost,
            box_weight=self.box_cost,
            alpha=self.alpha,
            gamma=self.gamma,
            reduce_mean=self.reduce_mean,
        )

    def assign(self, predictions: Predictions, targets: PaddedTargets) -> Tensor:
        """Match every layer and task: (T, L, B, Q) int64 on the CPU, index into the frame's boxes or -1."""
        return self.start_matching(predictions, targets).solve()

    def count(self, targets: Sequence[Targets], denoising: DenoisingQueries | None, *, num_queries: int) -> Tensor:
        """(2 T + 1,) float64: positives per task, background queries per task, known denoising rows; of one layer.

        Every box gets a query while there are enough of them, so this is known before the matching.
        """
        labels = pad_sequence([target.labels for target in targets], batch_first=True, padding_value=len(CLASSES))
        tasks = class_table(self.classes, device=labels.device)[0][labels]
        positives = [(tasks == task).sum(1).clamp(max=num_queries).sum() for task in range(len(self.classes))]
        positives = torch.stack(positives).double()
        known = positives.new_zeros(1) if denoising is None else denoising.is_known.sum(dtype=torch.float64)[None]
        return torch.cat((positives, len(targets) * num_queries - positives, known))

    def _matched_terms(
        self, predictions: Predictions, targets: PaddedTargets, assigned: Tensor, counts: Tensor
    ) -> dict[str, Tensor]:
        """loss_cls and loss_bbox, (L,) each, summed over the tasks; *Quirk Q9*."""
        num_tasks = len(self.classes)
        _, local_of = class_table(self.classes, device=assigned.device)
        sample = torch.arange(assigned.shape[2], device=assigned.device)[:, None]
        cls_loss = box_loss = 0
        for task, members in enumerate(self.classes):
            codes = predictions.codes(task)[:, :, predictions.num_dn :]
            logits = predictions.logits(task)[:, :, predictions.num_dn :]
            is_positive = assigned[task] != UNMATCHED
            box = assigned[task].clamp(min=0)
            labels = local_of[targets.labels[sample, box]].masked_fill(~is_positive, len(members))
            loss = focal_loss(logits, one_hot(labels, len(members)), alpha=self.alpha, gamma=self.gamma)
            positives, background = counts[task], counts[num_tasks + task]
            normaliser = self._at_least_one(positives + self.background_weight * background)
            cls_loss = cls_loss + loss.sum((1, 2, 3)) / self._divisor(normaliser, loss)
            distance = box_l1(codes, targets.codes[sample, box], is_positive, constant_like(self.code_weights, codes))
            box_loss = box_loss + distance / self._divisor(positives, distance)
        return {"loss_cls": self.cls_weight * cls_loss, "loss_bbox": self.box_weight * box_loss}

    def _denoising_terms(
        self, predictions: Predictions, denoising: DenoisingQueries, num_known: Tensor
    ) -> dict[str, Tensor]:
        """dn_loss_cls and dn_loss_bbox, (L,) each; normalised by the known rows of all tasks; *Quirk Q8*.

        Every known row learns its class (background after too much noise), and its box in the task that owns it. Rows
        without a box enter no sum, so a batch without boxes gives exactly 0 with gradient 0.
        """
        task_of, local_of = class_table(self.classes, device=denoising.labels.device)
        codes_wanted = encode_boxes(denoising.boxes.to(predictions.codes(0).dtype))
        cls_normaliser = self._at_least_one(num_known * ROUNDED_PI / 6 * self.positive_threshold**3)
        box_normaliser = self._at_least_one(num_known)
        cls_loss = box_loss = 0
        for task, members in enumerate(self.classes):
            codes = predictions.codes(task)[:, :, : predictions.num_dn]
            logits = predictions.logits(task)[:, :, : predictions.num_dn]
            is_mine = task_of[denoising.labels] == task
            labels = local_of[denoising.labels].masked_fill(~is_mine, len(members))
            loss = focal_loss(
                logits, one_hot(labels, len(members)).expand_as(logits), alpha=self.alpha, gamma=self.gamma
            )
            loss = torch.where(denoising.is_known[..., None], loss, 0)
            cls_loss = cls_loss + loss.sum((1, 2, 3)) / self._divisor(cls_normaliser, loss)
            is_used = denoising.is_known & (task_of[denoising.clean_labels] == task)
            distance = box_l1(codes, codes_wanted, is_used, constant_like(self.code_weights, codes))
            box_loss = box_loss + distance / self._divisor(box_normaliser, distance)
        return {
            "dn_loss_cls": self.dn_weight * self.cls_weight * cls_loss,
            "dn_loss_bbox": self.dn_weight * self.box_weight * box_loss,
        }

    def _at_least_one(self, normaliser: Tensor) -> Tensor:
        """Limit a normaliser from below to 1 over all processes."""
        return normaliser.clamp(min=1 / self.num_processes)

    def _divisor(self, normaliser: Tensor, like: Tensor) -> Tensor:
        return (normaliser + NORMALISER_EPS / self.num_processes).to(like.dtype)

    def _check(self, predictions: Predictions, targets: Sequence[Targets], denoising: DenoisingQueries | None) -> None:
        batch = predictions.tasks[0]["center"].shape[1]
        if len(targets) != batch:
            raise ValueError(f"the predictions are for {batch} samples, the targets for {len(targets)}")
        if predictions.classes != self.classes:
            raise ValueError(f"the predictions have tasks {predictions.classes}, the criterion has {self.classes}")
        num_dn = 0 if denoising is None else denoising.num_dn
        if predictions.num_dn != num_dn:
            raise ValueError(
                f"the predictions have {predictions.num_dn} denoising rows, the denoising queries have {num_dn}"
            )

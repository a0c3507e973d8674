"""Random predictions and targets for the loss tests."""

import torch

from cmt_aqr.boxes import Targets
from cmt_aqr.predictions import BOX_BRANCHES, CLASS_BRANCH, Predictions

ONE_TASK = (tuple(range(10)),)
TWO_TASKS = ((3, 0, 5, 9), (1, 2, 4, 6, 7, 8))
POINT_RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)


def make_predictions(*, batch, queries, classes=ONE_TASK, layers=2, num_dn=0, seed=0, dtype=torch.float64):
    """Leaves of the autograd graph: their gradients can be read."""
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for members in classes:
        widths = {**BOX_BRANCHES, CLASS_BRANCH: len(members)}
        outputs = {}
        for name, width in widths.items():
            tensor = torch.randn(layers, batch, queries + num_dn, width, generator=generator, dtype=dtype)
            outputs[name] = (tensor * (20 if name == "center" else 1)).requires_grad_()
        tasks.append(outputs)
    return Predictions(tuple(tasks), classes, num_dn)


def make_targets(counts, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    records = []
    for count in counts:
        boxes = torch.rand(count, 9, generator=generator, dtype=dtype) * 4 + 0.5
        boxes[:, :2] = (boxes[:, :2] - 2.5) * 10
        records.append(Targets(boxes, torch.randint(10, (count,), generator=generator)))
    return records


def gradients(predictions):
    return {
        f"{index}/{name}": tensor.grad for index, task in enumerate(predictions.tasks) for name, tensor in task.items()
    }


def slice_samples(predictions, samples):
    """Predictions of some samples as new leaves."""
    tasks = tuple(
        {name: tensor.detach()[:, samples].clone().requires_grad_() for name, tensor in task.items()}
        for task in predictions.tasks
    )
    return Predictions(tasks, predictions.classes, predictions.num_dn)

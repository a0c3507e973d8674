"""A run whose model is one linear layer, for tests of the training step."""

from types import SimpleNamespace

import torch
from torch import nn

from cmt_aqr.boxes import Targets
from cmt_aqr.config import load_config
from cmt_aqr.data.sample import Batch
from cmt_aqr.run import Run
from cmt_aqr.training.distributed import RankInfo
from cmt_aqr.training.optim import make_optimizer
from tests.parity.golden import REPOSITORY

CONFIG = REPOSITORY / "configs" / "cmt_lidar_0075.yaml"


class TinyModel(nn.Module):
    """Has the interface of the detector that a training step uses."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        nn.init.constant_(self.linear.weight, 0.5)
        nn.init.constant_(self.linear.bias, 0.25)

    def forward(self, images, points, lidar2img, denoising, image_mask):
        """Predictions (1, 1): 0.5 + 0.5 + 0.25."""
        return SimpleNamespace(tasks=({"cls_logits": self.linear(torch.ones(1, 2))},), aqr_weights=None)

    def clamp_parameters(self):
        """Nothing to clamp."""


def harmless(output):
    """A box loss of 1.25."""
    return output


def make_run(work_dir, box_loss=harmless, *, step=7, scaler=None) -> Run:
    """A run of one process before its step 7; ``box_loss`` maps the model's output to the loss term."""
    model = TinyModel()

    def criterion(predictions, targets, denoising, *, counts):
        output = predictions.tasks[0]["cls_logits"].sum()
        return {"loss_cls": output * 2, "loss_bbox": box_loss(output)}

    return Run(
        config=load_config(CONFIG, ("model.denoising.num_dn=0", "training.lr_mult={}", "training.decay_mult={}")),
        rank_info=RankInfo(rank=0, world_size=1, device=torch.device("cpu")),
        work_dir=work_dir,
        model=model,
        ddp_model=model,
        criterion=criterion,
        optimizer=make_optimizer(model, lr=0.1, weight_decay=0.0, lr_mult={}, decay_mult={}),
        scaler=torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler,
        tables=None,
        steps_per_epoch=5,
        last_step=10,
        step=step,
    )


def make_batch() -> Batch:
    """One frame without boxes, token a1."""
    eye = torch.eye(4, dtype=torch.float64)[None]
    return Batch(
        tokens=["a1"],
        images=None,
        points=[torch.arange(10.0).reshape(2, 5)],
        lidar2img=eye[:, None],
        targets=[Targets(torch.zeros(0, 9), torch.zeros(0).long())],
        lidar2global=eye,
        lidar2ego=eye,
        ego2global=eye,
        augmentation=eye,
    )

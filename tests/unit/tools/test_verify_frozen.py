"""The table of what is trained tells the truth, and a broken promise ends with status 1."""

import re

import pytest
import torch
from torch import nn

from cmt_aqr.tools import verify_frozen

SMALL = (
    "data.num_sweeps=1", "model.hidden_dim=16", "model.num_queries=20", "model.num_layers=1", "model.num_heads=2",
    "model.ffn_dim=32", "model.depth_bins=4", "model.head_channels=16", "model.lidar.voxel_size=[1.6,1.6,0.8]",
    "model.lidar.sparse_shape=[11,64,64]", "model.camera.input_size=[32,96]", "model.camera.base_channels=8",
    "model.denoising.num_dn=40", "model.attention.backend=dense", "training.epochs=1",
)  # fmt: skip
PARTS = (
    "training.lr_mult={decoder: 0.5, head: 0.1}", "training.decay_mult={aqr.scale: 0.0}",
    "training.freeze=[image_branch.backbone, lidar_branch]", "training.norm_eval=[shared_conv]",
)  # fmt: skip


def run(capsys, *settings):
    """Exit status, rows of the table by module, and the lines after it."""
    arguments = ["synthetic_tiny", "--device", "cpu", "--points", "3000", "--set", *SMALL, *settings]
    status = verify_frozen.main(arguments)
    table, *rest = capsys.readouterr().out.partition("head ")
    lines = ("".join([table, *rest])).splitlines()
    rows = {line.split()[0]: re.split(r" {2,}", line)[1:] for line in lines if re.search(r" (yes|no) ", line)}
    return status, rows, lines[len(rows) + 1 :]


def test_a_configuration_that_keeps_its_promise(capsys):
    status, rows, rest = run(capsys, *PARTS)
    assert status == 0
    assert rows["image_branch.backbone"][1:5] == ["no", "-", "-", "eval"]
    assert rows["lidar_branch"][1:5] == ["no", "-", "-", "eval"]
    assert rows["image_branch.backbone"][6] == rows["lidar_branch"][6] == "the same"
    assert rows["image_branch.neck"][1:5] == ["yes", "0.001", "0.01", "-"]
    assert rows["shared_conv"][1:5] == ["yes", "0.001", "0.01", "eval"]
    assert rows["decoder"][1:4] == ["yes", "0.0005", "0.01"] and rows["head"][1:4] == ["yes", "0.0001", "0.01"]
    assert rows["aqr.scale"][:4] == ["1", "yes", "0.001", "0"]
    assert all(row[5] != row[6] for row in rows.values())
    counts = {name: int(row[0].replace(",", "")) for name, row in rows.items()}
    frozen = counts["image_branch.backbone"] + counts["lidar_branch"]
    trained = sum(counts.values()) - frozen
    assert rest == [f"synthetic_tiny: {trained:,} parameters have changed, {frozen:,} are frozen and kept every bit"]


def test_batch_norms_that_go_on_measuring_are_found(capsys, monkeypatch):
    monkeypatch.setattr(verify_frozen, "set_training_mode", lambda model, names: model.train())
    status, _, rest = run(capsys, *PARTS)
    assert status == 1
    sentence = "its statistics changed, training.freeze or norm_eval names it"
    assert f"image_branch.backbone.bn1.running: {sentence}" in rest
    assert all(line.endswith(sentence) for line in rest[:-1])
    assert rest[-1] == f"synthetic_tiny: the step broke {len(rest) - 1} promises of the configuration"


def break_run(monkeypatch, damage):
    """Change the run behind the program's back, before its step."""
    build = verify_frozen.build_run

    def broken(*arguments):
        made = build(*arguments)
        damage(made)
        return made

    monkeypatch.setattr(verify_frozen, "build_run", broken)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            lambda run: run.model.shared_conv.register_parameter("unused", nn.Parameter(torch.ones(2))),
            "shared_conv.unused: nothing freezes it, and the optimizer does not hold it",
        ),
        (
            lambda run: run.optimizer.add_param_group(
                {"params": [next(run.model.lidar_branch.parameters())], "lr_scale": 1.0}
            ),
            "lidar_branch.encoder.conv_input.0.weight: training.freeze names it, and the optimizer holds it",
        ),
        (
            lambda run: run.optimizer.param_groups[0].update(weight_decay=0.5),
            "expected learning rate x 1.0 and weight decay 0.01, the optimizer has x 1.0 and 0.5",
        ),
        (
            lambda run: run.model.head.requires_grad_(False),
            "nothing freezes it, and the step left it as it was",
        ),
        (
            lambda run: run.model.lidar_branch.register_forward_pre_hook(
                lambda branch, _: (next(branch.parameters()).data.add_(1), None)[1]
            ),
            "lidar_branch.encoder.conv_input.0.weight: training.freeze names it, and the step changed it",
        ),
    ],
    ids=["forgotten", "held", "other decay", "no gradient", "changed"],
)
def test_a_broken_promise_is_named(capsys, monkeypatch, damage, expected):
    break_run(monkeypatch, damage)
    status, _, rest = run(capsys, *PARTS)
    assert status == 1
    assert any(line.endswith(expected) for line in rest), rest


def test_a_factor_of_zero_is_no_broken_promise(capsys):
    status, rows, _ = run(capsys, "training.lr_mult={aqr: 0}", "training.decay_mult={aqr.scale: 0.0}")
    assert status == 0
    assert rows["aqr.generator"][1:4] == ["yes", "0", "0.01"] and rows["aqr.generator"][6] == "the same"

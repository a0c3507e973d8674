"""Which keys may change when a run is resumed."""

from pathlib import Path

import pytest

from cmt_aqr.config import load_config, to_tree
from cmt_aqr.training import run_folder
from cmt_aqr.training.checkpoint import CheckpointError

CONFIG = Path(__file__).parents[3] / "configs" / "synthetic_tiny.yaml"


@pytest.fixture
def resume(tmp_path, monkeypatch):
    """Resume a run that was started with the shipped settings, less ``missing`` ones, with some changed."""
    tree = to_tree(load_config(CONFIG))
    (tmp_path / run_folder.LATEST).touch()
    state = {"config": tree, "model": {}, "optimizer": {}, "scaler": {}, "step": 3}
    monkeypatch.setattr(run_folder, "load_checkpoint", lambda *_: state)

    def run(*changes, missing=()):
        for block, key in missing:
            del tree[block][key]
        return run_folder.find_checkpoint(tmp_path, load_config(CONFIG, changes), resume=True, overwrite=False)

    return run


@pytest.mark.parametrize(
    "change",
    (
        "evaluation.precision=bf16",
        "model.activation_checkpointing=true",
        "model.camera.activation_checkpointing=true",
        "model.attention.backend=dense",
        "model.lidar.sparse_backend=torch",
        "training.accumulation=2",
    ),
)
def test_how_it_is_computed_may_change(resume, change):
    assert resume(change)["step"] == 3


def test_a_checkpoint_older_than_these_keys_is_resumed(resume):
    missing = (
        ("evaluation", "precision"),
        ("model", "activation_checkpointing"),
        ("training", "accumulation"),
        ("training", "ema_decay"),
        ("training", "lr_batch_size"),
    )
    assert resume(missing=missing)["step"] == 3


@pytest.mark.parametrize("change", ("training.precision=bf16", "model.dropout=0.5"))
def test_what_is_learned_may_not(resume, change):
    with pytest.raises(CheckpointError, match=f"started with other settings: {change.split('=')[0]}: "):
        resume(change)

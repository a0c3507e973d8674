"""Checkpoints: atomic, safe to read, errors that a person can act on."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cmt_aqr.training import checkpoint as module
from cmt_aqr.training.checkpoint import CheckpointError, load_checkpoint, load_into, load_weights, save_checkpoint


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "latest.pt"
    save_checkpoint(path, {"model": {"w": torch.arange(3.0)}, "step": 7})
    state = load_checkpoint(path)
    assert state["step"] == 7 and torch.equal(state["model"]["w"], torch.arange(3.0))
    assert torch.equal(load_weights(path)["w"], torch.arange(3.0))
    assert [entry.name for entry in path.parent.iterdir()] == ["latest.pt"]


def test_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "latest.pt"
    save_checkpoint(path, {"step": 1})
    before = path.read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device; the previous checkpoint is untouched"):
        save_checkpoint(path, {"step": 2})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["latest.pt"]


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)
    save_checkpoint(path, {"step": 1})
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        load_checkpoint(path)


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    path = tmp_path / "harmful.pth"
    torch.save({"model": Harmful()}, path)
    with pytest.raises(CheckpointError, match="needs code to be run"):
        load_weights(path)
    assert capsys.readouterr().out == ""


def test_weights_from_other_containers(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    assert torch.equal(load_weights(tmp_path / "a.safetensors")["w"], torch.ones(2))
    torch.save({"state_dict": {"w": torch.ones(2)}, "meta": {"epoch": 3}}, tmp_path / "b.pth")
    assert torch.equal(load_weights(tmp_path / "b.pth")["w"], torch.ones(2))
    (tmp_path / "c.safetensors").write_bytes(b"12345678 nonsense")
    with pytest.raises(CheckpointError, match="damaged safetensors"):
        load_weights(tmp_path / "c.safetensors")
    torch.save({"step": 3}, tmp_path / "d.pth")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        load_weights(tmp_path / "d.pth")


def test_misfit_names_keys_and_shapes():
    model = nn.Linear(3, 2)
    with pytest.raises(CheckpointError) as caught:
        load_into(model, {"weight": torch.zeros(2, 4), "extra": torch.zeros(1)}, "x.pt")
    assert str(caught.value) == (
        "x.pt: does not fit this model: 1 missing (bias); 1 unexpected (extra); "
        "1 of another shape (weight (2, 4) against (2, 3))"
    )
    load_into(model, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, "x.pt")
    assert model.weight.sum().item() == 6

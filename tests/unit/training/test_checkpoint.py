"""Checkpoints: atomic, with a checksum, safe to read, errors that a person can act on."""

import builtins
import io
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cmt_aqr.training import checkpoint as module
from cmt_aqr.training.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_into,
    load_weights,
    load_weights_and_config,
    save_checkpoint,
)
from tests.e2e.faults.checkpoint_damage import seal

CONFIG = {"name": "tiny", "model": {"width": 3}}


def state(**changes):
    return {"config": CONFIG, "model": {"w": torch.arange(3.0)}, "step": 7, **changes}


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "latest.pt"
    save_checkpoint(path, state())
    loaded = load_checkpoint(path)
    assert loaded["step"] == 7 and torch.equal(loaded["model"]["w"], torch.arange(3.0))
    weights, config = load_weights_and_config(path)
    assert torch.equal(weights["w"], torch.arange(3.0)) and config == CONFIG
    assert [entry.name for entry in path.parent.iterdir()] == ["latest.pt"]


def test_keys_of_earlier_versions_get_their_names_of_today(tmp_path):
    old = {
        "model": {"start": "local", "denoising": {"num_dn": 4, "split": 0.75}, "aqr": None},
        "training": {"up_fraction": 0.4, "momentum_dip": 0.9, "start": 1},
        "data": {"split": "val"},
    }
    new = {
        "model": {"init": "local", "denoising": {"num_dn": 4, "positive_threshold": 0.75}, "aqr": None},
        "training": {
            "schedule": "cyclic",
            "accumulation": 1,
            "lr_batch_size": None,
            "ema_decay": None,
            "compile": False,
            "pct_start": 0.4,
            "min_momentum_ratio": 0.9,
            "start": 1,
        },
        "data": {"split": "val", "failures": []},
    }
    save_checkpoint(tmp_path / "latest.pt", state(config=old))
    assert load_checkpoint(tmp_path / "latest.pt")["config"] == new
    assert load_weights_and_config(tmp_path / "latest.pt")[1] == new


def test_plain_pytorch_reads_the_file(tmp_path):
    save_checkpoint(tmp_path / "a.pt", state())
    for mmap in (False, True):
        assert torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)["model"]["w"].tolist() == [0, 1, 2]


def test_one_changed_bit_anywhere_is_found(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, state())
    good = path.read_bytes()
    rng = random.Random(0)
    # Every byte of the end, where the checksum is, and every 23rd of the rest.
    places = [*range(0, len(good) - 200, 23), *range(len(good) - 200, len(good))]
    for place in places:
        changed = bytearray(good)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: "), place
    for length in range(len(good) - 90, len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(path)


def test_the_checksum_is_described(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, state())
    good = path.read_bytes()
    path.write_bytes(good[:600] + bytes([good[600] ^ 1]) + good[601:])
    with pytest.raises(
        CheckpointError, match=r"a\.pt: damaged: its checksum says SHA-256 \w{8}\.\.\., its content has"
    ):
        load_checkpoint(path)
    path.write_bytes(good[:-5] + b"\xff" + good[-4:])
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(path)


def old_file(path, **changes):
    """A checkpoint as it was before there were checksums."""
    torch.save({"format": "cmt_aqr checkpoint 1", **state(**changes)}, path)
    return path


def test_older_checkpoints_are_read_with_a_note(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    path = old_file(tmp_path / "old.pt")
    assert load_checkpoint(path)["step"] == 7
    expected = f"note: {path} is of an older version, without a checksum of the whole file\n"
    assert capsys.readouterr().err == expected
    monkeypatch.setenv("RANK", "1")
    load_checkpoint(path)
    assert capsys.readouterr().err == ""
    # Their tensors are still protected by the CRCs that torch does not look at.
    content = path.read_bytes()
    place = content.index(torch.arange(3.0).numpy().tobytes())
    path.write_bytes(content[: place + 4] + b"\x01" + content[place + 5 :])
    assert torch.load(path, weights_only=True)["model"]["w"].tolist() != [0, 1, 2]
    with pytest.raises(CheckpointError, match=r"old\.pt: damaged: the record 'old/data/0' does not have its CRC"):
        load_checkpoint(path)


def test_the_checksum_cannot_go_missing(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"format": module.FORMAT, **state()}, path)
    with pytest.raises(CheckpointError, match="damaged: the checksum at its end is missing"):
        load_checkpoint(path)


def test_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "latest.pt"
    save_checkpoint(path, state())
    before = path.read_bytes()

    def full(name, mode):
        builtins.open(name, mode).close()
        return builtins.open("/dev/full", mode)

    # Also larger than the buffers, where torch reports the error.
    for size in (3, 1 << 20):
        with monkeypatch.context() as patch:
            patch.setattr(module, "open", full, raising=False)
            with pytest.raises(CheckpointError) as caught:
                save_checkpoint(path, state(model={"w": torch.zeros(size)}))
        assert str(caught.value) == (
            f"{path}: could not be saved: no space left on device; the previous checkpoint is untouched"
        )
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["latest.pt"]


def test_an_error_of_the_program_is_not_a_full_disk(tmp_path):
    with pytest.raises(Exception, match="pickle") as caught:
        save_checkpoint(tmp_path / "latest.pt", state(model={"w": lambda: 3}))
    assert not isinstance(caught.value, CheckpointError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_never_saved(tmp_path, value):
    path = tmp_path / "latest.pt"
    save_checkpoint(path, state())
    before = path.read_bytes()
    optimizer = {"state": {0: {"exp_avg": torch.tensor([0.0, value])}}}
    for bad, first in (
        ({"model": {"w": torch.zeros(3), "b": torch.tensor([1, value]), "c": torch.tensor(3)}}, "model.b"),
        ({"optimizer": optimizer}, "optimizer.state.0.exp_avg"),
    ):
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(path, state(**bad))
        assert str(caught.value) == (
            f"{path}: not saved: 1 of {3 if 'model' in bad else 2} tensors hold values that are not finite, the first "
            f"is {first}; the previous checkpoint is untouched"
        )
        assert path.read_bytes() == before
    with pytest.raises(CheckpointError, match=r"the first is model\.w$"):
        save_checkpoint(tmp_path / "new.pt", state(model={"w": torch.tensor(value)}))
    assert [entry.name for entry in tmp_path.iterdir()] == ["latest.pt"]


def test_non_finite_weights_are_never_loaded():
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    weights = {"weight": torch.zeros(2, 3), "bias": torch.tensor([0.0, float("nan")])}
    with pytest.raises(CheckpointError) as caught:
        load_into(model, weights, "x.pt")
    assert str(caught.value) == "x.pt: 1 of 2 tensors hold values that are not finite, the first is bias"
    assert torch.equal(model.weight, before)


def test_types_of_weights():
    model = nn.BatchNorm1d(2)
    good = model.state_dict()
    load_into(model, {**good, "weight": torch.tensor([1, 2], dtype=torch.float16)}, "x.pt")
    assert model.weight.dtype == torch.float32 and model.weight.tolist() == [1, 2]
    for name, tensor, sentence in (
        ("weight", torch.ones(2, dtype=torch.int64), "x.pt: weight: expected floating point, got int64"),
        ("weight", torch.ones(2, dtype=torch.bool), "x.pt: weight: expected floating point, got bool"),
        ("num_batches_tracked", torch.tensor(1.0), "x.pt: num_batches_tracked: expected int64, got float32"),
    ):
        with pytest.raises(CheckpointError) as caught:
            load_into(model, {**good, name: tensor}, "x.pt")
        assert str(caught.value) == sentence


def test_foreign_files(tmp_path):
    path = tmp_path / "x.pt"
    for content, sentence in (
        (None, f"{path}: no such file or directory"),
        (b"", f"{path}: the file is empty"),
        (
            b"name: tiny\n",
            f"{path}: neither a checkpoint nor weights: expected a file of torch.save, or of safetensors with the "
            "ending .safetensors; it starts with 'name: ti'",
        ),
        (seal([1]), f"{path}: expected a dictionary, got a list of 1 items"),
        (
            seal({"state_dict": {}}),
            f"{path}: not a checkpoint of this project (format: nothing, expected 'cmt_aqr checkpoint 2'); official "
            "weights go through python -m cmt_aqr.tools.import_checkpoint",
        ),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert str(caught.value) == sentence
    with pytest.raises(CheckpointError, match="is a directory"):
        load_checkpoint(tmp_path)


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    path = tmp_path / "harmful.pth"
    torch.save({"model": Harmful()}, path)
    with pytest.raises(CheckpointError) as caught:
        load_weights(path)
    assert str(caught.value) == (
        f"{path}: refused, it needs code to be run: it holds an object of print; keep tensors, numbers and text only, "
        "as in torch.save(model.state_dict(), ...)"
    )
    assert capsys.readouterr().out == ""


def test_weights_from_other_containers(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    assert torch.equal(load_weights(tmp_path / "a.safetensors")["w"], torch.ones(2))
    torch.save({"state_dict": {"w": torch.ones(2)}, "meta": {"epoch": 3}}, tmp_path / "b.pth")
    assert torch.equal(load_weights(tmp_path / "b.pth")["w"], torch.ones(2))
    file = io.BytesIO()
    torch.save({"w": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    (tmp_path / "legacy.pth").write_bytes(file.getvalue())
    assert torch.equal(load_weights(tmp_path / "legacy.pth")["w"], torch.ones(2))
    (tmp_path / "c.safetensors").write_bytes(b"12345678 nonsense")
    with pytest.raises(CheckpointError, match="damaged safetensors"):
        load_weights(tmp_path / "c.safetensors")
    torch.save({"step": 3}, tmp_path / "d.pth")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        load_weights(tmp_path / "d.pth")
    torch.save({3: torch.ones(2)}, tmp_path / "e.pth")
    with pytest.raises(CheckpointError, match="state dict: expected text as names of tensors, got the key 3"):
        load_weights(tmp_path / "e.pth")


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

"""Every stage that ``python -m cmt_aqr.golden export`` writes in float64 is the original's, where it was recorded."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmt_aqr.golden.__main__ import main
from cmt_aqr.golden.catalogue import ENTRIES, describe, stage_of
from tests.parity import recorded
from tests.parity.exported_cases import exported
from tests.parity.golden import REPOSITORY, SMALL_FOLDER, Golden, golden_dir, load_golden
from tests.parity.recorded import all_cases, write_bundle
from tests.parity.recorded_cases import read_cases

FILES = (
    "backbone3d", "backbone3d_oob", "decode", "head_eval", "head_eval_6task", "head_eval_small", "head_train",
    "head_train_6task", "head_train_small", "image_branch", "image_branch_vov", "lam_windows", "lidar_image_small",
    "transformer_vs_lidar_image",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_an_export_in_float64_equals_the_recorded_stages(name, tmp_path, capsys):
    golden = load_golden(name)
    cases = list(read_cases(golden))
    assert cases
    for case in cases:
        made = exported(golden, case)
        for tensor, expected in case.stages.items():
            stage = f"{case.prefix}golden export, {stage_of(tensor)}"
            if expected.is_floating_point():
                golden.check(stage, made[tensor].double(), expected, case.limit(tensor, "float64"))
            else:
                golden.check_equal(stage, made[tensor].to(expected.dtype), expected)
        write_bundle(case, tmp_path / case.name)
        assert compare(tmp_path / case.name, made, tmp_path) == 0, capsys.readouterr().out
        num_floats = sum(x.is_floating_point() for x in case.stages.values())
        limited = [entry for entry in read_tensors(tmp_path / case.name).values() if entry.get("tolerance")]
        assert len(limited) == num_floats


def compare(bundle, made, folder):
    """Exit status of the command, for tensors computed in float64."""
    save_file({name: x.contiguous() for name, x in made.items()}, folder / "made.safetensors")
    return main(["compare", str(bundle), str(folder / "made.safetensors"), "--precision", "float64"])


def read_tensors(bundle):
    return json.loads((bundle / "manifest.json").read_text())["tensors"]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Bundles of the files that come with the repository."""
    folder = tmp_path_factory.mktemp("recorded")
    for name in ("head_eval_small", "head_train_small", "lam_windows"):
        for case in read_cases(Golden(SMALL_FOLDER / f"{name}.npz")):
            write_bundle(case, folder / case.name)
    return folder


def shifted(x, share):
    """One element a share of the largest value off."""
    x.view(-1)[7] += share * x.abs().max()
    return x


def with_columns(x, change):
    x[:, 6] = change(x[:, 6])
    return x


# Bundle, tensor, mistake, words; the first four are just past their limits.
MISTAKES = {
    "heads": ("head_eval_small", "heads/task0.center", lambda x: shifted(x, 2e-12), ""),
    "losses": ("head_train_small", "losses/d3.loss_bbox", lambda x: x * (1 + 2e-9), ""),
    "gradients": ("head_train_small", "gradients/norms", lambda x: shifted(x, 2e-9), ""),
    "boxes": ("head_eval_small", "boxes/boxes.1", lambda x: shifted(x, 2e-6), ""),
    "matching": ("head_train_small", "losses/assigned", lambda x: x.flip(-1), ""),
    "yaw": ("head_eval_small", "boxes/boxes.0", lambda x: with_columns(x, torch.neg), "yaw sign"),
    "rows": ("lam_windows_w8_5", "windows/camera", lambda x: x[..., [0, 2, 1]], "rows and columns are swapped"),
    "keys": ("lam_windows_w8_5", "bias/indices", lambda x: x[1:], ""),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_past_the_limits_of_a_recorded_bundle(mistake, bundles, tmp_path, capsys):
    name, tensor, change, words = MISTAKES[mistake]
    right = load_file(bundles / name / "float64.safetensors")
    assert compare(bundles / name, right, tmp_path) == 0
    text = capsys.readouterr().out
    assert "limits: 1e-12 of the largest value in float64, 5e-6 in float32" in text
    assert compare(bundles / name, right | {tensor: change(right[tensor].clone())}, tmp_path) == 1
    text = capsys.readouterr().out
    assert f"first stage that differs: {stage_of(tensor)}\n" in text
    assert words in text.partition("likely cause:")[2]


def test_the_page_names_what_was_not_recorded():
    if not golden_dir().is_dir():
        pytest.skip(f"golden folder {golden_dir()} does not exist (set CMT_AQR_GOLDEN)")
    names = {name for case in all_cases() for name in (*case.given, *case.stages)}
    found = {describe(name).names for name in names} | {"weights/*"}
    page = (REPOSITORY / "docs" / "porting.md").read_text()
    table = page.partition("Not recorded:")[2].partition("\n## ")[0]
    listed = {name for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(.+?)`", row)}
    assert listed == {entry.names for entry in ENTRIES} - found


def test_the_command_writes_bundles_and_refuses_a_folder_that_exists(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CMT_AQR_GOLDEN", str(tmp_path / "none"))  # the files of the repository
    monkeypatch.setattr(recorded, "SMALL_FOLDER", tmp_path)
    (tmp_path / "decode.npz").write_bytes((SMALL_FOLDER / "decode.npz").read_bytes())
    assert recorded.main([str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'decode_thr'}: from heads to boxes\n"
    assert len(read_tensors(tmp_path / "out" / "decode_thr")) == 12
    assert recorded.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} exists; choose another folder\n"

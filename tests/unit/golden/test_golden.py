"""The tiny bundle is what the code computes today, and the comparison finds what is wrong with a port's tensors."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cmt_aqr.config import load_config
from cmt_aqr.golden.__main__ import main
from cmt_aqr.golden.bundle import Source
from cmt_aqr.golden.case import draw_detector, random_frame
from cmt_aqr.golden.manifest import TYPICAL
from cmt_aqr.golden.measure import measure
from tests.parity.golden import REPOSITORY
from tests.unit.golden.make_tiny import CONFIG, FOLDER, SETTINGS, export_tiny


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The tiny bundle written anew."""
    folder = tmp_path_factory.mktemp("golden") / "tiny"
    assert export_tiny(folder) == 0
    return folder


@pytest.fixture(scope="module")
def exact():
    """All tensors of the bundle in float64."""
    return load_file(FOLDER / "float64.safetensors")


@pytest.fixture
def port(exact, tmp_path, capsys):
    """Compares the bundle with itself after a change: name -> function; returns exit status and text."""

    def run(changes, *options):
        wrong = {name: x.clone() for name, x in exact.items()}
        for name, change in changes.items():
            wrong[name] = change(wrong[name]).contiguous()
        save_file(wrong, tmp_path / "port.safetensors")
        status = main(["compare", str(FOLDER), str(tmp_path / "port.safetensors"), *options])
        return status, capsys.readouterr().out

    return run


def columns(x, order):
    return x[..., order]


def with_yaw(x, change):
    x[:, 6] = change(x[:, 6])
    return x


def with_sizes(x, change):
    x[:, 3:6] = change(x[:, 3:6])
    return x


def test_the_shipped_bundle_is_what_the_code_computes(tmp_path, capsys):
    """With the shipped weights: drawn ones may round otherwise on another processor."""
    again = tmp_path / "again"
    assert export_tiny(again, "--checkpoint", str(FOLDER / "weights.safetensors")) == 0
    assert main(["compare", str(FOLDER), str(again)]) == 0
    assert main(["compare", str(FOLDER), str(again), "--precision", "float32"]) == 0
    text = capsys.readouterr().out
    assert "within their limits" in text
    assert "limits: 10 times the error of float32 against float64, times 2^-26; integers" in text
    assert "limits: 10 times the error of float32 against float64; integers" in text
    names = (Source(FOLDER).names, Source(again).names)
    assert names[0] == names[1] and len(names[0]) > 300
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2e6


def test_the_drawn_weights_are_the_shipped_ones(fresh):
    drawn, shipped = (load_file(folder / "weights.safetensors") for folder in (fresh, FOLDER))
    assert drawn.keys() == shipped.keys()
    for name, weight in drawn.items():
        torch.testing.assert_close(
            weight, shipped[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_limits_that_were_not_measured_are_called_typical(tmp_path, capsys):
    assert export_tiny(tmp_path / "rough", "--dtype", "float32") == 0
    assert main(["compare", str(tmp_path / "rough"), str(FOLDER), "--precision", "float32"]) == 0
    text = capsys.readouterr().out
    assert (
        "limits: 10 times a typical error of float32 (export float64 and float32 to measure this model's own);" in text
    )


def test_an_export_repeats_itself_bit_by_bit(fresh, tmp_path):
    assert export_tiny(tmp_path / "again") == 0
    for file in fresh.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_limits_follow_from_the_measured_errors(exact):
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    rounded = load_file(FOLDER / "float32.safetensors")
    name = "decoder/hidden"
    error = (exact[name] - rounded[name].double()).abs().max().item()
    entry = manifest["tensors"][name]
    assert entry["error"]["float32"] == error > 0
    least = 2**-23 * exact[name].abs().max().item()
    assert entry["tolerance"]["float32"] == manifest["tolerance_factor"] * max(error, least)
    assert manifest["tensors"]["windows/lidar"]["tolerance"] == {}


# Tensor that is changed, the mistake, and words that name it.
MISTAKES = {
    "rows and columns": ("windows/lidar", lambda x: columns(x, [0, 2, 1]), "rows and columns are swapped"),
    "y before x": ("positions/bev_sine", lambda x: x.roll(16, -1), "the sine embedding has y before x"),
    "half pixel": ("positions/pixels", lambda x: x + torch.tensor([8.0, 8.0, 0.0]), "half-pixel offset"),
    "BGR": ("images/input", lambda x: x.flip(1), "BGR/RGB"),
    "yaw sign": ("boxes/boxes.0", lambda x: with_yaw(x, torch.neg), "yaw sign"),
    "sigmoid twice": ("boxes/scores.0", torch.sigmoid, "sigmoid twice"),
    "log base, lse": ("decoder/layer0.lse", lambda x: x / math.log(2), "this lse has base 2"),
    "log base, sizes": ("boxes/boxes.0", lambda x: with_sizes(x, lambda s: 2 ** s.log()), "raised from base 2"),
    "sigmoid for tanh": ("aqr/weights", lambda x: x.atanh().sigmoid(), "activation of the weights is tanh"),
    "voxel axes": ("voxels/coords", lambda x: columns(x, [0, 3, 2, 1]), "x, y, z instead of z, y, x"),
    "constant factor": ("tokens/values", lambda x: 255 * x, "all values are 255 times"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_at_its_stage_and_named(mistake, port):
    name, change, words = MISTAKES[mistake]
    status, text = port({name: change})
    assert status == 1
    assert f"first stage that differs: {name.partition('/')[0]}\n" in text
    assert f"likely cause: {words}" in text or words in text.partition("likely cause:")[2], text


def test_stretched_windows_are_named(exact, port):
    def stretch(cells):
        points = exact["queries/reference_points"]
        row, col = (points[..., 1] * 8).floor(), (points[..., 0] * 12).floor()
        return torch.stack((torch.zeros_like(row), row, col), -1)[:, :, None].long()

    status, text = port({"windows/lidar": stretch})
    assert status == 1 and "likely cause: stretched windows" in text


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ([0, 1, 3, 4, 2, 5, 6, 7, 8, 9], "read as cx cy cz"),
        ([0, 1, 3, 2, 4, 5, 6, 7, 8, 9], "log width was read before"),
    ],
)
def test_the_order_of_the_box_code_is_named(exact, port, order, words):
    def decode(boxes):
        x, y, z, length, width, height, yaw, vx, vy = boxes.unbind(-1)
        code = [x, y, length.log(), width.log(), z, height.log(), yaw.sin(), yaw.cos(), vx, vy]
        x, y, log_l, log_w, z, log_h, sin, cos, vx, vy = (code[i] for i in order)
        return torch.stack((x, y, z, log_l.exp(), log_w.exp(), log_h.exp(), torch.atan2(sin, cos), vx, vy), -1)

    status, text = port({"boxes/boxes.0": decode})
    assert status == 1 and words in text.partition("likely cause:")[2]


def test_a_difference_that_nothing_explains_names_no_cause(port):
    status, text = port({"tokens/values": lambda x: x + torch.linspace(0, 1, x.numel()).reshape(x.shape) ** 3})
    assert status == 1 and "none of the known mistakes explains it" in text


def test_rows_are_matched_by_name_and_whole_turns_do_not_count(exact, port):
    boxes = torch.arange(len(exact["boxes/queries.0"])).flip(0)
    voxels = torch.arange(len(exact["voxels/coords"])).roll(5)
    changes = {name: lambda x: x[boxes] for name in exact if name.startswith("boxes/")}
    changes |= {name: lambda x: x[voxels] for name in exact if name.startswith("voxels/")}
    changes["boxes/boxes.0"] = lambda x: with_yaw(x[boxes], lambda yaw: yaw + 2 * math.pi)
    assert port(changes)[0] == 0


def test_a_row_too_many_is_found(exact, port):
    changes = {name: lambda x: torch.cat((x, x[:1] * 0)) for name in ("bias/indices", "bias/values")}
    status, text = port(changes)
    assert status == 1 and "1 rows are in B only" in text


def test_a_port_without_any_box_is_compared(exact, port):
    status, text = port({name: lambda x: x[:0] for name in exact if name.startswith("boxes/")})
    assert status == 1 and "boxes/queries.0: 40 rows are in A only" in text


def test_npz_missing_stages_and_layout_hints(exact, tmp_path, capsys):
    port = {"lidar/bev_map": exact["lidar/bev_map"].permute(0, 2, 3, 1).numpy(), "tokens/value": np.zeros(3)}
    np.savez(tmp_path / "port.npz", **port)
    assert main(["compare", str(FOLDER), str(tmp_path / "port.npz")]) == 1
    text = capsys.readouterr().out
    assert "--transpose lidar/bev_map=0,3,1,2" in text and "did you mean tokens/values?" in text
    assert "not in B: inputs" in text and "lidar/encoder" in text
    assert main(["compare", str(FOLDER), str(tmp_path / "port.npz"), "--transpose", "lidar/bev_map=0,3,1,2"]) == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "absent.npz", "no such file"),
        (lambda folder: _file(folder / "x.npz", b"nonsense"), "damaged"),
        (lambda folder: _file(folder / "x.safetensors", b"nonsense"), "damaged"),
        (lambda folder: _file(folder / "x.txt", b""), "expected a folder that 'export' wrote"),
        (lambda folder: folder, "expected a folder that 'export' wrote"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(make, words, tmp_path, capsys):
    assert main(["compare", str(FOLDER), str(make(tmp_path))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def _file(path, content):
    path.write_bytes(content)
    return path


def test_a_folder_is_not_written_over(tmp_path, capsys):
    shutil.copytree(FOLDER, tmp_path / "tiny")
    assert export_tiny(tmp_path / "tiny") == 2
    assert "exists; choose another folder, or add --overwrite" in capsys.readouterr().err


def test_measure_by_hand():
    a = torch.tensor([[1.0, -2.0], [4.0, math.inf]], dtype=torch.float64)
    b = torch.tensor([[1.0, -2.5], [4.25, math.inf]], dtype=torch.float64)
    found = measure(a, b, 0.3)
    assert (found.max_abs, found.past, found.first.index, found.worst.index) == (0.5, 1, (0, 1), (0, 1))
    assert found.max_rel == 0.125 and found.ulp == 0.5 / 2**-22
    one_sided = measure(a, b.nan_to_num(0, 7, 0), 0.3)
    assert one_sided.max_abs == math.inf and one_sided.past == 2


def test_random_weights_do_not_depend_on_spconv(monkeypatch):
    config = load_config("configs/synthetic_tiny.yaml", SETTINGS)
    frame = random_frame(config, num_points=300, num_boxes=1)
    expected = draw_detector(config, 3, frame).state_dict()
    monkeypatch.setattr("cmt_aqr.models.spconv_backend.import_error", lambda: "not here")
    for name, x in draw_detector(config, 3, frame).state_dict().items():
        assert torch.equal(x, expected[name]), name
    assert not draw_detector(config, 3, frame).training


def test_a_table_for_a_page_has_one_line_a_stage(port):
    status, text = port({"decoder/hidden": lambda x: 1.5 * x, "windows/lidar": lambda x: x + 1}, "--markdown")
    rows = {line.split("|")[1].strip(): line.split("|") for line in text.splitlines() if line.startswith("|")}
    assert status == 1 and list(rows)[2:] == [*dict.fromkeys(name.split("/")[0] for name in Source(FOLDER).names)][2:]
    assert rows["decoder"][3:5] == [" 5.0e-01 ", " hidden "] and float(rows["decoder"][5]) == 1
    assert rows["windows"][6] == " 84 of 168 " and rows["tokens"][3] == " 0.0e+00 "


def test_float64_is_exact_whatever_the_attention(tmp_path, capsys):
    """score_mod has no float64, and needs wider heads than those of the tiny model."""
    wide = ("--set", *SETTINGS, "model.num_heads=1", "model.attention.backend=score_mod")
    for name, more in (("plain", ()), ("dense", ("model.attention.backend=dense",))):
        command = ["export", str(CONFIG), str(tmp_path / name), "--points", "300", "--dtype", "float64"]
        assert main([*command, *wide, *more]) == 0
    manifest = json.loads((tmp_path / "plain" / "manifest.json").read_text())
    assert manifest["evaluators"] == {"float64": {"attention": "dense", "sparse encoder": "torch"}}
    assert manifest["machine"]["device"] == "CPU"
    plain, dense = (load_file(tmp_path / name / "float64.safetensors") for name in ("plain", "dense"))
    assert plain.keys() == dense.keys() and "decoder/layer0.lse" in plain
    assert all(torch.equal(plain[name], dense[name]) for name in plain)
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "plain"), str(tmp_path / "dense")]) == 0
    expected = f"float64, torch {torch.__version__}, CPU, attention by dense, sparse encoder by torch)"
    assert expected in capsys.readouterr().out.splitlines()[1]


def test_gradients_of_an_attention_that_has_none_are_refused(tmp_path, capsys):
    command = ["export", str(CONFIG), str(tmp_path / "bundle"), "--train"]
    assert main([*command, "--set", *SETTINGS, "model.num_heads=1", "model.attention.backend=score_mod"]) == 2
    assert capsys.readouterr().err == (
        "error: model.attention.backend is 'score_mod', which has no backward pass on a CPU; with --train use "
        "--set model.attention.backend=dense, or --device cuda\n"
    )
    assert not (tmp_path / "bundle").exists()


def test_the_factor_counts_where_no_manifest_gives_limits(tmp_path, capsys):
    x = torch.arange(1.0, 101)
    for name, factor in (("a", 1), ("b", 1 + 1e-6)):
        save_file({"tokens/values": x * factor}, tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert main(["compare", *files]) == 0
    assert "limits: 1e-5 of the largest value; integers" in capsys.readouterr().out
    assert main(["compare", *files, "--factor", "0.01"]) == 1
    assert "limits: 1e-5 of the largest value, times 0.01 (--factor); integers" in capsys.readouterr().out
    assert main(["compare", str(FOLDER), str(FOLDER), "--factor", "2"]) == 0
    assert "against float64, times 2^-26, times 2 (--factor); integers" in capsys.readouterr().out


def test_the_reference_may_be_less_exact(capsys):
    """Two bundles in float32: both sides are read from that file."""
    assert main(["compare", str(FOLDER), str(FOLDER), "--reference", "float32", "--precision", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "float32" in lines[0] and "float64" not in lines[0]
    hidden = next(line.split() for line in lines if line.startswith("decoder/hidden"))
    assert hidden[2] == "0.0e+00"
    assert main(["compare", str(FOLDER), str(FOLDER), "--reference", "bf16"]) == 2
    assert "holds float64, float32, not bf16; export it with --dtype bf16" in capsys.readouterr().err


def test_what_the_detector_keeps_in_float32_is_so_in_a_bundle_of_bf16(tmp_path):
    assert export_tiny(tmp_path / "both", "--dtype", "float32", "bf16") == 0
    exact, rounded = (load_file(tmp_path / "both" / f"{name}.safetensors") for name in ("float32", "bf16"))
    kept = [name for name in exact if name.startswith(("voxels/", "cameras/", "positions/", "windows/"))]
    kept += [name for name in exact if name.startswith("queries/") and name != "queries/positions"]
    assert {"positions/rays", "positions/bev_sine", "queries/pixels", "queries/is_seen"} <= set(kept)
    assert [name for name in kept if not torch.equal(exact[name], rounded[name])] == []
    assert not torch.equal(exact["tokens/values"].bfloat16(), rounded["tokens/values"].bfloat16())


def test_typical_limits_follow_the_measured_errors_of_the_page():
    """Ten times a typical error must be above the error itself, and not far above."""
    text = (REPOSITORY / "docs" / "numerics.md").read_text(encoding="utf-8")
    lines = text.partition("## float64 against")[2].partition("\n- ")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    measured = {stage: float(error) for stage, error, *_ in rows}
    assert {"lidar", "images", "decoder", "heads", "boxes"} <= measured.keys()
    for stage, error in measured.items():
        assert error <= TYPICAL[stage] <= max(3 * error, 1e-6), stage


def test_compare_does_not_load_what_only_export_needs():
    program = (
        "import sys; from cmt_aqr.golden.__main__ import main; "
        f"status = main(['compare', {str(FOLDER)!r}, {str(FOLDER)!r}]); "
        "assert status == 0 and 'cmt_aqr.golden.measure' in sys.modules; "
        "print([name for name in ('nuscenes', 'torchvision', 'cmt_aqr.build') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.splitlines()[-1] == "[]"

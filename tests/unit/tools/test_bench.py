"""The benches measure what they say: the original's manner computes the same model, differences are found."""

import copy

import pytest
import torch

from cmt_aqr.attention import AttentionBias, bias_values
from cmt_aqr.attention.dense import dense_attention
from cmt_aqr.boxes import Detections
from cmt_aqr.build import build_detector
from cmt_aqr.config import load_config
from cmt_aqr.tools import bench, bench_inference, bench_training
from cmt_aqr.tools.attention_cases import fusion_layout, make_windows
from cmt_aqr.tools.bench_frames import made_up_batch
from cmt_aqr.tools.bench_inference import compare
from cmt_aqr.tools.bench_measure import Measured, covered
from cmt_aqr.tools.bench_original import in_original_manner, masked_attention
from tests.unit.test_inference import SMALL

TINY = [*SMALL, "model.denoising.num_dn=20", "training.precision=fp32"]


def test_covered_time_counts_overlapping_streams_once():
    assert covered([(0, 10), (5, 12), (20, 21), (6, 7), (21, 23)]) == 15
    assert covered([]) == 0


def test_the_mask_is_the_bias():
    layout = fusion_layout((8, 8), (6, 4, 10))
    windows = make_windows(layout, 2, 30, device="cpu")
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 30, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 4, layout.num_tokens, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.randn(2, 30, 2, generator=generator, dtype=torch.float64)
    bias = AttentionBias(windows, bias_values(weights, torch.tensor([2.5]).double(), 5.0))
    torch.testing.assert_close(masked_attention(bias)(q, k, v), dense_attention(q, k, v, bias)[0], rtol=0, atol=1e-12)


def test_the_original_manner_computes_the_same_model():
    config = load_config("configs/synthetic_tiny.yaml", TINY)
    torch.manual_seed(0)
    detector = build_detector(config.model).eval()
    torch.nn.init.normal_(detector.aqr.generator.linear.weight, std=0.5)
    batch = made_up_batch(config, 1)
    inputs = batch.images, batch.points, batch.lidar2img
    original = in_original_manner(detector, with_aqr=True)
    plain = in_original_manner(detector, with_aqr=False)
    assert detector.aqr.backend == "auto" and plain.aqr is None
    with torch.inference_mode():
        expected, found, without = (model(*inputs).logits(0) for model in (detector, original, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (without - expected).abs().max() > 1e-2


def detections(centres, scores, labels):
    boxes = torch.zeros(len(centres), 9)
    boxes[:, 0] = torch.tensor(centres)
    return Detections(boxes, torch.tensor(scores), torch.tensor(labels))


def test_compare_finds_the_largest_differences():
    expected = detections([0.0, 10.0, 20.0, 30.0], [0.9, 0.8, 0.7, 0.05], [1, 1, 2, 3])
    found = detections([10.03, 0.01, 20.0, 50.0], [0.8, 0.88, 0.7, 0.9], [1, 1, 3, 3])
    difference = compare([found], [expected])
    assert difference.centre == pytest.approx(3.0, rel=1e-4)
    assert difference.score == pytest.approx(0.02, abs=1e-6)
    assert (difference.missing, difference.total) == (1, 3)
    same = compare([expected], [copy.deepcopy(expected)])
    assert (same.centre, same.score, same.missing) == (0, 0, 0)


def test_made_up_frames_fit_the_model():
    config = load_config("configs/synthetic_tiny.yaml", TINY)
    first, again, other = (made_up_batch(config, 2, seed=seed) for seed in (0, 0, 1))
    assert first.images.shape == (2, 6, 64, 160, 3) and len(first.points) == len(first.targets) == 2
    assert torch.equal(first.points[1], again.points[1]) and not torch.equal(first.points[1], other.points[1])
    assert not torch.equal(first.points[0], first.points[1])
    low, high = torch.tensor(config.model.point_range).chunk(2)
    centres = torch.cat([targets.boxes[:, :3] for targets in first.targets])
    assert ((centres > low) & (centres < high)).all()


def test_end2end_and_train_print_their_tables(capsys):
    common = ["configs/synthetic_tiny.yaml", "--device", "cpu", "--repeats", "1", "--set", *TINY]
    assert bench.main(["end2end", *common, "--precision", "fp32", "--no-compile"]) == 0
    table = capsys.readouterr().out
    for way in ("ours, AQR", "ours, AQR off", "original's manner, AQR", "original's manner, AQR off"):
        assert f"| {way} |" in table
    assert "| boxes |" in table and "| points |" in table
    assert bench.main(["train", *common]) == 0
    table = capsys.readouterr().out
    header, *rows = [line.split(" | ") for line in table.splitlines() if line.startswith(("| | ", "| ours", "| orig"))]
    assert [row[0] for row in rows] == ["| ours, eager", "| original's manner"]
    losses = [float(row[header.index("loss of the last step")]) for row in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the same weights and steps
    parts = [float(row[header.index("matching and loss, ms")]) for row in rows]
    wholes = [float(row[header.index("median, ms")]) for row in rows]
    assert all(0 < part < whole for part, whole in zip(parts, wholes, strict=True))


@pytest.mark.parametrize("command", ["end2end", "train"])
def test_a_bench_that_is_ended_has_printed_what_it_measured(command, capsys, monkeypatch):
    done = []

    def interrupted(*_, **__):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(True)
        return Measured(12.0, 13.0, None, None)

    monkeypatch.setattr(bench_inference, "measure", interrupted)
    monkeypatch.setattr(bench_training, "measure", interrupted)
    chosen = {"end2end": ["eager", "original"], "train": ["eager", "original"]}[command]
    arguments = ["--device", "cpu", "--repeats", "1", "--no-stages", "--ways", *chosen, "--set", *TINY]
    assert bench.main([command, "configs/synthetic_tiny.yaml", *arguments]) == 130
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("| ours, eager") and "| 12.0" in last


def test_end2end_measures_the_chosen_ways_only(capsys):
    arguments = ["--device", "cpu", "--repeats", "1", "--precision", "fp32", "--no-stages", "--ways", "eager"]
    assert bench.main(["end2end", "configs/synthetic_tiny.yaml", *arguments, "--set", *TINY]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ") and "median" not in line] == [
        "| ours, eager, AQR"
    ]
    assert not any(line.startswith("stages") for line in lines)

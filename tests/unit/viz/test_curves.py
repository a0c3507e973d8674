"""Curves: the lines in the picture have the values of the log."""

import numpy as np
import pytest

from cmt_aqr.viz.curves import curves_figure, draw_curves, series, smoothed


def spread(mean: float) -> dict:
    return {"mean": mean, "std": 0.5, "min": mean - 2, "max": mean + 3}


def log(offset: float = 0.0) -> list[dict]:
    """A log of two epochs."""
    lines = [
        {"kind": "train", "step": 10 * i, "epoch": i / 10, "loss": 20.0 - i + offset, "lr": i / 1000, "grad_norm": 3.0}
        for i in range(1, 21)
    ]
    lines[4]["loss"] = None  # not finite
    for epoch in (1, 2):
        lines.append({"kind": "eval", "step": 0, "epoch": epoch, "mAP": 0.1 * epoch + offset, "NDS": 0.2 * epoch})
        lines.append({
            "kind": "probe", "step": 0, "epoch": epoch, "bias_lidar": spread(epoch + offset),
            "bias_camera": spread(-epoch), "scale": 2.5 + offset, "attention_change": 0.1 * epoch,
        })  # fmt: skip
    lines.append({"kind": "eval", "step": 0, "epoch": 3, "error": "full disk"})
    return lines


def panel(figure, part: str):
    (axis,) = [axis for axis in figure.axes if part in axis.get_title(loc="left")]
    return axis


def drawn(axis, colour: str) -> list[list[tuple[float, float]]]:
    return [line.get_xydata().tolist() for line in axis.get_lines() if line.get_color() == colour]


def test_lines_are_those_of_the_logs():
    runs = {"a": log(), "b": log(0.25)}
    figure = curves_figure(runs)
    assert [axis.get_title(loc="left").split(" (")[0] for axis in figure.axes] == [
        "loss", "learning rate", "validation scores", "gradient norm, before clipping", "AQR bias of LiDAR",
        "AQR bias of cameras", "AQR scale", "AQR change of the attention, mean of all layers",
    ]  # fmt: skip
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    colours = [handle.get_color() for handle in legend.get_lines()]
    assert len(set(colours)) == 2
    for (name, lines), colour, offset in zip(runs.items(), colours, (0, 0.25), strict=True):
        raw, strong = (np.array(line) for line in drawn(panel(figure, "loss"), colour))
        losses = [(line["epoch"], line["loss"]) for line in lines if line["kind"] == "train"]
        expected = [(epoch, np.nan if loss is None else loss) for epoch, loss in losses]
        np.testing.assert_array_equal(raw, expected)
        assert strong[-1].tolist() == [2.0, pytest.approx(2 + offset)], name  # mean of the last five: 4, 3, 2, 1, 0
        assert drawn(panel(figure, "learning rate"), colour)[0][9] == [1.0, 0.01]
        mean_ap, nds = drawn(panel(figure, "validation scores"), colour)
        assert mean_ap == [[1, 0.1 + offset], [2, 0.2 + offset]] and nds == [[1, 0.2], [2, 0.4]]
        mean, low, high = drawn(panel(figure, "bias of LiDAR"), colour)
        assert [mean[1], low[1], high[1]] == [[2, 2 + offset], [2, offset], [2, 5 + offset]]
        assert drawn(panel(figure, "bias of cameras"), colour)[0] == [[1, -1], [2, -2]]
        assert drawn(panel(figure, "scale"), colour) == [[[1, 2.5 + offset], [2, 2.5 + offset]]]
        assert drawn(panel(figure, "change"), colour) == [[[1, 0.1], [2, 0.2]]]
    band = panel(figure, "bias of LiDAR").collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (0.5, 2.5)  # 1 - 0.5 to 2 + 0.5


def test_a_log_without_probe_and_evaluation_has_no_panels_for_them():
    lines = [line for line in log() if line["kind"] == "train"]
    assert len(curves_figure({"a": lines}).axes) == 4  # three, and an empty place
    assert sum(axis.get_visible() for axis in curves_figure({"a": lines}).axes) == 3
    with pytest.raises(ValueError, match="no log has a line of training, evaluation or probe"):
        curves_figure({"a": []})


def test_a_run_is_told_by_its_stroke_where_colours_repeat():
    figure = curves_figure({str(i): log() for i in range(8)})
    marks = [(line.get_color(), line.get_linestyle()) for line in figure.legends[0].get_lines()]
    assert len(set(marks)) == 8 and len({colour for colour, _ in marks}) == 6


def test_the_mean_leaves_out_what_is_not_finite():
    values = np.array([1.0, np.nan, 3.0])
    assert smoothed(values).tolist() == [2, 2, 2]
    assert np.isnan(smoothed(np.array([np.nan]))).all()
    assert series(log(), "eval", "mAP")[0].tolist() == [1, 2]  # the failed one is left out


def test_the_picture_is_legible_at_1600_pixels(tmp_path):
    import cv2

    shape = cv2.imread(str(draw_curves({"a": log()}, tmp_path / "c.png", title="t"))).shape
    assert 1600 <= shape[1] <= 1700
    axes = curves_figure({"a": log()}).axes
    texts = [text for axis in axes for text in (axis.yaxis.label, axis.xaxis.label, *axis.get_yticklabels())]
    assert min(text.get_fontsize() for text in texts) * 140 / 72 > 16  # points at 140 dots an inch -> pixels
    # Two runs that end with the same scores: nothing is written over each other, the title tells the marks.
    assert [text for axis in curves_figure({"a": log(), "b": log()}).axes for text in axis.texts] == []

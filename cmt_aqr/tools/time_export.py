"""Latency of a file of tools.export for one frame, beside that of the compiled pipeline of evaluation."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cmt_aqr.build import build_detector
from cmt_aqr.config import config_from_tree
from cmt_aqr.golden.bundle import WEIGHTS, Source
from cmt_aqr.inference import InferencePipeline
from cmt_aqr.jobs import decoding_of, load_model
from cmt_aqr.models.voxels import pad_points
from cmt_aqr.precision import PRECISIONS
from cmt_aqr.tools.bench_measure import Measured, describe_machine, measure, number
from cmt_aqr.tools.bench_timing import capture

Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def latency_table(
    model: Run, about: dict[str, str], inputs: dict[str, Tensor], bundle: Source, *, repeats: int, compiled: bool = True
) -> Iterator[str]:
    """Lines of a Markdown table: from the frame in host memory to the boxes there, as ``bench end2end`` measures.

    Args:
        model: the file as a function.
        about: its metadata.
        inputs: of the model, in its sizes and on its device.
        bundle: frame and weights.
        compiled: whether the pipeline is compiled; False is for a first look on a CPU.
    """
    device = torch.device(about["device"])
    yield f"{about['config']}, {describe_machine(device)}, {about['precision']}, batch 1\n"
    yield "| | median, ms | p99, ms | GPU busy, ms | peak, MiB | median / pipeline's |"
    yield "|---|---|---|---|---|---|"
    frame = host_frame(bundle, device)
    pipeline = make_pipeline(about, bundle, device, compiled=compiled)
    given = (frame.get("images"), [frame["points"]] if "points" in frame else None, frame.get("lidar2img"))
    base = measure(lambda: pipeline(*given), device, repeats=repeats, profiled=True)
    yield table_line("compiled pipeline" if compiled else "pipeline", base, base)
    buffers = {name: x.clone() for name, x in inputs.items()}
    ours = measure(HostCall(model, frame, buffers), device, repeats=repeats, profiled=True)
    yield table_line(about["form"], ours, base)
    if device.type == "cuda":
        replayed = HostCall(capture_program(model, buffers), frame, buffers)
        graph = measure(replayed, device, repeats=repeats, profiled=True)
        yield table_line(f"{about['form']}, one CUDA graph", graph, base)


def host_frame(bundle: Source, device: torch.device) -> dict[str, Tensor]:
    """The frame of a bundle under the names of a program's inputs; page-locked where there is a GPU."""
    names = {"images": "inputs/images", "points": "inputs/points.0", "lidar2img": "inputs/lidar2img"}
    found = {name: bundle[key] for name, key in names.items() if key in bundle}
    return {name: x.pin_memory() for name, x in found.items()} if device.type == "cuda" else found


def make_pipeline(about: dict[str, str], bundle: Source, device: torch.device, *, compiled: bool) -> InferencePipeline:
    """The pipeline of evaluation with the weights of the bundle and the precision of the file."""
    config = config_from_tree(bundle.manifest["config"], str(bundle.path))
    detector = build_detector(config.model)
    load_model(detector, config, bundle.path / f"{WEIGHTS}.safetensors")
    return InferencePipeline(
        detector.to(device).eval(),
        decoding=decoding_of(config),
        batch_size=1,
        precision=PRECISIONS[about["precision"]],
        compiled=compiled,
    )


class HostCall:
    """Calls a program with a frame in host memory and returns boxes in host memory."""

    def __init__(self, model: Run, frame: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
        self._model, self._frame, self._buffers = model, frame, buffers

    @torch.inference_mode()
    def __call__(self) -> dict[str, Tensor]:
        """Results by name."""
        for name, buffer in self._buffers.items():
            if name == "points":
                pad_points([self._frame[name]], buffer)
            else:
                buffer.copy_(self._frame[name], non_blocking=True)
        return {name: x.cpu() for name, x in self._model(self._buffers).items()}


@torch.inference_mode()
def capture_program(model: Run, buffers: dict[str, Tensor]) -> Run:
    """The program as one CUDA graph, which reads the buffers and ignores its argument."""
    outputs = {}
    graph = capture(lambda: outputs.update(model(buffers)))

    def replay(_: dict[str, Tensor]) -> dict[str, Tensor]:
        graph.replay()
        return outputs

    return replay


def table_line(name: str, measured: Measured, base: Measured) -> str:
    """One line of the table."""
    cells = [number(measured.median, 2), number(measured.p99, 2), number(measured.busy, 2), number(measured.peak, 0)]
    return f"| {name} | {' | '.join(cells)} | {measured.median / base.median:.2f} |"

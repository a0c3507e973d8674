"""Write tests/parity/small/: parts of the golden files, small enough to lie in the repository.

    python -m tests.parity.make_small

- head_train_small: the training case, six decoder layers: denoising queries, predictions, assignments, losses, norms of
  all gradients and the small gradients whole.
- head_eval_small, lidar_image_small: the cases in evaluation mode with both sensors, LiDAR alone and cameras alone.
- lam_windows: the windows of the published AQR, whole.
- decode: the detections of the case with a score threshold.

Weights and inputs were drawn, and are kept as what was drawn (draws.py). Of the large stages there are some rows each;
a mistake in a stage changes all of its rows.

`CMT_AQR_GOLDEN` names the folder of the whole files.
"""

import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.parity.draws import find_draw, last_bits
from tests.parity.golden import SMALL_FOLDER, Golden, golden_dir

# What is kept of large stages: name -> index. Queries at equal distances, corners and the middle of the grids, and of
# the camera maps the first and the last view and one between.
BEV_CELLS, PV_CELLS = np.s_[:, :, (0, 7, 15), (15, 3, 15)], np.s_[(0, 4, 11), :, (0, 2, 3), (9, 4, 0)]
ROWS = {
    "x_shared": BEV_CELLS,
    "bev_pos_embeds": np.s_[(0, 15, 137, 255),],
    "rv_pos_embeds": np.s_[(0, 4, 11), (0, 2, 3), (9, 4, 0)],
    "bev_query_embeds": np.s_[:, ::13],
    "rv_query_embeds": np.s_[:, ::13],
    "outs_dec": np.s_[:, :, ::13],
    "grad_in/x": BEV_CELLS,
    "grad_in/x_img": PV_CELLS,
}
# Prefixes of the two cases in one file.
PARTS = ("lidar/", "image/")
MAX_GRADIENT = 4096  # bytes; larger ones are left out, their norms are there


def main() -> int:
    """Write the files; returns the exit status."""
    if not golden_dir().is_dir():
        print(f"error: golden folder {golden_dir()} does not exist (set CMT_AQR_GOLDEN)", file=sys.stderr)
        return 2
    SMALL_FOLDER.mkdir(exist_ok=True)
    total = 0
    for name, arrays in small_files():
        path = SMALL_FOLDER / f"{name}.npz"
        write_npz(path, with_draws(arrays))
        total += path.stat().st_size
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
    print(f"{total / 1e3:.0f} kB in all")
    return 0


def small_files() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Name and arrays of every small file."""
    for name, whole in (
        ("head_train_small", "head_train"),
        ("head_eval_small", "head_eval"),
        ("lidar_image_small", "transformer_vs_lidar_image"),
    ):
        golden = Golden(golden_dir() / f"{whole}.npz")
        yield name, dict(item for key in golden.names for item in kept(golden, key))
    windows = Golden(golden_dir() / "lam_windows.npz")
    yield "lam_windows", {name: windows[name] for name in windows.names}
    decode = Golden(golden_dir() / "decode.npz")
    yield "decode", {name: decode[name] for name in decode.names if name.startswith("thr/")}


def kept(golden: Golden, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of what is kept of an array, if anything is."""
    part = next((name.removeprefix(prefix) for prefix in PARTS if name.startswith(prefix)), name)
    start = name.removesuffix(part)
    run, _, stage = part.partition("/")
    value = golden[name]
    is_large_gradient = stage.startswith("grad/") and value.nbytes > MAX_GRADIENT
    if run == "out64" and stage in ROWS:
        yield f"{start}rows/{stage}", value[ROWS[stage]]
    elif stage.startswith("loss/") or (run != "out32" and not is_large_gradient):
        yield name, value


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """As ``np.savez_compressed``, a few percent smaller, and the same bytes for the same arrays."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # with a fixed date
            entry.compress_type = zipfile.ZIP_LZMA
            with archive.open(entry, "w") as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def with_draws(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays with what was drawn replaced by its draw, in the case's order; :class:`Golden` reads it back."""
    seeds = {name: json.loads(str(value))["seed"] for name, value in arrays.items() if name.endswith("meta_json")}
    written, draws, bits = {}, {}, []
    for name, value in arrays.items():
        prefix = next((part for part in PARTS if name.startswith(part)), "")
        is_input = name.removeprefix(prefix).startswith(("sd/", "in/")) and prefix + "meta_json" in seeds
        draw = find_draw(value, seeds[prefix + "meta_json"]) if is_input else None
        if draw is None:
            written[name] = value
        else:
            draws[name] = draw.to_json()
            bits.append(last_bits(value, draw))
    if not draws:
        return written
    return written | {"draws_json": np.array(json.dumps(draws)), "draws_bits": np.concatenate(bits)}


if __name__ == "__main__":
    sys.exit(main())

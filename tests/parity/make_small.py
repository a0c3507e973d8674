"""Write tests/parity/small/: parts of the golden files, small enough to lie in the repository.

    python -m tests.parity.make_small

- head_train_layer0: the training case with the first of its six decoder layers. No layer depends on a later one, so the
  recorded predictions, assignments and losses of layer 0 are those of a detector with one layer. Gradients are left
  out, since they come from all six. Of the stages between (shared convolution, positions, output of the decoder) there
  are a few rows each, to save space; a mistake in a stage changes all of its rows.
- lam_windows: the windows of the published AQR, whole.
- decode: the detections of the case with a score threshold.

A case in evaluation mode does not fit into the megabyte beside them: every recorded case has weights of its own, of
which a detector with one layer takes 640 kB compressed, and the inputs of one sample 90 kB. Evaluation differs from the
training case by the statistics of one batch norm and by the absence of denoising queries; the whole set has it
(head_eval).

`CMT_AQR_GOLDEN` names the folder of the whole files.
"""

import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.parity.golden import SMALL_FOLDER, Golden, golden_dir

NUM_LAYERS = 6
TRAINING_CASE = "head_train"
LAYER0 = "head_train_layer0"
# Arrays of the training case that every layer shares.
SHARED = ("in/", "out/dn/", "out/task0/", "out64/dn/")
# Rows of the stages between inputs and heads that are kept: name -> index. Denoising and matching queries, corners and
# the middle of the grids, and of the camera maps the first and the last view.
ROWS = {
    "x_shared": np.s_[:, :, (0, 7, 15), (15, 3, 15)],
    "bev_pos_embeds": np.s_[(0, 15, 137, 255),],
    "rv_pos_embeds": np.s_[(0, 4, 11), (0, 2, 3), (9, 4, 0)],
    "outs_dec": np.s_[:1, :, (0, 55, 56, 115)],
    "bn_after/running_mean": np.s_[:],
    "bn_after/running_var": np.s_[:],
}
TERMS = ("loss_cls", "loss_bbox", "dn_loss_cls", "dn_loss_bbox")


def main() -> int:
    """Write the files; returns the exit status."""
    if not golden_dir().is_dir():
        print(f"error: golden folder {golden_dir()} does not exist (set CMT_AQR_GOLDEN)", file=sys.stderr)
        return 2
    SMALL_FOLDER.mkdir(exist_ok=True)
    total = 0
    for name, arrays in small_files():
        path = SMALL_FOLDER / f"{name}.npz"
        write_npz(path, arrays)
        total += path.stat().st_size
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
    print(f"{total / 1e3:.0f} kB in all")
    return 0


def small_files() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Name and arrays of every small file."""
    yield LAYER0, first_layer(Golden(golden_dir() / f"{TRAINING_CASE}.npz"))
    windows = Golden(golden_dir() / "lam_windows.npz")
    yield "lam_windows", {name: windows[name] for name in windows.names}
    decode = Golden(golden_dir() / "decode.npz")
    yield "decode", {name: decode[name] for name in decode.names if name.startswith("thr/")}


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """As ``np.savez_compressed``, a few percent smaller, and the same bytes for the same arrays."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # with a fixed date
            entry.compress_type = zipfile.ZIP_LZMA
            with archive.open(entry, "w") as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def first_layer(golden: Golden) -> dict[str, np.ndarray]:
    """The training case as that of a detector with one decoder layer."""
    arrays = {"meta_json": np.array(json.dumps(golden.meta | {"num_layers": 1}))}
    for name in golden.names:
        value, part = golden[name], name.removeprefix("out64/")
        if part in ROWS and part != name:
            arrays[f"rows/{part}"] = value[ROWS[part]]
        elif name.startswith(SHARED):
            arrays[name] = value
        elif name.startswith("sd/task_heads."):  # (layers x channels, ...), layer after layer
            arrays[name] = value[: len(value) // NUM_LAYERS]
        elif name.startswith("sd/"):
            if "decoder.layers." not in name or "decoder.layers.0." in name:
                arrays[name] = value
        elif part.startswith("task0/") or name.startswith("out/assign/"):
            arrays[name] = value[:1]
    for term in TERMS:
        arrays[f"out64/loss/{term}"] = golden[f"out64/loss/d0.{term}"]
        arrays[f"out32/loss/{term}"] = golden[f"out32/loss/d0.{term}"]
    arrays["out64/loss/total"] = sum(golden[f"out64/loss/d0.{term}"] for term in TERMS)
    return arrays


if __name__ == "__main__":
    sys.exit(main())

"""A port of everything after the two branches in NumPy, written from docs/porting.md and a bundle's manifest alone.

python -m tests.port_numpy.port BUNDLE OUT.safetensors [--dtype float32]
python -m cmt_aqr.golden compare BUNDLE OUT.safetensors --precision float64

It shares no code with the package, on purpose. Given are the maps of the branches, the calibration and, in training,
the denoising queries; computed are positions, tokens, queries, windows, weights, bias, decoder, heads and boxes.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy import ndarray
from safetensors.numpy import save_file

from .aqr import find_bias, find_weights, find_windows, modulate
from .decoder import decode, predict, select_boxes
from .model import Model
from .tokens import make_queries, make_tokens


def run(model: Model) -> dict[str, ndarray]:
    """All tensors that the port computes, by their names in the bundle."""
    made: dict[str, ndarray] = {}
    make_tokens(model, made)
    make_queries(model, made)
    bias = None
    if model.aqr is not None:
        find_windows(model, made)
        find_weights(model, made)
        if model.aqr["design"] == "bias":
            bias = find_bias(model, made)
        else:
            modulate(model, made)
    decode(model, bias, made)
    predict(model, made)
    select_boxes(model, made)
    return {name: np.ascontiguousarray(x) for name, x in made.items()}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.port_numpy.port", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("out", type=Path, metavar="OUT", help=".safetensors file to write")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--mistake", default="", help="one of MISTAKES in test_port.py, made on purpose")
    options = parser.parse_args(arguments)
    save_file(run(Model(options.bundle, options.dtype, options.mistake)), options.out)


if __name__ == "__main__":
    main()

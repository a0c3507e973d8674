"""Damaged checkpoints through the scripts as a user starts them: each must be refused with one sentence.

    python -m tests.e2e.faults.checkpoints --count 200

A small run is trained, then its latest.pt (and the same weights as safetensors, as the import writes them) is damaged
in every way of ``checkpoint_damage`` and given to ``train.py --resume``, ``test.py --checkpoint`` or
``training.init_from``. Prints a table of kinds and outcomes; exit status 1 where a damaged checkpoint was loaded, or a
script ended in a traceback, did not end, or said something else than one sentence with the file.
"""

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as save_safetensors

import test as test_script
import train as train_script
from cmt_aqr.training.checksum import METADATA, add_checksum
from tests.e2e.conftest import CONFIG, SMALL
from tests.e2e.faults.checkpoint_damage import BYTES, OTHER_FILES, RUN, WEIGHTS, damage, unseal

REFUSED, LOADED, TRACEBACK, HANG, OTHER = "refused", "loaded", "traceback", "hang", "other words"
COMMON = (str(CONFIG), "--device", "cpu")
# Seconds that a script may take to refuse a file.
LIMIT = 60
SENTENCE_LENGTH = 600


class _TimeIsUp(BaseException):
    """Not an Exception: nothing on the way may catch it."""


@dataclass(frozen=True)
class Case:
    """One damaged file and who reads it.

    Attributes:
        row: of the table.
        group, kind: of ``checkpoint_damage.damage``.
        reader: resume, test or init_from.
        is_safetensors: damage the safetensors file instead.
    """

    row: str
    group: str
    kind: str
    reader: str
    is_safetensors: bool = False


@dataclass(frozen=True)
class Base:
    """A trained run: its folder, settings and the two good files."""

    folder: Path
    settings: tuple[str, ...]
    checkpoint: bytes
    safetensors: bytes


def make_base(folder: Path) -> Base:
    """Write the world and train one epoch."""
    settings = (*SMALL, f"data.root={folder / 'world'}", f"data.index_dir={folder / 'index'}")
    run = folder / "good"
    status, text = call("train", [*COMMON, "--work-dir", str(run), "--max-steps", "3"], settings)
    assert status == 0, text
    checkpoint = (run / "latest.pt").read_bytes()
    weights = save_safetensors(unseal(checkpoint)["model"], metadata={"format": "pt", **METADATA})
    return Base(folder, settings, checkpoint, add_checksum(weights))


def make_cases(count: int) -> list[Case]:
    """Every malformed content and every other file once, the rest of ``count`` random damages of bytes."""
    both = ("resume", "test")
    cases = [
        *(Case(f"content: {_part(kind)}", "content", kind, "resume") for kind in RUN),
        *(Case(f"content: {_part(kind)}", "content", kind, both[i % 2]) for i, kind in enumerate(WEIGHTS)),
        *(Case("another file", "file", kind, both[i % 2]) for i, kind in enumerate(OTHER_FILES)),
    ]
    readers = ("resume", "test", "init_from")
    kinds = [(kind, is_safetensors) for is_safetensors in (False, True) for kind in BYTES]
    kinds.remove(("one bit of the end record or checksum", True))  # a zip file's
    number = 0
    while len(cases) < count:
        kind, is_safetensors = kinds[number % len(kinds)]
        reader = readers[1 + number % 2] if is_safetensors else readers[number % 3]
        row = f"safetensors: {kind}" if is_safetensors else kind
        cases.append(Case(row, "bytes", kind, reader, is_safetensors))
        number += 1
    return cases[:count] if count < len(cases) else cases


def _part(kind: str) -> str:
    """The part of the state that a kind of malformed content belongs to."""
    for part in ("step", "scaler", "config"):
        if part in kind:
            return part
    return "optimizer" if kind in RUN else "weights"


def observe(base: Base, case: Case, number: int, seed: int) -> tuple[str, str]:
    """Damage, read; returns the outcome and what was printed."""
    good = base.safetensors if case.is_safetensors else base.checkpoint
    content = damage(good, case.group, case.kind, random.Random(f"{seed} {number}"))
    folder = base.folder / f"case {number}"
    folder.mkdir()
    path = folder / ("weights.safetensors" if case.is_safetensors else "latest.pt")
    path.write_bytes(content)
    settings = base.settings
    if case.reader == "resume":
        script, arguments = "train", [*COMMON, "--work-dir", str(folder), "--resume"]
    elif case.reader == "test":
        script, arguments = "test", [*COMMON, "--checkpoint", str(path), "--out", str(folder / "out")]
    else:
        script, arguments = "train", [*COMMON, "--work-dir", str(folder / "new"), "--max-steps", "1"]
        settings = (*settings, f"training.init_from={path}")
    try:
        status, text = call(script, arguments, settings)
    except _TimeIsUp:
        return HANG, traceback.format_exc(limit=-3)
    except Exception:
        return TRACEBACK, traceback.format_exc(limit=-6)
    is_sentence = text.startswith("error: ") and text.count("\n") == 1 and len(text) < SENTENCE_LENGTH
    if status == 2 and is_sentence and str(path) in text and "weights_only" not in text:
        return REFUSED, text.strip().removeprefix("error: ").replace(f"{path.parent}/", "")
    return (LOADED if status == 0 else OTHER), text


def call(script: str, arguments: list[str], settings: tuple[str, ...]) -> tuple[int, str]:
    """Run a script in this process; returns its exit status and standard error."""

    def stop(signum: int, frame: object) -> None:
        raise _TimeIsUp

    previous, argv = signal.signal(signal.SIGALRM, stop), sys.argv
    sys.argv = [f"{script}.py", *arguments, "--set", *settings]
    err = io.StringIO()
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            status = {"train": train_script, "test": test_script}[script].main()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        sys.argv = argv
    return status, err.getvalue()


def table(cases: list[Case], outcomes: list[tuple[str, str]]) -> str:
    """Rows of the table in Markdown, with the shortest sentence of each as an example."""
    results = (REFUSED, LOADED, TRACEBACK, HANG, OTHER)
    lines = [f"| damage | {' | '.join(results)} | for example |", "|---|" + "---|" * (len(results) + 1)]
    total: Counter = Counter()
    for row in dict.fromkeys(case.row for case in cases):
        found = [outcome for case, outcome in zip(cases, outcomes, strict=True) if case.row == row]
        counts = Counter(result for result, _ in found)
        total += counts
        example = min((text for result, text in found if result == REFUSED), key=len, default="")
        lines.append(f"| {row} | {' | '.join(str(counts[name]) for name in results)} | {example.replace('|', '/')} |")
    lines.append(f"| **all {len(cases)}** | {' | '.join(str(total[name]) for name in results)} | |")
    return "\n".join(lines)


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="damaged checkpoints (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random damages (default: %(default)s)")
    options = parser.parse_args()
    os.environ.pop("RANK", None)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder))
        cases = make_cases(options.count)
        outcomes = [observe(base, case, number, options.seed) for number, case in enumerate(cases)]
    print(table(cases, outcomes))
    failed = [(case, outcome) for case, outcome in zip(cases, outcomes, strict=True) if outcome[0] != REFUSED]
    for case, (result, text) in failed:
        print(f"\n{case}: {result}\n{text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

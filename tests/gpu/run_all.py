"""Runs all GPU tests within a time limit, and continues where an earlier call at the same commit was stopped.

    python -m tests.gpu.run_all --outcomes gpu_tests.jsonl --limit 550

prints the messages of the failures, the tests that are not finished, and a row for docs/gpu_tests.md. Compiling takes
most of the time, so several processes share it, and all GPUs (``-n``, with pytest-xdist).
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parents[1]
PYTEST = (sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outcomes", type=Path, required=True, help="file of the outcomes so far; made where missing")
    parser.add_argument("--limit", type=float, default=550, help="seconds after which the run is stopped")
    parser.add_argument("-n", type=int, default=8, help="processes")
    parser.add_argument("--commit", default=None, help="the commit's name, where the folder is not a git repository")
    parser.add_argument("--times", type=Path, help="outcomes of an earlier run: its slowest tests begin first")
    parser.add_argument("--all", action="store_true", help="also run what has passed or was skipped before")
    arguments = parser.parse_args()
    wanted = collect()
    arguments.outcomes.parent.mkdir(parents=True, exist_ok=True)
    finished = {} if arguments.all else read_outcomes(arguments.outcomes)
    rest = [test for test in wanted if finished.get(test, {}).get("outcome") not in ("passed", "skipped")]
    if rest:
        run(slowest_first(rest, read_outcomes(arguments.times) if arguments.times else {}), arguments)
    return report(wanted, read_outcomes(arguments.outcomes), arguments)


def collect() -> list[str]:
    """Names of all GPU tests."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(FOLDER),
        "-m",
        "gpu",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    names = [line for line in output.stdout.splitlines() if "::" in line]
    if output.returncode or not names:
        sys.exit(f"the tests of {FOLDER} cannot be collected:\n{output.stdout}\n{output.stderr}")
    return names


def slowest_first(tests: list[str], outcomes: dict[str, dict]) -> list[str]:
    """The tests in the order of their times, longest first, those without a time before all."""
    return sorted(tests, key=lambda test: -outcomes.get(test, {"seconds": float("inf")})["seconds"])


def run(tests: list[str], arguments: argparse.Namespace) -> None:
    """Run the tests, at most ``arguments.limit`` seconds."""
    # One test at a time: with longer lists a process is left alone with several slow ones in the end.
    command = [*PYTEST, *tests, "-q", "-n", str(arguments.n), "--dist", "load", "--maxschedchunk", "1"]
    command += ["--outcomes", str(arguments.outcomes.resolve())]
    # References on the CPU: without a limit every process would use all cores, and the run takes three times as long.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
    try:
        process.wait(arguments.limit)
    except subprocess.TimeoutExpired:
        print(f"stopped after {arguments.limit:g} s", flush=True)
        process.kill()
        process.wait()


def read_outcomes(path: Path) -> dict[str, dict]:
    """The last outcome of each test."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["test"]: line for line in lines}


def report(wanted: list[str], outcomes: dict[str, dict], arguments: argparse.Namespace) -> int:
    """Print what failed, what is left, and the table's row; 0 where everything passed or was skipped."""
    counts = Counter(outcomes[test]["outcome"] if test in outcomes else "left" for test in wanted)
    for test in wanted:
        if outcomes.get(test, {}).get("outcome") == "failed":
            print(f"\nFAILED {test} ({outcomes[test]['seconds']} s)\n{outcomes[test]['message']}")
    for test in wanted:
        if test not in outcomes:
            print(f"not finished: {test}")
    slowest = sorted(outcomes.values(), key=lambda line: -line["seconds"])[:5]
    print("slowest: " + ", ".join(f"{line['test'].split('/')[-1]} {line['seconds']} s" for line in slowest))
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    hardware = f"{card}, Python {sys.version.split()[0]}, torch {torch.__version__}"
    numbers = " | ".join(str(counts[name]) for name in ("passed", "failed", "skipped", "left"))
    command = f"`python -m tests.gpu.run_all -n {arguments.n}`"
    print(f"| `{arguments.commit or read_commit()}` | {datetime.date.today()} | {hardware} | {command} | {numbers} |")
    return 1 if counts["failed"] or counts["left"] else 0


def read_commit() -> str:
    """The commit that is checked out."""
    command = ("git", "rev-parse", "--short", "HEAD")
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

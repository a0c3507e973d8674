"""python -m cmt_aqr: the commands, one a line, from the first lines of their files."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from cmt_aqr import __version__
from cmt_aqr.errors import UserError, report_errors

PACKAGE = Path(__file__).parent
IS_PROGRAM = '\nif __name__ == "__main__":\n'


def main() -> int:
    """Print the list; returns the exit status."""
    return report_errors(
        lambda: show(
            "cmt_aqr",
            f"cmt_aqr {__version__}: camera + LiDAR 3D object detection (CMT) with the AQR attention bias",
            [*scripts(), *programs(PACKAGE)],
            "Each of them takes --help. In Python: from cmt_aqr import Predictor. README.md begins with two commands, "
            "docs/guide.md goes from data to results.",
        )
    )


def show(name: str, head: str, rows: Iterable[tuple[str, str]], end: str) -> int:
    """Print commands and what they do in two columns; returns the exit status.

    Raises:
        UserError: the command line holds anything but --help.
    """
    words = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    rows = list(rows)
    if words:
        raise UserError(f"python -m {name} {words[0]}: python -m {name} takes no argument, it lists the commands")
    width = max(len(command) for command, _ in rows)
    print(head, "", *(f"  {command:<{width}}  {purpose}" for command, purpose in rows), "", end, sep="\n")
    return 0


def scripts() -> Iterator[tuple[str, str]]:
    """The scripts beside the package, which only a checkout has."""
    for command, name in (
        ("python train.py CONFIG", "train.py"),
        ("python test.py CONFIG --checkpoint FILE", "test.py"),
    ):
        file = PACKAGE.parent / name
        if file.is_file():
            yield command, purpose_of(file)


def programs(folder: Path) -> Iterator[tuple[str, str]]:
    """Commands below a folder of the package that ``python -m`` starts, this list and others like it left out."""
    for file in sorted(folder.rglob("*.py")):
        parts = ("cmt_aqr", *file.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__main__":
            parts = parts[:-1]
        if parts not in (("cmt_aqr",), ("cmt_aqr", "tools")) and IS_PROGRAM in file.read_text("utf-8"):
            yield f"python -m {'.'.join(parts)}", purpose_of(file)


def purpose_of(file: Path) -> str:
    """The first paragraph of a file's docstring in one line; the file is not run."""
    _, _, text = file.read_text("utf-8").partition('"""')
    return " ".join(text.partition('"""')[0].partition("\n\n")[0].split())


if __name__ == "__main__":
    sys.exit(main())

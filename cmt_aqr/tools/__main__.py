"""python -m cmt_aqr.tools: a list of the small programs, one on each line."""

import sys

from cmt_aqr.__main__ import PACKAGE, programs, show
from cmt_aqr.errors import report_errors


def main() -> int:
    """Print the list; returns the exit status."""
    return report_errors(
        lambda: show(
            "cmt_aqr.tools",
            "Small programs around the detector:",
            programs(PACKAGE / "tools"),
            "Each of them takes --help; python -m cmt_aqr lists the other commands.",
        )
    )


if __name__ == "__main__":
    sys.exit(main())

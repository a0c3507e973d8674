"""Errors that a user can fix: one sentence on stderr, exit status 2, no traceback."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class UserError(ValueError):
    """What a user can fix; the message is one sentence with the file, the key and both values.

    Every package derives its error class from this one. A plain ValueError is a mistake of the program.
    """


def describe_os_error(error: OSError) -> str:
    """One sentence about an error of the operating system, such as ``data/x.bin: no such file or directory``."""
    if error.strerror is None:
        return str(error) or type(error).__name__
    reason = error.strerror[:1].lower() + error.strerror[1:]
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return f"{' -> '.join(names)}: {reason}" if names else reason


def report_errors(run: Callable[[], int]) -> int:
    """Run a script: a user's error becomes one sentence and exit status 2, Ctrl-C one line and 130.

    Args:
        run: returns the exit status.
    """
    try:
        return run()
    except UserError as error:
        return _report(str(error))
    except OSError as error:  # a full disk or a missing permission that no caller described better
        return _report(describe_os_error(error))
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
        return 130


def _report(sentence: str) -> int:
    """Print the sentence; returns the exit status 2. With several processes the process is named."""
    rank = os.environ.get("RANK")
    process = f" (process {rank})" if rank not in (None, "0") else ""
    sys.stderr.write(f"error{process}: {sentence}\n")  # one write: lines of several processes must not run together
    sys.stderr.flush()
    _tell_torchrun(sentence)
    return 2


def _tell_torchrun(sentence: str) -> None:
    """Leave the sentence for the summary of torchrun, which prints it instead of advice about tracebacks.

    ``torch.distributed.elastic.multiprocessing.errors.record`` would leave a traceback of 20 lines.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        failure = {"message": {"message": sentence, "extraInfo": {"timestamp": int(time.time())}}}
        with suppress(OSError):
            Path(path).write_text(json.dumps(failure), encoding="utf-8")

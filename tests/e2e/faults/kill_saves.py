"""Kills a run at one of the file operations of its saves."""

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch


def kill_at_operation(chosen: int) -> None:
    """Make this process kill itself at the operation of this number; it prints which one that is.

    A save has, for epoch_N.pt and then for latest.pt: before its temporary file is made; half of the bytes written;
    written but not synced; synced but not renamed; renamed. After them: before and after an old epoch is removed.
    """
    count = 0

    def pass_or_die(operation: str, leave: Callable[[], None] = lambda: None) -> None:
        nonlocal count
        if count == chosen:
            leave()
            print(f"\n{operation}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    _watch_writing(pass_or_die)
    _watch_renaming(pass_or_die)
    _watch_removing(pass_or_die)


def _kind(path: str | Path) -> str:
    """epoch_N.pt or latest.pt, of the file or of its temporary one; empty for other files."""
    name = Path(path).name.removeprefix(".").removesuffix(".part")
    return "" if not name.endswith(".pt") else "epoch_N.pt" if name.startswith("epoch") else name


def _watch_writing(pass_or_die: Callable) -> None:
    save, fsync = torch.save, os.fsync

    def watched_save(content, writer):
        path = writer._file.name

        def leave_half():
            whole = io.BytesIO()
            save(content, whole)
            writer._file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            writer._file.flush()

        pass_or_die(f"{_kind(path)}: half of its bytes written", leave_half)
        save(content, writer)

    def watched_fsync(file):
        path = os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
        if _kind(path):
            pass_or_die(f"{_kind(path)}: written, not synced")
        fsync(file)

    torch.save, os.fsync = watched_save, watched_fsync


def _watch_renaming(pass_or_die: Callable) -> None:
    replace = os.replace

    def watched_replace(source, target):
        if not _kind(target):
            return replace(source, target)
        pass_or_die(f"{_kind(target)}: synced, not renamed")
        replace(source, target)
        pass_or_die(f"{_kind(target)}: renamed")

    os.replace = watched_replace


def _watch_removing(pass_or_die: Callable) -> None:
    unlink = Path.unlink

    def watched_unlink(path, **options):
        is_temporary = path.name.endswith(".part")
        if not _kind(path):
            return unlink(path, **options)
        if is_temporary:
            pass_or_die(f"{_kind(path)}: before its temporary file is made")
            return unlink(path, **options)
        pass_or_die("retention: before an old epoch is removed")
        unlink(path, **options)
        pass_or_die("retention: after an old epoch is removed")

    Path.unlink = watched_unlink

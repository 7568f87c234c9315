"""Write files and folders that are complete or not there, and say in one sentence why they cannot be."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


class disk_errors:
    """Turns the many exceptions of a full or forbidden disk into one sentence: `with disk_errors("output_dir", at)`.

    Args:
        argument: name of the argument that named the folder.
        folder: where was written.
        remedy: what to do after freeing space.
    """

    def __init__(self, argument: str, folder: Path, remedy: str = "try again"):
        self.argument, self.folder, self.remedy = argument, folder, remedy

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        # torch.save reports a failed write, and what then fails in closing the file, in words about its own source.
        words = ("write", "Write", "iostream", "unexpected pos")
        cut_short = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
        if isinstance(error, (OSError, SafetensorError)) or cut_short:
            reason = "a file was cut short" if cut_short else str(getattr(error, "strerror", None) or error)
            cause = " ".join(reason.split())
            raise ValueError(
                f"`{self.argument}` '{self.folder}' could not be written ({cause}); free some space or choose "
                f"another folder, and {self.remedy}."
            ) from error


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new empty folder to write into, which takes the place of `folder` when all of it is on disk.

    After an error, or if the block is left by an exception, what was in `folder` is there as before.
    """
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        flush(partial)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove(folder: Path) -> None:
    """Deletes a folder so that no half of it is ever seen under its name."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def flush(folder: Path) -> None:
    """Forces a folder's files onto the disk: a rename must not outrun the bytes it promises."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Forces a folder's list of names onto the disk, where the system can do that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

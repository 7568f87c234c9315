"""Write files and folders that are complete or not there, and word a disk's errors in one sentence."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError


class disk_errors:
    """Turns exceptions of a full or forbidden disk into one sentence: `with disk_errors("output_dir", folder)`.

    Args:
        argument: name of the argument that named the folder.
        folder: the folder that is written.
        remedy: advice for after space has been freed.

    Raises:
        ValueError: by the block's end, in place of OSError, SafetensorError and torch.save's RuntimeError.
    """

    def __init__(self, argument: str, folder: Path, remedy: str = "try again"):
        self.argument, self.folder, self.remedy = argument, folder, remedy

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        # torch.save reports a failed write, and the failed close after it, as RuntimeError.
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
    """Gives a new empty folder to write into, and puts it in the place of `folder` when all of it is on disk.

    After an error, or if the block is left by an exception, `folder` is as before. After a kill at any moment, the
    earlier folder or the new one is there, or the next call of this function or of `recover` puts it there.
    """
    partial, new, old = (_beside(folder, end) for end in ("partial", "new", "old"))
    recover(folder)
    _discard(folder, partial, new, old)
    try:
        partial.mkdir(parents=True)
        yield partial
        flush(partial)
        # From here on the new folder is complete, and its name says so.
        os.replace(partial, new)
        flush_folder(folder.parent)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        with contextlib.suppress(OSError):  # of a disk that does not let go; the first error says why
            _discard(folder, partial, new)
        raise
    _discard(folder, old)


def recover(folder: str | os.PathLike) -> None:
    """Puts a folder back that a killed `written_whole` had taken away: the new one, or else the earlier one.

    Does nothing where `folder` exists, or where nothing complete lies beside it.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.name or os.path.lexists(folder):
        return
    for complete in (_beside(folder, "new"), _beside(folder, "old")):
        if os.path.isdir(complete):
            os.replace(complete, folder)
            return


def remove(folder: Path) -> None:
    """Deletes a folder so that no half of it is ever seen under its name, and `recover` finds nothing."""
    _discard(folder, _beside(folder, "new"), _beside(folder, "old"), folder)


def write_whole(path: Path, save: Callable[[Path], object], partial: Path | None = None, flushed: bool = True) -> None:
    """Writes a file that is complete or not there; after an error or a kill, an earlier one is as before.

    Args:
        path: the file; its folder is made if missing.
        save: called with the path of an unfinished file, which it writes.
        partial: that path, on the same disk; None: a hidden name beside `path` that no other process uses.
        flushed: whether the bytes are forced onto the disk first, so that this holds for a loss of power too.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}") if partial is None else partial
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save(partial)
        if flushed:
            flush_file(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _beside(folder: Path, end: str) -> Path:
    return folder.with_name(f".{folder.name}.{end}")


def _discard(folder: Path, *paths: Path) -> None:
    """Deletes folders under a name that nothing takes for complete."""
    doomed = _beside(folder, "deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    for path in paths:
        if path.exists():
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def flush(folder: Path) -> None:
    """Forces a folder's files onto the disk, so that a rename does not outrun their bytes."""
    for path in folder.rglob("*"):
        if path.is_file():
            flush_file(path)
    flush_folder(folder)


def flush_file(path: Path) -> None:
    """Forces a file's bytes onto the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Forces a folder's list of names onto the disk, where the system can do that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

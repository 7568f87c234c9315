"""Write files and folders that are complete or not there, and word a disk's errors in one sentence."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

from safetensors import SafetensorError


class disk_errors:
    """Turns exceptions of a full or forbidden disk into one sentence: `with disk_errors("output_dir", folder)`.

    Args:
        argument: name of the argument that named the folder.
        folder: the folder that is written.
        remedy: advice for after space has been freed.

    Raises:
        ValueError: by the block's end, in place of OSError, SafetensorError and torch.save's RuntimeError. Of several
            such blocks in each other the outermost raises: it names what a person has given.
    """

    _depth = threading.local()

    def __init__(self, argument: str, folder: Path, remedy: str = "try again"):
        self.argument, self.folder, self.remedy = argument, folder, remedy

    def __enter__(self) -> None:
        self._depth.value = getattr(self._depth, "value", 0) + 1

    def __exit__(self, kind, error, traceback) -> None:
        self._depth.value -= 1
        if self._depth.value:
            return
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


@contextlib.contextmanager
def written_into(folder: Path) -> Iterator[Path]:
    """Gives a new empty folder to write into, and puts its files into `folder` when all of them are on disk.

    Other files of an existing `folder` stay, and so does the folder itself. After an error it is as before.
    """
    if not os.path.lexists(folder):
        with written_whole(folder) as partial:
            yield partial
        return
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process
    try:
        partial.mkdir()
        yield partial
        flush(partial)
        files = [path for path in partial.rglob("*") if path.is_file()]
        # Those at the top last: among them is the one that says what the others are.
        for path in sorted(files, key=lambda path: -len(path.parts)):
            target = folder / path.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class SoleWriter:
    """Keeps a second run from writing into a folder: `with SoleWriter("--out", folder) as writer: writer.keep()`.

    The system lets go of the folder when the process ends, however it ends. Where a file system knows no locks,
    nothing is kept.

    Args:
        argument: the option that names the folder, for the error.
        folder: made by `keep` if missing; it goes with the block if it is empty then.
    """

    def __init__(self, argument: str, folder: Path):
        self.argument, self.folder, self._handle, self._made = argument, folder, None, False

    def __enter__(self) -> SoleWriter:
        return self

    def __exit__(self, *error) -> None:
        if self._handle is not None:
            if self._made:
                with contextlib.suppress(OSError):
                    os.rmdir(self.folder)
            os.close(self._handle)
            self._handle = None

    def keep(self) -> None:
        """Keeps the folder to the end of the block; does nothing when called again.

        Raises:
            ValueError: another run keeps it, or it cannot be made.
        """
        if fcntl is None or self._handle is not None:
            return
        with disk_errors(self.argument, self.folder):
            self._made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.folder, os.O_RDONLY)
        if not _lock(self._handle):
            raise ValueError(
                f"`{self.argument}` '{self.folder}' is being written by another run; wait until it has ended, or give "
                "another folder."
            )


def _lock(handle: int) -> bool:
    """Locks an open file or folder, or tells that somebody else has."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as kept:
        if partial is None:
            _remove_unfinished(path)
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            if fcntl is not None:  # as long as this process lives
                _lock(kept.enter_context(open(partial, "wb")).fileno())
        try:
            save(partial)
            if flushed:
                flush_file(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _remove_unfinished(path: Path) -> None:
    """Removes unfinished files of killed processes that were writing `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 32}") if fcntl is not None else ():
        with contextlib.suppress(OSError), open(left, "rb") as file:
            if _lock(file.fileno()):
                left.unlink()


def write_names(path: Path, text: str) -> None:
    """Writes JSON as UTF-8; bytes of file names that are no text become escapes, which JSON reads."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_rows(path: Path, *forms: Mapping[str, type | tuple[type, ...]]) -> Iterator[tuple[int, dict]]:
    """Yields the rows of a file of JSON lines, each with its place in bytes.

    A line that was cut short or damaged is left out.

    Args:
        forms: what a row may have, key to type; further keys are allowed.
    """
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            # All but the last line of a process that was killed while writing it.
            if line.endswith(b"\n"):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict) and any(_has_form(row, form) for form in forms):
                    yield offset, row
            offset += len(line)


def _has_form(row: Mapping, form: Mapping) -> bool:
    return all(key in row and isinstance(row[key], kind) for key, kind in form.items())


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

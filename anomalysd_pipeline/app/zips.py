"""Zips from strangers: checked by entry, read into memory within bounds, never unpacked by name."""

from __future__ import annotations

import os
import re
import stat
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_CHUNK = 65536
_END, _END_SIZE, _END64 = b"PK\x05\x06", 22, b"PK\x06\x07"
_ENTRY_BYTES = 1024
"""Room for one entry in a zip's directory, its name included; real ones take about a hundred bytes."""


class Refused(ValueError):
    """Refuses an entry with a sentence of ours, told apart from the errors of zipfile."""


class Budget:
    """Counts the bytes read from zips against a bound, whatever their headers claim.

    Args:
        size: bound in bytes.
        sentence: message of the error beyond it.
    """

    def __init__(self, size: int, sentence: str):
        self._left = size
        self._sentence = sentence
        self._lock = threading.Lock()

    def spend(self, size: int) -> None:
        """Takes `size` bytes from the budget; raises `Refused`, a ValueError, if fewer were left."""
        with self._lock:
            self._left -= size
            if self._left < 0:
                raise Refused(self._sentence)


def is_zip(path: str | os.PathLike, name: str) -> bool:
    """Tells whether a file is a zip by its first bytes or its name."""
    with open(path, "rb") as file:
        return file.read(4) in (b"PK\x03\x04", _END) or name.lower().endswith(".zip")


@contextmanager
def open_zip(path: str | os.PathLike, name: str, most: int) -> Iterator[zipfile.ZipFile]:
    """Opens a zip.

    Args:
        path: path of the zip.
        name: its name in errors.
        most: bound on its entries.

    Raises:
        ValueError: it is damaged, or has too many entries, or entries that share bytes.
    """
    try:
        with open(path, "rb") as file:
            directory = _directory_bytes(file)
        # Before zipfile reads it: some megabytes of directory become hundreds of megabytes of objects.
        crowded = directory > most * _ENTRY_BYTES
        archive = None if crowded else zipfile.ZipFile(path)
    # zipfile raises nearly every kind of exception over damaged bytes.
    except Exception as error:
        raise ValueError(f"'{name}' is damaged or not a zip; pack it anew.") from error
    if archive is None:
        raise ValueError(f"'{name}' holds more than {most} files; split it into several zips.")
    with archive:
        if len(archive.infolist()) > most:
            raise ValueError(f"'{name}' holds more than {most} files; split it into several zips.")
        if _overlap(archive):
            raise ValueError(f"'{name}' is damaged or made to do harm, its files share bytes; pack it anew.")
        yield archive


def entry_fault(info: zipfile.ZipInfo, largest: int) -> str | None:
    """Tells why an entry is refused, as the rest of a sentence; None for one that may be read."""
    parts = re.split(r"[/\\]", info.orig_filename)
    if "\0" in info.orig_filename or ".." in parts or not parts[0] or re.match(r"[A-Za-z]:", info.orig_filename):
        return "has a name that leads out of the zip; pack it anew with plain names"
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        return "is a link or no file; pack the file itself"
    if info.flag_bits & 0x1:
        return "is encrypted; pack it without a password"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is packed by an unusual method; pack it anew as a plain zip"
    if info.file_size > largest:
        return f"is larger than {largest / 1e6:.3g} MB; give a smaller file"
    return None


def is_incidental(info: zipfile.ZipInfo) -> bool:
    """Tells whether an entry is a folder or a system's own file, such as `.DS_Store`, to be left out."""
    parts = re.split(r"[/\\]", info.filename)
    hidden = any(part.startswith(".") and part != ".." for part in parts)
    return info.is_dir() or hidden or parts[0] == "__MACOSX" or parts[-1].lower() in ("thumbs.db", "desktop.ini")


def read_entry(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, largest: int, spend: Callable[[int], None]
) -> bytes:
    """Reads the bytes of an entry.

    Args:
        archive: opened by `open_zip`.
        info: an entry without an `entry_fault`.
        name: its name in errors.
        largest: bound on its bytes.
        spend: `Budget.spend`, called with the size of each piece.

    Raises:
        ValueError: it is damaged or larger than its bound.
    """
    chunks, size = [], 0
    try:
        with archive.open(info) as file:
            while chunk := file.read(min(_CHUNK, largest + 1 - size)):
                size += len(chunk)
                spend(len(chunk))
                if size > largest:
                    raise Refused(f"'{name}' is larger than {largest / 1e6:.3g} MB; give a smaller file.")
                chunks.append(chunk)
    except Refused:
        raise
    # As in `open_zip`.
    except Exception as error:
        raise ValueError(f"'{name}' is damaged in the zip; pack it anew.") from error
    return b"".join(chunks)


def _directory_bytes(file) -> int:
    """Finds the size in bytes of a zip's directory, as zipfile will read it.

    Raises:
        ValueError: there is no directory, or one for sizes beyond those of uploads.
    """
    file.seek(0, os.SEEK_END)
    length = file.tell()
    file.seek(max(0, length - _END_SIZE - 65535 - 20))
    tail = file.read()
    start = len(tail) - _END_SIZE
    if start < 0 or not (tail[start:].startswith(_END) and tail.endswith(b"\0\0")):
        start = tail.rfind(_END)
    if start < 0 or len(tail) - start < _END_SIZE:
        raise ValueError("no directory")
    if tail[max(0, start - 20) :].startswith(_END64):
        raise ValueError("sizes beyond 4 GB")
    return struct.unpack_from("<L", tail, start + 12)[0]


def _overlap(archive: zipfile.ZipFile) -> bool:
    """Tells whether entries share compressed bytes, by which a small zip unpacks to a huge one."""
    end = 0
    for info in sorted(archive.infolist(), key=lambda one: one.header_offset):
        if info.header_offset < end:
            return True
        end = info.header_offset + 30 + len(info.orig_filename) + info.compress_size
    return False

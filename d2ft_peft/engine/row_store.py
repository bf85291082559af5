"""Rows of numbers by key, in files that are mapped into memory and only ever grow.

A file is a header of 256 bytes (JSON, padded) and records, in the order in which they came:

    20 bytes key | u32 rows | u32 CRC-32 of the values | u32 CRC-32 of these three | values [rows, width]

A process writes to a file of its own and reads all that are in the folder. So a process that is killed leaves at most
one record that is not whole, at the end of its file, where it is not read.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import uuid
import warnings
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hidden_states import bytes_of


_ENDING = ".rows"
_HEADER_BYTES = 256
_RECORD, _FIELDS = struct.Struct("<20sIII"), struct.Struct("<20sII")


@dataclass
class _File:
    """A file of the folder.

    Attributes:
        path: Where it is.
        scanned: Bytes whose records are known.
        map: Its content as far as it was mapped.
    """

    path: str
    scanned: int = _HEADER_BYTES
    map: mmap.mmap | None = None

    def bytes(self, end: int) -> mmap.mmap:
        """The content, at least up to byte `end`."""
        if self.map is None or len(self.map) < end:
            with open(self.path, "rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self.map


class RowStore:
    """Rows [rows, width] of one dtype by key, in a folder.

    What is in it is never thrown out for something newer: epochs ask for the samples in turn, so that a full store that
    made room would always have thrown out what is asked for next. Files about something else make room, the oldest
    first.

    Args:
        directory: The folder; it may hold what former runs left.
        about: What the rows depend on, in hexadecimal: those of another one are not read.
        width: Numbers in a row.
        dtype: Their type.
        max_bytes: Most bytes in the folder.
        sharers: Processes that fill it together.
    """

    def __init__(self, directory: str, about: str, width: int, dtype: torch.dtype, max_bytes: int, sharers: int = 1):
        self.directory, self.width, self.dtype = directory, width, dtype
        self.max_bytes, self.sharers = max_bytes, sharers
        self._header = {"format": "d2ft rows 1", "about": about, "width": width, "dtype": str(dtype)}
        self._row_bytes = width * dtype.itemsize
        self._files: dict[str, _File] = {}
        self._stale: dict[str, int] = {}
        self._index: dict[bytes, tuple[_File, int, int, int]] = {}
        self._checked: set[bytes] = set()
        self._own: _File | None = None
        self._descriptor: int | None = None
        self._full = False
        os.makedirs(directory, exist_ok=True)
        self.refresh()
        kept = sum(os.path.getsize(file.path) for file in self._files.values())
        self._room = (max_bytes - kept) // sharers

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    @property
    def num_bytes(self) -> int:
        """Bytes of all files in the folder."""
        return sum(entry.stat().st_size for entry in os.scandir(self.directory) if entry.name.endswith(_ENDING))

    def refresh(self) -> None:
        """Look at what other processes have written since."""
        entries = [entry for entry in os.scandir(self.directory) if entry.name.endswith(_ENDING)]
        for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime):
            size = entry.stat().st_size
            if entry.name in self._stale or (self._own is not None and entry.path == self._own.path):
                continue
            if entry.name not in self._files:
                if not self._is_ours(entry.path):
                    self._stale[entry.name] = size
                    continue
                self._files[entry.name] = _File(entry.path)
            file = self._files[entry.name]
            if size > file.scanned:
                self._scan(file, size)

    def get(self, key: bytes) -> Tensor | None:
        """Rows [rows, width], to be read only; None if they are not there, or damaged."""
        if key not in self._index:
            return None
        file, begin, rows, checksum = self._index[key]
        end = begin + rows * self._row_bytes
        data = memoryview(file.bytes(end))[begin:end]
        if key not in self._checked:
            if zlib.crc32(data) != checksum:
                warnings.warn(f"{rows} rows in {file.path!r} are damaged, and are computed again.", stacklevel=2)
                del self._index[key]
                return None
            self._checked.add(key)
        return torch.frombuffer(data, dtype=self.dtype).view(rows, self.width)

    def put(self, key: bytes, rows: Tensor) -> None:
        """Keep rows [rows, width], if there is room."""
        if key in self._index or self._full or not len(rows):
            return
        values = bytes_of(rows.to(self.dtype))
        record = _RECORD.size + len(values)
        if self._own is None:
            record += _HEADER_BYTES
        if record > self._room:
            self._say_full(f"{self.max_bytes} bytes")
            return
        self._make_room(record)
        fields = _FIELDS.pack(key, len(rows), zlib.crc32(values))
        try:
            self._append(fields + struct.pack("<I", zlib.crc32(fields)), values)
        except OSError as error:
            self._say_full(str(error))
            return
        self._room -= record
        begin = self._own.scanned + _RECORD.size
        self._index[key] = self._own, begin, len(rows), zlib.crc32(values)
        self._checked.add(key)
        self._own.scanned = begin + len(values)

    def close(self) -> None:
        """Let go of the files."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._full = True
        self._index.clear()
        self._files.clear()

    def _append(self, header: bytes, values: memoryview) -> None:
        if self._own is None:
            name = f"{self._header['about'][:16]}-{uuid.uuid4().hex[:12]}{_ENDING}"
            path = os.path.join(self.directory, name)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(self._descriptor, json.dumps(self._header).ljust(_HEADER_BYTES).encode())
            self._own = self._files[name] = _File(path)
        written = os.writev(self._descriptor, [header, values])
        if written != len(header) + len(values):
            os.ftruncate(self._descriptor, self._own.scanned)
            raise OSError(f"{self._own.path!r} took {written} bytes of a record only")

    def _make_room(self, record: int) -> None:
        while self._stale and self.num_bytes + record > self.max_bytes:
            name = next(iter(self._stale))
            del self._stale[name]
            if os.path.exists(path := os.path.join(self.directory, name)):
                os.remove(path)

    def _say_full(self, why: str) -> None:
        self._full = True
        warnings.warn(
            f"the cache {self.directory!r} is full ({why}, {len(self._index)} samples): what further samples need is "
            "computed in every epoch; raise cache_gigabytes.",
            stacklevel=3,
        )

    def _is_ours(self, path: str) -> bool:
        with open(path, "rb") as file:
            try:
                return json.loads(file.read(_HEADER_BYTES)) == self._header
            except ValueError:  # of a process that was killed early, or no file of ours
                return False

    def _scan(self, file: _File, size: int) -> None:
        data = file.bytes(size)
        while file.scanned + _RECORD.size <= size:
            key, rows, checksum, of_fields = _RECORD.unpack_from(data, file.scanned)
            if zlib.crc32(_FIELDS.pack(key, rows, checksum)) != of_fields:
                warnings.warn(
                    f"{file.path!r} is damaged from byte {file.scanned} on: what it held there is computed again.",
                    stacklevel=3,
                )
                file.scanned = 1 << 62
                return
            begin = file.scanned + _RECORD.size
            end = begin + rows * self._row_bytes
            if end > size:  # it is being written, or never was
                return
            self._index[key] = file, begin, rows, checksum
            file.scanned = end

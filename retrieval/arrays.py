"""Arrays in a safetensors file: written whole or not at all, and read without a map of it.

The system ends a process that looks at a mapped file which was cut short; reading one is an error.
"""

from __future__ import annotations

import json
import math
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.errors import RecordError

_DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "U64": np.dtype("<u8"), "F32": np.dtype("<f4")}
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class ArrayFile:
    """A file of arrays, int64, uint64 or float32, open until it is dropped; also in a forked child, or when it was deleted.

    Attributes:
        path: where it is.
        metadata: what was written with the arrays, texts by name.
        shapes: of the arrays, by name.

    Raises:
        RecordError: it is missing, cut short, or of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            self._stamp = self._stamped()
            size = self._stamp[0]
            begin = 8 + int.from_bytes(self._read(np.empty(min(8, size), np.uint8), 0).tobytes(), "little")
            header = json.loads(self._read(np.empty(min(begin, size) - 8, np.uint8), 8).tobytes())
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.shapes: dict[str, tuple[int, ...]] = {}
            self._arrays: dict[str, tuple[np.dtype[Any], int]] = {}
            for name, said in header.items():
                dtype, shape = _DTYPES[said["dtype"]], tuple(map(int, said["shape"]))
                at, end = said["data_offsets"]
                if min(shape, default=0) < 0 or end - at != math.prod(shape) * dtype.itemsize or begin + end > size:
                    raise ValueError(f"{name} does not fit into it")
                self.shapes[name], self._arrays[name] = shape, (dtype, begin + at)
        except _UNREADABLE as error:
            raise RecordError(f"{path}: nothing can be read from it: {error}") from error

    def array(self, name: str, dtype: type[np.generic]) -> NDArray[Any]:
        """A whole array.

        Raises:
            RecordError: there is none of the name and type, or the file has changed since it was opened.
        """
        if name not in self._arrays or self._arrays[name][0] != dtype:
            raise RecordError(f"{self.path}: damaged, it has no {name} of {np.dtype(dtype)}")
        return self.rows(name, 0, self.shapes[name][0])

    def rows(self, name: str, begin: int, end: int) -> NDArray[Any]:
        """Some rows of an array that is there.

        Raises:
            RecordError: the file has changed since it was opened.
        """
        (dtype, at), (_, *rest) = self._arrays[name], self.shapes[name]
        try:
            if self._stamped() != self._stamp:
                raise OSError("it was written to while it was open")
            return self._read(np.empty((end - begin, *rest), dtype), at + begin * math.prod(rest) * dtype.itemsize)
        except OSError as error:
            raise RecordError(f"{self.path}: nothing can be read from it: {error}") from error

    def _stamped(self) -> tuple[int, int]:
        status = os.fstat(self._file)
        return status.st_size, status.st_mtime_ns

    def _read(self, array: NDArray[Any], at: int) -> NDArray[Any]:
        """Fills an array; at a place of its own, because a forked child shares the file's."""
        left = memoryview(array.reshape(-1).view(np.uint8).data)
        while left:
            count = os.preadv(self._file, [left], at)
            if not count:
                raise OSError("it was cut short")
            left, at = left[count:], at + count
        return array


def write_arrays(path: Path, arrays: dict[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    """Writes a file for :class:`ArrayFile` that is there whole or not at all.

    Raises:
        OSError: it cannot be written; the one that was there is untouched.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # Beside the file, to the disk, and only then in its place.
    beside = path.with_name(f"{path.name}.{threading.get_ident()}.{os.getpid()}.tmp")
    try:
        for left in path.parent.glob(f"{path.name}.*.tmp"):
            if not _runs(left.name.split(".")[-2]):
                left.unlink(missing_ok=True)
        save_file(arrays, beside, metadata)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise error if isinstance(error, OSError) else OSError(str(error)) from error


def _runs(process: str) -> bool:
    """Whether a process of this id is there: what a killed one was writing can go."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except OSError:
        return True
    return True

"""From LMDB's errors to ours."""

from __future__ import annotations

from pathlib import Path

from ragkv.errors import RecordError, StoreError, StoreFullError

HOW_TO_REPAIR = "'ragkv verify --repair' saves what can be read"

# A write that the system cuts short, as it does at the end of a disk, is reported by LMDB as an I/O error.
_FULL = ("No space left", "File too large", "quota exceeded", "Input/output error")


class translated:
    """Turns LMDB's errors inside the block into ours."""

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        import lmdb

        if isinstance(error, lmdb.Error):
            raise _translate(self._path, error) from error


def _translate(path: Path, error: Exception) -> StoreError:
    import lmdb

    if isinstance(error, lmdb.MapFullError):
        return StoreFullError(f"{path}: the map is full ({error}); nothing was changed")
    if isinstance(error, lmdb.ReadersFullError):
        return StoreError(
            f"{path} has as many batches and snapshots open as it can: close those that are done ({error})"
        )
    if isinstance(error, lmdb.VersionMismatchError):
        return RecordError(f"{path} was written by another version of LMDB ({error})")
    if isinstance(error, lmdb.CorruptedError | lmdb.PageNotFoundError | lmdb.PanicError | lmdb.InvalidError):
        return RecordError(f"{path} is damaged ({error}): {HOW_TO_REPAIR}")
    if any(word in str(error) for word in _FULL):
        return StoreFullError(f"{path}: the disk is full ({error}); nothing was changed")
    return StoreError(f"{path}: {error}")

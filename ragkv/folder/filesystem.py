"""Where a folder may lie, what is in it, and bytes for people. LMDB's locks and its memory map need a local file system."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from ragkv.errors import StoreError, instance

MOUNTS = Path("/proc/mounts")
NETWORK = frozenset(
    (
        *("9p", "afs", "afpfs", "beegfs", "ceph", "cifs", "coda", "davfs", "fuse.ceph", "fuse.glusterfs"),
        *("fuse.rclone", "fuse.s3fs", "fuse.sshfs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4"),
        *("ocfs2", "orangefs", "pvfs2", "smb3", "smbfs", "vboxsf"),
    )
)


def folder_path(path: str | os.PathLike[str]) -> Path:
    """A folder's path, which may not be there yet, and stays the same wherever the process goes (``os.chdir``).

    No path is not the working folder's.

    Raises:
        ArgumentTypeError: it is no path.
        StoreError: no folder can be called so.
    """
    instance("path", path, str | os.PathLike, "the path of a folder")
    name = os.fspath(path)
    if not name or impossible(name):
        raise StoreError(f"path must be the path of a folder, got {name!r:.80}")
    try:
        return Path(path).absolute()
    except FileNotFoundError as error:
        raise StoreError(f"{name!r:.80} lies in the working folder, which is deleted: {error}") from error


def impossible(path: str | os.PathLike[str]) -> bool:
    """Whether nothing on a disk can be called so: there is a zero in it, or half a surrogate pair that stands for no byte."""
    try:
        return b"\0" in os.fsencode(path)
    except UnicodeEncodeError:
        return True


def prepare(path: Path, *, readonly: bool) -> bool:
    """Makes the folder, unless it is for reading only, and checks that LMDB can work on it.

    Returns:
        Whether it can only be read, because that was asked for or because it may not be written to.

    Raises:
        StoreError: the folder lies on a network file system, is not there to be read, or cannot be made.
    """
    if sys.byteorder != "little":
        raise StoreError("records are little-endian: a folder needs a little-endian machine")
    kind = filesystem_of(path)
    if kind in NETWORK:
        raise StoreError(
            f"{path} lies on {kind}, a network file system, where LMDB's locks and memory map are not reliable: "
            "choose a local folder"
        )
    try:
        if not readonly:
            path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK | os.X_OK)
        data = path / "data.mdb"
        if not path.is_dir() or ((readonly or not writable) and not data.exists()):
            raise StoreError(f"{path} is not a folder that could be read")
        return readonly or not writable or (data.exists() and not os.access(data, os.W_OK))
    except OSError as error:
        raise StoreError(f"{path} cannot be made or used: {error}") from error


def has_data(folder: Path) -> bool:
    """Whether something is kept in a folder."""
    return (folder / "data.mdb").is_file()


def filesystem_of(path: Path) -> str:
    """The type of the file system that a path lies on or would be made on; empty where that is not known."""
    try:
        lines = os.fsdecode(MOUNTS.read_bytes()).split("\n")
    except OSError:
        return ""
    place = path.resolve()
    best, kind = -1, ""
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        # Blanks in a mount point are written as octal escapes.
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[1]))
        if (place == point or point in place.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), fields[2]
    return kind

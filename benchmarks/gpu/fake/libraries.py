"""Builds the fake CUDA libraries beside a PyTorch that is made for CUDA 13; wants g++ and nm. See fake.py."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
# What each stands for, and what it is made of; what else such a library exports returns 0.
LIBRARIES = {
    "libcudart.so.13": ("runtime.cpp", "memory.cpp", "streams.cpp", "late.cpp", "device.cpp"),
    "libcublas.so.13": ("blas.cpp",),
    "libcublasLt.so.13": ("blas.cpp",),
}
DRIVER = "libcuda.so.1"


def build() -> Path:
    """The folder with the libraries; made anew where sources or packages changed."""
    packages, headers = _folder("torch").parent, _folder("triton") / "backends" / "nvidia" / "include"
    real = packages / "nvidia" / "cu13" / "lib"
    if not real.is_dir():
        sys.exit(f"no PyTorch made for CUDA 13 beside {packages}: on Linux PyPI's is (pip install torch)")
    mark = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(HERE.glob("*.*"))) + str(real).encode())
    folder = Path(tempfile.gettempdir()) / f"fake-cuda-{os.getuid()}-{mark.hexdigest()[:16]}"
    if folder.exists():
        return folder
    making = Path(tempfile.mkdtemp())
    for name, sources in LIBRARIES.items():
        _library(making, name, [HERE / source for source in sources], headers, _exported(real / name))
    _compile(
        *("-shared", f"-I{headers}", HERE / "driver.cpp", making / "libcudart.so.13"),
        *(f"-Wl,-soname,{DRIVER}", "-o", making / DRIVER),
    )
    (making / "libcuda.so").symlink_to(DRIVER)
    try:
        making.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(making)
    return folder


def _library(folder: Path, name: str, sources: list[Path], headers: Path, exported: set[str]) -> None:
    """One library with the version that torch asks for, and stubs for what is not written here."""
    stem = name.partition(".")[0]
    stubs, versions, written = folder / f"{stem}.c", folder / f"{stem}.map", folder / f"{stem}.o"
    _compile("-r", f"-I{headers}", *sources, "-o", written)
    missing = sorted(exported - _exported(written))
    stubs.write_text("".join(f"int {each}(void) {{ return 0; }}\n" for each in missing))
    versions.write_text(f"{name} {{ global: *; }};\n")
    _compile("-c", "-x", "c", "-fno-builtin", stubs, "-o", folder / f"{stem}-stubs.o")
    others = [folder / "libcudart.so.13"] if name != "libcudart.so.13" else []
    _compile(
        *("-shared", written, folder / f"{stem}-stubs.o", *others),
        *(f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}", "-o", folder / name),
    )


def _exported(path: Path) -> set[str]:
    """Functions that a library or an object file offers to others."""
    said = subprocess.run(
        ["nm", "--defined-only", *(["-D"] if ".so" in path.name else []), str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(re.findall(r" [TWi] ([A-Za-z]\w*|__cuda\w+)", said.stdout))


def _compile(*arguments: object) -> None:
    subprocess.run(["g++", "-std=c++17", "-O1", "-fPIC", "-w", *map(str, arguments)], check=True)


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"the fake CUDA needs {package}")
    return Path(spec.origin).parent


if __name__ == "__main__":
    print(build())

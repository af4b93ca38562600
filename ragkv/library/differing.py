"""What KV of documents depend on, by the names that people know: kept in the folder, so that a difference can be named."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from ragkv.chunk import digest
from ragkv.library.documents import Documents
from ragkv.retrieval import Catalogue

logger: logging.Logger = logging.getLogger(__name__)

_CONFIGURATION = "configuration "
# Their values say nothing to people.
_TOKENS = "tokenizer or the template's before_chunk and after_chunk"
_AROUND = "template around passages, question and answer"
_PLAIN = {"model", "weights", "template prefix", _TOKENS, _AROUND, "foreign text"}


def described(documents: Documents) -> dict[str, str]:
    """What the setting of documents (:attr:`Documents.setting`) is made of, by name."""
    runner = documents.runner
    weights, settings = runner.described
    configuration = json.loads(settings)
    return {
        "weights": weights,
        "dtype": str(runner.model.dtype).removeprefix("torch."),
        "device": runner.model.device.type,
        "attention implementation": str(configuration.pop("attention")),
        "template prefix": digest(documents.encoder.anchor).hex(),
        _TOKENS: digest(documents.sample).hex(),
        "namespace": documents.namespace,
        "context": documents.context,
        "document_tokens": str(documents.document_tokens),
        **{f"{_CONFIGURATION}{name}": json.dumps(value) for name, value in configuration.items()},
    }


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names of what differs, with the values that people can read; another model is one difference."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    configuration = [name for name in names if name.startswith(_CONFIGURATION)]
    if "weights" in names and configuration:
        names = ["model", *(name for name in names if name not in {"weights", "dtype", *configuration})]
    elif {"dtype", "device"} & {*names}:
        names.remove("weights")  # whose digest is of their bytes, and is taken in another way on a device
    said = []
    for name in names:
        values = [f"{side[name]:.40}" if side.get(name) else "none" for side in (before, now)]
        said.append(name if name in _PLAIN else f"{name} ({values[0]}, now {values[1]})")
    return said


def warn_of_differences(catalogue: Catalogue, documents: Documents) -> None:
    """Say why documents will be read again, where they were last read in another setting."""
    before, now = catalogue.read_with, described(documents)
    if not before or before == now:
        return
    with catalogue.snapshot() as view:
        unread = sum(documents.setting not in view.read_for(listed.key) for listed in view.documents())
    if unread:
        logger.warning(
            "documents of %s that are read again when they are asked for: %d; what differs from when they were read: %s",
            catalogue.path.parent,
            unread,
            ", ".join(differences(before, now)),
        )

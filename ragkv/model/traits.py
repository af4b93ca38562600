"""What probing found of a model, kept so that the next process that loads the same model need not probe it again."""

from __future__ import annotations

import inspect
import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
import transformers
from torch import nn

from ragkv.chunk import digest
from ragkv.errors import RecordError, StoreError
from ragkv.folder import seal, unseal
from ragkv.kernels import Impl, Rotation
from ragkv.model.cache import LayerSpec
from ragkv.model.rope import candidates, rope_frequencies, same_rotation

logger: logging.Logger = logging.getLogger(__name__)

_UNREADABLE = (KeyError, ValueError, TypeError, AttributeError, IndexError)


class Facts(Protocol):
    """Where small values are kept by name, as in :class:`~ragkv.TieredStore`."""

    def meta_get(self, name: str) -> bytes | None:
        """The value, or ``None``."""

    def meta_put(self, name: str, value: bytes) -> None:
        """Keep it, in the place of what was there."""


@dataclass(frozen=True)
class Traits:
    """What a model was found to do.

    Attributes:
        specs: shape, dtype and device of every layer's keys and values.
        rotations: how every layer's keys turn with their position; ``None`` where they carry none.
        max_positions: within which moved keys are those that the model would compute; ``None``: no limit.
        spans: selective attention computes its attention, where it can run.
        hands_on: its layers attend with the very masks that it is given.
    """

    specs: list[LayerSpec]
    rotations: list[Rotation | None]
    max_positions: int | None
    spans: bool
    hands_on: bool

    def to_bytes(self, model: nn.Module) -> bytes:
        """As JSON; of rotations, which of the model's they are."""
        possible = candidates(rope_frequencies(model))

        def number(rotation: Rotation | None) -> int:
            return next(at for at, other in enumerate(possible) if same_rotation(rotation, other))

        said = {
            "specs": [[*spec[:3], str(spec.dtype).removeprefix("torch."), str(spec.device)] for spec in self.specs],
            "rotations": list(map(number, self.rotations)),
            "max_positions": self.max_positions,
            "spans": self.spans,
            "hands_on": self.hands_on,
        }
        return json.dumps(said).encode()

    @classmethod
    def from_bytes(cls, data: bytes, model: nn.Module) -> Traits:
        """Those that :meth:`to_bytes` gave.

        Raises:
            RecordError: it gave others.
        """
        try:
            said, possible = json.loads(data), candidates(rope_frequencies(model))
            return cls(
                [
                    LayerSpec(heads, key_dim, value_dim, getattr(torch, dtype), torch.device(where))
                    for heads, key_dim, value_dim, dtype, where in said["specs"]
                ],
                [possible[number] for number in said["rotations"]],
                said["max_positions"],
                said["spans"],
                said["hands_on"],
            )
        except _UNREADABLE as error:
            raise RecordError(f"a model's traits cannot be read: {type(error).__name__}: {error}") from error


def model_key(model: nn.Module, fingerprint: str, kernels: Impl) -> bytes | None:
    """Digest of all that a model's traits hang on: its weights and settings, its code, where it runs, and what runs it.

    ``None`` where modules were given a ``forward`` of their own, of whose code nothing is known.
    """
    if any("forward" in vars(module) for module in model.modules()):
        return None
    kinds = sorted({type(module) for module in model.modules()}, key=str)
    code = [kind.forward.__code__.co_code for kind in kinds if hasattr(kind.forward, "__code__")]
    with suppress(OSError, TypeError):  # no source: the compiled forwards have to do
        code.append(Path(inspect.getfile(type(model))).read_bytes())
    where = [str(parameter.device) for parameter in model.parameters()]
    where += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    versions = [version("ragkv"), torch.__version__, transformers.__version__]
    return digest(fingerprint, kernels, *code, json.dumps([*map(str, kinds), *where, *versions]))


def recalled(facts: Facts, name: str, key: bytes) -> bytes | None:
    """What was kept under a name for a key; ``None`` where it was for another one, or is damaged."""
    kept = facts.meta_get(name)
    with suppress(RecordError):
        return None if kept is None else unseal(key, kept)
    return None


def keep(facts: Facts, name: str, key: bytes, data: bytes) -> None:
    """Keep something under a name, for one key; what cannot be kept is made again by the next process."""
    try:
        facts.meta_put(name, seal(key, data))
    except StoreError as error:  # full, or open for reading only
        logger.info("%s is not kept: %s", name, str(error))

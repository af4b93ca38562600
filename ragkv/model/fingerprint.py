"""What keys and values depend on besides the token ids: the model, as it runs now."""

from __future__ import annotations

import json
from typing import Any
from weakref import ref

from torch import Tensor, nn
from transformers import PreTrainedConfig

from ragkv.chunk import digest
from ragkv.model.weights import Bare, OnDisk, Saved, part_digest, parts

# What says how a model is saved, trained, or decoded from, but not what its layers compute in eval mode.
_IDLE = {
    *PreTrainedConfig().to_dict(),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "initializer_range", "torch_dtype"),
    *("tie_word_embeddings", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    *("_attn_implementation_internal", "_post_init_done", "_output_attentions"),
} - {"model_type"}


def settings(config: PreTrainedConfig) -> str:
    """A decoder's configuration as far as keys and values depend on it, its attention implementation among it; as JSON.

    Keys that its class does not declare count too: transformers asks any configuration for some (``is_causal``, ``layer_types``).
    """
    used = {name: value for name, value in vars(config).items() if name not in _IDLE}
    used |= {"model_type": config.model_type, "attention": config._attn_implementation}
    return json.dumps(used, sort_keys=True, default=str)


class Weights:
    """The digest of a model's weights, taken anew of those tensors that a look finds changed.

    Args:
        model: the bare model.

    Attributes:
        changes: rises with every look that finds tensors replaced, moved or written.
    """

    def __init__(self, model: nn.Module):
        self.changes: int = 0
        self._model = model
        self._seen: list[tuple] = []
        self._lasting: list[Any] = []  # weak references
        self._held: dict[Any, tuple[Any, tuple, bytes]] = {}  # by tensor: weak reference, mark, digest
        self._digest = b""

    def digest(self) -> bytes:
        """Of all that runs now.

        Noticed are tensors that were replaced, moved, or written in place, and adapters that were switched, loaded, merged or
        scaled. What PyTorch does not count as a write (``.data``, other programs) is not: see :meth:`forget`. Forward hooks
        and other attributes of modules are not looked at.

        Raises:
            UnsupportedModelError: some weights cannot be read.
        """
        now, held = list(parts(self._model)), dict[Any, tuple[Any, tuple, bytes]]()
        named, seen, lasting = list[Any](), list[tuple](), list[Any]()
        for name, part in now:
            own = part.tensor if isinstance(part, Saved) else part
            key, mark = _key(own), _mark(own)
            if key not in held:
                held[key] = self._fresh(key, own, mark)
            reference, _, known = held[key]
            named += [name, known]
            if isinstance(part, Saved):  # by its numbers: where it is means nothing where it is made anew for each look
                seen.append((name, known))
            else:
                seen.append((name, key, mark))
                lasting += [reference] * (reference is not None)
        if seen != self._seen or any(reference() is None for reference in self._lasting):
            self.changes += 1
            self._digest = digest(*named)
        self._held, self._seen, self._lasting = held, seen, lasting
        return self._digest

    def forget(self) -> None:
        """Take every digest anew at the next look."""
        self._seen, self._held = [], {}

    def _fresh(self, key: Any, part: Bare, mark: tuple) -> tuple[Any, tuple, bytes]:
        reference, old, known = self._held.get(key, (None, None, b""))
        same = mark == old and (reference is None or reference() is part)
        if known and same:
            return reference, mark, known
        return ref(part) if isinstance(part, Tensor) else None, mark, part_digest(part)


def _key(part: Bare) -> Any:
    return id(part) if isinstance(part, Tensor) else part if isinstance(part, str) else part.mark


def _mark(part: Bare) -> tuple:
    """What changes when a tensor is written in place, or its storage is replaced."""
    if isinstance(part, OnDisk):
        return part.mark
    if isinstance(part, str):
        return ()
    return part.data_ptr(), 0 if part.is_inference() else part._version, part.dtype, part.device

"""A quick look at a model: that its modules are those that they were, and that none of their tensors was moved or written.

It is taken at every turn, for each token of an answer too, of some hundred modules: no step of it is a loop of Python's.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from itertools import chain
from operator import attrgetter, is_not
from typing import Any

from torch import Tensor, nn

from ragkv.model.weights import contained

_END = object()
_version = attrgetter("_version")


class Glance:
    """What a model is now, to look later whether it still is.

    Seen are modules, parameters and buffers that were added, replaced, removed, moved to other memory or written in place; a module
    that was compiled in place; training mode, of the model and of dropouts; and what plain attributes of adapters (PEFT) say:
    which are active, merged or disabled, and by how much they count. Not seen are writes that PyTorch does not count (``.data``),
    and other attributes that are replaced.

    Args:
        model: the bare model.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        held = [part for module in modules for part in (module._parameters, module._buffers, module._modules)]
        self._empty = [part for part in held if not part]
        self._filled = [part.values() for part in held if part]  # views, which follow
        self._inside: list[Any] = [*chain.from_iterable(self._filled), _END]
        self._tensors = [value for value in self._inside if isinstance(value, Tensor)]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._marks = self._marked()
        self._own = [vars(module) for module in modules]
        self._sizes = list(map(len, self._own))
        said = [(vars(module), name) for module in modules for name in _said(module, module is model)]
        self._whose, self._names = [own for own, _ in said], [name for _, name in said]
        self._values = [deepcopy(own[name]) for own, name in said]

    @classmethod
    def of(cls, model: nn.Module) -> Glance | None:
        """Of a model; ``None`` where something else has a say in its weights: offloading (accelerate), tensors within tensors."""
        return cls(model) if contained(model) else None

    def stands(self) -> bool:
        """Whether modules and tensors are the same objects, and none of them was moved or written."""
        inside = chain(chain.from_iterable(self._filled), (_END,))
        same = not any(self._empty) and not any(map(is_not, inside, self._inside))
        return same and self._marked() == self._marks

    def same(self) -> bool:
        """Whether nothing that is looked at has changed."""
        alike = list(map(len, self._own)) == self._sizes and [*map(dict.get, self._whose, self._names)] == self._values
        return alike and self.stands()

    def _marked(self) -> list[int]:
        return [*map(Tensor.data_ptr, self._tensors), *map(_version, self._counted)]


def _said(module: nn.Module, whole: bool) -> Iterable[str]:
    """Names of a module's own attributes that decide what it computes, and that are compared."""
    own = vars(module)
    if hasattr(module, "adapter_layer_names"):
        return [name for name, value in own.items() if _plain(value)]
    return ["training", "p"] if isinstance(module, nn.modules.dropout._DropoutNd) else ["training"] if whole else []


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_plain, chain(value, value.values())))
    if isinstance(value, list | tuple | set):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)

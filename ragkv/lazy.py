"""What is worked out when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Key = TypeVar("Key")
Value = TypeVar("Value")


class lazy(Generic[Value]):
    """A :class:`functools.cached_property` without its lock, which up to Python 3.11 all objects of a class share.

    So one prompt's work does not wait for another's. Two threads that ask one object at once may both work it out.
    """

    def __init__(self, make: Callable[[Any], Value]):
        self._make, self._name, self.__doc__ = make, make.__name__, make.__doc__

    @overload
    def __get__(self, owner: None, kind: type) -> lazy[Value]: ...

    @overload
    def __get__(self, owner: object, kind: type) -> Value: ...

    def __get__(self, owner: Any, kind: type) -> Any:
        if owner is None:
            return self
        value = vars(owner)[self._name] = self._make(owner)
        return value


def keep_last(kept: dict[Key, Value], key: Key, value: Value, most: int) -> Value:
    """Put a value into a dict that holds no more than ``most``: those put first are dropped. Returns it."""
    kept[key] = value
    for oldest in list(kept)[:-most]:
        kept.pop(oldest, None)
    return value

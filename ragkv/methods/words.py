"""Methods as words: ``cache-blend:ratio=0.15,signal=key`` is ``CacheBlend(ratio=0.15, signal="key")``.

Names and knobs are read off the classes, so that a new method needs nothing here.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ragkv import methods
from ragkv.errors import ArgumentTypeError, MethodError
from ragkv.methods import Method

#: How a setting that holds or does not is written.
_TRUTH = {**dict.fromkeys(("1", "true", "yes"), True), **dict.fromkeys(("0", "false", "no"), False)}


def parse_method(text: str) -> Method:
    """The method that a text names.

    Args:
        text: ``name`` or ``name:knob=value,...``; the shares of a list are separated by ``/``.

    Raises:
        MethodError: no such method or knob, or a value that is out of range; the message lists what there is.
    """
    name, _, knobs = text.partition(":")
    known = known_methods()
    if name not in known:
        raise MethodError(f"no method {name!r}; there are: {', '.join(_spelled(*item) for item in known.items())}")
    kind = known[name]
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for item in filter(None, knobs.split(",")):
        knob, equals, value = item.partition("=")
        if not equals or knob not in knobs_of(kind):
            raise MethodError(f"{name} has no setting {item!r}; it is spelled {_spelled(name, kind)}")
        if knob in given:
            raise MethodError(f"{name}: {knob} is given twice")
        given[knob] = _value(f"{name}: {knob}", value, hints[knob])
    return kind(**given)


def as_method(method: Method | str) -> Method:
    """A method, given itself or in words.

    Raises:
        ArgumentTypeError: it is neither.
        MethodError: as :func:`parse_method`.
    """
    if isinstance(method, str):
        return parse_method(method)
    if not isinstance(method, Method):
        raise ArgumentTypeError(
            f"method must be a ragkv.Method, as ragkv.LegoLink(k=16), or its name, as 'lego-link:k=16'; got {method!r}"
        )
    return method


def words_of(method: Method) -> str | None:
    """The text that names a method; ``None`` where no text does: one of your own, or made of others."""
    name = next((name for name, kind in known_methods().items() if kind is type(method)), None)
    if name is None:
        return None
    plain = type(method)()
    knobs = {
        knob: getattr(method, knob) for knob in knobs_of(type(method)) if getattr(method, knob) != getattr(plain, knob)
    }
    said = ",".join(f"{knob}={_said(value)}" for knob, value in knobs.items())
    text = f"{name}:{said}" if said else name
    try:
        return text if parse_method(text) == method else None
    except (MethodError, TypeError):
        return None


def known_methods() -> dict[str, type[Method]]:
    """The methods of ``ragkv.methods`` by the names that they have in words; not those that have to be given others."""
    exported = [getattr(methods, name) for name in methods.__all__]
    kinds = [kind for kind in exported if kind is not Method and not any(map(_required, knobs_of(kind).values()))]
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind.__name__).lower(): kind for kind in kinds}


def knobs_of(kind: type[Method]) -> dict[str, Field[Any]]:
    """A method's settings by name; none where its class is no dataclass."""
    return {field.name: field for field in fields(kind)} if is_dataclass(kind) else {}


def _said(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _required(knob: Field[Any]) -> bool:
    return knob.default is MISSING and knob.default_factory is MISSING


def _spelled(name: str, kind: type[Method]) -> str:
    knobs = ",".join(f"{knob}=..." for knob in knobs_of(kind))
    return f"{name}:{knobs}" if knobs else name


def _value(what: str, text: str, hint: Any) -> Any:
    """A text as a knob's type: one of a union's, or the items of a tuple."""
    if get_origin(hint) is UnionType:
        hint = next(option for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is tuple:
        return tuple(_value(what, part, get_args(hint)[0]) for part in text.split("/") if part)
    try:
        return _TRUTH[text.lower()] if hint is bool else hint(text)
    except (TypeError, ValueError, KeyError):
        raise MethodError(f"{what} must be of type {getattr(hint, '__name__', hint)}, got {text!r}") from None

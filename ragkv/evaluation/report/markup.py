"""HTML and SVG as text. Texts are escaped, markup is not: the two are told apart by type."""

from __future__ import annotations

from html import escape


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: object) -> Markup:
    """An element.

    Args:
        name: of the element.
        *children: :class:`Markup` goes in as it is, other text is escaped, ``None`` is left out.
        **attributes: ``_`` stands for ``-`` and is dropped at the end (``class_``); ``None`` is left out, ``True`` stands alone.
    """
    parts = [name]
    for key, value in attributes.items():
        spelled = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(spelled)
        elif value is not None and value is not False:
            shown = f"{value:.1f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
            parts.append(f'{spelled}="{escape(shown)}"')
    opened = " ".join(parts)
    if name in ("input", "meta", "br"):
        return Markup(f"<{opened}>")
    return Markup(f"<{opened}>{join(*children)}</{name}>")


def join(*children: str | None) -> Markup:
    """Children one after the other; text is escaped."""
    kept = (child for child in children if child is not None)
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in kept))

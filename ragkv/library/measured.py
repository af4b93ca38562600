"""What is measured of a document's tokens when it is read, for methods that go by it."""

from __future__ import annotations

from enum import Flag, auto
from typing import TYPE_CHECKING

from ragkv.errors import instance

if TYPE_CHECKING:
    from ragkv.methods import Method
    from ragkv.store import Batch


class Measured(Flag):
    """What is measured.

    Attributes:
        SENSITIVITY: how much their values change behind another text; it is read twice for that.
        ATTENDED: what they attend to in the chunks in front.
    """

    NOTHING = 0
    SENSITIVITY = auto()
    ATTENDED = auto()

    @classmethod
    def by(cls, *methods: Method, sensitivity: bool | None = None) -> Measured:
        """What methods need; ``sensitivity`` where something else is said of it.

        Raises:
            ArgumentTypeError: that is neither true nor false.
        """
        instance("sensitivity", sensitivity, bool | None, "True, False or None")
        needed = cls.NOTHING
        for method in methods:
            needed |= cls.SENSITIVITY if method.needs_sensitivity else cls.NOTHING
            needed |= cls.ATTENDED if method.needs_attended else cls.NOTHING
        if sensitivity is None:
            return needed
        return needed | cls.SENSITIVITY if sensitivity else needed & ~cls.SENSITIVITY

    @classmethod
    def of(cls, batch: Batch, index: int, foreign: str) -> Measured:
        """What is known of a stored chunk, where sensitivities are measured behind a text of this id."""
        known = cls.SENSITIVITY if batch.foreigns[index] == foreign else cls.NOTHING
        return known if batch.attended[index] is None else known | cls.ATTENDED

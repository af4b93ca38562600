"""Names: a head and a tail each, drawn afresh for each context. A fifth of all name parts is kept out of training."""
# ruff: noqa: SIM905 - a list of words reads better as a line of words

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

FIRST_HEADS = "Mi Ka Lo Te Ra Sel Bo Ni Da Fe Gu Ha Jo Pe Ru Va Wen Yo Zi El An Or Is Ul Cla Tri".split()
FIRST_TAILS = "ra lin vek dor mas tia nna rik so bel ven la nas mir ton gan lde shi".split()
LAST_HEADS = (
    "Kol Bren Har Ost Vel Mar Tor Lin Gra Sto Fen Ash Dun Pol Wes Cor Hol Ber Cas Jor Nor Ris Sal Thorn Quin Eld Yar "
    "Zan Pem Drey"
).split()
LAST_TAILS = (
    "vane ford sen ley wick man mont ski dale berg lock well stad grove ham ridge more by ker quist rell nett"
).split()
FIRM_HEADS = "Bel Ark Nov Cal Dex Omni Hex Lumo Vert Sol Ter Rad Alt Zen Fal Gryph Ire Jun Kest Luth Mon Pax".split()
FIRM_TAILS = "mar tek don via rion cor tis gard lux wen phar stor nix dyne ros".split()
FIRM_ENDINGS = "Works Mills Partners Motors Foods Trading Brothers Labs".split()
TOWN_HEADS = (
    "Amber Black Clear Dray East Fox Glen High Iron King Long Moor North Oak Raven Silver Stone West Win Yew"
).split()
TOWN_TAILS = "haven port bridge minster burg mouth field stead ville gate wich fell".split()


@dataclass(frozen=True)
class Entity:
    """A subject: its full name, its type, and the key of its pronouns."""

    name: str
    type: str
    pronoun: str


def is_heldout(part: str) -> bool:
    """Whether a name part is one of the fifth that training never sees."""
    return zlib.crc32(part.encode()) % 5 == 0


def parts(heads: list[str], tails: list[str], heldout: bool) -> list[str]:
    """All name parts made of one of ``heads`` and one of ``tails``, on one side of the split."""
    return [head + tail for head in heads for tail in tails if is_heldout(head + tail) == heldout]


class Names:
    """Draws names that are not yet taken, all their parts on one side of the split."""

    def __init__(self, heldout: bool, mixed: bool = False):
        """Collects the parts that may be used: only held-out ones, or none of them.

        ``mixed`` lets a head take any tail, also one of another kind of name: three to six times as many parts to train on.
        """
        every = FIRST_TAILS + LAST_TAILS + FIRM_TAILS + TOWN_TAILS
        self.first = parts(FIRST_HEADS, every if mixed else FIRST_TAILS, heldout)
        self.last = parts(LAST_HEADS, every if mixed else LAST_TAILS, heldout)
        self.firm = parts(FIRM_HEADS, every if mixed else FIRM_TAILS, heldout)
        self.town = parts(TOWN_HEADS, every if mixed else TOWN_TAILS, heldout)

    def draw(self, rng: random.Random, type_: str, taken: set[str]) -> Entity:
        """Makes an entity of a type; its name is added to ``taken``."""
        while True:
            entity = self._draw(rng, type_)
            if entity.name not in taken:
                taken.add(entity.name)
                return entity

    def _draw(self, rng: random.Random, type_: str) -> Entity:
        if type_ == "person":
            return Entity(f"{rng.choice(self.first)} {rng.choice(self.last)}", type_, rng.choice(("woman", "man")))
        if type_ == "firm":
            return Entity(f"{rng.choice(self.firm)} {rng.choice(FIRM_ENDINGS)}", type_, "firm")
        return Entity(rng.choice(self.town), type_, "town")


TRAINING_NAMES, HELDOUT_NAMES = Names(heldout=False), Names(heldout=True)
MIXED_NAMES = Names(heldout=False, mixed=True)

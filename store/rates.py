"""What a prompt costs on a machine: measured figures of prefilling and of loading, and what follows from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from ragkv.errors import RecordError, StoreError
from ragkv.store.profile import CostProfile

#: The tier ``disk`` is measured without the system's page cache. With it, it goes by this name; no tier is called so.
PAGE_CACHE = "page cache"
_MEMORY = "cpu"
#: A pool may take this share of the time that computing a prompt takes, and be given up.
_PATIENCE = 0.03


class LevelRate(NamedTuple):
    """What a chunk takes at a lossy level of a pool.

    Attributes:
        name: the level's.
        token_bytes: that a token's KV take there.
        token_s: seconds that decoding one takes.
    """

    name: str
    token_bytes: float
    token_s: float = 0.0


class Loading(NamedTuple):
    """How fast KV get from a tier to their places in a prompt: read, decoded, rotated.

    Attributes:
        bytes_per_s: of the KV as the tier keeps them.
        token_bytes: that a token's KV take there.
        start_s: seconds that a prompt takes besides; over a network until it is known what is there, which everything waits for.
        beside: they come while a processor computes too, over a network; placing them, as from memory, is not in the rate then.
        levels: at which it holds them besides, best first.
    """

    bytes_per_s: float
    token_bytes: float
    start_s: float = 0.0
    beside: bool = False
    levels: tuple[LevelRate, ...] = ()

    def seconds(self, tokens: float) -> float:
        """For so many tokens; 0 for none."""
        return self.start_s + tokens * self.token_bytes / self.bytes_per_s if tokens else 0.0


@dataclass(frozen=True)
class Rates:
    """What a machine was measured to do with a model (CacheBlend's loading controller, arXiv:2405.16444).

    Attributes:
        costs: seconds that a prefill takes.
        tiers: how fast KV come from each, by name: ``"gpu"``, ``"cpu"``, ``"disk"``, or one of your own.
        piece_tokens: tokens that one forward pass computes.
        beside: loading goes on while the model computes, as on an accelerator; on a CPU one comes after the other, but for what
            comes over a network (:attr:`Loading.beside`).

    Raises:
        StoreError: a figure is none.
    """

    costs: CostProfile
    tiers: Mapping[str, Loading] = field(hash=False)
    piece_tokens: int = 512
    beside: bool = False

    def __post_init__(self) -> None:
        for name, tier in self.tiers.items():
            if not (tier.bytes_per_s > 0 and 0 < tier.token_bytes < inf and 0 <= tier.start_s < inf):
                raise StoreError(f"of the tier {name!r} bytes_per_s and token_bytes must be above 0, got {tuple(tier)}")
        if self.piece_tokens < 1:
            raise StoreError(f"piece_tokens must be at least 1, got {self.piece_tokens}")

    def compute_s(self, tokens: int, cached: int = 0) -> float:
        """Seconds that computing ``tokens`` takes behind ``cached`` others, in pieces."""
        pieces = range(0, tokens, self.piece_tokens)
        return sum(self.costs(cached + at, min(self.piece_tokens, tokens - at)) for at in pieces)

    def patience_s(self, tokens: int, cached: int = 0) -> float:
        """Seconds, besides what it took lately, for which whoever could compute so many tokens waits until a pool answers."""
        return _PATIENCE * self.compute_s(tokens, cached)

    def read_s(self, tokens: int, document_tokens: int) -> float:
        """Seconds that reading a document takes once, in windows of at most ``document_tokens``."""
        whole, rest = divmod(tokens, document_tokens)
        return whole * self.compute_s(document_tokens) + self.compute_s(rest)

    def load_s(self, tokens: Mapping[str, float]) -> float:
        """Seconds that loading takes, of so many tokens from each tier.

        Raises:
            KeyError: nothing was measured of a tier.
        """
        return sum(self.tiers[tier].seconds(count) for tier, count in tokens.items())

    def prompt_s(self, tokens: Mapping[str, float], compute_s: float, front_s: float = 0.0) -> float:
        """Seconds until so many tokens from each tier are loaded, and all is computed.

        Args:
            tokens: by tier.
            compute_s: seconds of computing.
            front_s: those of them that need nothing of what comes over a network.

        Raises:
            KeyError: nothing was measured of a tier.
        """
        if self.beside:
            return max(self.load_s(tokens), compute_s)
        away = {tier: count for tier, count in tokens.items() if self.tiers[tier].beside}
        here_s = self.load_s({tier: count for tier, count in tokens.items() if tier not in away})
        if _MEMORY in self.tiers:
            here_s += self.tiers[_MEMORY].seconds(sum(away.values()))
        start_s = sum(self.tiers[tier].start_s for tier, count in away.items() if count)
        return here_s + start_s + max(self.load_s(away) - start_s, front_s) + compute_s - front_s


def loading_to_bytes(tiers: Mapping[str, Loading]) -> bytes:
    """Measured tiers as JSON, for :meth:`TieredStore.meta_put`."""
    return json.dumps({name: tier[:3] for name, tier in tiers.items()}).encode()


def loading_from_bytes(data: bytes) -> dict[str, Loading]:
    """Reads :func:`loading_to_bytes`.

    Raises:
        RecordError: it is none.
    """
    try:
        return {
            str(name): Loading(float(rate), float(size), float(start))
            for name, (rate, size, start) in json.loads(data).items()
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise RecordError(f"measured rates cannot be read: {error}") from error

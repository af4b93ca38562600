"""Replays a stream of requests against one tier, without the tensors: how policies are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ragkv.errors import StoreFullError
from ragkv.store.books import MemoryBooks
from ragkv.store.planner import Planner
from ragkv.store.policy import POLICIES, Belady, Policy
from ragkv.store.terms import Terms


@dataclass(frozen=True)
class Request:
    """One chunk that is asked for: its key, its bytes, its tokens, and the seconds that computing it takes."""

    key: bytes
    size_bytes: int
    tokens: int
    cost_s: float


@dataclass(frozen=True)
class Outcome:
    """What a policy reached.

    Attributes:
        hit_rate: share of the requests that were found.
        token_hit_rate: share of the tokens that were found.
        saved_s: seconds of prefill that were saved.
        saved_share: of the seconds that computing everything takes.
    """

    hit_rate: float
    token_hit_rate: float
    saved_s: float
    saved_share: float


def replay(requests: Sequence[Request], policy: Policy, budget_bytes: int, *, selective: bool = False) -> Outcome:
    """Serves requests from an empty tier; what is missing is computed and put."""
    planner = Planner(MemoryBooks(), policy, budget_bytes)
    hits, tokens, saved = 0, 0, 0.0
    for position, request in enumerate(requests):
        if isinstance(policy, Belady):
            policy.position = position
        row = planner.books.row(request.key)
        if row is not None and row.usage.size_bytes:
            planner.use(request.key, row)
            hits, tokens, saved = hits + 1, tokens + request.tokens, saved + request.cost_s
            continue
        try:
            planner.admit(request.key, request.size_bytes, Terms(cost_s=request.cost_s), selective=selective)
        except StoreFullError:
            continue  # larger than the tier: it is computed each time
    total = sum(request.cost_s for request in requests)
    return Outcome(hits / len(requests), tokens / _tokens(requests), saved, saved / total if total else 0.0)


def compare(
    requests: Sequence[Request], shares: Sequence[float], *, selective: bool = False
) -> dict[str, list[Outcome]]:
    """Every policy, Belady's optimum among them, on one stream.

    Args:
        requests: the stream.
        shares: capacities, as shares of the bytes of all that is asked for.
        selective: admit only what is worth more than what it would evict.

    Returns:
        By the policy's name an outcome for each capacity.
    """
    total = sum({request.key: request.size_bytes for request in requests}.values())
    future = [request.key for request in requests]
    makers: dict[str, Callable[[], Policy]] = {**POLICIES, Belady.name: lambda: Belady(future)}
    return {
        name: [replay(requests, make(), int(share * total), selective=selective) for share in shares]
        for name, make in makers.items()
    }


def _tokens(requests: Iterable[Request]) -> int:
    return sum(request.tokens for request in requests)

"""Which of several replicas a question goes to: the one whose memory knows its chunks, unless it has too much to do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from hashlib import blake2b
from numbers import Real

from ragkv.chunk import Chunk
from ragkv.errors import ArgumentError, ArgumentTypeError, is_number, listable


def route(
    chunks: Iterable[Chunk | str],
    replicas: Mapping[str, float],
    *,
    held: Mapping[str, Collection[str]] | None = None,
    bound: float = 1.25,
) -> str:
    """The replica that a question over these chunks should be sent to.

    Every document has an order of the replicas that all callers agree on, by its hash and theirs (rendezvous hashing), so
    that questions over the same documents meet in the same memory, and little moves when a replica comes or goes. A chunk
    speaks for the first one in its document's order, with its tokens. No replica gets more than ``bound`` times its share
    of what is going on (consistent hashing with bounded loads, arXiv:1608.01350): chunks of a full one speak for the next
    in their order.

    Args:
        chunks: of the question, or names of documents or passages, which count alike.
        replicas: names, and how much each has to do just now: questions that it answers, say.
        held: what a replica is known to hold, by chunks' ids (:attr:`ragkv.Chunk.id`) or such names. A chunk then speaks for
            those that hold it; one that none holds, for the first in its order.
        bound: 1 or more.

    Returns:
        A name.

    Raises:
        ArgumentError: no replica, a load below 0, a bound below 1, or one that is not finite.
        ArgumentTypeError: what is not of these types.
    """
    if not isinstance(replicas, Mapping):
        raise ArgumentTypeError(f"replicas must map names to loads, as {{'a': 3, 'b': 0}}, got {replicas!r:.80}")
    figures = [*replicas.values(), bound]
    if not all(isinstance(figure, Real) for figure in figures):
        raise ArgumentTypeError(f"loads and bound must be numbers, got {replicas!r:.80}, {bound!r:.80}")
    if (
        not replicas
        or not all(is_number(one) and math.isfinite(one) for one in figures)
        or min(figures[:-1]) < 0
        or bound < 1
    ):
        raise ArgumentError(
            "route needs replicas, finite loads of at least 0 and a finite bound of at least 1, "
            f"got {replicas!r:.80}, {bound}: leave out a replica that is down"
        )
    held = {} if held is None else held
    if not isinstance(held, Mapping) or not all(isinstance(names, Collection) for names in held.values()):
        raise ArgumentTypeError(f"held must map replicas' names to what they hold, got {held!r:.80}")
    if not listable(chunks):
        raise ArgumentTypeError(f"chunks must be several ragkv.Chunk or names, got {chunks!r:.80}")
    most = math.ceil(bound * (sum(replicas.values()) + 1) / len(replicas))
    free = [name for name, load in replicas.items() if load + 1 <= most] or [
        min(replicas, key=lambda name: replicas[name])
    ]
    votes, whole = Counter[str](), list[str]()
    for chunk in chunks:
        if not isinstance(chunk, Chunk | str):
            raise ArgumentTypeError(f"chunks must be ragkv.Chunk or names, got {chunk!r:.80}")
        own, tokens = (chunk.id, len(chunk)) if isinstance(chunk, Chunk) else (chunk, 1)
        name = (chunk.document or own) if isinstance(chunk, Chunk) else own
        whole.append(name)
        holders = [replica for replica in free if own in held.get(replica, ())]
        for replica in holders or [_first(name, free)]:
            votes[replica] += tokens
    best = max(votes.values(), default=0)
    return _first("".join(sorted(whole)), [replica for replica in free if votes[replica] == best])


def _first(name: str, replicas: Sequence[str]) -> str:
    """The first of the replicas in the order of a document, or of several together."""

    def rank(replica: str) -> bytes:
        # Names of files may hold half a surrogate pair.
        named = f"{len(name)}:{name}{replica}".encode("utf-8", "surrogatepass")
        return blake2b(named, digest_size=16).digest()

    return max(replicas, key=rank)

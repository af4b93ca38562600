"""Options that say how passages are found. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import math
import re
from typing import TYPE_CHECKING, Any

from ragkv.cli.values import at_least, count_option, parsed

if TYPE_CHECKING:
    from ragkv.rag import RAG

_EXPRESSION = re.compile(r"\s*([^=!<>{]+?)\s*(>=|<=|!=|>|<|=)\s*(.*?)\s*", re.DOTALL)
_SIGNS = {"=": "$eq", "!=": "$ne", ">": "$gt", ">=": "$gte", "<": "$lt", "<=": "$lte"}
#: As ``ragkv.retrieval.ranking`` has them.
ORDERS = ("document", "retrieved", "best-last", "cache")
_OPTIONS = ("top_k", "neighbours", "max_context_tokens", "min_score", "hybrid", "rerank", "hops", "order")


def options(
    top_k: int | None = None, neighbours: int = 0, hybrid: bool = False, hops: int = 1
) -> argparse.ArgumentParser:
    """The options, with a command's defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("finding passages")
    for name, least, default, letter, what in (
        ("--top-k", 1, top_k, "K", "passages to find, in each hop"),
        ("--neighbours", 0, neighbours, "N", "passages to take along on either side of each, from its own document"),
        ("--hops", 1, hops, "N", "2: search again for names in the best document found"),
    ):
        said = "5, or what --max-context-tokens takes" if default is None else default
        group.add_argument(
            name, type=at_least(least), default=default, metavar=letter, help=f"{what} (default: {said})"
        )
    group.add_argument(
        "--hybrid",
        action=argparse.BooleanOptionalAction,
        default=hybrid,
        help=f"search by words (BM25) besides vectors (default: {'yes' if hybrid else 'no'})",
    )
    count_option(group, "--max-context-tokens", "the most tokens of all passages")
    group.add_argument("--min-score", type=parsed(_number), metavar="X", help="take no passage of a lower score")
    group.add_argument(
        "--where",
        type=parsed(condition),
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="only documents whose metadata say so: also !=, >, >=, <, <= or a JSON object; source=PATH for a file, a folder or a "
        "pattern; may be repeated",
    )
    group.add_argument("--rerank", metavar="MODEL", help="name or path of a cross-encoder that orders what was found")
    group.add_argument(
        "--order",
        choices=ORDERS,
        default=ORDERS[0],
        help="of the passages in the prompt: documents by their best passage, each in its own order; the best first; the best "
        f"last, next to the question; or one of which much was computed before (default: {ORDERS[0]})",
    )
    return parser


def search_of(
    args: argparse.Namespace, rag: RAG, namespace: str | None = None, where: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What the options say, for :meth:`RAG.retrieve`.

    Args:
        args: of the command.
        rag: the folder.
        namespace: where documents are found; the folder's own by default.
        where: holds besides ``--where``.

    Raises:
        RagKVError: a source of ``--where`` names no document.
    """
    chosen = {name: getattr(args, name) for name in _OPTIONS}
    conditions = [_meant(each, rag, namespace) for each in (*args.where, *([] if where is None else [where]))]
    return {**chosen, "where": {"$and": conditions} if conditions else None}


def _number(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError(f"must be a number, got {text!r}")
    return value


def condition(text: str) -> dict[str, Any]:
    """What a text says as a condition, as :func:`ragkv.retrieval.where.condition` takes it."""
    if text.lstrip().startswith("{"):
        return json.loads(text)
    match = _EXPRESSION.fullmatch(text)
    if match is None:
        raise ValueError(f"must be NAME, one of {' '.join(_SIGNS)}, VALUE, or a JSON object; got {text!r}")
    name, sign, value = match.groups()
    try:
        value = json.loads(value)
    except json.JSONDecodeError:
        pass  # a text
    return {name: value if isinstance(value, list) and sign == "=" else {_SIGNS[sign]: value}}


def _meant(condition: dict[str, Any], rag: RAG, namespace: str | None) -> dict[str, Any]:
    """With the documents that a source means in the place of what they were called by."""
    from ragkv.errors import RagKVError
    from ragkv.retrieval.naming import matching, unknown

    test = condition.get("source")
    if not isinstance(test, dict) or len(test) != 1:
        return condition
    ((sign, target),) = test.items()
    if sign not in ("$eq", "$ne") or not isinstance(target, str):
        return condition
    within = rag.engine.documents.namespace if namespace is None else namespace
    sources = [document.source for document in rag.retriever.catalogue.documents(within)]
    meant = matching(sources, target)
    if not meant:
        raise RagKVError(unknown(sources, target, "'ragkv docs'"))
    among: dict[str, Any] = {"source": {"$in": meant}}
    others = {name: wanted for name, wanted in condition.items() if name != "source"}
    return {"$and": [others, among if sign == "$eq" else {"$not": among}]}

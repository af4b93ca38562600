"""What ``ragkv eval`` takes. Imports nothing heavy, as :mod:`ragkv.cli.arguments`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

_SUMMARY = "Measure how well and how fast methods answer, on the bundled model or on your own model and data."

_DATA_HELP = (
    "'bundled', or a file of JSON or JSON lines: LongBench, CacheBlend, HotpotQA, 2WikiMultihopQA, MuSiQue, RULER, or ragkv's own "
    "form; which one is seen from its content (default: bundled)"
)

_ARMS_HELP = (
    "what to compare: 'default', 'full-prefill', 'full-documents', 'no-context', 'gold-only', 'prefix-only', 'no-rotation', a "
    "method as for 'ragkv ask --method' with '@alone' or '@document' behind it for one context only, 'random=ARM' for a random "
    "choice at the budget charged to an arm (default: default)"
)


def add_command(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """Registers ``eval``.

    Args:
        add_parser: of the top parser's subparsers.
    """
    command = add_parser("eval", help=_SUMMARY, description=_SUMMARY, allow_abbrev=False)
    command.add_argument("--model", default="bundled", help="name or path of a transformers decoder (default: bundled)")
    command.add_argument("--data", default="bundled", metavar="FILE", help=_DATA_HELP)
    command.add_argument("--out", default="ragkv-eval", metavar="FOLDER", help="rows and report (default: ragkv-eval)")
    command.add_argument("--arms", nargs="+", default=["default"], metavar="ARM", help=_ARMS_HELP)
    command.add_argument(
        "--budgets",
        nargs="+",
        type=_share,
        default=[0.05, 0.1, 0.15, 0.3],
        metavar="SHARE",
        help="shares of tokens at which methods are run (default: 0.05 0.1 0.15 0.3)",
    )
    command.add_argument("--metric", default="em", help="what the plots show upwards (default: em)")
    command.add_argument("--limit", type=_at_least(1), metavar="N", help="at most N cases (default: all; bundled: 320)")
    command.add_argument(
        "--orders",
        type=_at_least(1),
        default=3,
        metavar="N",
        help="orders of the chunks: as retrieved, and N - 1 shuffled (default: 3)",
    )
    command.add_argument(
        "--seed", type=_at_least(0), default=0, metavar="N", help="of shuffling and resampling (default: 0)"
    )
    command.add_argument(
        "--timed", type=_at_least(0), default=4, metavar="N", help="cases timed cold and from disk too (default: 4)"
    )
    command.add_argument(
        "--max-new-tokens", type=_at_least(1), default=32, metavar="N", help="the longest answer (default: 32)"
    )
    command.add_argument(
        "--chunk-words",
        type=_at_least(1),
        default=512,
        metavar="N",
        help="longer passages of data that is not cut yet are cut into chunks of N words (default: 512)",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--debug", action="store_true", help="show the traceback of a failure")


def _at_least(least: int) -> Callable[[str], int]:
    def parsed(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return parsed


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"must be a share from 0 to 1, got {text!r}")
    return share

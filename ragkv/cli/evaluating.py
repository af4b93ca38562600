"""What ``ragkv eval`` takes. Imports nothing heavy, as :mod:`ragkv.cli.arguments`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ragkv.cli.values import FOREIGN_HELP, count_option, folder_name, share, text_of_file

_SUMMARY = "Measure how well and how fast methods answer, on the bundled model or on your own model and data."

_DATA_HELP = (
    "'bundled', or a file of JSON or JSON lines: LongBench, CacheBlend, HotpotQA, 2WikiMultihopQA, MuSiQue, RULER, SQuAD, or "
    "ragkv's own form; which one is seen from its content (default: bundled)"
)

_ARMS_HELP = (
    "what to compare: 'default', 'full-prefill', 'full-documents', 'no-context', 'gold-only', 'prefix-only', 'no-rotation', a "
    "method as for 'ragkv ask --method' with '@alone' or '@document' behind it for one context only, or '@neighbours': documents "
    "are read behind the two passages of others nearest to them; 'random=ARM' for a random choice at the budget charged to an arm "
    "(default: default)"
)

#: Whole numbers: name, least, default, what it says.
_COUNTS = (
    ("--limit", 1, None, "at most N cases (default: all)"),
    ("--orders", 1, 3, "orders of the chunks: as retrieved, and N - 1 shuffled (default: 3)"),
    ("--seed", 0, 0, "of shuffling and resampling (default: 0)"),
    (
        "--jobs",
        1,
        1,
        "processes that ask cases side by side, each with the model and its share of the cores (default: 1)",
    ),
    ("--timed", 0, 4, "cases timed cold and from disk too (default: 4)"),
    (
        "--max-new-tokens",
        0,
        32,
        "the longest answer; 0: no answers, only the first token against full prefill, which is quick (default: 32)",
    ),
    (
        "--retrieve",
        1,
        None,
        "passages to find for each question, where the data has more (default: as the data says; SQuAD: 5)",
    ),
    ("--time-limit", 1, None, "stop after N seconds and write the report; the same command goes on"),
    ("--chunk-words", 1, 512, "longer passages, of data that is not cut yet, are cut after N words (default: 512)"),
)


def add_command(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """Registers ``eval``.

    Args:
        add_parser: of the top parser's subparsers.
    """
    command = add_parser("eval", help=_SUMMARY, description=_SUMMARY, allow_abbrev=False)
    command.add_argument("--model", default="bundled", help="name or path of a transformers decoder (default: bundled)")
    command.add_argument("--data", default="bundled", metavar="FILE", help=_DATA_HELP)
    rows = "rows and report (default: ragkv-eval)"
    command.add_argument("--out", type=folder_name, default="ragkv-eval", metavar="FOLDER", help=rows)
    command.add_argument("--arms", nargs="+", default=["default"], metavar="ARM", help=_ARMS_HELP)
    command.add_argument(
        "--budgets",
        nargs="+",
        type=share,
        default=[0.05, 0.1, 0.15, 0.3],
        metavar="SHARE",
        help="shares of tokens at which methods are run (default: 0.05 0.1 0.15 0.3)",
    )
    command.add_argument(
        "--metric", help="what the plots show upwards (default: em; of LongBench its own; without answers kl_chunks)"
    )
    command.add_argument(
        "--instruction",
        metavar="TEXT",
        help="stands between passages and question; '' for none (default: asks for a short answer where the data has those)",
    )
    command.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="of the weights (default: as the model was saved)",
    )
    command.add_argument("--foreign", type=text_of_file, metavar="FILE", help=FOREIGN_HELP)
    for name, least, default, what in _COUNTS:
        count_option(command, name, what, least, default)
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--debug", action="store_true", help="show the traceback of a failure")

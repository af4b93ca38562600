"""What ``ragkv calibrate`` takes. Imports nothing heavy, as :mod:`ragkv.cli.arguments`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ragkv.cli.values import count_option, share

_SUMMARY = "Find the cheapest method that loses no more than a bound against full prefill, on your own questions."

_DATA_HELP = (
    'a file of JSON lines {"question": ..., "answers": [...]}, asked over what was added (answers for --f1 only); or one of the '
    "forms of 'ragkv eval', whose records bring their documents along"
)

_BOUNDS = (
    ("--kl", "NATS", "mean KL of the first token to a full prefill stays under NATS (default: 0.1)"),
    ("--top1", "SHARE", "instead: the share of prompts whose first token is another one stays under SHARE"),
    ("--f1", "LOSS", "instead: the F1 that answers lose stays under LOSS, as 0.02; answers are decoded"),
)

_COUNTS = (
    ("--limit", 1, None, "at most N cases (default: all, and no more than are needed)"),
    ("--seed", 0, 0, "of their order (default: 0)"),
    ("--max-new-tokens", 1, 32, "with --f1: the longest answer (default: 32)"),
    ("--chunk-words", 1, 512, "longer passages, of data that is not cut yet, are cut after N words (default: 512)"),
)


def add_command(command: Callable[..., argparse.ArgumentParser], *parents: argparse.ArgumentParser) -> None:
    """Registers ``calibrate``.

    Args:
        command: makes a command's parser from its name, its parents and ``summary=``.
        *parents: the model, the store and how passages are found.
    """
    made = command("calibrate", *parents, summary=_SUMMARY)
    made.add_argument("--data", required=True, metavar="FILE", help=_DATA_HELP)
    bounds = made.add_mutually_exclusive_group()
    for name, unit, what in _BOUNDS:
        bounds.add_argument(name, type=float, metavar=unit, help=what)
    made.add_argument(
        "--confidence", type=share, default=0.95, metavar="SHARE", help="of the statement (default: 0.95)"
    )
    made.add_argument(
        "--cap", type=float, default=1.0, metavar="NATS", help="the most that one prompt's KL counts (default: 1)"
    )
    made.add_argument(
        "--ladder",
        nargs="+",
        metavar="METHOD",
        help="what is tried, from the dearest to the cheapest, as for 'ragkv ask --method' (default: relevant-tokens at ratios "
        "0.5 to 0.05, reuse)",
    )
    for name, least, default, what in _COUNTS:
        count_option(made, name, what, least, default)

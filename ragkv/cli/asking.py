"""What ``ragkv ask`` and ``ragkv chat`` take. Imports nothing heavy, as :mod:`ragkv.cli.arguments`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ragkv.cli import care
from ragkv.cli.values import at_least, count_option, schema_of_file

_BATCH_HELP = (
    'instead of QUESTION: a file of JSON lines {"question": ...}, with "id", "namespace" and "where" if you like, answered side by '
    "side"
)
_OUT_HELP = (
    "of --batch: the answers, a JSON line each as soon as it is there; the same command goes on where it stopped"
)
#: Options of a file of questions, and those of a single one.
_OF_BATCH, _OF_ONE = ("out", "at_once"), ("page", "force")
_SPELLED = {"out": "--out", "at_once": "--at-once", "page": "--report", "force": "--force"}


def add_commands(command: Callable[..., argparse.ArgumentParser], *parents: argparse.ArgumentParser) -> None:
    """Registers ``ask`` and ``chat``.

    Args:
        command: makes a command's parser from its name, its parents and ``summary=``.
        *parents: the model, the method, the store, progress, and how passages are found.
    """
    answering = (*parents, _answer())
    ask = command("ask", *answering, summary="Answer a question over the documents that were added, or a file of them.")
    ask.add_argument(
        "question", nargs="?", type=_question, metavar="QUESTION", help="'-' reads it from the standard input"
    )
    ask.add_argument("--batch", metavar="FILE", help=_BATCH_HELP)
    ask.add_argument("--out", metavar="FILE", help=_OUT_HELP)
    count_option(ask, "--at-once", "of --batch: so many are worked on at a time (default: 8)")
    ask.add_argument(
        "--schema",
        type=schema_of_file,
        metavar="FILE",
        help="the answer is JSON that fits the JSON schema in this file",
    )
    ask.add_argument(
        "--logprobs",
        type=at_least(1),
        nargs="?",
        const=True,
        metavar="N",
        help="with --json or --batch: log-probabilities of the answer's tokens, and of the N likeliest in the place of each",
    )
    care.page_option(ask, "--report", "write a page with the answer, its sources and a picture of what it cost")
    ask.set_defaults(refuse=ask.error)

    chat = command(
        "chat",
        *answering,
        summary="A conversation over the documents: a question a line. /help says what else a line may be.",
    )
    chat.add_argument("--sources", action="store_true", help="show behind each answer where it comes from")
    longest = (
        "the longest prompt with its answer; beyond it the oldest turns are dropped (default: the model's positions)"
    )
    count_option(chat, "--context-tokens", longest)


def check(args: argparse.Namespace) -> None:
    """One question or a file of them, and no option of the other: else a usage error."""
    if (args.question is None) == (args.batch is None):
        args.refuse("give a QUESTION, or --batch FILE with --out FILE")
    if args.batch is not None and args.out is None:
        args.refuse("--batch FILE needs --out FILE, for the answers")
    if args.batch is not None and Path(args.batch).resolve() == Path(args.out).resolve():
        args.refuse("the questions and their answers cannot be one file")
    others, what = (_OF_BATCH, "--batch") if args.batch is None else (_OF_ONE, "a single QUESTION")
    for name in others:
        if getattr(args, name) not in (None, False):
            args.refuse(f"{_SPELLED[name]} is an option of {what}")


def _answer() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    count_option(options, "--max-new-tokens", "the longest answer (default: 128)", default=128)
    options.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated"
    )
    quoted = "compute N tokens that the prompt proposes along with each one: the same answer, sooner where it quotes"
    count_option(options, "--lookup", quoted, least=0, default=0)
    return options


def _question(text: str) -> str:
    if text == "-":
        text = sys.stdin.read().strip() if sys.stdin is not None else ""
    if not text.strip():
        raise argparse.ArgumentTypeError("the question is blank")
    return text

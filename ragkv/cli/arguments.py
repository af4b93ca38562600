"""What the command line takes. Imports nothing heavy, so that help and usage errors come at once."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ragkv.cli import care, evaluating, filters
from ragkv.cli.values import FOREIGN_HELP, at_least, parsed, schema_of_file, text_of_file

if TYPE_CHECKING:
    from ragkv.methods import Method

_METHOD_HELP = (
    "how prompts are put together: reuse, lego-link:k=16, cache-blend:ratio=0.15,signal=key, full-prefill, ..."
)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    top = argparse.ArgumentParser(
        prog="ragkv",
        description="Answer questions over documents that a language model has already read.",
        epilog="'ragkv demo' needs no model, no documents and no network. 'ragkv COMMAND --help' says more.",
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    shared, model, method, bar = _shared(), _model(), _method(), _bar()

    def command(name: str, *parents: argparse.ArgumentParser, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, parents=[*parents, shared], help=summary, description=summary, allow_abbrev=False
        )

    demo = command(
        "demo",
        method,
        _search(neighbours=1),
        summary="Let the bundled model read the bundled documents and answer questions.",
    )
    demo.add_argument("--questions", type=at_least(1), metavar="N", help="ask only the first N questions")

    reading = (model, _storage(), bar)
    add = command(
        "add",
        *reading,
        method,
        summary="Read files, and folders with all that is in them: text, Markdown, PDF.",
    )
    add.add_argument(
        "--chunk-tokens",
        type=at_least(1),
        metavar="N",
        help="the longest passage (default: 256; 96 for the bundled model)",
    )
    add.add_argument("paths", nargs="+", metavar="PATH", help="a file or a folder")
    add.add_argument("--pin", action="store_true", help="keep the KV of these files from being evicted")

    sync = command(
        "sync",
        *reading,
        summary="Read what is new or changed in a folder, and forget the documents whose files are gone.",
    )
    sync.add_argument("folder", metavar="FOLDER")
    sync.add_argument("--dry-run", action="store_true", help="show what would be done, and do nothing")

    command("refresh", *reading, summary="Read whatever KV of the documents is missing, so that no question has to.")

    ask = command(
        "ask",
        model,
        method,
        _storage(),
        bar,
        _search(neighbours=0),
        summary="Answer a question over the documents that were added.",
    )
    ask.add_argument("question", type=_question, metavar="QUESTION")
    ask.add_argument(
        "--max-new-tokens", type=at_least(1), default=128, metavar="N", help="the longest answer (default: 128)"
    )
    ask.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated"
    )
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
        help="with --json: log-probabilities of the answer's tokens, and of the N likeliest in the place of each",
    )

    care.add_commands(command)
    evaluating.add_command(commands.add_parser)
    return top


def home() -> Path:
    """Where folders are kept unless ``--path`` says otherwise: ``$RAGKV_HOME``, or ``ragkv`` in the user's cache folder."""
    chosen = os.environ.get("RAGKV_HOME")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ragkv"


def folder(args: argparse.Namespace, default: str = "default") -> Path:
    """The folder that a command works on."""
    return home() / default if args.path is None else Path(args.path).expanduser()


def _shared() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--path", metavar="FOLDER", help="documents, vectors and KV (default: a folder in $RAGKV_HOME)")
    shared.add_argument("--json", action="store_true", help="print one JSON object")
    shared.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return shared


def _search(neighbours: int) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--top-k", type=at_least(1), default=5, metavar="K", help="passages to find (default: 5)")
    options.add_argument(
        "--neighbours",
        type=at_least(0),
        default=neighbours,
        metavar="N",
        help=f"passages to take along on either side of each, from its own document (default: {neighbours})",
    )
    return options


def _model() -> argparse.ArgumentParser:
    model = argparse.ArgumentParser(add_help=False)
    group = model.add_argument_group(
        "the model", "'add' keeps these in the folder; by default they are what is kept there"
    )
    group.add_argument("--model", help="name or path of a transformers decoder (in a new folder: bundled)")
    group.add_argument("--tokenizer", metavar="NAME", help="name or path of another tokenizer")
    group.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), help="of the weights")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of model and tokenizer")
    group.add_argument("--subfolder", metavar="NAME", help="where they stand in the model's folder")
    group.add_argument("--gguf-file", metavar="NAME", help="the file of a GGUF model in its folder")
    group.add_argument("--system", metavar="TEXT", help="a system message, where the tokenizer has a chat template")
    group.add_argument("--namespace", metavar="NAME", help="KV stored under another one are never found")
    group.add_argument(
        "--embedder", help="name or path of a sentence-transformers model (default: all-MiniLM-L6-v2, offline)"
    )
    group.add_argument("--foreign", type=text_of_file, metavar="FILE", help=FOREIGN_HELP)
    model.add_argument("--cache-dir", metavar="FOLDER", help="where fetched models are kept")
    for name, what in (
        ("--local-files-only", "fetch nothing"),
        ("--trust-remote-code", "let the model's own code run; never kept"),
    ):
        model.add_argument(name, action="store_true", default=None, help=what)
    return model


def _bar() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--progress",
        action="store_true",
        help="show how far reading is, also with --json or where stderr is no terminal",
    )
    return options


def _storage() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    for tier, what in (("gpu", "memory of the GPU"), ("cpu", "memory"), ("disk", "disk")):
        options.add_argument(
            f"--{tier}-size",
            f"--{tier}-bytes",
            type=parsed(filters.parse_size),
            metavar="SIZE",
            help=f"{what} for KV, as 8GiB",
        )
    options.add_argument(
        "--codec", metavar="NAME", help="how KV are encoded on disk: raw, lossless, int8, fp8, int4, cachegen"
    )
    options.add_argument("--cpu-codec", metavar="NAME", help="how KV are encoded in memory")
    options.add_argument(
        "--lifetime",
        type=parsed(filters.parse_duration),
        metavar="TIME",
        help="how long KV may be used before they are read again, as 12h or 30d (default: for ever)",
    )
    return options


def _method() -> argparse.ArgumentParser:
    method = argparse.ArgumentParser(add_help=False)
    method.add_argument(
        "--method", type=_parsed_method, help=f"{_METHOD_HELP} (default: the folder's, or sensitive-tokens)"
    )
    return method


def _parsed_method(text: str) -> Method:
    from ragkv.errors import MethodError
    from ragkv.methods.words import parse_method

    try:
        return parse_method(text)
    except MethodError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _question(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("the question is blank")
    return text

"""What the command line takes. Imports nothing heavy, so that help and usage errors come at once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkv import __version__
from ragkv.cli import asking, calibrating, care, evaluating, filters, searching
from ragkv.cli.pools import add_key_option
from ragkv.cli.values import FOREIGN_HELP, count_option, folder_name, parsed, text_of_file

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
    top.add_argument("--version", action="version", version=f"ragkv {__version__}")
    commands: argparse._SubParsersAction[argparse.ArgumentParser] = top.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Command
    )
    shared, model, method, bar = _shared(), _model(), _method(), _bar()

    def command(
        name: str, *parents: argparse.ArgumentParser, summary: str, aliases: Sequence[str] = ()
    ) -> argparse.ArgumentParser:
        more: dict[str, Any] = {"description": summary, "aliases": aliases, "allow_abbrev": False}
        return commands.add_parser(name, parents=[*parents, shared], help=summary, **more)

    demo = command(
        "demo",
        method,
        searching.options(top_k=3, neighbours=2, hybrid=True, hops=2),
        summary="Let the bundled model, or yours, read the bundled documents and answer questions.",
    )
    demo.add_argument("--model", default="bundled", metavar="PATH", help="a transformers decoder's (default: bundled)")
    _dtype(demo)
    count_option(demo, "--questions", "ask only the first N questions")

    reading = (model, _storage(), bar)
    add = command(
        "add",
        *reading,
        method,
        summary="Read files, and folders with all that is in them: text, Markdown, PDF, HTML, Office, mail and others.",
    )
    count_option(add, "--chunk-tokens", "the longest passage (default: 256; 96 for the bundled model)")
    add.add_argument("paths", nargs="+", metavar="PATH", help="a file or a folder")
    add.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="let the Ray cluster of this machine (auto, or HOST:PORT of its head; local: a new one here) read the files into the "
        "pool of --remote first",
    )
    count_option(add, "--workers", "of the cluster (default: as many as it has room for)")
    either = add.add_mutually_exclusive_group()
    either.add_argument("--pin", action="store_true", help="keep the KV of these files from being evicted")
    either.add_argument(
        "--dry-run", action="store_true", help="show what would be done and what it takes, and do nothing"
    )

    sync = command(
        "sync",
        *reading,
        summary="Read what is new or changed in a folder, and forget the documents whose files are gone.",
    )
    sync.add_argument("folder", metavar="FOLDER")
    sync.add_argument("--dry-run", action="store_true", help="show what would be done, and do nothing")

    for command_of_files in (add, sync):
        command_of_files.add_argument(
            "--encoding",
            type=parsed(_encoding),
            metavar="NAME",
            help="of text files, as cp1252 (default: UTF-8 where they are, else it is found out)",
        )

    refresh = command(
        "refresh", *reading, summary="Read whatever KV of the documents is missing, so that no question has to."
    )
    refresh.add_argument(
        "--dry-run", action="store_true", help="only name the documents whose neighbours (--behind) are others now"
    )
    publish = command(
        "publish",
        model,
        _storage(pool_required=True),
        summary="Put into a pool which documents there are, so that others answer without reading them.",
    )
    publish.add_argument(
        "--only", action="store_true", help="withdraw what is published there of the namespace for other models"
    )
    for command_that_reads in (add, sync, refresh):
        nearest = "read each document behind the N passages of others that are nearest to it"
        count_option(command_that_reads, "--behind", f"{nearest} (default: the folder's, or 0)", least=0)

    asking.add_commands(command, model, method, _storage(), bar, searching.options())

    advise = command(
        "advise",
        model,
        _storage(),
        method,
        summary="Measure when reuse pays on this machine with this model, and what documents would take.",
    )
    count_option(advise, "--tokens", "of the documents (default: 1000000)", default=1_000_000)
    care.duration_option(advise, "--limit", "measure no longer, about (default: 10s)", default=10.0)
    advise.add_argument("--again", action="store_true", help="measure, though what was measured before is kept")
    care.page_option(advise, "--html", "write a page with a picture of it")

    command(
        "info",
        summary="Show versions, the machine, what runs on it, and the folder: what a report of a fault should name.",
        aliases=["doctor"],
    )
    completion = command("completion", summary="Print a script by which a shell completes commands and options.")
    completion.add_argument(
        "shell",
        choices=("bash", "zsh", "tcsh"),
        help="as in: ragkv completion bash > ~/.local/share/bash-completion/completions/ragkv",
    )
    care.add_commands(command)
    evaluating.add_command(commands.add_parser)
    calibrating.add_command(command, model, _storage(), bar, searching.options())
    return top


class _Command(argparse.ArgumentParser):
    """The parser of one command: what it does not know is its own usage error, not that of the whole."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        found, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


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
    where = "documents, vectors and KV (default: a folder in $RAGKV_HOME)"
    shared.add_argument("--path", type=folder_name, metavar="FOLDER", help=where)
    shared.add_argument("--json", action="store_true", help="print one JSON object")
    shared.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return shared


def _model() -> argparse.ArgumentParser:
    model = argparse.ArgumentParser(add_help=False)
    group = model.add_argument_group(
        "the model", "'add' keeps these in the folder; by default they are what is kept there"
    )
    group.add_argument("--model", help="name or path of a transformers decoder (in a new folder: bundled)")
    group.add_argument("--tokenizer", metavar="NAME", help="name or path of another tokenizer")
    _dtype(group)
    group.add_argument(
        "--weights", choices=("float16", "int8"), help="pack them for a CPU, which decodes faster; the rest is float32"
    )
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of model and tokenizer")
    group.add_argument("--subfolder", metavar="NAME", help="where they stand in the model's folder")
    group.add_argument(
        "--gguf-file", "--gguf", metavar="NAME", help="a GGUF file in the model's folder; --model takes its path, too"
    )
    group.add_argument("--system", metavar="TEXT", help="a system message, where the tokenizer has a chat template")
    group.add_argument("--namespace", metavar="NAME", help="documents and KV stored under another one are never found")
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


def _dtype(options: argparse._ActionsContainer) -> None:
    options.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), help="of the weights")


def _bar() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show on stderr how far reading is, or do not (default: on a terminal; elsewhere lines without a bar, and with "
        "--json nothing)",
    )
    return options


def _storage(pool_required: bool = False) -> argparse.ArgumentParser:
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
        "--remote",
        metavar="URL",
        required=pool_required,
        help="a pool for KV that machines share: s3://BUCKET/PREFIX, gs://, az://, file:///, redis://, mooncake://",
    )
    add_key_option(options)
    options.add_argument(
        "--codec", metavar="NAME", help="how KV are encoded on disk: raw, lossless, int8, fp8, int4, cachegen"
    )
    options.add_argument("--cpu-codec", metavar="NAME", help="how KV are encoded in memory")
    options.add_argument(
        "--paths",
        action="store_true",
        dest="keeps_paths",  # others have paths of files
        default=None,
        help="keep what prompts compute, for those that begin the same",
    )
    care.duration_option(
        options, "--lifetime", "how long KV may be used before they are read again, as 12h or 30d (default: for ever)"
    )
    return options


def _method() -> argparse.ArgumentParser:
    method = argparse.ArgumentParser(add_help=False)
    method.add_argument(
        "--method", type=parsed(_method_in_words), help=f"{_METHOD_HELP} (default: the folder's, or relevant-tokens)"
    )
    return method


def _encoding(name: str) -> str | None:
    from ragkv.retrieval.encodings import checked_encoding

    return checked_encoding(name)


def _method_in_words(text: str) -> Method:
    from ragkv.methods.words import parse_method

    return parse_method(text)

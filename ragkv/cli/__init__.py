"""The ``ragkv`` command.

Light to import: models, index and store are loaded by the command that needs them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper

from ragkv.cli.arguments import parser

__all__ = ["main"]

#: Where a command does not stand in the module of its name.
_MODULES = {"export": "exchange", "import": "exchange", "doctor": "info"}

#: Commands that may work for hours, and what is kept of what they did.
_KEPT = {
    **dict.fromkeys(("add", "sync", "refresh", "import", "demo"), "read"),
    "calibrate": "measured",
    "ask --batch": "answered",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; ``sys.argv`` by default.

    Returns:
        The exit code: 0, 1 for a failure (one line on stderr says which), 130 for Ctrl-C.

    Raises:
        SystemExit: with code 2 for a usage error, with 0 for ``--help``.
    """
    if isinstance(sys.stdout, TextIOWrapper):  # letters that a terminal or a file of another encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)  # a report names the command
    try:
        code = import_module(f"ragkv.cli.{_MODULES.get(args.command, args.command)}").run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        done = _KEPT.get("ask --batch" if getattr(args, "batch", None) else args.command)
        more = f": what was {done} is kept, and the same command goes on from there"
        return _fail(f"interrupted{more if done else ''}", 130)
    except BrokenPipeError:
        # Whoever read our output has left; python would complain once more while it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        return _fail(_message(error), 1)


def _message(error: Exception) -> str:
    from ragkv.errors import RagKVError, in_one_line

    text = in_one_line(error)
    if isinstance(error, RagKVError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _fail(message: str, code: int) -> int:
    from ragkv.cli.show import plain

    print(f"ragkv: {plain(message)}", file=sys.stderr)
    return code

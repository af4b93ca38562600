"""Python programs that need not load PyTorch and transformers anew, which takes seconds each.

``warm.py serve SOCKET`` has loaded them, and nothing of ragkv; ``warm.py SOCKET PROGRAM ...`` stands for
``python PROGRAM ...``: the program runs in a fork of the first, with the arguments, environment, folder and pipes of the
second, which ends as it does.
"""

import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from functools import partial


def start(path: str, argv: list[str]) -> None:
    """Has a program run, and ends as it does."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(path)
    message = json.dumps([argv, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [message], [0, 1, 2])
    program = int(server.recv(64))
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: os.kill(program, number))
    status = int(server.recv(64) or 1 << 8)
    if os.WIFSIGNALED(status):
        with suppress(OSError):
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def serve(path: str) -> Callable[[], object]:
    """Returns what is to run, in a fork for each that asks; ends when its input does."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(path)
    server.listen()
    load()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        if sys.stdin in select.select([server, sys.stdin], [], [])[0]:
            sys.exit()
        client, _ = server.accept()
        if os.fork():
            client.close()
            continue
        server.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message, pipes, *_ = socket.recv_fds(client, 1 << 18, 3)
        program = os.fork()
        if not program:
            client.close()
            return partial(run, *json.loads(message), pipes)
        look_after(program, client)


def load() -> None:
    """What a model needs."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a fork cannot use a GPU that was looked at before it
    import torch
    import transformers

    torch.set_num_threads(1)  # a fork has none but its own
    for name in ("AutoModelForCausalLM", "LlamaForCausalLM", "PreTrainedTokenizerFast", "DynamicCache"):
        getattr(transformers, name)
    gc.collect()
    gc.freeze()


def look_after(program: int, client: socket.socket) -> None:
    """Says who it is, and how it ended; where nobody waits for it any more it is ended."""
    ended = os.pidfd_open(program)
    with suppress(OSError):
        client.send(str(program).encode())
    if ended not in select.select([ended, client], [], [])[0]:
        os.kill(program, signal.SIGKILL)
    status = os.waitpid(program, 0)[1]
    with suppress(OSError):
        client.send(str(status).encode())
    os._exit(0)


def run(argv: list[str], folder: str, environment: dict[str, str], pipes: list[int]) -> None:
    """Does what ``python`` does with these arguments."""
    for number, pipe in enumerate(pipes):
        os.dup2(pipe, number)
        os.close(pipe)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    safe = argv[0] == "-P"
    kind, *rest = argv[safe:]
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if kind not in ("-c", "-m"):
        sys.argv = [kind, *rest]
        sys.path[:0] = [] if safe else [os.path.dirname(os.path.abspath(kind))]
        runpy.run_path(kind, run_name="__main__")
        return
    what, *sys.argv[1:] = rest
    sys.path[:0] = [] if safe else [folder]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = "-c"
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        del sys.path[0]
        serve(sys.argv[2])()
    else:
        start(sys.argv[1], sys.argv[2:])

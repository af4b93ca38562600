from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

import pytest
import torch

from ragkv.library import costs

# Tiny models gain nothing from threads and lose much where cores are shared.
torch.set_num_threads(1)


def pytest_collection(session):
    gc.disable()


def pytest_collection_modifyitems(items):
    """Files of few tests that take minutes come first: who begins one last is alone with it at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_interpreter.py", "test_compiled.py"))


def pytest_collection_finish(session):
    """What imports left stays for good: the collector need not look through a million objects again and again."""
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_make_parametrize_id(config, val, argname):
    """Bytes name no test: an archive has its second in them, and processes that collect have to agree on names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def warm():
    """What stands for ``sys.executable`` where a program may find PyTorch and transformers loaded."""
    program = Path(__file__).with_name("warm.py")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/socket"
        serve = [sys.executable, "-P", program, "serve", path]
        with subprocess.Popen(serve, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as server:
            while not os.path.exists(path):
                assert server.poll() is None
                time.sleep(0.01)
            yield [sys.executable, "-IS", program, path]
            server.stdin.close()


@pytest.fixture
def reads(monkeypatch):
    """Watches an engine: a list that grows by the number of tokens of every forward pass that reads documents.

    What a store measures of a model that is new to the process is no reading.
    """

    def watch(engine):
        seen, read, prefill = [], engine.decoder.read, costs._prefill

        def measured(*given):
            before = len(seen)
            took = prefill(*given)
            del seen[before:]
            return took

        monkeypatch.setattr(costs, "_prefill", measured)
        monkeypatch.setattr(engine.decoder, "read", lambda ids, *rest: (seen.append(len(ids)), read(ids, *rest))[1])
        return seen

    return watch


@pytest.fixture
def unmeasured(monkeypatch):
    """As in a process that has measured no model's prefills."""
    monkeypatch.setattr(costs, "_measured", {})


@pytest.fixture
def interruptible():
    """Ctrl-C is heard, also where the tests were started in the background; and by programs that are started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def damage():
    """Changes a bit of what a store keeps on disk."""

    def flip(store, name, place, database="segments"):
        with store._disk.environment.transaction(write=True) as txn:
            data = bytearray(txn.get(database, name))
            data[place] ^= 4
            txn.put(database, name, bytes(data))

    return flip


@pytest.fixture
def facts():
    """Names of the small values that a store keeps on disk."""

    def names(store):
        with store._disk.environment.transaction() as txn:
            return [key.decode() for key in txn.keys("facts")]

    return names


def run_forked(work: Callable[[], object], *, kill_after_s: float | None = None, timeout_s: float = 60) -> str:
    """Runs ``work`` in a forked child and returns what it returned, as text.

    A child that is killed by a signal, by us or by a fault, returns ``"signal N"`` behind what ``work`` printed so far;
    one that raises returns the traceback.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        signal.alarm(int(timeout_s))
        torch.set_num_threads(1)
        try:
            os.dup2(writer, 1)
            text = str(work())
        except BaseException:
            text = "raised\n" + traceback.format_exc()
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(process, signal.SIGKILL)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(process, 0)
    return text + (f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "")


@pytest.fixture
def forked() -> Callable[..., str]:
    return run_forked


@pytest.fixture
def forked_amid(monkeypatch) -> Callable[..., str]:
    """Forks while another thread is in a function, which goes on when the child is done; what the child's work returned, as text.

    The function is named by what it belongs to and its name there.
    """

    def fork(work: Callable[[], object], owner: object, name: str, child: Callable[[], object]) -> str:
        there, go_on, inside = threading.Event(), threading.Event(), getattr(owner, name)
        thread = threading.Thread(target=work)

        def slow(*args, **options):
            if threading.current_thread() is thread:
                there.set()
                go_on.wait(60)
            return inside(*args, **options)

        monkeypatch.setattr(owner, name, slow)
        thread.start()
        try:
            assert there.wait(60)
            return run_forked(child, timeout_s=20)
        finally:
            go_on.set()
            thread.join()

    return fork

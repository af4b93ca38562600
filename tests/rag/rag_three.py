"""A folder that one process changes, another asks, and a third looks after. Run with a folder; prints how much each did."""

import contextlib
import io
import json
import os
import re
import sys
import time
import traceback
from pathlib import Path

import torch
from rags import DOCUMENTS, QUESTION, open_rag, small_model

from ragkv.cli import main

NAMES = list(DOCUMENTS)[:3]


def version(name, number):
    return "\n\n".join(f"{part} This is version {number}." for part in DOCUMENTS[name].split(". ") if part.strip())


def going_on(folder, until):
    """Until it is late, and whoever looks after the folder is done."""
    return time.monotonic() < until or not (folder / "done").exists()


def change(folder, model, until):
    number = 0
    with open_rag(folder, model) as rag:
        while going_on(folder, until):
            number += 1
            rag.add_texts([version(name, number) for name in NAMES[:2]], NAMES[:2])
            if number % 2:
                rag.remove(NAMES[2])
                rag.refresh()
            else:
                rag.add_texts([version(NAMES[2], number)], [NAMES[2]])
    return number


def ask(folder, model, until):
    asked = 0
    with open_rag(folder, model) as rag:
        while going_on(folder, until):
            for options in ({"top_k": 6}, {"top_k": 3, "neighbours": 9, "hybrid": True}):
                answer = rag.ask(QUESTION, max_new_tokens=2, **options)
                versions = {
                    (hit.source, said) for hit in answer.sources for said in re.findall(r"version (\d+)", hit.text)
                }
                assert len({source for source, _ in versions}) == len(versions), versions
                asked += 1
    return asked


def said(*argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(argv))
    return code, out.getvalue() + err.getvalue()


def care(folder, model, until):
    looked = 0
    while time.monotonic() < until:
        for command, code, text in (
            (["verify"], 0, "nothing is damaged"),
            (["docs", "--json"], 0, ""),
            (["ls", "--json"], 0, ""),
            (["prune", "--orphans", "--yes"], 0, "removed"),
            (["compact"], 1, "open in another process"),
        ):
            got = said(*command, "--path", str(folder))
            assert got[0] == code and text in got[1], (command, got)
        looked += 1
    return looked


def three(folder, seconds):
    model, children = small_model(), []
    with open_rag(folder, model) as rag:
        rag.add_texts([version(name, 0) for name in NAMES], NAMES)
    until = time.monotonic() + seconds
    for task in (change, ask, care):
        child = os.fork()
        if not child:
            try:
                (folder / task.__name__).write_text(str(task(folder, model, until)))
                code = 0
            except BaseException:
                traceback.print_exc()
                code = 1
            if task is care:
                (folder / "done").touch()
            os._exit(code)
        children.append(child)
    if [os.waitpid(child, 0)[1] for child in children] != [0, 0, 0]:
        sys.exit(1)
    print(json.dumps({task.__name__: int((folder / task.__name__).read_text()) for task in (change, ask, care)}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    three(Path(sys.argv[1]), float(sys.argv[2]))

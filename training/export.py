"""Writes a checkpoint as a transformers model into the package: `python -m training.export`."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ragkv.bundled import MODEL_PATH
from training.model import Size
from training.tokenizer import DEFAULT_PATH as TOKENIZER_PATH
from training.train import RESULTS

MAX_BYTES = 16 << 20
SHIPPED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def to_llama(state: dict[str, torch.Tensor], size: Size, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Makes a transformers model of a checkpoint; the training-only helper is left out."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=size.positions,
        rope_parameters={"rope_type": "default", "rope_theta": size.theta},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("subject_head")}
    missing, unexpected = model.load_state_dict(kept, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"the checkpoint must hold the layers of {size}; missing {missing}, unexpected {unexpected}.")
    model.tie_weights()
    return model.eval()


def read_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The model of a run's last checkpoint."""
    state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    return to_llama(state["model"], Size(**state["size"]), tokenizer)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, target: Path) -> int:
    """Writes model (fp16 weights) and tokenizer; the files appear at once or not at all.

    Returns:
        The bytes written.

    Raises:
        ValueError: If they are more than `MAX_BYTES`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fresh = Path(folder) / "model"
        model.half().save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        for path in (path for path in fresh.iterdir() if path.name not in SHIPPED):
            path.unlink()
        for path in fresh.iterdir():
            path.chmod(0o644)
        size = sum(path.stat().st_size for path in fresh.iterdir())
        if size > MAX_BYTES:
            raise ValueError(f"the exported model must be {MAX_BYTES} bytes at most; got {size}.")
        if target.exists():
            target.rename(Path(folder) / "old")
        shutil.move(fresh, target)
    return size


def main() -> None:
    """Reads the arguments and exports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="bundled", help="name of the folder under training/results")
    parser.add_argument("--out", type=Path, default=MODEL_PATH)
    args = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER_PATH)
    size = export(read_checkpoint(RESULTS / args.run, tokenizer), tokenizer, args.out)
    print(f"wrote {args.out} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()

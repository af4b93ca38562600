"""Under what conditions a run was made."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from typing import Any

import torch
import transformers

import ragkv
from ragkv.engine import Engine
from ragkv.machine import processor


def versions() -> dict[str, str]:
    """What the figures may hang on."""
    return {
        "ragkv": ragkv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def conditions(engine: Engine, command: str) -> dict[str, Any]:
    """Machine, model and versions, by name.

    Args:
        engine: the model's.
        command: that the run was started with.
    """
    decoder = engine.decoder
    parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "model type": f"{decoder.config.model_type}, {len(decoder.layers)} layers, {parameters:,} parameters",
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "attention": decoder.attention,
        "device": _device(decoder.device),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        **versions(),
    }


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()

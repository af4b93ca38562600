"""What a chunk's tokens attended to, as text in a record's header."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ragkv.chunk import Attended


def stored(attended: Attended) -> Attended:
    """As exact as reading :func:`to_text` gives it."""
    return replace(attended, tokens=attended.tokens.detach().cpu().half().float())


def to_text(attended: Attended) -> str:
    """What :func:`from_text` reads."""
    facts = [attended.front, attended.masses, attended.impact, to_base64(attended.tokens)]
    return json.dumps(facts, separators=(",", ":"))


def from_text(text: str) -> Attended:
    """What was written.

    Raises:
        ValueError, TypeError: it is not what :func:`to_text` writes.
    """
    front, masses, impact, tokens = json.loads(text)
    attended = Attended(tuple(map(str, front)), tuple(map(float, masses)), float(impact), from_base64(tokens))
    if len(attended.front) != len(attended.masses) or not 0 <= attended.impact <= 1:
        raise ValueError(f"{len(front)} chunks in front, {len(masses)} masses, an impact of {impact}")
    return attended


def to_base64(numbers: Tensor) -> str:
    """fp16, little-endian, in base64."""
    return base64.b64encode(numbers.detach().cpu().numpy().astype("<f2").tobytes()).decode()


def from_base64(text: str) -> Tensor:
    """The numbers of :func:`to_base64`, in fp32."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float32))

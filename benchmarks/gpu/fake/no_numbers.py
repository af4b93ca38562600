"""What has to hold where no number means anything: engines can be made, answers go on, what is stored counts as finite."""

from __future__ import annotations

import copy
import ctypes
from typing import Any

import torch
from measure import Bench
from numbers_on_host import OnHost

import ragkv.model.decoding as decoding
from ragkv.model.cache import LayerSpec
from ragkv.model.decoder import Decoder
from ragkv.model.rope import candidates, rope_frequencies
from ragkv.model.traits import Traits
from ragkv.store.codecs.base import Codec

_fake = ctypes.CDLL("libcudart.so.13")
_fake.fake_counts.restype = ctypes.c_char_p


def counts() -> dict[str, int]:
    """How often what was done since :func:`reset`."""
    lines = _fake.fake_counts().decode().splitlines()
    return {name: int(count) for name, _, count in (line.rpartition("\t") for line in lines)}


def reset() -> None:
    _fake.fake_reset()


def install() -> None:
    plain = Decoder.probe

    def probe(self: Any, known: Traits | None = None) -> None:
        if self.model.device.type == "cpu":
            return plain(self, known)
        with OnHost():
            return plain(self, known or _traits(self.model))

    Decoder.probe = probe  # type: ignore[method-assign]
    Traits.to_bytes = lambda self, model: b""  # type: ignore[method-assign]
    Codec.finite = lambda self, numbers: torch.zeros_like(numbers)  # type: ignore[method-assign]
    decoding._Choice.read = lambda self, decoder: (self._numbers(), 5)[1]  # type: ignore[method-assign]
    Bench.seconds = lambda self, run, rounds=None: self.wall(run)  # type: ignore[method-assign]  # no profiler sees a kernel
    torch.backends.cuda.enable_cudnn_sdp(False)


def _traits(model: Any) -> Traits:
    """What a small model of the kind does, found out on the CPU."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.intermediate_size, config.vocab_size = 2, 64, 128
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    found = Decoder(type(model)(config).eval().float(), "reference").traits
    turned, spec, layers = found.rotations[0], found.specs[0], model.config.num_hidden_layers
    same = [each for each in candidates(rope_frequencies(model)) if (each is None) == (turned is None)]
    rotation = next(each for each in same if each is None or turned is None or each.interleaved == turned.interleaved)
    specs = [LayerSpec(*spec[:3], model.dtype, model.device)] * layers
    return Traits(specs, [rotation] * layers, found.max_positions, found.spans, found.hands_on)

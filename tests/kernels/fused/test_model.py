"""A whole model whose scattered pass runs the Triton kernel."""

import torch

from ragkv.model.decoder import Decoder
from ragkv.model.kernel_attention import SpanBuilder, kernel_attention, span_rules
from ragkv.model.masks import for_model
from ragkv.testing import random_ids, tiny_model


def test_scattered_rows_are_exact(device):
    model = tiny_model("starcoder2", num_hidden_layers=2).to(device)  # windows
    decoder, ids = Decoder(model), torch.tensor(random_ids(70), device=device)
    cache = decoder.cache(70)
    want = decoder.step(ids, torch.arange(70, device=device), cache)
    rows = torch.cat([torch.arange(1, 60, 3), torch.arange(60, 70)]).to(device)

    def write(layer, keys, values):
        held = cache.layers[layer]
        held.key_room[:, :, rows], held.value_room[:, :, rows] = keys, values
        return held.key_room, held.value_room

    cache.set_length(0)
    cache.writer = write
    spans = for_model(SpanBuilder(span_rules(decoder.rules, device), rows, 70), decoder.config)
    with kernel_attention(decoder.config, device, torch.float32, "triton") as ran:
        got = decoder.step(ids[rows], rows, cache, spans)
    assert ran == "selective (triton)"
    assert float((got - want).abs().max()) < 1e-4

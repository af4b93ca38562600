"""Rows of several prompts in one forward are what each gives alone, on every architecture."""

import pytest
import torch
from transformers import AttentionInterface

from ragkv.model.decoder import Decoder
from ragkv.model.kernel_attention import Scores, SpanBuilder, span_rules
from ragkv.model.packing import packs, run_packed
from ragkv.model.rows import Rows
from ragkv.model.syncs import no_syncs
from ragkv.testing import ARCHITECTURES, random_ids, shows_attention, tiny_model

EXACT = 1e-4
NOT_PACKED = [name for name in ARCHITECTURES if not shows_attention(name)]


def prompts(decoder):
    """Rows behind caches of several lengths: the next token, some tokens, a whole prompt, scattered ones."""
    made = []
    for held, rows in ((30, 1), (50, 1), (7, 9), (0, 20), (40, 5)):
        cache, ids = decoder.cache(100), torch.tensor(random_ids(held + rows))
        if held:
            decoder.read(ids[:held], cache, 0)
        made.append(Rows(ids[held:], torch.arange(held, held + rows), cache))
    return made


def scattered(decoder, seed):
    ids, cache = torch.tensor(random_ids(45, seed)), decoder.cache(50)
    decoder.read(ids, cache, 0)
    slots = torch.tensor([3, 4, 11, 25, 40, 44])
    cache.set_length(0)
    cache.writer = lambda layer, keys, values: cache.scatter(layer, keys, values, slots, 45)
    return Rows(ids[slots], slots, cache, decoder.masks(slots, 45))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_is_alone(architecture):
    decoder = Decoder(tiny_model(architecture))
    assert packs(decoder) == (architecture not in NOT_PACKED)
    if architecture in NOT_PACKED:
        return
    alone = [*prompts(decoder), scattered(decoder, 1), scattered(decoder, 2)]
    packed = [*prompts(decoder), scattered(decoder, 1), scattered(decoder, 2)]
    loaded = decoder.attention
    want, got = [decoder.forward(rows) for rows in alone], run_packed(decoder, packed)
    assert decoder.attention == loaded
    for before, after, a, b in zip(want, got, alone, packed, strict=True):
        assert float((before - after).abs().max()) < EXACT
        assert a.attention == b.attention
        for mine, other in zip(a.cache.layers, b.cache.layers, strict=True):
            assert mine.length == other.length
            held = mine.length or 45
            assert float((mine.key_room[:, :, :held] - other.key_room[:, :, :held]).abs().max()) < EXACT
            assert float((mine.value_room[:, :, :held] - other.value_room[:, :, :held]).abs().max()) < EXACT


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_rows_behind_chunks_that_stand_apart(architecture, kernels):
    """Positions that do not run evenly with the slots, beyond them or shared: alone too a row sees what stands in front of it."""
    decoder = Decoder(tiny_model(architecture), kernels)

    def apart():
        made = prompts(decoder)[:3]
        for rows, shift in zip(made, (11, -9, -3), strict=True):
            rows.positions = rows.positions + shift
        return made

    want, got = [decoder.forward(rows) for rows in apart()], run_packed(decoder, apart())
    for before, after in zip(want, got, strict=True):
        assert float((before - after).abs().max()) < EXACT


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_who_watches_sees_its_own_rows(architecture):
    decoder = Decoder(tiny_model(architecture))
    rules = span_rules(decoder.rules)

    def scored():
        some = prompts(decoder)[1:3]
        for rows in some:
            rows.masks = SpanBuilder(rules, rows.positions, rows.held + len(rows))
            rows.scores, rows.wanted = Scores(torch.rand(len(rows), generator=torch.Generator().manual_seed(0))), 0
        return some

    some, others = scored(), scored()
    for rows in some:
        decoder.forward(rows)
    run_packed(decoder, [*others, *prompts(decoder)])
    assert {rows.attention for rows in (*some, *others)} == {"selective (reference)"}
    for mine, its in zip(some, others, strict=True):
        assert len(mine.scores.layers) == len(its.scores.layers) == len(decoder.layers)
        for a, b in zip(mine.scores.layers, its.scores.layers, strict=True):
            assert len(a) == mine.held and a.sum() > 0
            torch.testing.assert_close(a, b, atol=EXACT, rtol=EXACT)


def test_logits_are_given_where_they_are_wanted():
    decoder = Decoder(tiny_model())
    some = prompts(decoder)
    some[1].wanted, some[2].wanted, some[3].wanted = 0, 3, 0
    got = run_packed(decoder, some)
    assert [len(logits) for logits in got] == [1, 0, 3, 0, 1]
    alone = prompts(decoder)[2]
    alone.wanted = 3
    assert float((decoder.forward(alone) - got[2]).abs().max()) < EXACT
    for rows in some:
        rows.wanted = 0
    assert [len(logits) for logits in run_packed(decoder, some)] == [0] * 5


@pytest.mark.parametrize("keeps_last", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_nothing_is_waited_for(kernels, keeps_last):
    """A step of all answers is launched as a whole, which rows' logits are wanted among it."""
    decoder = Decoder(tiny_model(), kernels)
    decoder.keeps_last = keeps_last
    assert packs(decoder)  # its first steps
    some, same = prompts(decoder), prompts(decoder)
    with no_syncs(torch.device("cpu")):
        got = run_packed(decoder, some)
    for before, after in zip(map(decoder.forward, same), got, strict=True):
        assert float((before - after).abs().max()) < EXACT


def test_a_model_that_fails_leaves_its_attention_as_it_was(monkeypatch):
    decoder = Decoder(tiny_model())
    loaded = decoder.attention
    monkeypatch.setattr(decoder.layers[2], "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_packed(decoder, prompts(decoder))
    assert decoder.attention == loaded
    assert not [name for name in AttentionInterface._global_mapping if name.startswith("ragkv_packed")]


def test_a_model_whose_rows_hang_on_each_other_is_not_packed(monkeypatch):
    decoder = Decoder(tiny_model())
    norm = decoder.layers[1].input_layernorm
    plain = norm.forward
    monkeypatch.setattr(norm, "forward", lambda hidden: plain(hidden - hidden.mean(1, keepdim=True)))
    assert not packs(decoder)

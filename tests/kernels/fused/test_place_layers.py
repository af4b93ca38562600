"""All layers of a prompt at once, against each piece by itself: every codec, pools, and layers that differ."""

import pytest
import torch

from ragkv.kernels import KernelError, Layers, Rotation, Run, Stored, Turn, place_layers, rotation_tables, slots_of
from ragkv.kernels.triton_impl import place as launching
from ragkv.store.codecs import get_codec

BF16, F32 = torch.bfloat16, torch.float32
N, PAGE = 90, 4
# heads, dim of K, dim of V, rotated dimensions (0: none), interleaved
LLAMA = [(2, 64, 64, 64, False)] * 3
MIXED = [(2, 64, 64, 64, False), (1, 80, 48, 32, False), (2, 64, 64, 0, False), (4, 64, 64, 64, True)]


@pytest.fixture
def launches(monkeypatch):
    """How many there are."""
    seen, launch = [], launching.launch
    monkeypatch.setattr(launching, "launch", lambda *args, **more: (seen.append(args[1]), launch(*args, **more)))
    return seen


@pytest.fixture
def prompt(device, random, poisoned):
    """A prompt's room, and chunks of some lengths that are held in some way, for layers of some shapes."""

    class Prompt:
        def __init__(self, shapes, dtype):
            self.shapes, self.dtype = shapes, dtype
            self.rooms = [(poisoned(h, N, k, dtype=dtype), poisoned(h, N, v, dtype=dtype)) for h, k, v, _, _ in shapes]
            tables = {(r, i): self.turn(r, i) for *_, r, i in shapes if r}
            self.turns = [tables.get(tuple(shape[3:])) for shape in shapes]

        def turn(self, rotary, interleaved):
            rotation = Rotation(10000.0 ** -(torch.arange(0, rotary, 2) / rotary).to(device), interleaved)
            at = torch.arange(N, device=device)
            return Turn(*rotation_tables(rotation, at // 3, at), interleaved)

        def numbers(self, tokens):
            return [
                [random(h, tokens, dim, dtype=self.dtype) * (1 + number) for dim in (k, v)]
                for number, (h, k, v, _, _) in enumerate(self.shapes)
            ]

        def encoded(self, codec, tokens):
            def stored(tensor, side):
                parts = get_codec(codec).encode(tensor.float().cpu(), side)
                parts = {name: part.contiguous().to(device) for name, part in parts.items()}  # as a record has them
                return Stored.encoded(codec, parts, tuple(tensor.shape), side)

            return Layers([(stored(k, "k"), stored(v, "v")) for k, v in self.numbers(tokens)])

        def pool(self, blocks):
            shapes = [(blocks, h, PAGE, dim) for h, k, v, _, _ in self.shapes for dim in (k, v)]
            pools = [random(*shape, dtype=self.dtype) for shape in shapes]
            return Layers.pool(list(zip(pools[::2], pools[1::2], strict=True)))

        def place(self, runs, impl, **more):
            rooms = [(k.clone(), v.clone()) for k, v in self.rooms]
            place_layers(Layers.raw(rooms), runs, impl=impl, **more)
            return rooms

        def check(self, runs, rounding, **more):
            got, want = self.place(runs, "triton", **more), self.place(runs, "reference", **more)
            for a, b in zip(sum(got, ()), sum(want, ()), strict=True):
                assert torch.equal(a.isnan(), b.isnan())
                a, b = a.nan_to_num().double(), b.nan_to_num().double()
                largest = b.abs().amax(-1, keepdim=True) * 2**0.5
                bound = (2 * rounding(self.dtype) + 16 * torch.finfo(F32).eps) * largest
                assert ((a - b).abs() <= bound).all()

    return Prompt


@pytest.mark.parametrize("way", ["raw", "int8", "int4", "fp8"])
@pytest.mark.parametrize("shapes", [LLAMA, MIXED], ids=["alike", "mixed"])
def test_chunks(way, shapes, prompt, rounding, launches):
    """The first where it was made, some turned, an empty one; what is of a kind is one launch."""
    one = prompt(shapes, BF16)
    lengths = {3: 7, 12: 33, 50: 0, 51: 39}
    held = {
        at: Layers.raw(one.numbers(n)) if way == "raw" or not n else one.encoded(way, n) for at, n in lengths.items()
    }
    runs = [Run(held[at], at, n, turns=None if n == 7 else one.turns) for at, n in lengths.items()]
    one.check(runs, rounding)
    if shapes is LLAMA:
        # groups of a codec that are shorter than a whole one are a kind of their own
        assert len(launches) == {"raw": 1, "fp8": 2}.get(way, len(launches)) <= 6


def test_a_pool_is_one_launch_whatever_the_layers(prompt, rounding, launches):
    for shapes, count in ((LLAMA, 1), (LLAMA * 3, 1), (MIXED, 7)):
        one = prompt(shapes, BF16)
        pool, order = one.pool(30), torch.randperm(30, generator=torch.Generator().manual_seed(0))
        slots = slots_of(order, PAGE, 120)
        runs = [
            Run(pool, 2, 41, slots[:41], one.turns),
            Run(pool, 43, 1, slots[41:42]),
            Run(pool, 44, 46, slots[60:106], one.turns),
        ]
        launches.clear()
        one.check(runs, rounding)
        assert len(launches) == count
        for number in range(2):  # what was found of the pool is used again: another prompt, other layers
            again = prompt(shapes, BF16)
            again.check([Run(pool, 5, 20, slots[40:60], again.turns)], rounding, layers=range(number, len(shapes) - 1))


def test_kinds_beside_each_other(prompt, rounding):
    """Chunks, encoded ones and a pool in one call; fp32, so that the table's addresses count other bytes."""
    one = prompt(MIXED, F32)
    pool = one.pool(12)
    runs = [
        Run(one.encoded("int8", 20), 0, 20, turns=one.turns),
        Run(pool, 20, 17, slots_of(torch.tensor([3, 0, 11, 7, 5]), PAGE, 17), one.turns),
        Run(Layers.raw(one.numbers(5)), 37, 5),
        Run(one.encoded("fp8", 30), 60, 30, turns=one.turns),
    ]
    one.check(runs, rounding)


def test_layers_of_other_dtypes(device, poisoned):
    """What is written is of a kind too; numbers that all of them hold, so that they are equal."""
    numbers = (torch.arange(2 * 9 * 16, device=device) % 200).view(2, 9, 16)
    source = Layers.raw([(numbers.to(dtype), -numbers.to(dtype)) for dtype in (BF16, F32, BF16)])
    rooms = [tuple(poisoned(2, 20, 16, dtype=dtype) for _ in "kv") for dtype in (F32, F32, BF16)]
    place_layers(Layers.raw(rooms), [Run(source, 7, 9)], impl="triton")
    for keys, values in rooms:
        assert torch.equal(keys[:, 7:16].long(), numbers) and torch.equal(values[:, 7:16].long(), -numbers)
        assert keys[:, :7].isnan().all() and values[:, 16:].isnan().all()


def test_what_the_kernel_cannot_read(prompt, random):
    one = prompt(LLAMA, BF16)
    apart = [(random(2, 64, 9, dtype=BF16).transpose(1, 2), random(2, 9, 64, dtype=BF16))] * 3
    with pytest.raises(KernelError, match="side by side"):
        one.place([Run(Layers.raw(apart), 0, 9)], "triton")

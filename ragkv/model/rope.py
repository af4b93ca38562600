"""How the model turns its keys, found out by trying instead of being assumed.

A few random tokens are run at position 0 and at a large offset. The right rotation takes the one's keys to the other's in
every layer, and the values are the same. L layers, H kv heads, T tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ragkv.errors import UnsupportedModelError
from ragkv.kernels import Rotation, place, rotation_tables
from ragkv.lazy import lazy
from ragkv.model.inspection import non_finite


class Probe(NamedTuple):
    """What a few tokens gave: keys and values of every layer, ``[H, T, D]`` each, and the last hidden states."""

    keys: list[Tensor]
    values: list[Tensor]
    hidden: Tensor


#: Runs the probe tokens with the first one at the given position.
Run = Callable[[int], Probe]

#: Largest relative error (Frobenius) at which two runs of an exact model count as equal. A wrong rotation is off by about 1.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
# Of a model with noise of its own: so many times the noise, but never what learned positions differ by (0.7 and more).
_NOISES, _LARGEST = 3.0, 0.3
_FIRST_OFFSET = 1000


class Tolerance:
    """At which relative errors two runs of a model count as equal.

    Weights or activations that are quantised make a model noisy: what it computes hangs on which tokens are run together. How
    much is measured where an exact model's tolerance does not do.

    Args:
        noise: measures the relative difference of passes that an exact model computes alike.
    """

    def __init__(self, noise: Callable[[], float]):
        self._measure = noise

    def holds(self, error: float, dtype: torch.dtype) -> bool:
        """Whether a relative error is small enough; NaN never is."""
        return error <= TOLERANCE[dtype] or error <= self.noisy

    @lazy
    def noisy(self) -> float:
        """The largest error that the model's own noise explains."""
        return min(_NOISES * self._measure(), _LARGEST)


def rope_frequencies(model: nn.Module) -> list[Tensor]:
    """The distinct frequencies that the model's rotary modules hold, as such or in a table of sines and cosines: ``[R / 2]`` each.

    Raises:
        UnsupportedModelError: frequencies were cast to half precision.
    """
    found: list[Tensor] = []
    for name, buffer in model.named_buffers():
        leaf = name.rsplit(".", 1)[-1]
        plain = leaf.endswith("inv_freq") and "original" not in leaf and buffer.dim() == 1
        if not plain and not _is_sine_table(buffer):
            continue
        if buffer.dtype not in (torch.float32, torch.float64):
            raise UnsupportedModelError(
                f"the rotary frequencies ({name}) are {buffer.dtype}: they must be float32, or positions blur into each other. "
                "model.to(dtype) and model.half() cast them; load with from_pretrained(..., dtype=...) instead."
            )
        frequencies = buffer.detach().clone() if plain else _of_sine_table(buffer)
        if not any(table.shape == frequencies.shape and torch.equal(table, frequencies) for table in found):
            found.append(frequencies)
    return found


def _is_sine_table(buffer: Tensor) -> bool:
    """Whether a buffer is ``[P, R]``: beside each other the sines and cosines of P positions' angles."""
    if buffer.dim() != 2 or buffer.shape[0] < 2 or buffer.shape[1] % 2 or not buffer.is_floating_point():
        return False
    sines, cosines = buffer[:2].double().chunk(2, -1)
    still = torch.equal(sines[0], torch.zeros_like(sines[0])) and torch.equal(cosines[0], torch.ones_like(cosines[0]))
    return still and bool((sines[1].square() + cosines[1].square() - 1).abs().max() < 1e-2)


def _of_sine_table(table: Tensor) -> Tensor:
    """The frequencies ``[R / 2]`` of a table of sines and cosines, exact in fp32.

    At positions that are powers of two the table's fp32 angles are not rounded: each doubling halves what is left of the error that
    sine and cosine were rounded by.
    """
    sines, cosines = table.double().chunk(2, -1)
    turns, position = torch.atan2(sines[1], cosines[1]), 1
    while 2 * position < len(table):
        position *= 2
        away = torch.atan2(sines[position], cosines[position]) - 2 * turns
        turns = 2 * turns + torch.remainder(away + torch.pi, 2 * torch.pi) - torch.pi
    return (turns / position).float()


def probe_rotations(
    model: nn.Module, start: Probe, run: Run, max_positions: int | None, tolerance: Tolerance
) -> tuple[list[Rotation | None], int | None]:
    """Find every layer's rotation, and up to which position keys can be moved.

    Args:
        model: the decoder, searched for frequency tables.
        start: of a few tokens, the first one at position 0.
        run: runs the same tokens with the first one at a given position.
        max_positions: the model's positions, if limited.
        tolerance: at which errors two runs count as equal.

    Returns:
        One :class:`Rotation` a layer (``None``: the layer's keys carry no position), and the number of positions within which
        moved keys are those that the model would compute (``None``: no limit was found).

    Raises:
        UnsupportedModelError: the model computes NaN, values change with the position, or no known rotation explains the keys.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in (*start.keys, *start.values, start.hidden)):
        raise UnsupportedModelError(f"a few tokens give NaN or infinite numbers: {non_finite(start.hidden.dtype)}")
    furthest = None if max_positions is None else max_positions - start.keys[0].shape[1]
    if furthest is not None and furthest < 1:
        raise UnsupportedModelError(f"the model has {max_positions} positions: too few to place a chunk")
    possible = candidates(rope_frequencies(model))
    if furthest is not None:
        with suppress(UnsupportedModelError):  # one run is enough for most models
            return _rotations(start, run(furthest), furthest, possible, tolerance), None
    offset = _FIRST_OFFSET if furthest is None else min(_FIRST_OFFSET, furthest)
    rotations = _rotations(start, run(offset), offset, possible, tolerance)
    return rotations, _movable(run, start, rotations, offset, furthest, tolerance)


def _rotations(
    start: Probe, moved: Probe, offset: int, possible: list[Rotation | None], tolerance: Tolerance
) -> list[Rotation | None]:
    if not _same_content(start, moved, tolerance):
        raise UnsupportedModelError(
            "the model's values change with the absolute position: learned or absolute position embeddings cannot be moved, nor "
            "keys that a norm with weights changes behind their rotation. ragkv needs a decoder with rotary positions."
        )
    pairs = zip(start.keys, moved.keys, strict=True)
    rotations = [_explain(layer, a, b, offset, possible, tolerance) for layer, (a, b) in enumerate(pairs)]
    if all(rotation is None for rotation in rotations):
        raise UnsupportedModelError(
            "no layer's keys turn with their position (ALiBi, or no positions at all): moving a chunk could not be told from "
            "leaving it. ragkv needs a decoder with rotary positions."
        )
    return rotations


def candidates(tables: Sequence[Tensor]) -> list[Rotation | None]:
    """How keys may turn by these frequencies: not at all, or either way round, in halves or pairs."""
    ways = [*tables] + [-table for table in tables]
    return [None] + [Rotation(table, interleaved) for table in ways for interleaved in (False, True)]


def same_rotation(one: Rotation | None, other: Rotation | None) -> bool:
    """Whether two layers' keys turn alike."""
    if one is None or other is None:
        return one is other
    return one.interleaved == other.interleaved and torch.equal(one.inv_freq, other.inv_freq)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference, relative to what is wanted."""
    return float((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30))


def _same_content(start: Probe, moved: Probe, tolerance: Tolerance) -> bool:
    """Whether all but the keys is the same at both places, as it must be where only rotations tell positions."""
    pairs = zip([*start.values, start.hidden], [*moved.values, moved.hidden], strict=True)
    return all(tolerance.holds(relative_error(b, a), a.dtype) for a, b in pairs)


def turned(keys: Tensor, rotation: Rotation | None, old: int, new: int) -> Tensor:
    """Keys ``[H, T, D]`` whose first token stood at ``old``, as they would be at ``new``."""
    if rotation is None or old == new:
        return keys.clone()
    steps = torch.arange(keys.shape[1], device=keys.device)
    out = torch.empty_like(keys)
    place(out, keys, *rotation_tables(rotation, old + steps, new + steps), interleaved=rotation.interleaved)
    return out


def _explain(
    layer: int,
    at_zero: Tensor,
    at_offset: Tensor,
    offset: int,
    possible: list[Rotation | None],
    tolerance: Tolerance,
) -> Rotation | None:
    fitting = [c for c in possible if c is None or c.rotary_dim <= at_zero.shape[-1]]
    errors = [relative_error(turned(at_zero, c, 0, offset), at_offset) for c in fitting]
    best = min(range(len(fitting)), key=errors.__getitem__)
    if not tolerance.holds(errors[best], at_zero.dtype):
        raise UnsupportedModelError(
            f"layer {layer}: no known rotation explains how its keys change with the position (tried {len(fitting)}, best "
            f"relative error {errors[best]:.2g}). ragkv knows rotary embedding of halves and of interleaved pairs, on all or "
            "the first dimensions of a head, by the frequencies that the model's rotary modules hold."
        )
    return fitting[best]


def _movable(
    run: Run,
    start: Probe,
    rotations: list[Rotation | None],
    passed: int,
    furthest: int | None,
    tolerance: Tolerance,
) -> int | None:
    """The positions within which the rotations hold; attention that changes with the absolute position ends them."""

    def holds(offset: int) -> bool:
        moved = run(offset)
        turns = zip(start.keys, moved.keys, rotations, strict=True)
        return _same_content(start, moved, tolerance) and all(
            tolerance.holds(relative_error(turned(a, rotation, 0, offset), b), a.dtype) for a, b, rotation in turns
        )

    if furthest is None or furthest <= passed or holds(furthest):
        return None
    low, high = passed, furthest  # holds at low, fails at high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low + start.keys[0].shape[1]

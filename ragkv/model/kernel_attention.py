"""Selective attention as transformers' attention interface takes it, for the one pass of a fusion.

Every rule that ragkv drives lets a query see one run of keys. A rule's spans ``[1, 1, S, 2]`` are handed through the model in the
mask's place: transformers passes ready-made 4D masks on as they are, and fusion changes them where it narrows the set. So
the queries' positions reach the kernel without an ``[S, N]`` mask and without a word to the model.

B sequences, H query heads, K kv heads, S queries, N keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ragkv.errors import UnsupportedModelError
from ragkv.kernels import Impl, implementation, key_spans, scored_attention, selective_attention
from ragkv.model.attention import switched
from ragkv.model.masks import Rule
from ragkv.model.turns import turns

_FAR = 1 << 30  # a position beyond every window


@dataclass(frozen=True)
class SpanRule:
    """A layer's attention rule in closed form: causal, and within a window or an attention chunk if there is one."""

    window: int | None = None
    chunk: int | None = None

    def spans(self, positions: Tensor) -> Tensor:
        """``[1, 1, S, 2]`` int32 first and last key that queries at ``positions [S]`` see: what takes the mask's place."""
        return key_spans(positions, window=self.window, chunk=self.chunk)[None, None]

    def whole(self, keys: int) -> bool:
        """Whether so many keys are all within window or attention chunk."""
        return all(size is None or keys < size for size in (self.window, self.chunk))


def span_rules(rules: Sequence[Rule], device: torch.device | str = "cpu") -> list[SpanRule] | None:
    """The closed form of every layer's rule, found by trying; ``None`` where one has none that ragkv knows.

    Args:
        rules: from :func:`ragkv.model.masks.layer_rules`.
        device: where the rules' own tensors are.
    """
    found = {id(rule): _closed_form(rule, device) for rule in {id(rule): rule for rule in rules}.values()}
    each = [found[id(rule)] for rule in rules]
    return None if None in each else [rule for rule in each if rule is not None]


def serves(model: PreTrainedModel, config: PreTrainedConfig) -> bool:
    """Whether a model's attention is what selective attention computes, as far as the model says so itself.

    It must go through transformers' attention interface, and must hand over all that its attention does besides (caps, sinks): that
    is so where it runs with sdpa, or supports flash attention, which sees no mask and no code of the model either.
    """
    interface = bool(getattr(model, "_supports_attention_backend", False))
    return interface and (config._attn_implementation == "sdpa" or bool(getattr(model, "_supports_flash_attn", False)))


class SpanBuilder:
    """Spans for one set of query positions, made once per distinct rule: a :class:`ragkv.model.masks.MaskBuilder` without masks.

    Args:
        rules: one a layer.
        positions: ``[S]`` query positions, ascending.
        keys: N; where all of them are queries too, causal layers need no spans.
    """

    def __init__(self, rules: Sequence[SpanRule], positions: Tensor, keys: int):
        self.rules: Sequence[SpanRule] = rules
        self.positions: Tensor = positions
        self.keys: int = keys
        self.everything: bool = len(positions) == keys
        self._made: dict[SpanRule, Tensor] = {}

    def layer(self, layer: int) -> Tensor | None:
        """``[1, 1, S, 2]`` int32; ``None`` where ordinary causal attention is meant."""
        rule = self.rules[layer]
        if self.everything and rule == SpanRule():
            return None
        if rule not in self._made:
            self._made[rule] = rule.spans(self.positions)
        return self._made[rule]


@dataclass(eq=False)
class Scores:
    """What some queries attend to, taken while they are computed.

    Attributes:
        weights: ``[S]`` fp32, by which their attention is summed.
        layers: ``[N]`` fp32 of every layer that has run, the mean over heads.
        every: ``[L, N]`` the same of all layers in one, where a step in fixed shapes has run.
    """

    weights: Tensor
    layers: list[Tensor] = field(default_factory=list)
    every: Tensor | None = None

    def last(self, layers: int) -> Tensor:
        """``[L, N]`` of the last so many layers that have run, or of all there are, where the weights are."""
        if self.every is not None:
            return self.every
        seen = [one.to(self.weights.device) for one in self.layers[-layers:]]
        return torch.stack(seen) if seen else self.weights.new_empty(0, 0)


@dataclass(frozen=True)
class KernelAttention:
    """The attention function of one pass.

    Attributes:
        impl: what selective attention is asked to run as.
        scores: takes what is attended to.
    """

    impl: Impl
    scores: Scores | None = None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention over spans; without them causal, as sdpa computes it.

        Args:
            module: the attention module.
            query: ``[1, H, S, D]``.
            key: ``[1, K, N, D]``.
            value: ``[1, K, N, Dv]``.
            attention_mask: spans ``[1, 1, S, 2]`` int32, or ``None``.
            dropout: must be 0.
            scaling: of the scores.
            softcap: of the scores.
            s_aux: ``[H]`` attention sinks.
            sliding_window: the layer's, which is in the spans already.
            **kwargs: what transformers passes besides.

        Returns:
            ``[1, S, H, Dv]``, and no weights.

        Raises:
            UnsupportedModelError: the model asks for something that neither spans nor kernel know.
        """
        foreign = [name for name in ("position_bias", "head_mask", "cache") if kwargs.get(name) is not None]
        if foreign or dropout:
            raise UnsupportedModelError(
                f"selective attention knows no {', '.join(foreign or ['dropout'])}: use sdpa or eager"
            )
        more: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "impl": self.impl}
        if attention_mask is None and softcap is None and s_aux is None and self.scores is None:
            return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
        spans = _spans_of(attention_mask, query, key)
        if self.scores is None:
            return selective_attention(query[0], key[0], value[0], spans, window=sliding_window, **more)[None], None
        out, scores = scored_attention(query[0], key[0], value[0], spans, self.scores.weights.to(query.device), **more)
        self.scores.layers.append(scores)
        return out[None], None


def _spans_of(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """Spans ``[S, 2]`` out of the mask's place; where there is none, of the last S of the N tokens, causally."""
    queries = query.shape[2]
    if mask is None:
        return key_spans(torch.arange(queries, device=query.device) + key.shape[2] - queries)
    if mask.dtype != torch.int32 or tuple(mask.shape) != (1, 1, queries, 2):
        raise UnsupportedModelError(
            f"selective attention takes int32 spans [1, 1, {queries}, 2], got {mask.dtype} {list(mask.shape)}"
        )
    return mask[0, 0]


@contextmanager
def kernel_attention(
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    impl: Impl = "auto",
    scores: Scores | None = None,
) -> Iterator[str]:
    """Selective attention in all layers of a model, for one turn; what it was loaded with is put back whatever happens.

    The model must be given spans (:class:`SpanBuilder`) in the place of masks.

    Args:
        config: the model's text config.
        device: of the model.
        dtype: of the model's activations.
        impl: which implementation of the kernel runs.
        scores: takes what is attended to.

    Yields:
        What runs, for the report: ``"selective (triton)"`` or ``"selective (reference)"``.
    """
    ran = implementation(impl, device, dtype)
    with turns(config), switched(config, "selective", KernelAttention(ran, scores), _spans_of_model):
        yield f"selective ({ran})"


def _spans_of_model(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Rule,
    device: torch.device | str = "cpu",
    q_offset: int = 0,
    **kwargs: Any,
) -> Tensor | None:
    """Where the model makes its own masks: none for all tokens under a causal rule, else spans.

    Raises:
        UnsupportedModelError: the rule has no closed form.
    """
    rules = span_rules([mask_function], device)
    if rules is None:
        raise UnsupportedModelError("the model's attention rule is none that spans express: use sdpa or eager")
    return SpanBuilder(rules, torch.arange(q_length, device=device) + q_offset, kv_length).layer(0)


def hands_on(run: Callable[[Tensor], object], config: PreTrainedConfig, layers: int, device: torch.device) -> bool:
    """Whether every layer's attention is given what the model is given as a mask, so that something else may stand in its place.

    Not so where a layer works on the mask itself: hides more keys, or adds to it head by head.

    Args:
        run: runs two tokens over an empty cache with what it is given as the mask.
        config: the model's text config.
        layers: L.
        device: of the model.
    """
    spans = [[3, 1 << 20], [5, 1 << 30]]  # of two tokens, whose masks have this shape too
    given = torch.tensor(spans, dtype=torch.int32, device=device)[None, None]
    got = list[Tensor | None]()

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        got.append(attention_mask)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    try:
        with turns(config), switched(config, "handed", attend):
            run(given)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False  # what it does to masks cannot be done to this
    same = (mask is not None and mask.dtype == given.dtype and torch.equal(mask.to(device), given) for mask in got)
    return len(got) == layers and all(same)


@lru_cache(maxsize=64)
def _closed_form(rule: Rule, device: torch.device | str) -> SpanRule | None:
    first = _bisect(lambda key: _sees(rule, _FAR, key, device), 0, _FAR)
    if first == 0:
        found = SpanRule()
    elif not _sees(rule, _FAR + 1, first, device):
        found = SpanRule(window=_FAR - first + 1)
    else:
        found = SpanRule(
            chunk=_bisect(lambda query: not _sees(rule, query, first, device), first, first + _FAR) - first
        )
    return found if _holds(found, rule, device) else None


def _holds(found: SpanRule, rule: Rule, device: torch.device | str) -> bool:
    """Whether the closed form agrees with the rule: all about the edges, and at random."""
    size = found.window or found.chunk or 1024
    generator = torch.Generator().manual_seed(0)
    near = torch.cat(
        [torch.arange(-2, 3, device="cpu") + size * times for times in range(4)]
        + [torch.randint(0, 4 * size, (64,), generator=generator, device="cpu")]
    )
    queries = near[near >= 0].to(device)
    spans = key_spans(queries, window=found.window, chunk=found.chunk).long()
    offsets = torch.arange(-2, 3, device=device)
    edges = (spans[:, :, None] + offsets).flatten(1)
    anywhere = torch.randint(0, 5 * size, (len(queries), 64), generator=generator, device="cpu").to(device)
    keys = torch.cat([edges, anywhere], 1).clamp(min=0)
    want = (keys >= spans[:, :1]) & (keys <= spans[:, 1:])
    zero = torch.zeros((), dtype=torch.long, device=device)
    return bool((rule(zero, zero, queries[:, None], keys).expand_as(want) == want).all())


def _sees(rule: Rule, query: int, key: int, device: torch.device | str) -> bool:
    zero = torch.zeros((), dtype=torch.long, device=device)
    return bool(rule(zero, zero, zero + query, zero + key))


def _bisect(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The least number in ``low .. high`` that it holds for; it holds for all above, and for ``high``."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low

"""A Llama for training: the context is read once, its questions attend to it and each to itself.

The weights carry transformers' names, so that `training.export` only writes them down.
Shapes: B contexts, C context tokens, M question tokens, d hidden, H heads, G kv heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data import IGNORED, Batch


@dataclass(frozen=True)
class Size:
    """The shape of the model; the helpers' layers are counted from 0."""

    layers: int = 6
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384
    vocabulary: int = 1792
    theta: float = 10000.0
    positions: int = 4096
    subject_layer: int = 2
    evidence_layer: int = 4

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads


SIZES = {
    "small": Size(),
    "medium": Size(hidden=192, intermediate=512),
    "large": Size(layers=8, hidden=256, heads=8, kv_heads=4, intermediate=704, subject_layer=3, evidence_layer=6),
}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama's rope: the first half of a head is paired with the second. x ``[B, H, T, D]``, cos ``[B, 1, T, D]``."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class RMSNorm(nn.Module):
    """Root-mean-square norm with a scale."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Grouped-query attention; context tokens see the context, question tokens see it and their own question."""

    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        kv = size.kv_heads * size.head_dim
        self.q_proj = nn.Linear(size.hidden, size.hidden, bias=False)
        self.k_proj = nn.Linear(size.hidden, kv, bias=False)
        self.v_proj = nn.Linear(size.hidden, kv, bias=False)
        self.o_proj = nn.Linear(size.hidden, size.hidden, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x ``[B, C + M, d]``, mask ``[B, 1, M, C + M]``; returns the output, and q and k for the evidence helper."""
        size = self.size
        heads = lambda y, n: y.unflatten(-1, (n, size.head_dim)).transpose(1, 2)  # noqa: E731
        v = heads(self.v_proj(x), size.kv_heads)
        # Rotated in fp32; attention runs in what the projections gave.
        q = rotate(heads(self.q_proj(x), size.heads), *rope).to(v.dtype)
        k = rotate(heads(self.k_proj(x), size.kv_heads), *rope).to(v.dtype)
        k, v = (y.repeat_interleave(size.heads // size.kv_heads, 1) for y in (k, v))
        attend = F.scaled_dot_product_attention
        read = attend(q[:, :, :width], k[:, :, :width], v[:, :, :width], is_causal=True)
        asked = attend(q[:, :, width:], k, v, attn_mask=mask)
        out = torch.cat((read, asked), 2).transpose(1, 2).flatten(2)
        return self.o_proj(out), q, k


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, size: Size):
        super().__init__()
        self.gate_proj = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.up_proj = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.down_proj = nn.Linear(size.intermediate, size.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d]`` to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A decoder layer."""

    def __init__(self, size: Size):
        super().__init__()
        self.input_layernorm = RMSNorm(size.hidden)
        self.self_attn = Attention(size)
        self.post_attention_layernorm = RMSNorm(size.hidden)
        self.mlp = MLP(size)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer; see `Attention.forward`."""
        y, q, k = self.self_attn(self.input_layernorm(x), rope, mask, width)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), q, k


class Decoder(nn.Module):
    """Embedding, layers, last norm."""

    def __init__(self, size: Size):
        super().__init__()
        self.embed_tokens = nn.Embedding(size.vocabulary, size.hidden)
        self.layers = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = RMSNorm(size.hidden)


class Reader(nn.Module):
    """The model with the training-only helpers; `losses` is all that training calls."""

    def __init__(self, size: Size):
        """Draws the weights: embeddings 0.05, matrices 1/sqrt(fan-in), output projections zero."""
        super().__init__()
        self.size = size
        self.model = Decoder(size)
        self.subject_head = nn.Linear(size.hidden, size.vocabulary, bias=False)
        frequencies = size.theta ** -(torch.arange(0, size.head_dim, 2) / size.head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.05)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)
            elif name.endswith("_proj.weight") or name.startswith("subject"):
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def losses(self, batch: Batch, read_share: int) -> dict[str, Tensor]:
        """The loss terms of a batch.

        Args:
            batch: What to read and what to answer.
            read_share: Every ``read_share``-th context token is predicted as well (the language-model loss).

        Returns:
            ``answer`` (mean cross entropy of the answers' tokens), ``read`` (of context tokens), ``subject`` (the name
            read off the value at a lower layer), ``evidence`` (attention of answers to where they can be copied from).
        """
        width = batch.context.shape[1]
        x = F.embedding(torch.cat((batch.context, batch.asked), 1), self.model.embed_tokens.weight)
        rope, mask = self._rope(batch), self._mask(batch)
        subject = evidence = x.new_zeros(())
        for number, layer in enumerate(self.model.layers):
            x, q, k = layer(x, rope, mask, width)
            if number == self.size.subject_layer:
                subject = self._subject(x[:, :width], batch)
            if number == self.size.evidence_layer:
                evidence = self._evidence(q[:, ::2, width:], k[:, ::2, :width], batch)
        x = self.model.norm(x)
        answer = self._predict(x[:, width:], batch.target)
        read = self._predict(x[:, : width - 1 : read_share], self._next(batch)[:, ::read_share])
        return {"answer": answer, "read": read, "subject": subject, "evidence": evidence}

    def _rope(self, batch: Batch) -> tuple[Tensor, Tensor]:
        positions = torch.cat((batch.context_positions, batch.asked_positions), 1)
        angles = positions[:, None, :, None] * self.frequencies
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()

    def _mask(self, batch: Batch) -> Tensor:
        """``[B, 1, M, C + M]`` float: 0 where a question token may look."""
        c, m = batch.context.shape[1], batch.asked.shape[1]
        device = batch.context.device
        context = (torch.arange(c, device=device) < batch.length[:, None])[:, None].expand(-1, m, -1)
        own = batch.segment[:, :, None] == batch.segment[:, None]
        own = own & torch.ones(m, m, dtype=torch.bool, device=device).tril()
        allowed = torch.cat((context, own), -1)[:, None]
        return torch.zeros(allowed.shape, device=device).masked_fill(~allowed, float("-inf"))

    def _next(self, batch: Batch) -> Tensor:
        """Next context tokens ``[B, C - 1]``, `IGNORED` behind the end."""
        inside = torch.arange(1, batch.context.shape[1], device=batch.context.device) < batch.length[:, None]
        return batch.context[:, 1:].masked_fill(~inside, IGNORED)

    def _predict(self, x: Tensor, target: Tensor) -> Tensor:
        known = target != IGNORED
        logits = F.linear(x[known], self.model.embed_tokens.weight)
        return F.cross_entropy(logits.float(), target[known])

    def _subject(self, x: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of the subject's name tokens, read off the value's first token by one matrix."""
        at = x.gather(1, batch.fact.clamp(min=0)[:, :, None].expand(-1, -1, x.shape[-1]))
        score = F.log_softmax(self.subject_head(F.rms_norm(at, at.shape[-1:])).float(), -1)
        known = batch.subject != IGNORED
        picked = score.gather(-1, batch.subject.clamp(min=0)) * known
        return -picked.sum() / known.sum().clamp(min=1)

    def _evidence(self, q: Tensor, k: Tensor, batch: Batch) -> Tensor:
        """Mean -log attention of half of the heads to the place of the next answer token."""
        score = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        outside = torch.arange(k.shape[2], device=k.device) >= batch.length[:, None]
        score = score.masked_fill(outside[:, None, None], float("-inf"))
        wanted = batch.evidence.clamp(min=0)[:, None, :, None].expand(-1, q.shape[1], -1, -1)
        loss = score.logsumexp(-1) - score.gather(-1, wanted).squeeze(-1)
        known = (batch.evidence >= 0)[:, None].expand_as(loss)
        return (loss * known).sum() / known.sum().clamp(min=1)

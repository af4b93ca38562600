"""Operations on keys and values, as plain functions of tensors; they know no model and no store.

Each has a readable reference in torch and a fused version in Triton; triton is loaded when it first runs.
"""

from ragkv.kernels.api import deviation, place, place_layers, place_pieces, placing, scatter
from ragkv.kernels.api_attention import WIDEST_HEAD, key_spans, scored_attention, selective_attention
from ragkv.kernels.dispatch import Impl, KernelError, implementation
from ragkv.kernels.layers import Brought, Layers, Run, Turn
from ragkv.kernels.rotation import Rotation, rotation_tables
from ragkv.kernels.stored import Piece, Stored, slots_of

__all__ = [
    "WIDEST_HEAD",
    "Brought",
    "Impl",
    "KernelError",
    "Layers",
    "Piece",
    "Rotation",
    "Run",
    "Stored",
    "Turn",
    "deviation",
    "implementation",
    "key_spans",
    "place",
    "place_layers",
    "place_pieces",
    "placing",
    "rotation_tables",
    "scatter",
    "scored_attention",
    "selective_attention",
    "slots_of",
]

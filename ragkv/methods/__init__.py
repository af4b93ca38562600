"""Methods: how a prompt is put together. One published method a file."""

from ragkv.methods.base import Method
from ragkv.methods.cache_blend import CacheBlend
from ragkv.methods.full_prefill import FullPrefill
from ragkv.methods.lego_link import LegoLink
from ragkv.methods.reuse import Reuse

__all__ = ["CacheBlend", "FullPrefill", "LegoLink", "Method", "Reuse"]

"""Methods: how a prompt is put together. One published method a file."""

from ragkv.methods.auto import Auto
from ragkv.methods.base import Method
from ragkv.methods.cache_blend import CacheBlend
from ragkv.methods.cache_craft import CacheCraft
from ragkv.methods.calibrated import Calibrated
from ragkv.methods.full_prefill import FullPrefill
from ragkv.methods.lego_link import LegoLink
from ragkv.methods.oracle import Oracle
from ragkv.methods.question_aware import QuestionAware
from ragkv.methods.random_tokens import Random
from ragkv.methods.relevant_tokens import RelevantTokens
from ragkv.methods.reuse import Reuse
from ragkv.methods.sensitive_tokens import SensitiveTokens
from ragkv.methods.union import Union

__all__ = [
    "Auto",
    "CacheBlend",
    "CacheCraft",
    "Calibrated",
    "FullPrefill",
    "LegoLink",
    "Method",
    "Oracle",
    "QuestionAware",
    "Random",
    "RelevantTokens",
    "Reuse",
    "SensitiveTokens",
    "Union",
]

"""Every Triton kernel as it is launched: what :mod:`inspect_kernels` compiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TRITON_NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}


@dataclass
class Case:
    """One kernel with one set of compile-time arguments.

    Attributes:
        kernel: the operation.
        label: what it is compiled for.
        function: the jit function.
        types: Triton types of the run-time arguments, by name.
        constants: compile-time arguments, by name.
        warps: of a program.
        stages: of software pipelines.
        tuned: width, dtype and rows by which the launch chooses tile sizes, warps and stages, if it does.
        wide: 16-byte loads are expected.
        matrix: matrix instructions are expected.
        asked_bytes: of memory, that a program asks for before it uses the first; 0: not counted.
    """

    kernel: str
    label: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    tuned: tuple[int, torch.dtype, int] | None = None
    wide: bool = False
    matrix: bool = False
    asked_bytes: int = 0


def place_cases() -> Iterator[Case]:
    from ragkv.kernels.triton_impl.place import constants, place_kernel

    def case(
        label: str, dim: int, half: int, codec: str, side: str, group: int, number: torch.dtype, page: int = 0, **more
    ) -> Case:
        dtypes = (number, FP32 if codec == "fp8" else FP16, FP16, BF16)
        turn = more.pop("interleaved", False)
        fixed = {**constants(dim, half, turn, codec, side, group, page=page, dtypes=dtypes, dense=True, heads=8)}
        warps = fixed.pop("num_warps")
        asked = fixed["AT_ONCE"] * fixed["BLOCK"] * dim * number.itemsize // (2 if codec == "int4" else 1)
        wide = codec == "raw"
        return Case("place", label, place_kernel, {"table": "*i64"}, fixed, warps, wide=wide, asked_bytes=asked)

    yield case("bf16 D=128 halves", 128, 64, "raw", "v", 0, BF16)
    yield case("bf16 D=128 halves, pool", 128, 64, "raw", "v", 0, BF16, page=16)
    yield case("bf16 D=128 interleaved", 128, 64, "raw", "v", 0, BF16, interleaved=True)
    yield case("bf16 D=128 copied", 128, 0, "raw", "v", 0, BF16)
    yield case("bf16 D=64 halves", 64, 32, "raw", "v", 0, BF16)
    yield case("bf16 D=80 R=32", 80, 16, "raw", "v", 0, BF16)
    yield case("bf16 D=256 halves", 256, 128, "raw", "v", 0, BF16)
    yield case("fp32 D=128 halves", 128, 64, "raw", "v", 0, FP32)
    yield case("int8 K D=128 halves", 128, 64, "int8", "k", 64, torch.uint8)
    yield case("int8 V D=128", 128, 0, "int8", "v", 64, torch.uint8)
    yield case("int4 K D=128 halves", 128, 64, "int4", "k", 32, torch.uint8)
    yield case("int4 V D=128", 128, 0, "int4", "v", 32, torch.uint8)
    yield case("fp8 K D=128 halves", 128, 64, "fp8", "k", 0, torch.uint8)
    yield case("fp8 V D=128", 128, 0, "fp8", "v", 0, torch.uint8)


def attention_cases() -> Iterator[Case]:
    from ragkv.kernels.triton_impl.attention import attention_kernel, combine_kernel, combining, constants

    types = dict.fromkeys(("query", "key", "value", "out"), "") | {
        "greatest_of": "*fp32",
        "total_of": "*fp32",
        "spans": "*i32",
        "sinks": "*bf16",
        "length": "i32",
        "keys": "i32",
    }
    types |= {"scale": "fp32", "softcap": "fp32"} | dict.fromkeys(("tiles", "parts", "kv_heads", "beside"), "i32")
    types |= {name: "i32" for name in attention_kernel.arg_names if name.endswith("_stride")}

    def case(
        dim: int,
        dtype: torch.dtype,
        groups: int = 4,
        capped: bool = False,
        sunk: bool = False,
        split: bool = False,
        kept: bool = False,
        queries: int = 512,
    ) -> Case:
        fixed = constants(groups, dim, dim, dtype, capped=capped, sunk=sunk, split=split, kept=kept)
        name = TRITON_NAMES[dtype]
        more = (
            " capped" * capped
            + " sinks" * sunk
            + f" {groups} heads" * (groups == 7)
            + " split" * split
            + " kept" * kept
            + f" {queries} queries" * (queries < 512)
        ).replace(" 1 queries", " 1 query")
        own = {key: kind or f"*{name}" for key, kind in types.items()}
        own |= {"out": "*fp32"} if split else {}
        return Case(
            "selective_attention",
            f"{name} D={dim}{more}",
            attention_kernel,
            own,
            fixed,
            matrix=dtype != FP32,
            tuned=(dim, dtype, queries * groups),
        )

    for dtype in (BF16, FP16, FP32):
        for dim in (64, 80, 96, 128, 256):
            yield case(dim, dtype)
    yield case(64, BF16, sunk=True, groups=8)
    yield case(256, BF16, capped=True, groups=2)
    yield case(128, BF16, groups=7)
    yield case(128, BF16, split=True)
    yield case(128, BF16, groups=7, split=True)
    yield case(256, BF16, capped=True, groups=2, split=True)
    yield case(64, BF16, sunk=True, groups=8, split=True)
    yield case(128, FP32, split=True)
    yield case(128, BF16, kept=True)
    yield case(128, BF16, split=True, kept=True)
    for queries in (1, 8):
        for dtype, dim in ((BF16, 64), (BF16, 128), (BF16, 256), (FP32, 128)):
            yield case(dim, dtype, split=True, queries=queries)
    yield case(256, BF16, capped=True, groups=2, split=True, queries=1)
    yield case(64, BF16, sunk=True, groups=8, split=True, queries=1)
    own = dict.fromkeys(("partial", "greatest_of", "total_of", "normaliser"), "*fp32") | {
        "out": "*bf16",
        "rows": "i32",
        "parts": "i32",
    }
    for dim, parts in ((128, 4), (128, 32), (256, 32)):
        sizes = {"KEPT": False, "VALUE_DIM": dim, "BLOCK_V": dim, **combining(parts, dim)}
        warps = sizes.pop("num_warps")
        asked = sizes["AT_ONCE"] * dim * 4
        label = f"bf16 D={dim} {parts} parts"
        yield Case("combine", label, combine_kernel, own, sizes, warps, wide=True, asked_bytes=asked)


def scatter_cases() -> Iterator[Case]:
    from ragkv.kernels.triton_impl.scatter import constants, scatter_kernel

    names = ("fresh_keys", "fresh_values", "keys", "values")
    for label, compare in (("scatter", False), ("deviation", True)):
        for dtype, dim in ((BF16, 128), (BF16, 80), (FP32, 128)):
            types = dict.fromkeys(names, f"*{TRITON_NAMES[dtype]}") | {
                "rows": "*i64",
                "moved": "*fp32",
                "length": "i32",
            }
            types |= {name: "i32" for name in scatter_kernel.arg_names if name.endswith("_stride")}
            fixed = constants(8, dim, dim, indexed=True, compare=compare)
            asked = 0 if compare else fixed["AT_ONCE"] * fixed["BLOCK"] * dim * dtype.itemsize
            label_of = f"{TRITON_NAMES[dtype]} D={dim}"
            yield Case(label, label_of, scatter_kernel, types, fixed, wide=True, asked_bytes=asked)


def scores_cases() -> Iterator[Case]:
    from ragkv.kernels.triton_impl.scores import constants, scores_kernel

    types = {
        "query": "",
        "key": "",
        "spans": "*i32",
        "length": "i32",
        "keys": "i32",
        "scale": "fp32",
        "softcap": "fp32",
    }
    types |= dict.fromkeys(("weights", "normaliser", "out"), "*fp32")
    types |= {name: "i32" for name in scores_kernel.arg_names if name.endswith("_stride")}
    for dtype, dim in ((BF16, 128), (BF16, 256), (FP32, 128), (FP32, 256)):
        own = {name: kind or f"*{TRITON_NAMES[dtype]}" for name, kind in types.items()}
        fixed = constants(4, dim, dtype, capped=False)
        stages = fixed.pop("num_stages")
        label = f"{TRITON_NAMES[dtype]} D={dim}"
        yield Case("scores", label, scores_kernel, own, fixed, stages=stages, matrix=dtype != FP32)


FAMILIES = {
    "place": place_cases,
    "selective_attention": attention_cases,
    "scatter": scatter_cases,
    "scores": scores_cases,
}

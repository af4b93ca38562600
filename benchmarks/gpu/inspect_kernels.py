"""What the compiler makes of every Triton kernel: registers, shared memory, spills and the instructions that matter. Needs no GPU.

    python benchmarks/gpu/inspect_kernels.py                      # sm_80, sm_90, as a table
    python benchmarks/gpu/inspect_kernels.py --arch 100 --json sm100.json

Kernels are compiled as they are launched: the same compile-time arguments, warps and stages. ``cuobjdump`` of the triton wheel
tells registers and shared memory, and disassembles. The file is not named inspect.py: the standard library's module of that name
would then not be found by programs in this folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from kernel_cases import FAMILIES, Case

# Of a processor, by architecture: bytes of shared memory. Every one of these has 64 Ki registers, 64 warps and 32 programs.
_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}


@dataclass
class Resources:
    """What one compiled kernel takes.

    Attributes:
        programs: as many as a processor holds at once.
        asked_bytes: of memory, that these ask for before they use the first.
    """

    kernel: str
    label: str
    arch: int
    registers: int
    shared_bytes: int
    spilled_bytes: int
    instructions: int
    loads_16: int
    loads_1: int
    loads: int
    stores_16: int
    matrix: int
    programs: int
    asked_bytes: int
    wide_expected: bool = field(repr=False)
    matrix_expected: bool = field(repr=False)

    @property
    def fault(self) -> str:
        """What is wrong with it; empty where nothing is."""
        faults = [f"spills {self.spilled_bytes} bytes"] if self.spilled_bytes else []
        faults += ["no 16-byte loads"] if self.wide_expected and not self.loads_16 else []
        faults += ["loads of single bytes"] if self.loads_1 else []
        faults += ["no matrix instructions"] if self.matrix_expected and not self.matrix else []
        return ", ".join(faults)


def compiled(case: Case, arch: int) -> Resources:
    """Compile for ``sm_<arch>`` and read what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ragkv.kernels.triton_impl.launch import OPTIONS

    names = case.function.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    at = {name: (names.index(name),) for name in names}
    # Launches specialise pointers and strides that are multiples of 16, as torch's are.
    attributes = {
        at[name]: [["tt.divisibility", 16]]
        for name, kind in case.types.items()
        if kind[0] == "*" or name.endswith("_stride")
    }
    fixed, options = dict(case.constants), {"num_warps": case.warps, "num_stages": case.stages}
    if case.tuned:
        from ragkv.kernels.triton_impl.attention import tuning

        dim, dtype, rows = case.tuned
        fixed |= tuning(dim, dtype, (arch // 10, arch % 10), rows)
        options = {name: fixed.pop(name) for name in options}
    source = ASTSource(case.function, signature, {at[name]: value for name, value in fixed.items()}, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options | OPTIONS)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = _cuobjdump("--dump-resource-usage", file.name), _cuobjdump("--dump-sass", file.name)
    used = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    registers, shared = int(used["REG"]), binary.metadata.shared
    warps = options["num_warps"]
    programs = (65536 // (-(-registers // 8) * 256 * warps), 64 // warps, 32, _SHARED[arch] // (shared + 1024))
    count = lambda pattern: sum(bool(re.match(pattern, operation)) for operation in operations)  # noqa: E731
    return Resources(
        *(case.kernel, case.label, arch, registers, shared),
        spilled_bytes=int(used["LOCAL"]) + int(used["STACK"]) or 4 * count(r"(LDL|STL)\b"),
        instructions=len(operations),
        loads_16=count(r"(LDG|LDGSTS|UBLKCP)\b.*(128|BYPASS)|UTMALDG"),
        loads_1=count(r"LDG\b.*\.[US]8"),
        loads=count(r"LDG|UTMALDG|UBLKCP"),
        stores_16=count(r"STG\b.*128"),
        matrix=count(r"HMMA|HGMMA|UTC\w*MMA"),
        programs=min(programs),
        asked_bytes=min(programs) * case.asked_bytes,
        wide_expected=case.wide,
        matrix_expected=case.matrix,
    )


def _cuobjdump(option: str, path: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}  # it calls nvdisasm
    return subprocess.run(
        [str(folder / "cuobjdump"), option, path], capture_output=True, text=True, check=True, env=env
    ).stdout


def table(rows: list[Resources]) -> str:
    """As Markdown."""
    heads = "| kernel | for | sm | registers | shared bytes | programs | KB | 16-byte loads / loads | 16-byte stores | matrix |"
    lines = [heads, "|---" * heads.count(" | ") + "|---|"]
    lines += [
        f"| {r.kernel} | {r.label} | {r.arch} | {r.registers} | {r.shared_bytes} | {r.programs} | {r.asked_bytes / 1024:.0f} "
        f"| {r.loads_16} / {r.loads} | {r.stores_16} | {r.matrix} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--kernel", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--label", default="", help="only configurations whose label contains this")
    parser.add_argument("--quick", action="store_true", help="of each kernel only the first configuration")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", help="write the figures to this file too")
    args = parser.parse_args()
    cases = [case for name in args.kernel for case in FAMILIES[name]() if args.label in case.label]
    if args.quick:
        cases = list({(case.kernel, case.function): case for case in reversed(cases)}.values())[::-1]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        os.environ["TRITON_CACHE_DIR"] = folder  # what is compiled for other GPUs does not belong into the user's cache
        rows = []
        for row in pool.map(lambda pair: compiled(*pair), [(case, arch) for arch in args.arch for case in cases]):
            rows.append(row)
            print(f"{row.kernel}, {row.label}, sm_{row.arch}: {row.fault or 'good'}", file=sys.stderr, flush=True)
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps([{**vars(row), "fault": row.fault} for row in rows], indent=1))
    return int(any(row.fault for row in rows))


if __name__ == "__main__":
    sys.exit(main())

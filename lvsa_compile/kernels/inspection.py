"""Compiles the Triton kernels for devices that are not there, and says what came out: registers, spills, shared memory, matrix units."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvsa_compile.errors import TargetError
from lvsa_compile.kernels.configurations import Configuration, column_widths, configurations

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942")
HEAD_DIMS = (64, 80, 96, 128)
DTYPES = ("bf16", "fp16")

_SHARED_LIMIT = {"cuda:80": 166912, "cuda:89": 101376, "cuda:90": 232448, "cuda:100": 232448, "cuda:120": 101376, "hip:gfx942": 65536}
MATRIX_INSTRUCTION = {"cuda:80": "mma.sync", "cuda:89": "mma.sync", "cuda:90": "wgmma", "cuda:100": "tcgen05", "cuda:120": "mma.sync",
                       "hip:gfx942": "v_mfma"}  # fmt: skip
_MAY_SPILL = ("cuda:89", "cuda:120")  # consumer parts: small register files, and no goal of ours
_ARGUMENTS = {  # of attention_kernel, by type; strides and the rest are integers
    "pointers": ("query", "key", "value", "output"),
    "floats": ("key_mask", "log_sum_exp"),
    "indices": ("query_bounds", "segments", "tiles", "items", "segment_of", "listed"),
    "described": ("key_0", "value_0", "key_1", "value_1"),  # one of each part of the head dim
}


@dataclass(frozen=True)
class Compiled:
    """One compiled variant of the attention kernel; ``described`` if it loads keys and values by tensor descriptor; ``problems`` says
    what is wrong with it.
    """

    target: str
    dtype: str
    head_dim: int
    masked: bool
    described: bool
    configuration: Configuration
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: int
    problems: tuple[str, ...]


def inspect(targets: Sequence[str] = TARGETS, head_dims: Sequence[int] = HEAD_DIMS, dtypes: Sequence[str] = DTYPES) -> Iterator[Compiled]:
    """Compiles every configuration of every head dim and dtype; needs Triton, and no device.

    Raises:
        TargetError: a target is not known, or Triton is not installed.
    """
    for target in targets:
        if target not in _SHARED_LIMIT:
            raise TargetError(target, "unknown", f"Name some of: {', '.join(_SHARED_LIMIT)}.")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise TargetError(targets[0], "compiling needs Triton", "Run `pip install triton`.") from None
    for target, head_dim, dtype, masked, described in itertools.product(targets, head_dims, dtypes, (False, True), (False, True)):
        for configuration in configurations(target, head_dim, 2, described):
            yield _compiled(target, dtype, head_dim, masked, described, configuration)


def _compiled(target: str, dtype: str, head_dim: int, masked: bool, described: bool, configuration: Configuration) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    from lvsa_compile.kernels.triton_attention import attention_kernel

    width_0, width_1 = column_widths(head_dim)
    constants: dict[str, Any] = {
        "BLOCK_M": configuration.block_m, "BLOCK_N": configuration.block_n, "HEAD_DIM": head_dim, "WIDTH_0": width_0, "WIDTH_1": width_1,
        "WORDS": 1, "HAS_MASK": masked, "STRADDLES": True, "DESCRIBED": described, "PRECISION": "ieee",
        **{f"{name}_column": 1 for name in ("query", "key", "value", "output")},  # as a launch specialises them
    }  # fmt: skip
    parts = dict(zip(_ARGUMENTS["described"], (width_0, width_0, width_1, width_1), strict=True))
    constants |= {name: None for name, width in parts.items() if not (described and width)}
    signature = {name: "constexpr" if name in constants else _type_of(name, dtype) for name in attention_kernel.arg_names}
    signature |= {
        name: f"tensordesc<{dtype}[1, 1, {configuration.block_n}, {width}]>" for name, width in parts.items() if name not in constants
    }
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(attention_kernel.arg_names)
        if signature[name].startswith("*") or re.fullmatch(r"(query|key|value|output)_(batch|head|row)", name)
    }
    kind, _, version = target.partition(":")
    part = GPUTarget("cuda", int(version), 32) if kind == "cuda" else GPUTarget("hip", version, 64)
    source = ASTSource(attention_kernel, signature, constants, attributes)
    options = {"num_warps": configuration.warps, "num_stages": configuration.stages}
    try:
        found = triton_compile(source, target=part, options=options)
    except Exception as error:  # of any stage of the compiler: it is what one wants to see here
        problem = f"does not compile: {type(error).__name__}: {str(error)[-300:]}"
        return Compiled(target, dtype, head_dim, masked, described, configuration, 0, 0, 0, 0, (problem,))
    registers, spilled = _registers(found.asm)
    text = found.asm["ptx" if kind == "cuda" else "amdgcn"]
    instructions = text.count(MATRIX_INSTRUCTION[target])
    shared = int(found.metadata.shared)
    problems = []
    if spilled and target not in _MAY_SPILL:
        problems.append(f"spills {spilled} bytes")
    if shared > _SHARED_LIMIT[target]:
        problems.append(f"needs {shared} bytes of shared memory, the part has {_SHARED_LIMIT[target]}")
    if not instructions:
        problems.append(f"no {MATRIX_INSTRUCTION[target]}")
    return Compiled(target, dtype, head_dim, masked, described, configuration, registers, spilled, shared, instructions, tuple(problems))


def _type_of(name: str, dtype: str) -> str:
    if name in _ARGUMENTS["pointers"]:
        return f"*{dtype}"
    if name in _ARGUMENTS["floats"]:
        return "*fp32"
    if name in _ARGUMENTS["indices"]:
        return "*i32"
    return {"tile_order": "*i64", "scale": "fp32"}.get(name, "i32")


def _registers(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers per thread and bytes that did not fit into them."""
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))  # type: ignore[index]
        return registers, 4 * spilled  # scalar registers spill into lanes of vector ones, not into memory
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert used is not None, usage
    return int(used[1]), int(used[2]) + int(used[3])

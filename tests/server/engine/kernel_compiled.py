"""Compiles the kernel for a GPU that need not be here, and prints the resources of each form: run as a program."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trimtab.server.engine import kernel

INTEGERS = ("layer", "n_slots", "n_rows", "n_vocab", "hidden_stride", "residual_stride")
TYPES = {
    "i32": ("row_slot_T", "token_T", "shape_LSC", "place_LSK", "gate_LSK", "entry_LSK"),
    "i64": ("position_T", "opened_E"),
    "i8": ("special_V", "excludes_LSK"),
    "u8": ("flags_LT",),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def resources(kernel_: Any, capability: int, dtype: str, *, pair: bool) -> str:
    """The line of registers, stack and spills of one form."""
    constants: dict[str, int | None] = {"D": 576, "K": 64, "PAIR": pair, "GROUP_": kernel.GROUP, "TILE_": kernel.TILE}
    if not pair:
        constants["residual_TD"] = None
    signature = dict.fromkeys(kernel_.arg_names, "*fp32") | dict.fromkeys(INTEGERS, "i32")
    signature |= {name: f"*{kind}" for kind, names in TYPES.items() for name in names}
    signature |= {"hidden_TD": f"*{dtype}", "residual_TD": f"*{dtype}"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel_, signature, constexprs=constants)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernel.WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        told = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return next(line.strip() for line in told.splitlines() if "REG:" in line)


if __name__ == "__main__":
    for kernel_ in (kernel._edit, kernel._watch):
        for dtype, pair in (("bf16", True), ("fp32", False)):
            sys.stdout.write(resources(kernel_, int(sys.argv[1]), dtype, pair=pair) + "\n")

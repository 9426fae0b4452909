"""The kernel compiles to machine code for the cards it is meant for; that needs no GPU."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install -e .[triton]")

# In a process of its own: this one interprets kernels, and Triton decides that once.
SCRIPT = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from quantgate_serve.attention import triton_paged as paged

capability, kind, head_dim, group, splits = json.loads(sys.argv[1])
partial = kind if splits == 1 else "fp32"
pointers = {"query": kind, "keys": kind, "values": kind, "output": kind, "table": "i32",
            "length": "i32", "partial": partial, "weight": partial}
block_d = triton.next_power_of_2(head_dim)
constants = {"NUM_HEADS": 4 * group, "GROUP": group, "HEAD_DIM": head_dim, "PAGE_SIZE": 16,
             "NUM_SPLITS": splits, "TILE": paged.tile_tokens(block_d, 4 if kind == "fp32" else 2),
             "BLOCK_G": max(16, triton.next_power_of_2(group)), "BLOCK_D": block_d,
             "PRECISION": "ieee" if kind == "fp32" else "tf32"}
names = paged._attend.arg_names
types = {name: "*" + pointers[name] if name in pointers else "i32" for name in names}
types |= {"scale": "fp32"} | {name: "constexpr" for name in constants}
# What torch's allocations and the strides of a Llama let Triton assume; not table and length.
aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
           if name not in ("table", "length", "scale", "stride_table") and name not in constants}
source = ASTSource(fn=paged._attend, signature={name: types[name] for name in names},
                   constexprs={(names.index(k),): v for k, v in constants.items()}, attrs=aligned)
kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32))
print(json.dumps({"shared": kernel.metadata.shared, "cubin": len(kernel.asm["cubin"]),
                  "tensor_cores": "mma" in kernel.asm["ptx"]}))
"""


@pytest.mark.parametrize(
    ("capability", "kind", "head_dim", "group", "splits"),
    [
        (90, "bf16", 128, 4, 8),
        (90, "bf16", 64, 4, 1),
        (80, "fp16", 256, 8, 4),
        (89, "bf16", 80, 1, 4),
        (86, "bf16", 128, 7, 2),
        (80, "fp32", 256, 4, 4),
    ],
)
def test_the_kernel_compiles_and_fits_into_the_smaller_cards(
    capability: int, kind: str, head_dim: int, group: int, splits: int
) -> None:
    case = json.dumps([capability, kind, head_dim, group, splits])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, case],
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["cubin"] > 0
    assert made["shared"] <= 99 * 1024
    assert made["tensor_cores"] == (kind != "fp32")

"""Compiles each kernel as the published models call it, for a GPU that need not be there; prints its shared memory.

python compile_kernels.py 90 fp16
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from weaksam.sam.kernels import attention, mask_head, passes, postprocess

HALF = {"query", "key", "value", "rel_h", "rel_w", "mixed", "basis", "update", "matrix", "gram"}
WHOLE = {"chosen": "*i64", "counts": "*i32", "boxes": "*i32", "row_taps": "*i32", "column_taps": "*i32"}
NUMBERS = {"scale_by": "fp32", "per_channel": "fp32", "eps": "fp32", "offset": "fp32", "lowest": "fp32"}
SIZES = {
    *("num_tokens", "height", "width", "num_image_tokens", "embedding_columns", "rows", "columns"),
    *("low_rows", "low_columns"),
}
LAYOUT = {"HEADS": 8, "TOKENS": 8, "CHANNELS": 128}
READ = {"ROWS": 64, "CHANNELS": 128, "TILE": passes.TOKEN_TO_IMAGE_TILE}


def kernels() -> dict[str, tuple[Any, dict[str, Any], int]]:
    """Per name the kernel, its constants and warps."""
    write = LAYOUT | {"TILE": passes.IMAGE_TO_TOKEN_TILE}
    predict = {"NUM_MASKS": 3, "ROWS": 128, "CHANNELS": 64, "FINE": 32, "TILE": mask_head.TILE}
    measure = {"ROWS": postprocess.ROWS, "COLUMNS": postprocess.COLUMNS, "LOW_COLUMNS": 256}
    found = {
        "image to token, first": (passes._image_to_token_first, write, passes.WARPS),
        "image to token, second": (passes._image_to_token_second, write, passes.WARPS),
        "token to image, one": (passes._token_to_image, READ | {"BOTH": False}, passes.WARPS),
        "token to image, both": (passes._token_to_image, READ | {"BOTH": True}, passes.WARPS),
        "predict": (mask_head._predict, predict, mask_head.WARPS),
        "measure": (postprocess._measure, measure, postprocess.WARPS),
    }
    for dim in (64, 80):
        for num_tokens, width in ((4096, 64), (196, 14)):
            constants, warps = attention.tiling(num_tokens, width, dim)
            found[f"attend {dim} {num_tokens}"] = (attention._attend, constants, warps)
    return found


def kind_of(kernel: Any, name: str, half: str) -> str:
    """Of an argument, in Triton's words."""
    if name.isupper():
        return "constexpr"
    if name in WHOLE or name in NUMBERS or name in SIZES:
        return WHOLE.get(name) or NUMBERS.get(name) or "i32"
    of_halves = name in HALF or (
        kernel.__name__ != "_predict" and name.startswith(("shared_", "gram", "value", "mixed"))
    )
    return f"*{half}" if of_halves else "*fp32"


def main() -> None:
    """Compiles all."""
    capability, half = int(sys.argv[1]), sys.argv[2]
    shared_memory = {}
    for name, (kernel, constants, warps) in kernels().items():
        names = kernel.arg_names
        signature = {one: kind_of(kernel, one, half) for one in names}
        source = ASTSource(
            kernel,
            signature=signature,
            constexprs={(names.index(one),): value for one, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i, one in enumerate(names) if signature[one].startswith("*")},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        shared_memory[name] = compiled.metadata.shared
    print(json.dumps(shared_memory))


if __name__ == "__main__":
    main()

"""Ahead-of-time compilation of every Triton kernel, and the committed table of what it takes: registers, shared memory.

python tests/kernel_checks/resources.py STEM ARCH          compile; one JSON line a case
python tests/kernel_checks/resources.py --write            compile everything and write kernel_resources.json
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100, 120)
TABLE = Path(__file__).parent.parent / "kernel_resources.json"

ADVANTAGE_FLAGS = ("HAS_WEIGHTS", "HAS_DECIDING", "LEAVE_ONE_OUT", "CLAMP", "RAW_SINGLETON", "ZERO_UNINFORMATIVE")
HEAD_FLAGS = ("HAS_BIAS", "HAS_BLOCKED", "HAS_SCALE", "HAS_SOFTCAP", "HAS_TEMPERATURE", "PER_TOKEN")
OUTPUTS = ("ENTROPY", "TOP1", "MEAN", "SQUARES")
HEAD = {
    "logits": "*fp32", "temperatures": "*fp32", "bias": "*bf16", "blocked": "*i1", "V": "i32", "width": "i32", "stride": "i32",
    "logit_scale": "fp32", "softcap": "fp32", "temperature": "fp32",
}  # fmt: skip
STORED = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def group_advantage():
    from r1v2_fast.kernels import _group_advantage_batch as second
    from r1v2_fast.kernels import group_advantage as kernel

    types = dict.fromkeys(("rewards", "deciding"), "*bf16") | {"informative": "*i1", "offsets": "*i32"}
    types |= dict.fromkeys(("weights", "advantages", "means", "stds"), "*fp32") | {"partials": "*fp64"}
    types |= dict.fromkeys(("N", "groups", "row_stride"), "i32") | {"eps": "fp32", "tol": "fp32"}
    plain = {"column_stride": 1, "deciding_stride": 1, "CORRECTION": 1, "WIDE": kernel.WIDE}
    for components, size, on in itertools.product((1, 3), (0, 8, 64, 4096), (True, False)):
        P, M = kernel.tile(size, 8)
        flags = dict.fromkeys((*ADVANTAGE_FLAGS, "DIVIDE"), on) | {"GDPO": False, "BATCH": False}
        constants = {**plain, **flags, "R": components, "SIZE": size, "P": P, "M": M}
        yield f"R={components} SIZE={size} flags={on}", kernel.group_advantage_kernel, types, constants, kernel.OPTIONS
    for size, gdpo in itertools.product((0, 8), (True, False)):
        P, M = kernel.tile(size, 8)
        flags = dict.fromkeys(ADVANTAGE_FLAGS, True) | {"GDPO": gdpo, "BATCH": True, "DIVIDE": gdpo}
        constants = {**plain, **flags, "R": 3, "SIZE": size, "P": P, "M": M}
        yield f"SIZE={size} gdpo={gdpo} batch", kernel.group_advantage_kernel, types, constants, kernel.OPTIONS
    types = {"advantages": "*fp32", "partials": "*fp64", "N": "i32", "programs": "i32", "eps": "fp32"}
    constants = {"WHITEN": True, "CORRECTION": 1, "CLAMP": True, "PARTIALS": second.PARTIALS, "BLOCK": second.BLOCK}
    yield "finish", second.finish_kernel, types, constants, {}


def linear_logprob():
    from r1v2_fast.kernels import _launch
    from r1v2_fast.kernels import linear_logprob as kernel

    options = dict(_launch.DEFAULT)
    warps = {"num_warps": options.pop("num_warps")}
    types = {
        **HEAD,
        "targets": "*i64",
        "raw": "*fp32",
        "raw_stride": "i32",
        "matrix_stride": "i32",
        "matrix_width": "i32",
    }
    for dtype, grad, on in (
        ("fp32", False, False), ("fp32", False, True), ("bf16", True, False), ("bf16", True, True),
        ("fp16", True, True), ("fp32", True, True),
    ):  # fmt: skip
        constants = {
            **dict.fromkeys((*HEAD_FLAGS, *OUTPUTS), on), "GRAD": grad, "ONE_READ": grad and dtype == "bf16",
            "OWN": dtype != "fp32", "NORMALISE": dtype == "fp16", "STORED": STORED[dtype], "LIMIT": kernel.LIMIT, **options,
        }  # fmt: skip
        name = f"{dtype} grad={grad} everything={on}"
        yield name, kernel.row_kernel, {**types, "matrix": f"*{dtype}"}, constants, warps


def linear_logprob_grads():
    from r1v2_fast.kernels import _launch
    from r1v2_fast.kernels import linear_logprob_grads as kernel

    tile, warps = {"BLOCK": _launch.DEFAULT["BLOCK"]}, {"num_warps": _launch.DEFAULT["num_warps"]}
    for dtype, on in (("bf16", False), ("bf16", True), ("fp32", True)):
        flags = {**dict.fromkeys(HEAD_FLAGS, on), "STORED": STORED[dtype], **tile}
        types = {**HEAD, "top": "*fp32", "shift": "*fp32", "matrix": f"*{dtype}", "matrix_stride": "i32"}
        yield f"entropy {dtype} everything={on}", kernel.entropy_kernel, types, {**flags, "FACTOR": 1.0}, warps
        types = {**HEAD, "logits": f"*{dtype}", "targets": "*i64", "known": "*fp32", "n": "i32"}
        types |= {"grad": f"*{dtype}", "grad_stride": "i32"}
        yield f"logits {dtype} everything={on}", kernel.logits_grad_kernel, types, {**flags, "ENTROPY": on}, warps


def linear_logprob_sparse():
    from r1v2_fast.kernels import _launch
    from r1v2_fast.kernels import linear_logprob_sparse as kernel

    options = dict(_launch.DEFAULT)
    warps = {"num_warps": options.pop("num_warps")}
    rows = {
        "targets": "*i64",
        "top": "*fp32",
        "whole": "*fp32",
        "room": "*i32",
        "ids_out": "*i32",
        "values_out": "*fp32",
    }
    types = {**HEAD, **rows, "counts": "*i32", "budget": "fp32", "lost": "fp32"}
    for on in (False, True):
        constants = {**dict.fromkeys(HEAD_FLAGS, on), "C": 4096, "STEPS": kernel.STEPS, **options}
        yield f"select everything={on}", kernel.select_kernel, types, constants, warps
    types = {
        "ids": "*i32", "values": "*fp32", "counts": "*i32", "targets": "*i64", "whole": "*fp32", "at_target": "*fp32",
        "weight": "*bf16", "out": "*fp32", "V": "i32", "H": "i32", "row_stride": "i32", "column_stride": "i32",
    }  # fmt: skip
    constants = {"C": 4096, "COMPUTE": tl.bfloat16, "K": 8, "BLOCK": 512}
    yield "gather bf16", kernel.gather_kernel, types, constants, {"num_warps": 4}


def policy_loss():
    from r1v2_fast.kernels import policy_loss as kernel
    from r1v2_fast.ops._policy_loss_settings import KINDS, Numbers

    tensors = (
        "logprobs",
        "old",
        "advantages",
        "reference",
        "importance",
        "rollout",
        "behaviour",
        "token_weights",
        "entropy",
    )
    outputs = ("normalizer", "entropy_normalizer", "loss", "grad", "entropy_grad", "metrics", "scales")
    shapes = dict.fromkeys(("count", "sequences", "longest"), "i32")
    numbers = [*Numbers._fields[:-2], "divisor_number", "entropy_divisor_number"]
    kinds = (
        "grpo",
        "gspo",
        "luspo",
        "gmpo",
        "cispo",
        "sapo",
        "vespo",
        "dppo_tv",
    )  # what differs in more than the average
    for kind, dtype, on in [
        *((kind, "fp32", True) for kind in kinds),
        ("grpo", "fp32", False),
        ("grpo", "bf16", False),
    ]:
        family, ratio, aggregate = KINDS[kind]
        types = {**dict.fromkeys(tensors, f"*{dtype}"), **dict.fromkeys(outputs, "*fp32"), **shapes}
        types |= {"mask": "*i1", "offsets": "*i64", "partials": "*fp64", "finished": "*i32"} | dict.fromkeys(
            numbers, "fp64"
        )
        constants = {
            "FAMILY": family, "RATIO": ratio, "AGGREGATE": aggregate, "KL": "k3" if on else "", "KL_IN_LOSS": on,
            "KL_IMPORTANCE": on, "ADVANTAGE": "token" if on else "sequence", "IMPORTANCE": "token" if on else "",
            "ROLLOUT": "sequence_mask" if on else "", "HAS_BEHAVIOUR": on, "OFF_POLICY": "rollout" if on else "",
            "HAS_WEIGHTS": on, "HAS_ENTROPY": on, "DUAL": on, "TWO_SIDED": on, "PADDED": on, "GIVEN": "" if on else "number",
            "ENTROPY_GIVEN": "" if on else "number", "DIVIDED": not on, "ENTROPY_DIVIDED": not on, "BLOCK": 512,
        }  # fmt: skip
        yield f"{kind} {dtype} everything={on}", kernel.policy_loss_kernel, types, constants, {"num_warps": 8}


def mpo_loss():
    from r1v2_fast.kernels import mpo_loss as kernel

    tensors = ("reference", "pair_weights", "delta", "normalizer", "generation_normalizer")
    numbers = ("beta", "preference_weight", "quality_weight", "generation_weight", "smoothing")
    numbers += ("delta_number", "normalizer_number", "generation_number")
    types = dict.fromkeys((*tensors, "loss", "metrics", "rewards", "grad"), "*fp32") | dict.fromkeys(numbers, "fp64")
    types |= {"offsets": "*i64", "partials": "*fp64", "finished": "*i32", "count": "i32", "pairs": "i32"}
    strides = dict.fromkeys(("logprobs_stride", "reference_stride", "offsets_stride", "pair_weights_stride"), 1)
    for dtype, average, on in (("fp32", 16, False), ("fp32", 1024, False), ("fp32", 1024, True), ("bf16", 4096, True)):
        block, warps = kernel.tile(2 * average, 1)
        flags = dict.fromkeys(("HAS_WEIGHTS", "DELTA_TENSOR", "NORMALIZER_TENSOR"), on)
        flags |= {"GENERATION": "tokens" if on else "number", "PER_SEQUENCE": not on}
        constants = {**strides, **flags, "PROGRAMS": kernel.PROGRAMS, "BLOCK": block}
        here = {**types, "logprobs": f"*{dtype}"}
        yield f"{dtype} BLOCK={block} everything={on}", kernel.mpo_loss_kernel, here, constants, {"num_warps": warps}


CASES = {
    f.__name__: f
    for f in (group_advantage, linear_logprob, linear_logprob_grads, linear_logprob_sparse, policy_loss, mpo_loss)
}


def build(kernel, types, constants, options, architecture):
    """Compiled as a launch with aligned pointers and sizes specialises it."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    assert set(types) | set(constants) == set(kernel.arg_names), set(kernel.arg_names) ^ (set(types) | set(constants))
    # V is any number; strides and widths are padded to 128 bytes
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] in "*i" and name != "V"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def used(compiled) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"], "shared": compiled.metadata.shared}


def measure(stem: str, architecture: int) -> dict[str, dict[str, int]]:
    return {
        name: used(build(kernel, types, constants, options, architecture))
        for name, kernel, types, constants, options in CASES[stem]()
    }


def main() -> None:
    if sys.argv[1] != "--write":
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
        return
    table = {stem: {str(arch): measure(stem, arch) for arch in ARCHITECTURES} for stem in CASES}
    text = json.dumps({"triton": triton.__version__, **table}, indent=1)
    TABLE.write_text(
        re.sub(r"\{\s+(\"registers\"[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text) + "\n"
    )


if __name__ == "__main__":
    main()

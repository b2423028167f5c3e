"""The row kernel of `_C`: a cluster of blocks holds a row, so that every logit is read once; sm_90 and newer.

It stands in for `kernels.linear_logprob.launch`; the kernels beside that one stay Triton's. n rows, V vocabulary.
"""

from __future__ import annotations

import functools

import torch

from r1v2_fast import _native
from r1v2_fast.ops import _backend

STORED = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # Stored of csrc/linear_logprob_rows.h
STEM = "linear_logprob"


def why_not(device_type: str) -> str | None:
    """None where it may run on such a device, else the reason and what would work."""
    if device_type != "cuda":
        return f"the row kernel needs a CUDA tensor, got one on {device_type}; move it, or use backend='torch'"
    return _native.why_not(device_type) or _backend.triton_why_not(device_type)  # whose kernels run beside it


@functools.cache
def _limit(index: int) -> int:
    """The longest vocabulary that the device takes, 0 below sm_90."""
    return _native.loaded().linear_logprob_rows_limit(index)


def lacks(hidden: torch.Tensor, vocabulary: int) -> str | None:
    """None where it can make this call's rows, else the reason and what would work."""
    if hidden.dtype == torch.float64:
        return "its statistics are fp32, the inputs fp64; use backend='torch'"
    built = _native.loaded().cuda_architectures
    if all(_native.split_architecture(name) < (9, 0) for name in built.split()):
        return f"clusters need code for sm_90 or newer, and r1v2_fast._C was built for {built}; use backend='triton'"
    limit = _limit(hidden.get_device())
    if not limit:
        major, minor = torch.cuda.get_device_capability(hidden.device)
        return f"clusters need sm_90 or newer, this GPU is sm_{major}{minor}; use backend='triton'"
    if vocabulary > limit:
        return f"a row must fit a cluster's shared memory, here {limit} logits, got {vocabulary}; use backend='triton'"
    return None


def resolved(backend: str, hidden: torch.Tensor, vocabulary: int) -> str:
    """What "auto" stands for: Triton, or this kernel where `bench tune` found it faster; raises where it cannot run."""
    if backend == "auto":
        from r1v2_fast.kernels import _launch

        if _launch.row_pass(STEM, hidden.device, vocabulary) == "triton":
            return "triton"
        return "triton" if why_not(hidden.device.type) or lacks(hidden, vocabulary) else "cuda"
    if backend == "cuda" and (reason := lacks(hidden, vocabulary)) is not None:
        raise RuntimeError(f"linear_logprob cannot run with backend='cuda': {reason}")
    return backend


def launch(
    head: dict,  # of kernels.linear_logprob.head_arguments; rows of logits at multiples of 16 bytes, padding included
    targets_n: torch.Tensor,  # int64
    raw: torch.Tensor,  # [10, n] fp32, out
    matrix_nV: torch.Tensor | None,  # out: D, over the logits' own memory if they are fp32; padding is overwritten
    outputs: tuple[str, ...],
    *,
    own: bool,  # D holds the target's entry, else 0
    cluster: int = 0,
) -> None:
    """Raw statistics of n rows and, where `matrix_nV` is given, D with exp(z - m) f = D scale.

    cluster  blocks a row, up to 8; 0: the fewest that leave room for three on an SM. Another number, other bits
    """
    logits, rows = head["logits"], len(targets_n)
    temperatures = head["temperatures"] if head["PER_TOKEN"] else None
    bias = head["bias"].float() if head["HAS_BIAS"] else None
    blocked = head["blocked"] if head["HAS_BLOCKED"] else None
    if not rows:
        return
    V = logits.shape[1]
    _check_rows("logits", logits, (rows, V), (torch.float32,), logits.device)
    for name, tensor, shape, dtype in (
        ("targets", targets_n, (rows,), torch.int64),
        ("temperatures", temperatures, (rows,), torch.float32),
        ("bias", bias, (V,), torch.float32),
        ("blocked", blocked, (V,), torch.bool),
    ):
        if tensor is not None:
            _check(name, tensor, shape, (dtype,), logits.device, tensor.is_contiguous())
    _check("raw", raw, (10, rows), (torch.float32,), logits.device, raw.stride(1) == 1)
    if matrix_nV is not None:
        _check_rows("matrix", matrix_nV, (rows, V), tuple(d for d in STORED if d is not None), logits.device)
    for name, tensor in (("bias", bias), ("blocked", blocked)):
        if tensor is not None and tensor.data_ptr() % 16:
            raise ValueError(f"{name} must start at a multiple of 16 bytes")
    _native.loaded().linear_logprob_rows(
        logits=logits.data_ptr(),
        targets=targets_n.data_ptr(),
        temperatures=0 if temperatures is None else temperatures.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        blocked=0 if blocked is None else blocked.data_ptr(),
        raw=raw.data_ptr(),
        matrix=0 if matrix_nV is None else matrix_nV.data_ptr(),
        rows=rows,
        vocabulary=V,
        stride=logits.stride(0),
        raw_stride=raw.stride(0),
        matrix_stride=0 if matrix_nV is None else matrix_nV.stride(0),
        logit_scale=head["logit_scale"],
        softcap=head["softcap"] if head["HAS_SOFTCAP"] else 0.0,
        temperature=head["temperature"],
        stored=STORED[None if matrix_nV is None else matrix_nV.dtype],
        own=own,
        entropy="entropy" in outputs,
        top1="is_top1" in outputs,
        mean="mean_logits" in outputs,
        squares="log_sum_sq_probs" in outputs,
        cluster=cluster,
        **_native.place(logits),
    )


def _check(name: str, tensor: torch.Tensor, shape, dtypes, device: torch.device, laid_out: bool) -> None:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in dtypes or tensor.device != device or not laid_out:
        raise ValueError(
            f"{name} must be {' or '.join(map(str, dtypes))} {tuple(shape)} on {device} with contiguous rows, got "
            f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}"
        )


def _check_rows(name: str, tensor: torch.Tensor, shape: tuple[int, int], dtypes, device: torch.device) -> None:
    """Rows that start at multiples of 16 bytes and go on, in memory, to the next multiple of four columns."""
    _check(name, tensor, shape, dtypes, device, tensor.stride(1) == 1)
    rows, V = shape
    step = tensor.stride(0)
    room = tensor.untyped_storage().nbytes() // tensor.itemsize - tensor.storage_offset()
    wide = -(-V // 4) * 4
    if tensor.data_ptr() % 16 or step * tensor.itemsize % 16 or step < wide or (rows - 1) * step + wide > room:
        raise ValueError(
            f"{name}'s rows must start at multiples of 16 bytes and be readable up to column {wide}, got a stride of "
            f"{step} {tensor.dtype} from {tensor.data_ptr():#x}"
        )

"""Run by test_linear_logprob_rows.py on a GPU of sm_90 or newer: `_C`'s row kernel against fp64 and beside Triton's."""

import itertools

import linear_logprob as head_checks
import torch

from r1v2_fast.ops import _linear_logprob_native as native
from r1v2_fast.ops import _linear_logprob_rows as rows
from r1v2_fast.ops import linear_logprobs
from r1v2_fast.ops._linear_logprob_pass import room, triton_head, triton_rows
from r1v2_fast.ops._linear_logprob_rows import OUTPUTS, Shaping
from r1v2_fast.reference import linear_logprob as reference
from r1v2_fast.testing.accuracy import assert_as_accurate

N = 96
VOCABULARIES = (5, 4301, 32000, 64000, 151674, 152064, 262144)  # one block a row, two, four, eight, and the most
STATISTICS = ("logprobs", "entropy", "mean_logits", "log_sum_sq_probs")


def shapings(V: int, device) -> dict[str, Shaping]:
    g = torch.Generator().manual_seed(1)
    blocked = torch.rand(V, generator=g) < 0.3
    blocked[:2] = False
    bias = torch.randn(V, generator=g).to(device)
    each = torch.linspace(0.5, 2.0, N).to(device)
    return {
        "plain": Shaping(None, 1.0, 1.0, None, None),
        "per token": Shaping(None, each, 1.0, None, None),
        "all": Shaping(bias, 1.3, 0.6, 4.0, blocked.to(device)),
    }


def made(values, targets, shaping, stored, *, cluster: bool):
    """(Raw, D scale [n, V]) of `_C`'s kernel or Triton's."""
    logits = room(values, *values.shape, torch.float32).copy_(values)
    matrix = room(values, *values.shape, stored)
    head = triton_head(logits, shaping, slice(None), padded=True)
    if not cluster:
        raw = triton_rows(head, targets, OUTPUTS, matrix, own=True, padded=True)
        return raw, matrix.float() * raw.scale[:, None]
    again = [rows.raw_room(values, len(values), torch.float32) for _ in range(2)]
    for stacked in again:
        native.launch(head, targets, stacked, matrix, OUTPUTS, own=True)
    assert torch.equal(*again), "the same call gave other bits"
    raw = rows.raw_of(again[0])
    return raw, matrix.float() * raw.scale[:, None]


def right(values, targets, shaping, dtype):
    part = rows.row_pass(values.to(dtype, copy=True), targets, shaping, slice(None), OUTPUTS, grad=True)
    matrix = rows.gradient_matrix(part)
    rows.place(matrix, targets, part.raw.at_target())
    return part.raw, matrix


def row_cases(device):
    for V, stored in itertools.product(VOCABULARIES, (torch.bfloat16, torch.float16, torch.float32)):
        g = torch.Generator(device).manual_seed(V)
        values = 4 * torch.randn(N, V, generator=g, device=device)
        targets = torch.randint(0, 2, (N,), generator=g, device=device)  # never forbidden
        for name, shaping in shapings(V, device).items():
            what = f"V={V} {stored} {name}"
            exact, exact_matrix = right(values, targets, shaping, torch.float64)
            same, same_matrix = right(values, targets, shaping, torch.float32)
            raw, matrix = made(values, targets, shaping, stored, cluster=True)
            theirs, their_matrix = made(values, targets, shaping, stored, cluster=False)
            for field in STATISTICS:
                bar = max((same, theirs), key=lambda r: (r.result(field) - exact.result(field)).abs().max())
                assert_as_accurate(raw.result(field), bar.result(field), exact.result(field), f"{what}: {field}")
            assert torch.equal(raw.result("is_top1"), theirs.result("is_top1")), what
            plain = same_matrix.to(torch.bfloat16).float() if stored == torch.bfloat16 else same_matrix
            bar = max((plain, their_matrix), key=lambda d: (d - exact_matrix).abs().max())
            assert_as_accurate(matrix, bar, exact_matrix, f"{what}: D")
            yield


def head_cases(device):
    """linear_logprobs through it, with the kernels beside it: every option, dtype and entropy mode."""
    modes = itertools.cycle([(False, None), (True, None), (None, head_checks.V * 2 * head_checks.N)])
    for dtype, (name, options) in itertools.product(head_checks.DTYPES, head_checks.OPTIONS.items()):
        tensors, targets, upstream = head_checks.inputs(dtype, device)
        options = head_checks.there(options, device)
        mode, workspace = next(modes)
        shared = {"entropy": mode is not False, **options}
        plain = head_checks.run(reference.linear_logprobs, tensors, targets, upstream, **shared)
        truth = head_checks.run(reference.linear_logprobs, [t.double() for t in tensors], targets, upstream, **shared)
        ours = head_checks.run(
            linear_logprobs, tensors, targets, upstream, outputs=OUTPUTS, entropy_grad=mode, workspace_bytes=workspace,
            backend="cuda", **shared,
        )  # fmt: skip
        head_checks.compare(ours, plain, truth, f"{dtype} {name} entropy_grad={mode}")
        yield


def check_any_split(device):
    g = torch.Generator(device).manual_seed(2)
    values = torch.randn(64, 152064, generator=g, device=device) * 5
    targets = torch.randint(0, 152064, (64,), generator=g, device=device)
    shaping = Shaping(None, 1.0, 1.0, None, None)
    whole, _ = made(values, targets, shaping, torch.bfloat16, cluster=True)
    for start in range(0, 64, 7):
        at = slice(start, start + 7)
        part, _ = made(values[at], targets[at], shaping, torch.bfloat16, cluster=True)
        assert torch.equal(torch.stack(part), torch.stack(whole)[:, at])


def main(device):
    check_any_split(device)
    checked = sum(1 for _ in itertools.chain(row_cases(device), head_cases(device)))
    print(f"{checked} cases as accurate as PyTorch's own dtype")


if __name__ == "__main__":
    main("cuda")

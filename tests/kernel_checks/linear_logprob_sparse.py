"""Run by test_kernels.py in a process of its own: on the CPU under TRITON_INTERPRET=1, and on a GPU."""

import sys

import torch

from r1v2_fast.kernels import linear_logprob as rows
from r1v2_fast.kernels import linear_logprob_sparse as kernel
from r1v2_fast.ops import linear_logprobs
from r1v2_fast.testing.peaked import peaked_policy

N, H, V = 20, 64, 12000
TOLERANCES = (2.0**-10, 1e-3, 1e-5, 0.3)


def selected(logits, targets, tolerance):
    raw = torch.empty(10, len(logits), device=logits.device)
    head = rows.head_arguments(logits, None, None, 1.0, 1.0, None)
    rows.launch(head, targets, raw, None, ())
    whole = raw[1] + (raw[2] - raw[0]).exp()
    return kernel.launch_select(head, targets, raw[0].contiguous(), whole, tolerance, 4096)


def check_selection(device):
    """Kept entries are the largest, and one fewer octave of them would drop too much."""
    hidden, weight, targets = peaked_policy(N, H, V, device=device)
    logits = hidden @ weight.T
    probs = logits.double().softmax(1)
    probs[torch.arange(N), targets] = 0
    sparse = 0
    for tolerance in TOLERANCES:
        ids, values, counts = selected(logits, targets, tolerance)
        for row in range(N):
            if (count := int(counts[row])) < 0:
                continue
            sparse += 1
            chosen = ids[row, :count].long()
            assert len(chosen.unique()) == count and (chosen.diff() > 0).all()
            assert (values[row, :count].double() - probs[row, chosen]).abs().max() <= 1e-5 if count else True
            rest = probs[row].clone()
            rest[chosen] = 0
            assert rest.sum() <= tolerance
            if count:
                least = probs[row, chosen].min()
                assert rest.max() <= least * 1.001
                if count > 1:  # the bisection ends within an octave / 2^15 of the best threshold
                    assert (
                        rest.sum() + probs[row, chosen][probs[row, chosen] <= least * 1.01].sum()
                        > tolerance * 0.99 - 4e-6
                    )
    assert sparse > 2 * N, sparse


def check_bound(device):
    """|d logprob / d hidden - exact| <= tau c max |W_v| on peaked, flat and adversarial rows, with every option at once."""
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, targets = peaked_policy(N, H, V, dtype=dtype, device=device)
        hidden[0] = 0  # every id alike
        hidden[1] *= 4  # one id has all
        targets[2] = -100
        temperature = 0.5 + torch.rand(N, generator=g).to(device)
        for options in (
            {},
            {"softcap": 30.0, "temperature": temperature, "forbidden": torch.tensor([5, 7], device=device)},
        ):
            targets[(targets == 5) | (targets == 7)] = 6
            for tolerance in TOLERANCES:
                (exact,), (near,) = (
                    torch.autograd.grad(
                        linear_logprobs(leaf, weight, targets, grad_tolerance=tau, backend="triton", **options).logprobs.sum(),
                        leaf,
                    )
                    for leaf, tau in ((hidden.clone().requires_grad_(), 0.0), (hidden.clone().requires_grad_(), tolerance))
                )  # fmt: skip
                c = 1 / options["temperature"] if "temperature" in options else 1.0
                largest = c * weight.double().norm(dim=1).max()
                rounding = 4 * torch.finfo(dtype).eps * largest  # D, and each gradient, in the compute dtype
                bound = tolerance * largest + rounding
                assert ((near.double() - exact.double()).norm(dim=1) <= bound).all(), (
                    dtype,
                    options,
                    tolerance,
                )
                assert (near[2] == 0).all()


def check_same_bits(device):
    hidden, weight, targets = peaked_policy(N, H, V, device=device)

    def grad(rows_of):
        leaf = hidden[rows_of].clone().requires_grad_()
        out = linear_logprobs(leaf, weight, targets[rows_of], grad_tolerance=2**-10, backend="triton")
        return torch.autograd.grad(out.logprobs.sum(), leaf)[0]

    assert torch.equal(grad(slice(None)), grad(slice(None)))


def main(device):
    check_selection(device)
    check_bound(device)
    check_same_bits(device)
    print(f"gradients as accurate as {len(TOLERANCES)} tolerances promise")


if __name__ == "__main__":
    main(sys.argv[1])

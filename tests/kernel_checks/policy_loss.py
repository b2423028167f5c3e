"""Run by test_kernels.py in a process of its own: on the CPU under TRITON_INTERPRET=1, and on a GPU."""

import itertools
import sys

import torch

from r1v2_fast.ops import _policy_loss_autograd
from r1v2_fast.ops._policy_loss_settings import KINDS
from r1v2_fast.ops.policy_loss import policy_loss
from r1v2_fast.testing.accuracy import assert_as_accurate
from r1v2_fast.testing.launches import kernels_launched, launches
from r1v2_fast.testing.responses import EVERYTHING, SETTINGS, op_arguments, ours, plain, responses

BLOCK = 512  # the kernel's largest tile: a response longer than that is walked


def compare(batch, kind, chosen, device):
    """Loss and gradients by the relative rule, metrics with the torch backend's, packed and padded to the bit."""
    there = batch.to(torch.device(device))
    found, metrics = ours(there, kind, chosen, backend="triton")
    same, truth = (plain(batch, kind, chosen, to) for to in (torch.float32, torch.float64))
    for value, own, exact in zip(found, same, truth, strict=True):
        assert_as_accurate(value.cpu(), own, exact, f"{kind} {chosen}")
    _, known = ours(batch, kind, chosen, backend="torch")
    assert metrics.keys() == known.keys()
    for name, value in metrics.items():
        exact = known[name].double()
        assert_as_accurate(value.cpu(), exact.float(), exact, name)
    wide, wide_metrics = ours(there, kind, chosen, padded=True, backend="triton")
    if kind == "dr_grpo" and "normalizer" not in chosen:
        return  # the padded length is the divisor
    assert torch.equal(found[0], wide[0])
    for packed, padded in zip(found[1:], wide[1:], strict=True):
        assert torch.equal(packed, padded[there.mask]) and (padded[~there.mask] == 0).all()
    assert all(torch.equal(metrics[name], wide_metrics[name]) for name in metrics)


def main(device):
    batch = responses().to(torch.float32)
    checked = 0
    for kind in KINDS:
        for name, chosen in SETTINGS.items():
            if device == "cuda" or checked % 3 == 0 or name in ("plain", "everything"):  # the interpreter is slow
                compare(batch, kind, chosen, device)
            checked += 1
    long = responses((BLOCK + 70, 1, 0, 2 * BLOCK, 30), seed=5).to(torch.float32)
    for kind in ("dapo", "gspo", "gmpo", "vespo"):
        compare(long, kind, EVERYTHING, device)
    many = responses((1,) * 1100, seed=6).to(torch.float32)  # more sequences than programs
    compare(many, "grpo", EVERYTHING, device)

    broken = responses((3, 2)).to(torch.float32).to(torch.device(device))
    broken.token_advantages[:] = 1.0
    for field, kind in itertools.product(("logprobs", "token_advantages"), KINDS):
        poisoned = getattr(broken, field).clone()
        poisoned[1] = torch.nan
        (loss, grad, _), _ = ours(
            broken._replace(**{field: poisoned}), kind, {"per_token": True, "normalizer": 2.0}, backend="triton"
        )
        assert loss.isnan() and grad.isnan().any(), kind

    there = responses(seed=7).to(torch.float32).to(torch.device(device))
    for kind in KINDS:
        with launches() as seen:
            ours(there, kind, EVERYTHING, backend="triton")
        assert seen == ["policy_loss_kernel"], seen
        if device == "cuda":  # and nothing else: no cast, no fill, no copy
            arguments = {"kind": kind, "backend": "triton", **op_arguments(there, kind, EVERYTHING)}
            assert kernels_launched(lambda given=arguments: policy_loss(there.logprobs, **given)) == 1
    first, again = (ours(there, "grpo", EVERYTHING, backend="triton")[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for dtype in (torch.bfloat16, torch.float16):
        half = there.to(dtype)
        (loss, grad, _), _ = ours(half, "grpo", EVERYTHING, backend="triton")
        (wide, *_), _ = ours(half.to(torch.float32), "grpo", EVERYTHING, backend="triton")
        assert torch.equal(loss, wide) and grad.dtype == dtype
    empty = torch.zeros(0, device=device, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    policy_loss(empty, empty.detach(), empty.detach(), offsets=zero, backend="triton").loss.backward()
    normalizer = torch.tensor(5.0, device=device)
    number, tensor = (
        ours(there, "grpo", {**EVERYTHING, "normalizer": n}, backend="triton")[0] for n in (5.0, normalizer)
    )
    assert all(torch.equal(a, b) for a, b in zip(number, tensor, strict=True))

    called, op = [], _policy_loss_autograd._triton_op
    _policy_loss_autograd._triton_op = lambda *inputs: called.append(inputs) or op(*inputs)
    ours(there, "grpo", EVERYTHING, backend="triton")
    torch.library.opcheck(op, [x.detach() if isinstance(x, torch.Tensor) else x for x in called[0]])
    print(f"{checked} settings as accurate as PyTorch's fp32")


if __name__ == "__main__":
    main(sys.argv[1])

"""Run by test_kernels.py in a process of its own: on the CPU under TRITON_INTERPRET=1, and on a GPU.

The entropy's matrix is checked with the head, in linear_logprob.py: it is the gradient of the entropy there.
"""

import itertools
import sys

import linear_logprob as shared
import torch

from r1v2_fast.ops import logprobs_from_logits
from r1v2_fast.reference import linear_logprob as reference
from r1v2_fast.testing.accuracy import assert_as_accurate


def logits_cases(device):
    """From logits in their own dtype, in place and not, log-prob and entropy together."""
    for (dtype, (name, options)), inplace in zip(
        itertools.product(shared.DTYPES, shared.OPTIONS.items()), itertools.cycle((False, True, True))
    ):
        options = {k: v for k, v in shared.there(options, device).items() if k != "logit_scale"}
        g = torch.Generator().manual_seed(3)
        logits = (torch.randn(shared.N, shared.V, generator=g) * 3).to(device, dtype)
        _, targets, upstream = shared.inputs(dtype, device)

        def step(values, plain, options=options, targets=targets, upstream=upstream, inplace=inplace):
            leaf = values.clone().requires_grad_()
            held = leaf * 1  # a non-leaf may be overwritten
            if plain:
                out = reference.statistics(reference.shaped(held, **options), targets)
            else:
                out = logprobs_from_logits(
                    held,
                    targets,
                    outputs=shared.OUTPUTS,
                    entropy_grad=True,
                    inplace_grad=inplace,
                    backend="triton",
                    **options,
                )._asdict()
            loss = (out["logprobs"] * upstream.to(out["logprobs"].dtype)).sum()
            (loss + (out["entropy"] * upstream.flip(0).to(loss.dtype)).sum()).backward()
            return out, [leaf.grad]

        ours, plain, truth = step(logits, False), step(logits, True), step(logits.double(), True)
        what = f"logits {dtype} {name} inplace={inplace}"
        for field in ("logprobs", "entropy", "mean_logits", "log_sum_sq_probs"):
            assert_as_accurate(ours[0][field].detach(), plain[0][field].detach(), truth[0][field].detach(), what)
        if device == "cuda" or dtype == torch.float32:  # the interpreter truncates to 16 bits instead of rounding
            assert_as_accurate(ours[1][0], plain[1][0], truth[1][0], f"{what}: gradient")
        yield


def check_ignored_rows_may_hold_anything(device):
    logits = torch.full((2, 50), torch.nan, device=device)
    logits[1] = torch.arange(50.0, device=device)
    leaf = logits.requires_grad_()
    targets = torch.tensor([-100, 3], device=device)
    out = logprobs_from_logits(leaf, targets, outputs=("entropy",), entropy_grad=True, backend="triton")
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert out.logprobs[0] == 0 and (leaf.grad[0] == 0).all() and leaf.grad[1].isfinite().all()


def check_writing_over_the_logits_is_seen_by_autograd(device):
    """Another consumer of the logits, or a second backward, must raise and not compute with what lies there now."""
    for backend in ("triton", "torch"):
        held = torch.randn(3, 50, device=device, requires_grad=True) * 1.0
        other = held.square().sum()
        targets = torch.tensor([1, 2, 3], device=device)
        out = logprobs_from_logits(held, targets, inplace_grad=True, backend=backend).logprobs.sum()
        out.backward(retain_graph=True)
        for again in (other, out):
            try:
                again.backward()
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
            else:
                raise AssertionError(f"{backend}: a gradient was made of overwritten logits")
        try:
            logprobs_from_logits(torch.zeros(1, 50, device=device).expand(3, 50), targets, inplace_grad=True)
        except ValueError as error:
            assert "do not overlap" in str(error)
        else:
            raise AssertionError("overlapping rows were accepted")


def main(device):
    checked = sum(1 for _ in logits_cases(device))
    assert checked == len(shared.DTYPES) * len(shared.OPTIONS)
    check_ignored_rows_may_hold_anything(device)
    check_writing_over_the_logits_is_seen_by_autograd(device)
    print(f"{checked} cases as accurate as PyTorch's own dtype")


if __name__ == "__main__":
    main(sys.argv[1])

"""Run by test_kernels.py in a process of its own: on the CPU under TRITON_INTERPRET=1, and on a GPU."""

import itertools
import sys

import torch

from r1v2_fast.kernels import linear_logprob as kernel
from r1v2_fast.ops import linear_logprobs, logprobs_from_logits
from r1v2_fast.reference import linear_logprob as reference
from r1v2_fast.testing.accuracy import assert_as_accurate

OUTPUTS = ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
N, H, V = 40, 64, 4300  # three tiles of 2048, the last of them short; rows enough for a maximum to mean something
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "per token": {"temperature": torch.linspace(0.5, 2.0, N)},
    "softcap": {"softcap": 3.0, "logit_scale": 1.7},
    "forbidden": {"forbidden": torch.tensor([0, 94, V - 1])},
    "all": {"temperature": 1.3, "softcap": 4.0, "logit_scale": 0.6, "forbidden": torch.arange(2500)},
}


def inputs(dtype, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(N, H, generator=g) * 0.25).to(device, dtype)  # no single row that outweighs the rest
    weight = (torch.randn(V, H, generator=g) / H**0.5).to(device, dtype)
    bias = (torch.randn(V, generator=g) * 0.25).to(device, dtype)
    targets = torch.randint(2500, V - 4, (N,), generator=g)
    targets[0], targets[1] = 2500, -100
    upstream = torch.where(torch.rand(N, generator=g) < 0.5, -1.0, 1.0) + torch.rand(N, generator=g) / 8
    return (hidden, weight, bias), targets.to(device), upstream.to(device)  # rows weigh alike, too


def there(options, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def run(function, tensors, targets, upstream, *, entropy: bool, **options):
    leaves = [t.clone().requires_grad_() for t in tensors]
    hidden, weight, bias = leaves
    out = function(hidden, weight, targets, bias=bias, **options)
    out = out if isinstance(out, dict) else out._asdict()
    loss = (out["logprobs"] * upstream.to(out["logprobs"].dtype)).sum()
    if entropy:
        loss = loss + (out["entropy"] * upstream.flip(0).to(out["entropy"].dtype)).sum()
    loss.backward()
    return out, [leaf.grad for leaf in leaves]


def compare(found, plain, truth, what):
    (ours, grads), (same, same_grads), (exact, exact_grads) = found, plain, truth
    for field in ("logprobs", "entropy", "mean_logits", "log_sum_sq_probs"):
        assert_as_accurate(ours[field].detach(), same[field].detach(), exact[field].detach(), f"{what}: {field}")
    assert torch.equal(ours["is_top1"], exact["is_top1"]), what
    for grad, own, right, name in zip(grads, same_grads, exact_grads, ("hidden", "weight", "bias"), strict=True):
        assert_as_accurate(grad, own, right, f"{what}: gradient of {name}")


def head_cases(device):
    """Every option, dtype and entropy mode; the head trains, with D kept, recomputed, and half of both."""
    modes = itertools.cycle([(False, None), (True, V * 4 * N), (None, V * 2 * N), (True, None)])
    for dtype, (name, options) in itertools.product(DTYPES, OPTIONS.items()):
        tensors, targets, upstream = inputs(dtype, device)
        options = there(options, device)
        for mode, room in itertools.islice(modes, 1):
            entropy = mode is not False
            plain = run(reference.linear_logprobs, tensors, targets, upstream, entropy=entropy, **options)
            wide = [t.double() for t in tensors]
            truth = run(reference.linear_logprobs, wide, targets, upstream, entropy=entropy, **options)
            ours = run(
                linear_logprobs, tensors, targets, upstream, entropy=entropy, outputs=OUTPUTS, entropy_grad=mode,
                workspace_bytes=room, backend="triton", **options,
            )  # fmt: skip
            compare(ours, plain, truth, f"{dtype} {name} entropy_grad={mode} workspace_bytes={room}")
            yield


def statistics_alone(logits, targets, **options):
    raw = torch.empty(10, len(logits), device=logits.device)
    head = kernel.head_arguments(logits, None, None, 1.0, 1.0, None)
    kernel.launch(head, targets, raw, **options)
    return raw


def check_one_read(device):
    """D as one read writes it, in fp32: rows whose maximum outgrows the first tile's by less and by more than LIMIT."""
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(1)).to(device)
    logits[1, 2500] = 50.0
    logits[2, V - 1] = 90.0
    assert 90 - logits[2, :2048].max() > kernel.LIMIT > 50 - logits[1, :2048].max() + 1
    targets = torch.tensor([7, 2500, -100], device=device)
    twice, once = torch.empty(3, V, device=device), torch.empty(3, V, device=device)
    raw_twice = statistics_alone(logits, targets, matrix_nV=twice, outputs=OUTPUTS, one_read=False, own=True)
    raw_once = statistics_alone(logits, targets, matrix_nV=once, outputs=OUTPUTS, one_read=True, own=True)
    keep = [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert torch.equal(raw_twice[keep], raw_once[keep])
    assert raw_once[4, 0] <= 1 and 0 < raw_once[4, 1] < 1e-15 and raw_once[4, 2] == 1

    def plain(values):
        e = (values - values.amax(1, keepdim=True)).exp()
        for row, t in ((0, 7), (1, 2500)):
            e[row, t] = 0
            e[row, t] = -e[row].sum()
        return e

    exact, same = plain(logits.double()), plain(logits)
    for row in range(3):
        values = once[row].double() * raw_once[4, row].double()
        error = (values - exact[row]).abs()
        assert (error <= 2e-5 * exact[row].abs() + 1e-30).all()  # fp32 exponents up to 50: bf16 rounds to 4e-3
        assert_as_accurate(twice[row] * raw_twice[4, row], same[row], exact[row])


def check_near_certainty(device):
    """1 - p right to 1e-6 at p = 1 - 1e-6, and the gradient with it."""
    hidden, weight = torch.zeros(1, H, device=device), torch.zeros(V, H, device=device)
    hidden[0, 0] = 1.0
    for t in (3, 2500, V - 1):  # the maximum in the first tile, and jumps of the running maximum by 23 nat
        head = weight.clone()
        head[t, 0] = torch.log(torch.tensor((V - 1) * 1e6))
        leaf = hidden.clone().requires_grad_()
        out = linear_logprobs(leaf, head, torch.tensor([t], device=device), backend="triton").logprobs
        out.sum().backward()
        s = (V - 1) * torch.exp(-head[t, 0].double())
        assert abs(-torch.expm1(out.double()).item() - (s / (1 + s)).item()) <= 1e-6 * (s / (1 + s)).item()
        gradient = (head[t, 0].double() * s / (1 + s)).item()
        assert abs(leaf.grad[0, 0].item() - gradient) <= 1e-6 * gradient


def check_any_split(device):
    g = torch.Generator().manual_seed(2)
    logits, targets = torch.randn(6, V, generator=g).to(device) * 5, torch.randint(0, V, (6,), generator=g).to(device)
    whole = statistics_alone(logits, targets, matrix_nV=None, outputs=OUTPUTS)
    for split in (1, 2, 3, 5):
        parts = zip(logits.split(split), targets.split(split), strict=True)
        assert torch.equal(
            torch.cat([statistics_alone(a, b, matrix_nV=None, outputs=OUTPUTS) for a, b in parts], 1), whole
        )
    ties = torch.zeros(2, V, device=device)
    ties[:, [2000, 2100]] = 1.0  # equal maxima in two tiles: only the first is the top
    top1 = logprobs_from_logits(ties, torch.tensor([2000, 2100], device=device), outputs=("is_top1",), backend="triton")
    assert top1.is_top1.tolist() == [True, False]


def check_rows_without_gradient(device):
    (hidden, weight, _), targets, upstream = inputs(torch.float32, device)
    wanted = torch.arange(N, device=device) % 3 > 0
    hidden = torch.cat([hidden, hidden]).requires_grad_()
    targets, wanted = targets.repeat(2), wanted.repeat(2)
    out = linear_logprobs(hidden, weight, targets, needs_grad=wanted, workspace_bytes=V * 8, backend="triton").logprobs
    upstream = torch.where(wanted, upstream.repeat(2), torch.nan)  # promised to be zero: whatever arrives
    (grad,) = torch.autograd.grad(out, hidden, upstream)
    assert (grad[~wanted] == 0).all() and (grad[targets == -100] == 0).all() and grad.isfinite().all()
    leaf = hidden.detach().double().requires_grad_()
    exact = reference.linear_logprobs(leaf, weight.double(), targets)["logprobs"]
    (right,) = torch.autograd.grad(exact, leaf, upstream.nan_to_num().double())
    plain = hidden.detach().requires_grad_()
    same = reference.linear_logprobs(plain, weight, targets)["logprobs"]
    (own,) = torch.autograd.grad(same, plain, upstream.nan_to_num())
    assert_as_accurate(grad, own, right)
    assert_as_accurate(out.detach(), same.detach(), exact.detach())


def check_strides(device):
    """Targets and temperatures of any stride, overlapping ones too: a kernel reads them row by row."""
    (hidden, weight, _), targets, _ = inputs(torch.float32, device)
    twice = torch.stack((targets, targets.flip(0)), 1)
    temperature = torch.linspace(0.5, 2.0, N, device=device)
    wide = torch.stack((temperature, temperature), 1)
    for logprobs in (
        lambda t, s: linear_logprobs(hidden, weight, t, temperature=s, backend="triton").logprobs,
        lambda t, s: logprobs_from_logits(hidden @ weight.T, t, temperature=s, backend="triton").logprobs,
    ):
        assert torch.equal(logprobs(twice[:, 0], wide[:, 1]), logprobs(targets, temperature))
        one = torch.tensor([2600], device=device)
        assert torch.equal(logprobs(one.expand(N), 0.7), logprobs(one.repeat(N), 0.7))


def check_nan_target(device):
    """A NaN in the target's row of W alone gives NaN, not -inf."""
    (hidden, weight, _), targets, _ = inputs(torch.float32, device)
    weight[targets[5]] = torch.nan
    assert linear_logprobs(hidden, weight, targets, outputs=("is_top1",), backend="triton").logprobs[5].isnan()


def main(device):
    check_one_read(device)
    check_near_certainty(device)
    check_any_split(device)
    check_strides(device)
    check_nan_target(device)
    check_rows_without_gradient(device)
    checked = sum(1 for _ in head_cases(device))
    assert checked == len(DTYPES) * len(OPTIONS)
    print(f"{checked} cases as accurate as PyTorch's own dtype")


if __name__ == "__main__":
    main(sys.argv[1])

"""The FLOP and memory contract of linear_logprobs, counted; and that the counters see what breaks it."""

import subprocess
import sys

import pytest
import torch

from r1v2_fast.ops import linear_logprobs
from r1v2_fast.ops._linear_logprob_rows import OUTPUTS
from r1v2_fast.testing.flops import assert_flops, matmul_flops
from r1v2_fast.testing.memory import assert_peak, peak_bytes

N, H, V = 512, 256, 16384
NHV = N * H * V
TILE = 16 << 20  # the CPU's logits tile
ROW_PASS_TILES = 3  # logits and the row pass's own temporaries


def step(N=N, *, head=False, bias=False, dtype=torch.float32, extra=None, **options):
    """A function that runs forward and backward once."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=g) / 16).to(dtype).requires_grad_(head)
    offset = torch.zeros(V, dtype=dtype, requires_grad=head) if bias else None
    targets = torch.randint(0, V, (N,), generator=g)
    upstream = torch.randn(N, generator=g)

    def run():
        out = linear_logprobs(hidden, weight, targets, bias=offset, **options)
        loss = (out.logprobs * upstream).sum()
        if out.entropy is not None and options.get("entropy_grad") is not False:
            loss = loss + out.entropy.sum()
        if extra is not None:
            extra(hidden, weight)
        loss.backward()

    return run


@pytest.mark.parametrize(
    ("matmuls", "options"),
    [
        (4, {}),
        (4, {"dtype": torch.bfloat16}),
        (4, {"bias": True, "temperature": 0.7, "softcap": 20.0, "forbidden": torch.tensor([3])}),
        (4, {"outputs": ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs"), "entropy_grad": False}),
        (6, {"outputs": ("entropy",), "entropy_grad": True}),
        (8, {"outputs": ("entropy",), "entropy_grad": None}),
        (6, {"head": True}),
        (6, {"head": True, "bias": True}),
        (8, {"head": True, "workspace_bytes": V * 4 * 2}),
        (6.5, {"head": True, "workspace_bytes": V * 4 * N}),  # three quarters of the rows are kept, the rest made again
        (3, {"needs_grad": torch.arange(N) % 2 == 0}),
        (2, {"needs_grad": torch.zeros(N, dtype=torch.bool)}),
    ],
    ids=str,
)
def test_flops_keep_the_contract(matmuls, options):
    run = step(**options)
    run()
    assert_flops(run, matmuls * NHV)


def test_no_gradient_costs_one_matmul():
    with torch.no_grad():
        hidden, weight = torch.randn(N, H), torch.randn(V, H)
        assert_flops(lambda: linear_logprobs(hidden, weight, torch.zeros(N, dtype=torch.int64)), 2 * NHV)


def test_a_planted_matmul_breaks_the_contract():
    with pytest.raises(AssertionError, match="FLOPs counted"):
        assert_flops(step(extra=lambda hidden, weight: hidden[: N // 32] @ weight.T), 4 * NHV)


def test_the_counter_knows_every_product():
    a, b, v = torch.randn(3, 5), torch.randn(5, 7), torch.randn(5)
    batch = torch.randn(2, 3, 5), torch.randn(2, 5, 7)
    out = torch.randn(3, 7)
    products = [
        (lambda: a @ b, 210),
        (lambda: torch.addmm(out, a, b), 210),
        (lambda: out.addmm_(a, b), 210),
        (lambda: torch.mm(a, b, out=out), 210),
        (lambda: torch.bmm(*batch), 420),
        (lambda: torch.baddbmm(torch.zeros(2, 3, 7), *batch), 420),
        (lambda: torch.einsum("bij,bjk->bik", *batch), 420),
        (lambda: torch.nn.functional.linear(a, b.T), 210),
        (lambda: torch.mv(a, v), 30),
        (lambda: a @ v, 30),
        (lambda: torch.dot(v, v), 10),
        (lambda: torch.outer(v, v), 0),
    ]
    for product, flops in products:
        assert matmul_flops(product) == flops


MANY = 4096  # rows: N x V takes 256 MiB, or 16 tiles
LIMIT = ROW_PASS_TILES * TILE + 5 * MANY * H * 4  # hidden, its gradients and the products on the way
assert LIMIT < MANY * V * 4 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_of_n_times_v_elements_exists(dtype):
    upcast = 64 << 20 if dtype == torch.bfloat16 else 0  # weight tiles, where the CPU has no mixed-precision matmul
    assert_peak(step(MANY, dtype=dtype), LIMIT + upcast)


def test_the_kept_probabilities_stay_within_the_workspace():
    gradient, workspace = 2 * V * H * 4, 32 << 20
    small = assert_peak(step(MANY, head=True, workspace_bytes=workspace), LIMIT + gradient + workspace)
    assert peak_bytes(step(MANY, head=True)) > small + MANY * V * 4 / 2  # all of them kept


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": True},
        {"softcap": 20.0, "bias": True},
        {"outputs": OUTPUTS, "forbidden": torch.tensor([3]), "entropy_grad": True},
        {"grad_tolerance": 2**-10},
        {"grad_tolerance": 0.5, "softcap": 20.0},
    ],
    ids=str,
)  # fmt: skip
def test_a_given_workspace_bounds_what_is_held(options):
    """Workspace, a few hidden-sized buffers, [N] statistics, and the head's gradient where it trains."""
    workspace, statistics = 8 << 20, 40 * MANY * 4
    outputs = 2 * V * H * 4 if options.get("head") else 0
    run = step(MANY, workspace_bytes=workspace, **options)
    run()
    assert_peak(run, workspace + 5 * MANY * H * 4 + statistics + outputs)


def test_a_planted_n_times_v_tensor_breaks_the_bound():
    with pytest.raises(AssertionError, match="MiB held at the peak"):
        assert_peak(step(MANY, extra=lambda hidden, weight: torch.empty(MANY, V)), LIMIT)


RSS = """
import re, torch
from r1v2_fast.ops import linear_logprobs
def rss():  # ru_maxrss would begin with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
torch.set_num_threads(2)
N, H, V = {n}, 128, 32768
hidden = torch.randn(N, H, requires_grad=True)
weight = torch.randn(V, H) / 12
targets = torch.randint(0, V, (N,))
def run(n):
    linear_logprobs(hidden[:n], weight, targets[:n]).logprobs.sum().backward()
run(64)
before = rss()
run(N)
{planted}
print(rss() - before)
"""


def grown_mib(planted=""):
    done = subprocess.run([sys.executable, "-c", RSS.format(n=4096, planted=planted)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_the_processs_own_memory_grows_by_tiles_and_not_by_the_logits():
    logits = 4096 * 32768 * 4 / 2**20
    assert grown_mib() < logits / 4
    assert grown_mib("keep = torch.ones(N, V)") > logits

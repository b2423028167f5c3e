"""linear_logprobs as a PyTorch op: lengths, checkpointing, precision settings; on a GPU its syncs and graph capture."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from r1v2_fast.ops import linear_logprobs, logprobs_from_logits
from r1v2_fast.reference import linear_logprob as reference
from r1v2_fast.testing.accuracy import assert_as_accurate

gpu = pytest.mark.gpu


def inputs(n, h=16, v=97, device="cpu", dtype=torch.float32):
    g = torch.Generator().manual_seed(n)
    hidden, weight = torch.randn(n, h, generator=g).to(device, dtype), torch.randn(v, h, generator=g).to(device, dtype)
    return hidden.requires_grad_(), weight, torch.randint(0, v, (n,), generator=g).to(device)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("trains_head", [False, True])
def test_new_lengths_do_not_recompile(trains_head, dynamic):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=dynamic)
    def loss(hidden, weight, targets, wanted):
        return linear_logprobs(hidden, weight, targets, needs_grad=wanted).logprobs.sum()

    compiled = []
    for n in (7, 12, 33, 100, 64):
        hidden, weight, targets = inputs(n)
        weight.requires_grad_(trains_head)
        wanted = torch.arange(n) % 3 > 0
        if dynamic is None:
            for tensor in (hidden, targets, wanted):
                torch._dynamo.mark_dynamic(tensor, 0)
        loss(hidden, weight, targets, wanted).backward()
        compiled.append(counter.frame_count)
        own, head = hidden.grad.clone(), weight.grad
        hidden.grad = weight.grad = None
        linear_logprobs(hidden, weight, targets, needs_grad=wanted).logprobs.sum().backward()
        assert torch.equal(own, hidden.grad)
        assert head is None or torch.equal(head, weight.grad)
    assert compiled == compiled[:1] * 5


def test_activation_checkpointing_gives_the_same_gradient():
    hidden, weight, targets = inputs(20)
    weight.requires_grad_()

    def loss(h, w):
        return linear_logprobs(h, w, targets).logprobs.sum()

    plain = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    again = torch.autograd.grad(checkpoint(loss, hidden, weight, use_reentrant=False), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("mode", [True, None])
def test_either_output_alone_may_have_a_gradient(mode):
    hidden, weight, targets = inputs(11)
    weight.requires_grad_()
    for field in ("logprobs", "entropy"):
        out = linear_logprobs(hidden, weight, targets, outputs=("entropy",), entropy_grad=mode)
        ours = torch.autograd.grad(getattr(out, field).sum(), (hidden, weight))
        leaves = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        truth = torch.autograd.grad(reference.linear_logprobs(*leaves, targets)[field].sum(), leaves)
        plain = torch.autograd.grad(reference.linear_logprobs(hidden, weight, targets)[field].sum(), (hidden, weight))
        for grad, same, exact in zip(ours, plain, truth, strict=True):
            assert_as_accurate(grad, same, exact, field)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_arrives_at_rows_without_a_gradient_or_stands_in_them_does_not_matter(dtype):
    hidden, weight, targets = inputs(12, dtype=dtype)
    weight.requires_grad_()
    targets[3] = -100
    wanted = torch.arange(12) % 2 == 1
    silent = ~wanted | (targets == -100)
    with torch.no_grad():
        hidden[2], hidden[3] = torch.nan, torch.inf
    temperature = torch.ones(12)
    temperature[3] = 0.0
    out = linear_logprobs(
        hidden, weight, targets, temperature=temperature, needs_grad=wanted, outputs=("entropy",), entropy_grad=True
    )
    for bad in (torch.nan, torch.inf):
        upstream = torch.ones(12).masked_fill(silent, bad)
        grads = torch.autograd.grad(
            (out.logprobs, out.entropy), (hidden, weight), (upstream, upstream), retain_graph=True
        )
        assert all(grad.isfinite().all() for grad in grads)
        assert (grads[0][silent] == 0).all() and (grads[0][~silent] != 0).any(1).all()


def test_a_second_derivative_is_refused_and_not_left_out():
    hidden, weight, targets = inputs(5)
    logits = torch.randn(5, 9, requires_grad=True)
    for leaf, out in (
        (hidden, linear_logprobs(hidden, weight, targets).logprobs),
        (logits, logprobs_from_logits(logits, targets % 9).logprobs),
    ):
        with pytest.raises(RuntimeError, match="not differentiable twice"):
            torch.autograd.grad(out.sum(), leaf, create_graph=True)


def test_autocast_leaves_fp64_alone():
    hidden, weight, targets = inputs(6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprobs(hidden, weight, targets).logprobs
    assert torch.equal(out, linear_logprobs(hidden, weight, targets).logprobs)


def test_a_head_that_trains_alone_makes_no_hidden_gradient():
    hidden, weight, targets = inputs(9)
    hidden = hidden.detach()
    weight.requires_grad_()
    for room in (None, 97 * 4 * 4, 1):
        out = linear_logprobs(hidden, weight, targets, workspace_bytes=room).logprobs
        (grad,) = torch.autograd.grad(out.sum(), weight)
        wide = weight.detach().double().requires_grad_()
        (exact,) = torch.autograd.grad(
            reference.linear_logprobs(hidden.double(), wide, targets)["logprobs"].sum(), wide
        )
        (plain,) = torch.autograd.grad(reference.linear_logprobs(hidden, weight, targets)["logprobs"].sum(), weight)
        assert_as_accurate(grad, plain, exact)


def test_a_million_rows_run():
    n = 1 << 20
    hidden, weight, targets = inputs(n, 2, 5)
    linear_logprobs(hidden, weight, targets).logprobs.sum().backward()
    first = slice(0, 100)
    exact = reference.linear_logprobs(hidden[first].double(), weight.double(), targets[first])["logprobs"]
    out = linear_logprobs(hidden, weight, targets).logprobs
    plain = reference.linear_logprobs(hidden[first], weight, targets[first])["logprobs"]
    assert_as_accurate(out[first].detach(), plain.detach(), exact.detach())
    assert hidden.grad.shape == (n, 2) and hidden.grad.isfinite().all() and (hidden.grad[-100:] != 0).all()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_fp32_stays_fp32_whatever_the_matmul_setting_and_the_setting_returns(precision):
    hidden, weight, targets = inputs(40, 256, 500)
    before = linear_logprobs(hidden, weight, targets).logprobs
    torch.set_float32_matmul_precision(precision)
    try:
        after = linear_logprobs(hidden, weight, targets).logprobs
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(before, after)


def test_calls_in_threads_leave_the_matmul_setting_as_it_was():
    hidden, weight, targets = inputs(64, 64, 3000)
    torch.set_float32_matmul_precision("medium")
    try:
        with ThreadPoolExecutor(4) as pool:
            calls = list(pool.map(lambda _: linear_logprobs(hidden, weight, targets).logprobs, range(12)))
        assert all(torch.equal(calls[0], call) for call in calls)
        assert torch.backends.mkldnn.matmul.fp32_precision != "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_launch_parameters_come_from_the_nearest_vocabulary_and_their_absence_is_said_once(tmp_path, monkeypatch):
    from r1v2_fast.kernels import _launch

    rows = ({"V": 32000, "BLOCK": 1024}, {"V": 152064, "BLOCK": 4096})
    assert [_launch.nearest(rows, v)["BLOCK"] for v in (1000, 60000, 80000, 1 << 20)] == [1024, 1024, 4096, 4096]
    monkeypatch.setattr(_launch, "__file__", str(tmp_path / "_launch.py"))
    _launch._table.cache_clear()
    with pytest.warns(UserWarning, match="no launch parameters of linear_logprob were measured on A Card 9"):
        assert _launch._table("linear_logprob", "A Card 9") == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _launch._table("linear_logprob", "A Card 9")
    path = _launch.path("linear_logprob", "A Card 10")
    path.write_text(json.dumps(rows))
    assert path.name == "linear_logprob.A_Card_10.json" and _launch._table("linear_logprob", "A Card 10") == rows
    _launch._table.cache_clear()


def steps(device="cuda"):
    """Every kind of call, by name: a function that runs forward and backward."""
    hidden, weight, targets = inputs(300, 64, 5000, device, torch.bfloat16)
    trained = weight.clone().requires_grad_()
    wanted = torch.arange(300) % 2 == 0

    def run(head, **options):
        out = linear_logprobs(hidden, head, targets, **options)
        loss = out.logprobs.sum() if out.entropy is None else out.logprobs.sum() + out.entropy.sum()
        loss.backward()
        return out.logprobs

    def logits():
        held = (hidden @ weight.T).detach().requires_grad_()
        out = logprobs_from_logits(held, targets, outputs=("entropy",), entropy_grad=True)
        (out.logprobs.sum() + out.entropy.sum()).backward()
        return out.logprobs

    return {
        "frozen": lambda: run(weight),
        "trainable": lambda: run(trained, workspace_bytes=1 << 20),
        "needs_grad": lambda: run(weight, needs_grad=wanted),
        "entropy": lambda: run(weight, outputs=("entropy",), entropy_grad=True),
        "lazy entropy": lambda: run(weight, outputs=("entropy",)),
        "forbidden": lambda: run(weight, forbidden=torch.tensor([3], device=device)),
        "logits": logits,
    }


@gpu
@pytest.mark.parametrize(
    "name", ["frozen", "trainable", "needs_grad", "entropy", "lazy entropy", "forbidden", "logits"]
)
def test_no_call_syncs_with_the_host(name):
    run = steps()[name]
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize(
    "name", ["frozen", "trainable", "needs_grad", "entropy", "lazy entropy", "forbidden", "logits"]
)
def test_a_cuda_graph_replays_the_call(name):
    run = steps()[name]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


@gpu
@pytest.mark.parametrize(
    ("options", "reason"), [({"grad_tolerance": 0.01}, "grad_tolerance"), ({"needs_grad": "device"}, "needs_grad")]
)
def test_a_call_that_must_sync_refuses_capture(options, reason):
    hidden, weight, targets = inputs(30, 64, 5000, "cuda", torch.bfloat16)
    options = {k: torch.ones(30, dtype=torch.bool, device="cuda") if v == "device" else v for k, v in options.items()}
    linear_logprobs(hidden, weight, targets, **options)
    with (
        pytest.raises(RuntimeError, match=f"{reason}.*CUDA graph capture forbids"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        linear_logprobs(hidden, weight, targets, **options)


@gpu
def test_a_bad_target_on_the_device_gives_nan_and_no_wild_read():
    hidden, weight, targets = inputs(8, 64, 5000, "cuda", torch.bfloat16)
    targets[2], targets[3], targets[4] = 5000, -5, 1 << 40
    out = linear_logprobs(hidden, weight, targets).logprobs
    assert out[2:5].isnan().all() and out[5:].isfinite().all()
    out[5:].sum().backward()
    assert hidden.grad[5:].isfinite().all()


@gpu
def test_ignored_rows_on_the_device_may_hold_anything():
    hidden, weight, targets = inputs(8, 64, 5000, "cuda", torch.bfloat16)
    weight.requires_grad_()
    targets[2] = -100
    with torch.no_grad():
        hidden[2] = torch.nan
    temperature = torch.ones(8, device="cuda")
    temperature[2] = 0.0
    out = linear_logprobs(hidden, weight, targets, temperature=temperature, outputs=("entropy",), entropy_grad=True)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert out.logprobs[2] == 0 and (hidden.grad[2] == 0).all()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()

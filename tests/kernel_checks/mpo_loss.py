"""Run by test_kernels.py in a process of its own: on the CPU under TRITON_INTERPRET=1, and on a GPU."""

import itertools
import sys
from unittest import mock

import torch

from r1v2_fast.kernels import mpo_loss as kernel
from r1v2_fast.ops import mpo_loss as public
from r1v2_fast.ops.mpo_loss import Numbers, _torch_op, _triton_op
from r1v2_fast.reference import mpo_loss as reference
from r1v2_fast.testing.accuracy import assert_as_accurate
from r1v2_fast.testing.launches import launches

LENGTHS = [1, 3, 130, 700, 2, 1, 1, 300, 5, 640, 2, 90]  # six pairs; a block is 256: one, part of one, several
# neither starts a kernel; zeros: a ticket off a GPU
VIEWS = {f"aten::{name}" for name in ("detach", "to", "unbind", "select", "split", "narrow", "slice", "as_strided")}
ROOM = {f"aten::{name}" for name in ("empty", "new_empty", "zeros", "zero_", "fill_")}


def batch(lengths, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    ref = -torch.rand(int(offsets[-1]), generator=g)
    return ref + spread * torch.randn(len(ref), generator=g), ref, offsets


def everything(pairs):
    return {
        "beta": 0.7, "weights": (1.0, 2.0, 0.3), "delta": torch.tensor(0.4), "label_smoothing": 0.1,
        "pair_weights": torch.linspace(0.5, 2.0, pairs), "normalizer": 9.0, "generation_normalizer": torch.tensor(5),
    }  # fmt: skip


def moved(options, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def run(function, logprobs, ref, offsets, **options):
    """Every field, then the gradient."""
    leaf = logprobs.detach().requires_grad_()
    out = function(leaf, ref, offsets, **options)
    return [value.detach().cpu() for value in (*out, torch.autograd.grad(out[0], leaf)[0])]


def on(device):
    """The kernel on `device`."""

    def function(logprobs, ref, offsets, **options):
        return public(logprobs, ref.to(device), offsets.to(device), backend="triton", **moved(options, device))

    return lambda logprobs, *rest, **options: run(function, logprobs.to(device), *rest, **options)


def compare(device, logprobs, ref, offsets, **options):
    ours = on(device)(logprobs, ref, offsets, **options)
    plain = run(reference.mpo_loss, logprobs, ref, offsets.tolist(), **options)
    exactly = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    truth = run(reference.mpo_loss, logprobs.double(), ref.double(), offsets.tolist(), **exactly)
    for value, same, exact in zip(ours, plain, truth, strict=True):
        assert value.isfinite().all()
        assert_as_accurate(value, same, exact, str(options))


def check_outside(device):
    """Whatever the offsets: nothing beyond the log-probs is read (NaN lies there), and no gradient stays unwritten."""
    logprobs, ref, offsets = batch(LENGTHS)
    count = len(logprobs)
    around = torch.full((3 * count,), torch.nan, device=device)
    around[count : 2 * count] = logprobs.to(device)
    within, numbers = around[count : 2 * count], list(Numbers(0.1, 0.8, 0.2, 1.0, 0.0, 0.3, 6.0, float("nan")))
    early, late = offsets.clamp(min=70), offsets.clamp(max=1000)  # also: empty sequences
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated with NaN
    for where in (offsets, early, late, offsets - 2 * count, offsets + 2 * count, offsets * 3 - count, offsets.flip(0)):
        for per_sequence in (True, False):
            arguments = (within, ref.to(device), where.to(device), None, None, None, None, numbers, per_sequence)
            ours = _triton_op(*arguments)
            assert all(value.isfinite().all() for value in ours)
            if (where.diff() >= 0).all():
                for value, known in zip(ours, _torch_op(*arguments), strict=True):
                    assert_as_accurate(value, known, known.double())
                begin, end = where[[0, -1]].clamp(0, count).tolist()
                assert (ours[-1][:begin] == 0).all() and (ours[-1][end:] == 0).all()
    torch.use_deterministic_algorithms(False)


def profiled():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def launched(profile):
    return {event.name for event in profile.events() if event.name.startswith("aten::")} - VIEWS - ROOM


def check_one_launch(device):
    logprobs, ref, offsets = (values.to(device) for values in batch(LENGTHS))
    strided = [torch.stack([values, values], 1)[:, 0] for values in (logprobs, ref.bfloat16(), offsets.int())]
    strided[0].requires_grad_()
    for options in ({}, {"generation": "token"}, everything(6)):
        options = moved(options, device)
        with launches() as seen:
            public(*strided, backend="triton", **options)
        assert seen == ["mpo_loss_kernel"], seen
        silent, known = mock.MagicMock(), lambda offsets, count: 6  # offsets are looked at on a CPU only
        with (
            mock.patch.object(kernel, "mpo_loss_kernel", silent),
            mock.patch.object(sys.modules["r1v2_fast.ops.mpo_loss"], "_pairs", known),
            profiled() as profile,
        ):
            loss = public(*strided, backend="triton", **options).loss
        assert silent.__getitem__.call_count == 1
        assert not launched(profile), f"besides its kernel it runs {launched(profile)}"
        upstream = torch.ones_like(loss)
        with profiled() as profile:
            torch.autograd.grad(loss, strided[0], upstream)
        assert launched(profile) == {"aten::mul"}, launched(profile)


def check_bits(device):
    logprobs, ref, offsets = batch(LENGTHS)
    options = {**everything(6), "delta": 0.4, "generation_normalizer": 5.0}
    ours = on(device)(logprobs, ref, offsets, **options)
    weights = options["pair_weights"]
    *strided, strided_weights = (
        torch.stack([values, values], 1)[:, 0] for values in (logprobs, ref, offsets.int(), weights)
    )
    tensors = {name: torch.tensor([options[name]], dtype=torch.float64) for name in ("delta", "normalizer")}
    plain = (logprobs, ref, offsets)
    for arguments, changed in ((plain, {}), (strided, {"pair_weights": strided_weights}), (plain, tensors)):
        again = on(device)(*arguments, **(options | changed))
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def check_splits(device):
    """Three calls of two pairs each, with the normalizers given, against one of six."""
    logprobs, ref, offsets = batch(LENGTHS)
    for generation in ("sequence", "token"):
        options = {"generation": generation, "normalizer": 6.0, "generation_normalizer": 50.0, "delta": 0.2}
        whole = on(device)(logprobs, ref, offsets, **options)[-1]
        grad = torch.zeros_like(whole)
        for pairs in ((0, 1), (2, 3), (4, 5)):
            sequences = [*pairs, *(6 + pair for pair in pairs)]
            at = torch.cat([torch.arange(int(offsets[s]), int(offsets[s + 1])) for s in sequences])
            own = torch.tensor([0, *itertools.accumulate(LENGTHS[s] for s in sequences)])
            grad[at] += on(device)(logprobs[at], ref[at], own, **options)[-1]
        assert_as_accurate(grad, whole, whole.double())


def check_registration(device):
    logprobs, ref, offsets = (values.to(device) for values in batch([1, 3, 2, 2]))
    numbers = list(Numbers(0.1, 0.8, 0.2, 1.0, 0.1, 0.3, 2.0, float("nan")))
    torch.library.opcheck(_triton_op, (logprobs, ref, offsets, None, None, None, None, numbers, False))
    scalars = (torch.tensor(value, device=device) for value in (0.4, 3, 5.0))
    torch.library.opcheck(_triton_op, (logprobs, ref, offsets, torch.ones(2, device=device), *scalars, numbers, True))
    step = lambda leaf: public(leaf, ref, offsets, backend="triton", delta=0.3).loss  # noqa: E731
    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = logprobs.clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def main(device):
    checked = 0
    for dtype, generation, on_all, ints in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), ("sequence", "token"), (False, True), (torch.int32, torch.int64)
    ):
        logprobs, ref, offsets = batch(LENGTHS)
        options = {"generation": generation, **(everything(6) if on_all else {})}
        compare(device, logprobs.to(dtype), ref.to(dtype), offsets.to(ints), **options)
        checked += 1
    with mock.patch.object(kernel, "PROGRAMS", 4):  # 11 pairs: programs of three pairs and of two
        compare(device, *batch([1 + 37 * i % 11 for i in range(22)]), **everything(11))
    longest = 131_072 if device == "cuda" else 3 * 2048 + 5  # blocks of 2048
    logprobs, ref, offsets = batch([1, longest, longest, 1], spread=0.1)
    for reward, delta in itertools.product((1e4, -1e4), (0.0, 1e6, -1e6)):
        ref[0] = logprobs[0] - reward / 0.1
        compare(device, logprobs, ref, offsets, delta=delta, label_smoothing=0.1)
    far, origin, two = torch.tensor([40.0, 0.0]), torch.zeros(2), torch.tensor([0, 1, 2])
    compare(device, far, origin, two, beta=1.0, weights=(1.0, 0.0, 0.0))  # a loss of 4e-18
    check_outside(device)
    check_one_launch(device)
    check_bits(device)
    check_splits(device)
    check_registration(device)
    print(f"{checked} cases as accurate as PyTorch's own dtype")


if __name__ == "__main__":
    main(sys.argv[1])

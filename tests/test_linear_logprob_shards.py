"""Two gloo ranks: a head split by vocabulary, an FSDP2 head, and DDP give the loss and every gradient of one rank."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from r1v2_fast import ops
from r1v2_fast.reference import linear_logprob as reference
from r1v2_fast.testing.accuracy import assert_as_accurate

N, H, V = 24, 16, 130
OUTPUTS = ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
OPTIONS = {
    "plain": {},
    "all": {"temperature": 1.3, "softcap": 4.0, "logit_scale": 0.6, "forbidden": torch.arange(60, 70)},
    "per token": {"temperature": torch.linspace(0.5, 2.0, N)},
    "no gradient for a third": {"needs_grad": torch.arange(N) % 3 > 0},
    "nothing kept": {"workspace_bytes": 1},
    "a shard of forbidden ids alone": {"forbidden": torch.arange(65, 130)},
}


def inputs(dtype):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, H, generator=g).to(dtype), torch.randn(V, H, generator=g).to(dtype)
    bias = torch.randn(V, generator=g).to(dtype)
    weight[70], bias[70] = weight[3], bias[3]  # a tie across the shards: only the first id is the top
    targets = torch.randint(0, 60, (N,), generator=g)
    hidden[0] = weight[3] * 3
    hidden[1] = weight[3] * 3
    targets[0], targets[1], targets[2] = 3, 70, -100
    return (hidden, weight, bias), targets, torch.randn(N, generator=g).to(dtype)


def step(tensors, targets, upstream, entropy_grad, **options):
    hidden, weight, bias = (t.clone().requires_grad_() for t in tensors)
    out = ops.linear_logprobs(hidden, weight, targets, bias=bias, outputs=OUTPUTS, entropy_grad=entropy_grad, **options)
    loss = (out.logprobs * upstream).sum()
    if entropy_grad is not False:
        loss = loss + (out.entropy * upstream.flip(0)).sum()
    loss.backward()
    return out, (hidden.grad, weight.grad, bias.grad)


def check_shards(rank, dtype, backend="auto"):
    own = slice(rank * V // 2, (rank + 1) * V // 2)
    tensors, targets, upstream = inputs(dtype)
    shard = (tensors[0], tensors[1][own], tensors[2][own])
    for name, options in OPTIONS.items():
        ids = targets.clone()
        if "forbidden" in options:
            ids[torch.isin(ids, options["forbidden"])] = 5
        for mode in (False, True, None):
            one, one_grads = step(tensors, ids, upstream, mode, **options)
            two, two_grads = step(
                shard, ids, upstream, mode, process_group=dist.group.WORLD, backend=backend, **options
            )
            truth, truth_grads = step([t.double() for t in tensors], ids, upstream.double(), mode, **options)
            for field in ("logprobs", "entropy", "mean_logits", "log_sum_sq_probs"):
                assert_as_accurate(
                    getattr(two, field).detach(),
                    getattr(one, field).detach(),
                    getattr(truth, field).detach(),
                    f"{name} {field}",
                )
            assert torch.equal(two.is_top1, one.is_top1), name
            expected = (one_grads[0], one_grads[1][own], one_grads[2][own])
            exact = (truth_grads[0], truth_grads[1][own], truth_grads[2][own])
            for grad, same, right, what in zip(two_grads, expected, exact, ("hidden", "weight", "bias"), strict=True):
                if dtype == torch.float32:  # two fp32 sums of one gradient: parity
                    assert (grad - same).abs().max() <= 1e-5 * same.abs().max(), f"{name} entropy_grad={mode} {what}"
                else:
                    assert_as_accurate(grad, same, right, f"{name} entropy_grad={mode} {what}")
    if dtype == torch.float64:
        assert one.is_top1[0] and not one.is_top1[1]


def check_far_shards(rank, dtype, backend):
    """A target whose shard lies 100 nat below the other's maximum: its term must not pass through that shard's scale."""
    own = slice(rank * V // 2, (rank + 1) * V // 2)
    (hidden, weight, _), targets, upstream = inputs(torch.float64)
    hidden[:, 0], weight[:, 0] = 10.0, 0.0
    weight[100, 0] = 12.0  # a logit of 120 on rank 1; the targets are rank 0's
    targets[1] = 7
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    leaves = hidden.clone().requires_grad_(), weight[own].clone().requires_grad_()
    options = {"process_group": dist.group.WORLD, "backend": backend}
    (ops.linear_logprobs(*leaves, targets, **options).logprobs * upstream).sum().backward()
    wide = hidden.double().clone().requires_grad_(), weight.double().clone().requires_grad_()
    (reference.linear_logprobs(*wide, targets)["logprobs"] * upstream).sum().backward()
    plain = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    (reference.linear_logprobs(*plain, targets)["logprobs"] * upstream).sum().backward()
    assert_as_accurate(leaves[0].grad, plain[0].grad, wide[0].grad, f"{dtype} hidden")
    assert_as_accurate(leaves[1].grad, plain[1].grad[own], wide[1].grad[own], f"{dtype} weight")


def check_tolerance(rank, backend="auto"):
    """Each shard drops its part of the budget, and the sum keeps the bound."""
    (hidden, weight, _), targets, _ = inputs(torch.float32)
    own = slice(rank * V // 2, (rank + 1) * V // 2)
    hidden = hidden * 2
    whole, part = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    ops.linear_logprobs(whole, weight, targets).logprobs.sum().backward()
    out = ops.linear_logprobs(
        part, weight[own], targets, grad_tolerance=0.02, process_group=dist.group.WORLD, backend=backend
    )
    out.logprobs.sum().backward()
    error = (part.grad - whole.grad).norm(dim=1).max()
    assert 0 < error <= 0.02 * weight.norm(dim=1).max()


def check_compiled(rank):
    """The group goes into the graph by its name."""
    own = slice(rank * V // 2, (rank + 1) * V // 2)
    (hidden, weight, _), targets, _ = inputs(torch.float64)

    def loss(h):
        return ops.linear_logprobs(h, weight[own], targets, process_group=dist.group.WORLD).logprobs.sum()

    eager, compiled = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss(eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert torch.equal(eager.grad, compiled.grad)


def check_data_parallel(rank):
    """FSDP2's sharded head and DDP, each rank with half of the rows: gradients averaged as theirs are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    (hidden, weight, _), targets, upstream = inputs(torch.float64)
    rows = slice(rank * N // 2, (rank + 1) * N // 2)
    whole = weight.clone().requires_grad_()
    (ops.linear_logprobs(hidden, whole, targets).logprobs * upstream).sum().backward()
    expected = whole.grad / 2

    sharded = distribute_tensor(weight, init_device_mesh("cpu", (2,)), [Shard(0)]).requires_grad_()
    leaf = hidden[rows].clone().requires_grad_()
    (ops.linear_logprobs(leaf, sharded, targets[rows]).logprobs * upstream[rows]).sum().backward()
    assert sharded.grad.placements == (Shard(0),)
    gathered = sharded.grad.full_tensor()
    assert (gathered - expected).abs().max() <= 1e-10 * expected.abs().max() and expected.abs().max() > 0

    head = torch.nn.Linear(H, V, bias=False, dtype=torch.float64)
    head.weight.data.copy_(weight)

    class Scored(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, h, ids):
            return ops.linear_logprobs(h, self.head.weight, ids).logprobs

    model = torch.nn.parallel.DistributedDataParallel(Scored())
    (model(hidden[rows], targets[rows]) * upstream[rows]).sum().backward()
    assert (head.weight.grad - expected).abs().max() <= 1e-10 * expected.abs().max()


def on_rank(rank: int, port: int, what: str):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        if what == "shards":
            check_shards(rank, torch.float64)
            check_shards(rank, torch.bfloat16)
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                check_far_shards(rank, dtype, "torch")
        elif what == "shards on triton":
            check_shards(rank, torch.float32, "triton")
            check_shards(rank, torch.bfloat16, "triton")
            check_shards(rank, torch.float16, "triton")
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                check_far_shards(rank, dtype, "triton")
            check_tolerance(rank, "triton")
        else:
            check_tolerance(rank)
            check_compiled(rank)
            check_data_parallel(rank)
        dist.barrier()  # no rank leaves while the other still talks to it
    finally:
        dist.destroy_process_group()
    # every check has passed; a failed one raised above. At interpreter exit gloo's and DDP's threads can outlive their
    # owners, which aborts the process ("terminate called without an active exception", seen once)
    os._exit(0)


@pytest.mark.parametrize("what", ["shards", "shards on triton", "others"])
def test_two_ranks_give_the_loss_and_the_gradients_of_one(what, monkeypatch):
    if what == "shards on triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(on_rank, args=(port, what), nprocs=2)

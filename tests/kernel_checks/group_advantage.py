"""Run by test_kernels.py in a process of its own: on the CPU under TRITON_INTERPRET=1, and on a GPU."""

import itertools
import sys

import torch

from r1v2_fast.ops.group_advantage import CHOICES, group_advantages
from r1v2_fast.reference import group_advantage as reference
from r1v2_fast.testing.accuracy import assert_as_accurate

# groups of none, one, a few, and more than one tile of members
OFFSETS = torch.tensor([0, 3, 3, 4, 9, 14, 1300, 1301, 1308])


def rewards(components):
    g = torch.Generator().manual_seed(components)
    values = torch.randn(int(OFFSETS[-1]), components, generator=g)
    values[4:9] = 1.7
    values[10, 0] = torch.nan
    values[2] = torch.nan
    values[14:1300] += 100.0  # one pass over squares would lose these
    return values


def plain(values, options):
    """The same in PyTorch's own fp32, group by group."""
    totals = (values * options["component_weights"]).nansum(1).masked_fill(values.isnan().all(1), torch.nan)
    mean, std, advantages = [], [], torch.zeros(len(totals))
    for start, end in itertools.pairwise(OFFSETS.tolist()):
        live = totals[start:end].isfinite().nonzero().squeeze(1) + start
        group = totals[live]
        mean.append(group.mean() if len(group) else torch.tensor(0.0))
        std.append(
            group.std(correction=options["correction"]) if len(group) > options["correction"] else group.new_zeros(())
        )
        if len(group) == 1 and options["singleton"] == "raw":
            mean[-1], std[-1] = torch.tensor(0.0), torch.tensor(1.0)
        advantages[live] = group - mean[-1]
        if options["baseline"] == "leave_one_out" and len(group) > 1:
            advantages[live] *= len(group) / (len(group) - 1)
        if options["scale"] == "group":
            advantages[live] /= std[-1] + 1e-4 if options["eps_mode"] == "add" else std[-1].clamp(min=1e-4)
    return advantages, torch.stack(mean), torch.stack(std)


def main(device):
    offsets = OFFSETS.to(device)
    checked = 0
    for components, scale in itertools.product((1, 3), ("group", "none")):
        values = rewards(components)
        weights = torch.linspace(0.5, 1.5, components)
        names = ("baseline", "correction", "eps_mode", "singleton")
        for choice in itertools.product(*(CHOICES[name] for name in names), (False, True), (None, values[:, 0])):
            options = dict(zip((*names, "zero_uninformative", "informative_from"), choice, strict=True))
            options |= {"scale": scale, "component_weights": weights}
            there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            ours = group_advantages(values.to(device), offsets, backend="triton", **there)
            ours = [part.cpu() for part in ours]
            truth = reference.group_advantages(values, OFFSETS.tolist(), **options)
            assert torch.equal(ours[3], truth[3])
            silent = truth[0] == 0
            assert (ours[0][silent] == 0).all()
            for value, own, exact in zip(ours[:3], plain(values, options), truth[:3], strict=True):
                assert_as_accurate(value, own.where(exact != 0, 0.0), exact)
            checked += 1
    assert checked == 2 * 2 * 16 * 2 * 2
    equal = group_advantages(torch.full((7,), 1.7, device=device), torch.tensor([0, 3, 7]), eps=0.0, backend="triton")
    assert (equal.advantages == 0).all() and not equal.informative.any()
    empty = group_advantages(torch.zeros(0, device=device), torch.tensor([0]), backend="triton")
    assert [len(part) for part in empty] == [0, 0, 0, 0]
    strided = rewards(3).to(device).T.contiguous().T
    assert torch.equal(
        group_advantages(strided, offsets, backend="triton").advantages,
        group_advantages(strided.contiguous(), offsets, backend="triton").advantages,
    )
    op = torch.ops.r1v2_fast.group_advantage_triton.default
    rest = (torch.ones(1, device=device), None, "sum", "mean", "group", 1, 1e-4, "add", "zero", 0.0, True)
    torch.library.opcheck(op, (rewards(1)[:14].to(device), offsets[:6], *rest))
    print(f"{checked} cases as accurate as PyTorch's fp32")


if __name__ == "__main__":
    main(sys.argv[1])

"""Run by test_kernels.py in a process of its own: on the CPU under TRITON_INTERPRET=1, and on a GPU."""

import itertools
import sys

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1v2_fast.kernels import _group_advantage_batch as second
from r1v2_fast.ops.group_advantage import CHOICES, group_advantages
from r1v2_fast.reference import group_advantage as reference
from r1v2_fast.testing import launches as launched
from r1v2_fast.testing.accuracy import assert_as_accurate

# groups of none, one, a few; more members than a program holds a group of (16), and than it holds at all
RAGGED = [0, 3, 3, 4, 9, 14, 54, 55, 62, 62]
LONG = [0, 1, 2500, 2503, 2505, *range(2510, 2750, 5)]
FLAGS = ("baseline", "correction", "eps_mode", "singleton")
DEFAULTS = {"baseline": "mean", "scale": "group", "correction": 1, "eps": 1e-4, "eps_mode": "add", "singleton": "zero"}


def rewards(components, offsets, seed=0):
    values = torch.randn(offsets[-1], components, generator=torch.Generator().manual_seed(seed))
    values[4:9] = 1.7
    values[10, 0] = torch.nan
    values[11, 0] = torch.inf
    values[2] = torch.nan
    values[14:] += 100.0  # one pass over squares would lose these
    return values


def plain(values, offsets, options):
    """The same in PyTorch's own fp32, group by group."""
    options = {**DEFAULTS, "aggregate": "sum", "component_weights": None, **options}
    values = (values[:, None] if values.dim() == 1 else values).float()
    values = values.where(values.isfinite(), torch.nan)
    weights = (
        torch.ones(values.shape[1]) if options["component_weights"] is None else options["component_weights"].float()
    )
    totals = (values * weights).nansum(1).masked_fill(values.isnan().all(1), torch.nan)
    advantages, mean, std = _centred(totals, offsets, options)
    if options["aggregate"] == "gdpo":
        advantages = sum(
            _centred(part, offsets, options)[0] * w for part, w in zip(values.unbind(1), weights, strict=True)
        )
        live = advantages[~totals.isnan()]
        advantages = _scaled(advantages - live.mean(), live.std(correction=options["correction"]), options)
    return advantages, mean, std


def _centred(totals, offsets, options):
    correction = options["correction"]
    mean, std, advantages = torch.zeros(len(offsets) - 1), torch.zeros(len(offsets) - 1), torch.zeros(len(totals))
    batch = totals[~totals.isnan()]
    for g, (start, end) in enumerate(itertools.pairwise(offsets)):
        live = (~totals[start:end].isnan()).nonzero().squeeze(1) + start
        group = totals[live]
        if len(group):
            mean[g] = group.mean()
        if len(group) > correction:
            std[g] = group.std(correction=correction)
        if len(group) == 1 and options["singleton"] == "raw":
            mean[g], std[g] = 0.0, 1.0
        advantages[live] = group - mean[g]
        if options["baseline"] == "leave_one_out" and len(group) > 1:
            advantages[live] *= len(group) / (len(group) - 1)
        if options["scale"] != "none" and len(group):
            spread = std[g] if options["scale"] == "group" else batch.std(correction=correction)
            advantages[live] = _scaled(advantages[live], spread, options)
    return advantages, mean, std


def _scaled(deviation, std, options):
    return deviation / (std + options["eps"] if options["eps_mode"] == "add" else std.clamp(min=options["eps"]))


def compare(device, values, offsets, groups=None, **options):
    """Ours on Triton by the relative rule, informative groups and those without a spread as the reference has them."""
    there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    groups = torch.tensor(offsets, device=device) if groups is None else groups
    ours = [part.cpu() for part in group_advantages(values.to(device), groups, backend="triton", **there)]
    truth = reference.group_advantages(values, offsets, **options)
    assert torch.equal(ours[3], truth[3])
    equal = (truth[2] == 0).repeat_interleave(torch.tensor(offsets).diff())
    assert options.get("aggregate") == "gdpo" or (ours[0][equal] == 0).all()
    own = [part.where(exact != 0, 0.0) for part, exact in zip(plain(values, offsets, options), truth[:3], strict=True)]
    largest = (
        values[values.isfinite()].double().abs().max().reshape(1)
        if values.isfinite().any()
        else torch.zeros(1).double()
    )
    means = (
        torch.cat([part, largest.to(part.dtype)]) for part in (ours[1], own[1], truth[1])
    )  # sums err by their terms
    assert all(part.dtype == torch.float32 for part in ours[:3])
    assert_as_accurate(ours[0], own[0], truth[0], f"advantages with {options}")
    assert_as_accurate(*means, f"means with {options}")
    assert_as_accurate(ours[2], own[2], truth[2], f"std with {options}")
    return ours[0]


def every_mode(device):
    """Each aggregate and scale with flags of which every pair of values occurs: an orthogonal array of strength 2."""
    count = 0
    for components, aggregate, scale in itertools.product((1, 3), CHOICES["aggregate"], CHOICES["scale"]):
        if aggregate == "gdpo" and scale == "batch":
            continue
        values = rewards(components, RAGGED, components)
        for a, b, c in itertools.product((0, 1), repeat=3):
            options = {name: CHOICES[name][bit] for name, bit in zip(FLAGS, (a, b, c, a ^ b), strict=True)}
            options |= {"zero_uninformative": bool(a ^ c), "informative_from": values[:, 0] if b ^ c else None}
            options |= {"aggregate": aggregate, "scale": scale}
            options |= {"component_weights": torch.linspace(0.5, 1.5, components) if a ^ b ^ c else None}
            compare(device, values, RAGGED, **options)
            count += 1
    return count


def every_layout(device):
    for size in (1, 2, 3, 8, 37, 64, 1500):
        count = max(3 * size, 70 // size * size)
        values = torch.randn(count, 1, generator=torch.Generator().manual_seed(size)) + 100
        compare(device, values, list(range(0, count + 1, size)), groups=size, baseline="leave_one_out")
    for options in ({}, {"scale": "batch"}, {"aggregate": "gdpo"}):
        for dtype in (torch.int32, torch.int64):
            compare(device, rewards(2, LONG), LONG, groups=torch.tensor(LONG, dtype=dtype, device=device), **options)
    tiny = [0, 1, 2, 5, 100_005, 100_007, *range(100_010, 100_100, 3)]
    compare(device, rewards(1, tiny), tiny, informative_from=torch.arange(tiny[-1]).float())
    compare(device, rewards(1, tiny), tiny, scale="batch", zero_uninformative=True)
    many = list(range(0, 3 * 33_001, 3))  # more tiles of groups than programs that may leave partials
    if device == "cuda":
        compare(device, rewards(1, many), many, scale="batch")
    second.PARTIALS = 4  # a program then takes several tiles of groups
    for options in ({"scale": "batch"}, {"aggregate": "gdpo"}):
        compare(device, rewards(2, many[:800]), many[:800], **options)
    second.PARTIALS = 1024


def every_dtype_and_stride(device):
    for dtype in (torch.bfloat16, torch.float16):
        for options in ({}, {"aggregate": "gdpo", "component_weights": torch.tensor([0.5, 1.5, 2.0], dtype=dtype)}):
            values = rewards(3, RAGGED)
            values[14:] -= 100
            compare(device, values.to(dtype), RAGGED, informative_from=values[:, 1].to(dtype), **options)
    values = rewards(3, RAGGED)
    for view in (values.T.contiguous().T, values.repeat(1, 2)[:, ::2], values.repeat_interleave(2, 0)[::2]):
        ours = compare(device, view, RAGGED, informative_from=view[:, 1])
        assert torch.equal(ours, compare(device, view.contiguous(), RAGGED, informative_from=values[:, 1]))


def every_extreme(device):
    near = 1e6 + 0.0625 * torch.arange(62.0)[torch.randperm(62, generator=torch.Generator().manual_seed(0))]
    for options in ({}, {"scale": "batch"}, {"aggregate": "gdpo"}, {"eps": 0.0}, {"informative_tol": 1.0}):
        compare(device, near, RAGGED, **options)
        compare(device, near * 1e-12, RAGGED, **options)
    huge = torch.randn(62, generator=torch.Generator().manual_seed(1)) * 1e30
    for options in ({}, {"scale": "batch"}, {"aggregate": "gdpo"}):
        ours = group_advantages(huge.to(device), torch.tensor(RAGGED, device=device), backend="triton", **options)
        assert ours.advantages.isfinite().all()
    for options in ({"eps": 0.0}, {"eps": 0.0, "aggregate": "gdpo"}, {"eps": 0.0, "scale": "batch"}):
        for singleton in CHOICES["singleton"]:
            equal = group_advantages(
                torch.full((7,), 1.7, device=device), 1, backend="triton", singleton=singleton, **options
            )
            assert torch.equal(equal.advantages, equal.advantages[:1].expand(7)) and not equal.informative.any()
            assert (equal.advantages == 0).all() or (singleton == "raw" and options == {"eps": 0.0})
    for fill in (torch.nan, torch.inf, -torch.inf):
        out = group_advantages(torch.full((6, 2), fill, device=device), 3, backend="triton", aggregate="gdpo")
        assert all((part == 0).all() for part in out)
    for empty in (torch.zeros(1, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)):
        for options in ({}, {"scale": "batch"}):
            out = group_advantages(torch.zeros(0, device=device), empty.to(device), backend="triton", **options)
            assert [len(part) for part in out] == [0] + [len(empty) - 1] * 3 and not out.mean.any()


def wrong_offsets(device):
    """On a GPU nobody looks at them: their groups become NaN, nothing outside is read, nothing is left unwritten."""
    op, unwritten = torch.ops.r1v2_fast.group_advantage_triton.default, 77.0
    values = torch.arange(8.0, device=device)[:, None]
    new_empty = torch.Tensor.new_empty

    def marked(self, *shape, **options):
        made = new_empty(self, *shape, **options)
        return made.fill_(unwritten) if made.is_floating_point() else made

    torch.Tensor.new_empty = marked
    try:
        for wrong in ([0, 4, 2, 8], [0, 4, 900, 8], [-70, 4, 8], [3, 4, 8], [0, 4, 7], [0, -5, 8], [0, 4, 2**40]):
            for scale in ("group", "batch"):
                rest = (None, None, "sum", "mean", scale, 1, 1e-4, "clamp", "zero", 0.0, False)
                out = op(values, torch.tensor(wrong, device=device), 0, *rest)
                assert out[1].isnan().any() and out[2].isnan().any(), (wrong, scale, out)
                assert not any((part == unwritten).any() for part in out[:3]), (wrong, scale, out)
                if scale == "batch":  # a batch that one group spoils is spoilt
                    assert out[0].isnan().all(), (wrong, out)
    finally:
        torch.Tensor.new_empty = new_empty


def launches(device):
    """One for any dtype and stride, two where the batch is needed; beside them only allocations and views."""
    op = torch.ops.r1v2_fast.group_advantage_triton.default
    offsets = torch.tensor(RAGGED, dtype=torch.int32, device=device)
    values = rewards(3, RAGGED).to(device, torch.bfloat16)
    weights = torch.ones(3, dtype=torch.float16, device=device)
    for layout, columns, (aggregate, scale, wanted) in itertools.product(
        ((offsets, 0), (None, 31)), (slice(None), slice(1, 2)),
        (("sum", "group", 1), ("sum", "none", 1), ("sum", "batch", 2), ("gdpo", "group", 2)),
    ):  # fmt: skip
        arguments = (values[:, columns], *layout, weights[columns], values[:, 2], aggregate, "mean", scale)
        arguments += (1, 1e-4, "add", "zero", 0.0, True)
        with launched.launches() as seen:
            op(*arguments)
        assert len(seen) == wanted, (aggregate, scale, seen)
        if device == "cuda":
            assert launched.kernels_launched(lambda given=arguments: op(*given)) == wanted


def deciding_of_any_dtype(device):
    """A bool says right or wrong; lanes beyond a group, which have no NaN among ints, decide nothing. Nor does inf."""
    values = torch.tensor([1.0, 0, 1, 1, 0, 1, 2], device=device)
    for layout in (torch.tensor([0, 3, 6, 7], device=device), torch.tensor([0, 2, 2, 7], device=device)):
        for deciding in (
            torch.ones(7, dtype=torch.bool),
            torch.ones(7, dtype=torch.int64),
            torch.full((7,), torch.inf),
        ):
            out = group_advantages(
                values, layout, informative_from=deciding.to(device), zero_uninformative=True, backend="triton"
            )
            assert not out.informative.any() and (out.advantages == 0).all(), (layout, deciding)
        mixed = torch.tensor([True, False, True, True, True, False, True], device=device)
        out = group_advantages(values, layout, informative_from=mixed, backend="triton")
        exact = group_advantages(values.cpu(), layout.cpu(), informative_from=mixed.cpu()).informative
        assert torch.equal(out.informative.cpu(), exact)


def limits(device):
    """No reward is so large that another group's advantage, or any, is not a number."""
    largest = torch.finfo(torch.float32).max
    for group in ([-largest, -largest, 1, 0], [largest, largest, largest, -largest], [largest, 1, 0, 0]):
        values = torch.tensor([*group, 0, 1, 1, 0], device=device)
        for options in ({}, {"scale": "batch"}, {"scale": "none"}, {"aggregate": "gdpo"}, {"eps": 0.0}):
            out = group_advantages(values, 4, backend="triton", **options)
            assert all(part.isfinite().all() for part in out[:3]), (group, options, out)


def groups_of_any_kind(device):
    number = st.floats(-1e4, 1e4, width=32).map(lambda v: v if abs(v) > 1e-15 else 0.0)  # squares are normal in fp32
    member = st.one_of(number, st.sampled_from([0.0, 1.0, 1.7, float("nan"), float("inf"), float("-inf")]))
    group = st.one_of(
        st.lists(member, max_size=9), st.builds(lambda v, n: [v] * n, member, st.integers(0, 5)),
        st.builds(lambda seed, n: torch.randn(n, generator=torch.Generator().manual_seed(seed)).tolist(),
                  st.integers(0, 9), st.integers(20, 1200)),
    )  # fmt: skip
    kinds = st.sampled_from([("sum", "group"), ("sum", "batch"), ("sum", "none"), ("gdpo", "group"), ("gdpo", "none")])
    flags = st.fixed_dictionaries({name: st.sampled_from(CHOICES[name]) for name in FLAGS})

    @settings(deadline=None, max_examples=60, derandomize=True, database=None)
    @given(st.lists(group, max_size=6), kinds, flags)
    def agree(layout, kind, chosen):
        offsets = [0, *itertools.accumulate(map(len, layout))]
        values = torch.tensor([v for members in layout for v in members], dtype=torch.float32)
        compare(device, values, offsets, aggregate=kind[0], scale=kind[1], **chosen)

    agree()


def main(device):
    checked = every_mode(device)
    for check in (
        every_layout, every_dtype_and_stride, every_extreme, limits, wrong_offsets, deciding_of_any_dtype, launches,
        groups_of_any_kind,
    ):  # fmt: skip
        check(device)
    op = torch.ops.r1v2_fast.group_advantage_triton.default
    values, offsets = rewards(3, RAGGED).to(device), torch.tensor(RAGGED, device=device)
    for aggregate in CHOICES["aggregate"]:
        rest = (None, None, aggregate, "mean", "group", 1, 1e-4, "add", "zero", 0.0, True)
        torch.library.opcheck(op, (values, offsets, 0, *rest))
        torch.library.opcheck(op, (values.bfloat16(), None, 31, *rest))
    print(f"{checked} modes, every layout and any groups as accurate as PyTorch's fp32")


if __name__ == "__main__":
    main(sys.argv[1])

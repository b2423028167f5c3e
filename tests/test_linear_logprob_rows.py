"""The cluster row kernel, emulated on the CPU, against the row pass on torch: n rows of V logits, D the gradient matrix."""

import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r1v2_fast import _native
from r1v2_fast.ops import _backend, linear_logprobs, logprobs_from_logits
from r1v2_fast.ops import _linear_logprob_native as native
from r1v2_fast.ops import _linear_logprob_rows as rows
from r1v2_fast.ops._linear_logprob_pass import padded, room
from r1v2_fast.ops._linear_logprob_rows import OUTPUTS, Shaping
from r1v2_fast.reference import linear_logprob as reference
from r1v2_fast.testing.accuracy import assert_as_accurate, max_error, ulp_at_max

ROOT = Path(__file__).parent.parent
PLAIN = Shaping(None, 1.0, 1.0, None, None)
HALVES = (torch.bfloat16, torch.float16)

POINTERS = ("logits", "targets", "temperatures", "bias", "blocked", "raw", "matrix")
SIZES = ("rows", "vocabulary", "stride", "raw_stride", "matrix_stride")
FLAGS = ("own", "entropy", "top1", "mean", "squares")


class LogprobRows(ctypes.Structure):
    """Of csrc/linear_logprob_rows.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in POINTERS]
        + [(name, ctypes.c_int64) for name in SIZES]
        + [(name, ctypes.c_float) for name in ("logit_scale", "softcap", "temperature")]
        + [("stored", ctypes.c_int)]
        + [(name, ctypes.c_bool) for name in FLAGS]
        + [("cluster", ctypes.c_uint)]
    )


class Emulated:
    """Stands for `_C`."""

    cuda_architectures = "90a"

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.rows_error.restype = ctypes.c_char_p
        self.library.rows_limit.restype = ctypes.c_int64

    def seed(self, value: int) -> None:
        self.library.emulated_seed(ctypes.c_uint64(value))

    def linear_logprob_rows_limit(self, device: int) -> int:
        return self.library.rows_limit()

    def linear_logprob_rows(self, *, device: int, stream: int, **arguments) -> None:
        error = self.library.rows_error(ctypes.byref(LogprobRows(**arguments)))
        if error is not None:
            raise RuntimeError(error.decode())


@pytest.fixture(scope="session")
def library(compiled):
    return Emulated(compiled("linear_logprob_rows.cpp", emulated=True, shared=True))


@pytest.fixture
def kernel(library, monkeypatch):
    monkeypatch.setattr(_native, "loaded", lambda: library)
    library.seed(0)
    return library


def head_of(logits, shaping: Shaping, at: slice = slice(None)) -> dict:
    """`triton_head` without Triton, whose launcher it calls."""
    from r1v2_fast.ops._linear_logprob_pass import triton_head

    pytest.importorskip("triton")
    return triton_head(logits, shaping, at, padded=True)


def made(values_nV, targets, shaping=PLAIN, outputs=OUTPUTS, stored=None, own=True, in_place=False, **options):
    """(Raw, D or None) of the kernel; what lies beyond V is NaN before and 0, or untouched, after."""
    n, V = values_nV.shape
    logits = room(values_nV, n, V, torch.float32)
    whole = logits.as_strided((n, logits.stride(0)), (logits.stride(0), 1))
    whole.fill_(torch.nan)
    logits.copy_(values_nV)
    matrix = None
    if stored is not None:
        matrix = logits if in_place else torch.full((n, padded(V, stored)), torch.nan, dtype=stored)[:, :V]
    raw = rows.raw_room(logits, n, torch.float32)
    native.launch(head_of(logits, shaping, slice(0, n)), targets, raw, matrix, outputs, own=own, **options)
    if matrix is not None:
        end = -(-V // 4) * 4
        beside = matrix.as_strided((n, matrix.stride(0) - V), (matrix.stride(0), 1), matrix.storage_offset() + V)
        assert (beside[:, : end - V] == 0).all() and beside[:, end - V :].isnan().all()
    return rows.raw_of(raw), matrix


def right(values_nV, targets, shaping, dtype, own):
    """(Raw, exp(z - m) f with the target's entry, or 0 there) of the row pass on torch in `dtype`."""
    wide = shaping if shaping.bias is None else replace(shaping, bias=shaping.bias.to(dtype))
    part = rows.row_pass(values_nV.to(dtype, copy=True), targets, wide, slice(None), OUTPUTS, grad=True)
    matrix = rows.gradient_matrix(part)
    if own:
        rows.place(matrix, targets, part.raw.at_target())
    return part.raw, matrix


def shapings(n: int, V: int) -> dict[str, Shaping]:
    g = torch.Generator().manual_seed(3)
    blocked = torch.rand(V, generator=g) < 0.4
    blocked[:2] = False
    bias = torch.randn(V, generator=g)
    return {
        "plain": PLAIN,
        "temperature": Shaping(None, 0.7, 1.0, None, None),
        "per token": Shaping(None, torch.linspace(0.5, 2.0, n), 1.0, None, None),
        "bias": Shaping(bias.bfloat16(), 1.0, 1.0, None, None),
        "softcap": Shaping(None, 1.0, 1.7, 3.0, None),
        "forbidden": Shaping(None, 1.0, 1.0, None, blocked),
        "all": Shaping(bias, torch.linspace(0.5, 2.0, n), 0.6, 4.0, blocked),
    }


def assert_close(ours, plain, truth, what):
    """The relative rule; the fp32 reference's maximum error is taken over more rows than the emulated kernel is given."""
    allowed = 1.5 * max_error(plain, truth) + ulp_at_max(truth, torch.float32)
    error = max_error(ours, truth[: len(ours)])
    assert error <= allowed, f"{what}: error {error:.3e} against fp64, allowed {allowed:.3e}"


def compare(values, targets, shaping, stored, own, found, what):
    """`found` of the first rows of `values`, some of whose targets are elsewhere."""
    raw, matrix = found
    exact, exact_matrix = right(values, targets, shaping, torch.float64, own)
    same, same_matrix = right(values, targets, shaping, torch.float32, own)
    known = (targets >= 0) & (targets < values.shape[1])
    here = known[: len(raw.top)]
    for name in ("logprobs", "entropy", "mean_logits", "log_sum_sq_probs"):
        ours, plain, truth = (r.result(name) for r in (raw, same, exact))
        assert_close(ours[here], plain[known], truth[known], f"{what}: {name}")
    for name in ("top", "others", "weighted", "squares", "total", "allowed"):
        assert_close(*(getattr(r, name) for r in (raw, same, exact)), f"{what}: {name}")
    assert_close(raw.factor[here], same.factor[known], exact.factor[known], f"{what}: factor")
    assert torch.equal(raw.target == -torch.inf, ~here), what
    assert torch.equal(raw.result("is_top1")[here], exact.result("is_top1")[: len(here)][here]), what
    if matrix is not None:
        ours = matrix.double() * raw.scale.double()[:, None]
        unit = same.sum()[:, None] / 2**15 if stored == torch.float16 else torch.ones(len(values), 1)
        plain = (same_matrix / unit).to(stored).double() * unit.double()
        assert_close(ours, plain, exact_matrix, f"{what}: D")


# cluster, V: one logit; fewer than blocks; a slice's worth and one more; empty slices; several copies; a multiple of 4
SHAPES = [(1, 1), (8, 5), (2, 33), (8, 257), (8, 4301), (1, 9002), (3, 4096)]


@pytest.mark.parametrize("stored", [None, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("cluster", "V"), SHAPES)
def test_every_option_is_as_accurate_as_the_row_pass_in_fp32(kernel, cluster, V, stored):
    g = torch.Generator().manual_seed(V)
    values = torch.randn(48, V, generator=g) * 4
    targets = torch.randint(0, V, (48,), generator=g)
    targets[:4] = torch.tensor([-100, V - 1, V, 0])  # two that are elsewhere, the last, the first
    for name, shaping in shapings(len(values), V).items():
        if shaping.blocked is not None:
            shaping.blocked[targets[[1, 3, *range(4, 48)]]] = False
        own = stored is not None and name != "softcap"
        found = made(values[:4], targets[:4], shaping, stored=stored, own=own, cluster=cluster)
        compare(values, targets, shaping, stored, own, found, name)


@pytest.mark.parametrize("stored", [torch.float32, *HALVES], ids=str)
def test_the_order_of_threads_and_the_lateness_of_copies_change_nothing(kernel, stored):
    values = torch.randn(2, 9001, generator=torch.Generator().manual_seed(1)) * 4
    targets = torch.tensor([8999, 3])
    shaping = shapings(2, 9001)["all"]
    expected = made(values, targets, shaping, stored=stored, cluster=4)
    for seed in range(1, 9):
        kernel.seed(seed)
        raw, matrix = made(values, targets, shaping, stored=stored, cluster=4, in_place=stored == torch.float32)
        assert torch.equal(torch.stack(raw), torch.stack(expected[0])) and torch.equal(matrix, expected[1])


def test_a_row_gives_the_same_bits_in_any_batch_and_output_set(kernel):
    values = torch.randn(5, 2503, generator=torch.Generator().manual_seed(2)) * 5
    targets = torch.tensor([4, 2502, 0, -100, 77])
    raw, matrix = made(values, targets, stored=torch.bfloat16)
    for row in range(5):
        alone, own = made(values[row : row + 1], targets[row : row + 1], outputs=(), stored=torch.bfloat16)
        assert torch.equal(torch.stack(alone)[:5, 0], torch.stack(raw)[:5, row]) and torch.equal(own[0], matrix[row])
        assert (torch.stack(alone)[5:] == 0).all()  # not asked for


@pytest.mark.parametrize("cluster", [1, 8])
def test_one_minus_p_is_right_near_certainty(kernel, cluster):
    V = 4300
    for t in (3, 2500, V - 1):
        values = torch.zeros(1, V)
        values[0, t] = torch.log(torch.tensor((V - 1) * 1e6))
        raw, matrix = made(values, torch.tensor([t]), stored=torch.float32, cluster=cluster)
        s = (V - 1) * torch.exp(-values[0, t].double())
        assert abs(-torch.expm1(raw.logprobs().double()) - s / (1 + s)) <= 1e-6 * s / (1 + s)
        assert abs(-matrix[0, t].double() - s) <= 1e-6 * s


def test_of_equal_maxima_in_two_blocks_the_first_is_the_top(kernel):
    values = torch.zeros(3, 256)
    values[:, [31, 32]] = 1.0  # the last of the first block, the first of the second
    raw, _ = made(values, torch.tensor([31, 32, -100]), cluster=8)
    assert raw.result("is_top1").tolist() == [True, False, False]


def test_nan_reaches_what_depends_on_it(kernel):
    values = torch.randn(3, 300, generator=torch.Generator().manual_seed(4))
    values[0, 77] = torch.nan
    values[1, 250] = torch.nan
    values[2, 5] = torch.inf
    raw, matrix = made(values, torch.tensor([77, 3, 3]), stored=torch.bfloat16, cluster=8)
    assert raw.logprobs().isnan().all() and matrix[1, 250].isnan() and matrix[2, 3].isnan()
    assert raw.result("is_top1")[0] == (torch.tensor(True) if raw.beaten[0] == 0 else torch.tensor(False))


def test_it_touches_nothing_beyond_its_buffers(compiled):
    program = compiled("linear_logprob_rows.cpp", sanitize="address,undefined", emulated=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stored", [torch.float32, *HALVES], ids=str)
def test_a_shard_of_forbidden_ids_alone_adds_nothing(kernel, stored):
    shaping = Shaping(None, 1.0, 1.0, None, torch.ones(300, dtype=torch.bool))
    raw, matrix = made(torch.randn(2, 300), torch.tensor([-1, 300]), shaping, stored=stored, cluster=2)
    assert (raw.top == -1e30).all() and (raw.others == 0).all() and (matrix == 0).all() and (raw.allowed == 0).all()


def test_the_longest_vocabulary_fits_and_a_longer_one_is_an_error(kernel):
    V = 262144
    assert kernel.linear_logprob_rows_limit(0) == V
    values = torch.randn(1, V, generator=torch.Generator().manual_seed(5)) * 3
    targets = torch.tensor([V - 7])
    found = made(values, targets, stored=torch.bfloat16)
    compare(values, targets, PLAIN, torch.bfloat16, True, found, "262144")
    with pytest.raises(RuntimeError, match=r"262145 logits do not fit 8 blocks of 32768"):
        made(torch.zeros(1, V + 1), targets)
    with pytest.raises(RuntimeError, match=r"40000 logits do not fit 1 blocks"):
        made(torch.zeros(1, 40000), targets, cluster=1)


def test_what_the_kernel_could_not_read_is_refused(kernel):
    raw, targets = torch.empty(10, 2), torch.zeros(2, dtype=torch.int64)

    def launch(logits, targets=targets, raw=raw, matrix=None):
        native.launch(head_of(logits, PLAIN), targets, raw, matrix, (), own=False)

    fine = torch.zeros(2, 64)
    launch(fine[:, :63])
    for logits in (
        torch.zeros(2, 62),
        torch.zeros(2, 64)[:, 1:],
        torch.zeros(131)[:126].view(2, 63),
        torch.zeros(2, 66),
    ):
        with pytest.raises(ValueError, match="logits's rows must start at multiples of 16 bytes"):
            launch(logits)
    with pytest.raises(ValueError, match="logits must be torch.float32"):
        launch(fine.bfloat16())
    with pytest.raises(ValueError, match=r"targets must be torch.int64 \(2,\)"):
        launch(fine, torch.zeros(4, dtype=torch.int64)[::2])
    with pytest.raises(ValueError, match=r"raw must be torch.float32 \(10, 2\)"):
        launch(fine, raw=torch.empty(2, 10).T)
    with pytest.raises(ValueError, match="matrix must be"):
        launch(fine, matrix=torch.empty(2, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match="matrix's rows must start"):
        launch(fine, matrix=torch.empty(2, 68, dtype=torch.bfloat16)[:, :64])


def gradients(function, tensors, targets, upstream, **options):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(leaves[0], leaves[1], targets, bias=leaves[2], **options)
    logprobs = out["logprobs"] if isinstance(out, dict) else out.logprobs
    return logprobs.detach(), *torch.autograd.grad((logprobs * upstream.to(logprobs.dtype)).sum(), leaves)


@pytest.mark.parametrize("workspace", [None, 512 * 4 * 8], ids=["D kept", "D made again"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_linear_logprobs_through_it_follows_the_relative_rule(kernel, monkeypatch, dtype, workspace):
    pytest.importorskip("triton")
    monkeypatch.setitem(_backend._CANDIDATES, "linear_logprob", (("cuda", lambda device: None),))
    monkeypatch.setattr(native, "lacks", lambda hidden, vocabulary: None)
    n, h, v = 24, 32, 301
    g = torch.Generator().manual_seed(6)
    tensors = [(torch.randn(*shape, generator=g) * 0.25).to(dtype) for shape in ((n, h), (v, h), (v,))]
    targets = torch.randint(0, v, (n,), generator=g)
    targets[3] = -100
    upstream = torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0)
    options = {"temperature": torch.linspace(0.5, 2.0, n), "softcap": 4.0, "logit_scale": 1.5}
    ours = gradients(linear_logprobs, tensors, targets, upstream, workspace_bytes=workspace, backend="cuda", **options)
    plain = gradients(reference.linear_logprobs, tensors, targets, upstream, **options)
    exact = gradients(reference.linear_logprobs, [t.double() for t in tensors], targets, upstream, **options)
    for a, b, c, name in zip(ours, plain, exact, ("logprobs", "hidden", "weight", "bias"), strict=True):
        assert_as_accurate(a, b, c, f"gradient of {name}" if name != "logprobs" else name)


def test_asking_for_it_where_it_cannot_run_says_why(monkeypatch):
    hidden, weight, targets = torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="needs a CUDA tensor, got one on cpu; move it, or use backend='torch'"):
        linear_logprobs(hidden, weight, targets, backend="cuda")
    with pytest.raises(RuntimeError, match="rows which linear_logprobs makes; use backend='triton'"):
        logprobs_from_logits(torch.zeros(2, 5), targets, backend="cuda")
    monkeypatch.setattr(native, "_limit", lambda index: 1000)
    with pytest.raises(RuntimeError, match="here 1000 logits, got 1001; use backend='triton'"):
        native.resolved("cuda", hidden, 1001)
    with pytest.raises(RuntimeError, match="the inputs fp64; use backend='torch'"):
        native.resolved("cuda", hidden.double(), 5)
    monkeypatch.setattr(native, "_limit", lambda index: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(RuntimeError, match="need sm_90 or newer, this GPU is sm_86; use backend='triton'"):
        native.resolved("cuda", hidden, 5)


def test_auto_takes_it_where_it_was_measured_to_be_faster_and_runs(monkeypatch):
    from r1v2_fast.kernels import _launch

    table = ({"V": 32000, **_launch.DEFAULT}, {"V": 152064, **_launch.DEFAULT, "rows": "cuda"})
    monkeypatch.setattr(_launch, "_table", lambda stem, name: table)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "made up")
    monkeypatch.setattr(native, "why_not", lambda device_type: None)
    monkeypatch.setattr(native, "_limit", lambda index: 200000)
    hidden = torch.zeros(1, 4)
    assert [native.resolved("auto", hidden, V) for V in (32000, 150000, 262144)] == ["triton", "cuda", "triton"]
    assert native.resolved("triton", hidden, 152064) == "triton"
    assert _launch.parameters("linear_logprob", torch.device("cuda"), 152064) == _launch.DEFAULT


def test_tuning_marks_the_vocabularies_where_it_is_faster():
    pytest.importorskip("triton")
    from bench import tune

    rows_of = tune.tuned(lambda parameters, V: 1.0, (32000, 152064), cluster=lambda V: 0.9 if V > 100000 else 1.1)
    assert [row.get("rows") for row in rows_of] == [None, "cuda"]


@pytest.mark.gpu
def test_the_gpu_agrees_with_fp64_and_with_the_triton_kernel():
    if (reason := native.why_not("cuda") or native.lacks(torch.empty(0, device="cuda"), 262144)) is not None:
        pytest.skip(reason)
    script = ROOT / "tests" / "kernel_checks" / "linear_logprob_rows.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0 and "as accurate as" in done.stdout, done.stderr

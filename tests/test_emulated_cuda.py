"""The CPU emulation under which our CUDA kernels are tested: right kernels pass for every order of threads, faults do not."""

import subprocess

import pytest


@pytest.fixture(scope="module")
def program(compiled):
    return compiled("emulator_test.cpp", sanitize="address,undefined", emulated=True)


def test_right_kernels_are_right_for_every_order_and_a_missing_barrier_shows(program):
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and "the emulator holds" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergent barriers", "threads meet at different barriers: __syncthreads and __syncthreads_or"),
        ("early exit", "deadlock: 1 threads have left; 95 wait at __syncthreads"),
        ("divergent warp", "threads meet at different barriers: __syncwarp and __shfl_sync"),
        ("misaligned copy", "not aligned to 16"),
        ("bytes that never come", "deadlock: 0 threads have left; 64 wait at mbarrier_wait"),
        ("bytes not announced", "more bytes than it was told to expect"),
        ("overrun", "heap-buffer-overflow"),
        ("block that left", "which has left"),
        ("block that has not begun", "rank 1, which has not begun"),
        ("spinning", "deadlock: threads spin"),
    ],
)
def test_a_planted_fault_aborts_and_says_what_it_is(program, fault, message):
    done = subprocess.run([program, fault], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and message in done.stderr, done.stdout + done.stderr

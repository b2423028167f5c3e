"""The race in C++: its logarithm, its pretest, the CPU sampler and, emulated, the kernel, against every key sorted."""

import subprocess

import pytest

SOURCES = ("priority_sample_test.cpp", "priority_sample.cpp")


def run(program, *arguments):
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_cpu_sampler_is_what_every_key_says_under_sanitizers(compiled):
    assert "all as every key says" in run(compiled(*SOURCES, sanitize="address,undefined"))


def test_the_kernel_is_what_every_key_says(compiled):
    assert "all as every key says" in run(compiled(*SOURCES, "priority_sample.cu", emulated=True))


def test_the_kernel_is_clean_under_sanitizers(compiled):
    program = compiled(*SOURCES, "priority_sample.cu", sanitize="address,undefined", emulated=True)
    assert "all as every key says" in run(program, "brief")


def test_vector_clones_give_the_same_bits(compiled):
    assert "all as every key says" in run(compiled(*SOURCES))


@pytest.mark.slow
def test_threads_do_not_race(compiled):
    assert "all as every key says" in run(compiled(*SOURCES, sanitize="thread"))


@pytest.mark.slow
def test_a_million_draws_are_distributed_as_they_should_be(compiled):
    assert "distributed as they should be" in run(compiled(*SOURCES), "distribution")

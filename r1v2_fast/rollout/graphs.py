"""A step as a CUDA graph: one launch instead of hundreds, where a step is too small to keep the GPU busy.

Not yet run on a GPU; `tests/rollout/test_graphs.py -m gpu` compares it with the eager step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

WARM_UP = 3  # runs before a capture: libraries allocate workspaces and choose algorithms in the first


def captured(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`step` as a replay of its kernels; the step itself, with a warning, where it cannot be captured.

    `step` reads and writes tensors whose addresses stay, and doing it again must change nothing. What a replay returns is
    written over by the next.
    """
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step()
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        warnings.warn(
            f"the decode step was not captured as a CUDA graph and runs eagerly, which is slower: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return step

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay

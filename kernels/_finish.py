"""A sum over all programs in one launch: each leaves a row of partial sums, and the last to finish adds the rows in order.

So the same call gives the same bits, which sums by atomics would not.
"""

import torch
import triton
import triton.language as tl

_TICKETS: dict[tuple[torch.device, int], torch.Tensor] = {}


@triton.jit
def last_to_finish(ticket):
    """True in the program that finishes last; every other's stores are then visible to loads past L1 (".cg")."""
    tl.debug_barrier()  # one thread takes the ticket: its release must follow the stores of all
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket, 0)
    return last


def ticket(device: torch.device) -> torch.Tensor:
    """An int32 that is 0 between launches. Launches on one stream follow each other, so each stream keeps its own.

    A captured graph may be replayed on any stream: it gets one that it sets to 0 itself.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _TICKETS:
        _TICKETS[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _TICKETS[key]

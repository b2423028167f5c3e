"""How a rank leaves when it, or another, cannot go on: with a sentence that names what a resume goes back to."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from r1v2_fast.parallel.world import World


@contextmanager
def named(world: World, newest: Callable[[], str]) -> Iterator[None]:
    """Among several ranks, an error inside comes out with its rank and `newest`, the last completed checkpoint.

    raises  ValueError as it is; RuntimeError instead of everything else
    """
    try:
        yield
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        if world.size == 1:
            raise
        # torchrun ends the others as soon as one is gone: what there is to say is said first
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        said = " ".join(str(error).split())
        raise kind(f"rank {world.rank} of {world.size} stops: {said}; {newest()}") from error

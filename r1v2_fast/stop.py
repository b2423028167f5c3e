"""Stopping well: SIGTERM and the first Ctrl-C let the step finish, checkpoint it and leave."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


class Stopped(Exception):
    """The run left at a signal, resumable; `status` is the shell's exit status for it."""

    def __init__(self, sentence: str, signum: int):
        super().__init__(sentence)
        self.status = 128 + signum


class StopRequest:
    """Inside, `signum` is the signal that asked to stop, 0 before. A second Ctrl-C stops at once, losing the step."""

    def __init__(self) -> None:
        self.signum = 0
        self._pid = os.getpid()
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # handlers can be set there alone
            self._before = {s: signal.signal(s, self._asked) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _asked(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a child that a reward forked: it has nothing to checkpoint
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
            return
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum

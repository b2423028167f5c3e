"""A limit on how long somebody else's Python code may run, wherever in it that code hangs."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

# not SIGALRM: math-verify sets and cancels that one itself
SIGNAL = signal.SIGVTALRM


class OutOfTime(Exception):
    """The block took longer than its limit; its cause is raised where the block was at that moment."""


class _Interrupt(BaseException):
    """Not an Exception: a reward's `except Exception: return 0` must not swallow it."""


class time_limit:
    """`with time_limit(seconds):` raises OutOfTime where the block takes longer.

    It interrupts loops, sleeps, sockets, regular expressions and arithmetic on huge integers, but not C code that
    never looks for signals, such as one long numpy call: that one is interrupted as it returns. A block that swallows
    the interrupt meets it again every quarter of the limit, and is out of time whatever it returns. Limits do not
    nest. There is no limit where seconds is None, or outside the main thread, which no signal reaches.
    """

    def __init__(self, seconds: float | None):
        if seconds is not None and seconds <= 0:
            raise ValueError(f"a time limit must be above 0 seconds, got {seconds}")
        self.seconds = seconds or 0.0
        self.limited = seconds is not None and threading.current_thread() is threading.main_thread()
        self.armed = self.expired = False
        self.over = threading.Event()
        self.watchdog = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        if not self.limited:
            return
        self.previous = signal.getsignal(SIGNAL)
        if isinstance(getattr(self.previous, "__self__", None), time_limit):
            raise RuntimeError("time limits do not nest: this one stands within another")
        self.deadline = time.monotonic() + self.seconds
        signal.signal(SIGNAL, self._interrupt)
        # Two clocks: the thread wakes a sleeping block, but never gets the interpreter's lock from a regular expression
        # or a huge integer; those burn processor time, which the kernel counts.
        self.watchdog.start()
        signal.setitimer(signal.ITIMER_VIRTUAL, self.seconds, self.seconds / 4)
        self.armed = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self.limited:
            return
        self.armed = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        self.over.set()
        self.watchdog.join()
        signal.signal(SIGNAL, self.previous or signal.SIG_DFL)
        if self.expired and (kind is None or issubclass(kind, (Exception, _Interrupt))):
            raise OutOfTime(f"took longer than {self.seconds:g} s") from error

    def _watch(self) -> None:
        pause = self.seconds
        while not self.over.wait(pause):
            signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)
            pause = self.seconds / 4

    def _interrupt(self, _: int, frame: FrameType | None) -> None:
        # A signal that lands in __exit__ before its first line must not raise: nothing would be put back. One before
        # the deadline is the processor's clock, which other threads of the process drive too.
        here = frame is not None and frame.f_code.co_filename == __file__
        if self.armed and not here and time.monotonic() >= self.deadline:
            self.expired = True
            raise _Interrupt

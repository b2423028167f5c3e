"""The benchmark suite: `python -m bench --help`."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's start and stop lines; read when torch is imported

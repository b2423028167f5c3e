"""Reward functions by name or by `path.py:name`, called with checks that name the function and the sample."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import math
import reprlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from r1v2_fast.judge import hallucination, rules
from r1v2_fast.judge.time_limit import OutOfTime
from r1v2_fast.judge.time_limit import time_limit as limited

BLAME_SECONDS = 60.0  # for finding the sample that raises, where there is no time limit
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120
LARGEST = 3.4028234663852886e38  # rewards are added up as float32

RewardFunction = Callable[..., Any]
BUILT_IN: dict[str, RewardFunction] = {
    "exact_match": rules.exact_match,
    "math_answer": rules.math_answer,
    "think_format": rules.think_format,
    "faithful": hallucination.faithful,
    "coin_flip": rules.coin_flip,
}


COMPARE = ("exact_match", "math_answer")  # with the record's answer


def load_reward(spec: str) -> RewardFunction:
    """A built-in reward's name, or `path/to/file.py:name`; raises ValueError that says what is missing."""
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    path, separator, name = spec.rpartition(":")
    if not separator or not path.endswith(".py"):
        raise ValueError(f"a reward must be one of {sorted(BUILT_IN)} or path.py:name, got {spec!r}")
    if not Path(path).is_file():
        raise ValueError(f"reward {spec!r}: no such file {path}")
    module = _load_file(path)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward {spec!r}: {path} has no function {name!r}")
    return function


def _load_file(path: str) -> ModuleType:
    """The file as a module, run once however many rewards it holds: it may load a model of its own."""
    place = hashlib.blake2b(str(Path(path).resolve()).encode(), digest_size=8).hexdigest()
    name = f"r1v2_fast_reward_{place}"  # without a dot, or pickle takes it for a package
    if name not in sys.modules:
        module_spec = importlib.util.spec_from_file_location(name, path)
        assert module_spec is not None and module_spec.loader is not None
        # dataclasses look their module up by name, while it runs
        module = sys.modules[name] = importlib.util.module_from_spec(module_spec)
        folder = str(Path(path).resolve().parent)  # for a helper module beside it, as for a script
        sys.path.insert(0, folder)
        try:
            module_spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            text = _line(f"reward file {path} raised {type(error).__name__} at import: {error}")
            raise ValueError(text) from error
        finally:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)
    return sys.modules[name]


def score(
    name: str,
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    columns: dict[str, list],
    samples: list[str],
    *,
    time_limit: float | None = None,
    on_nan: Literal["stop", "skip"] = "stop",
) -> list[float]:
    """The rewards of all completions as floats, NaN where unscorable: where the function returns None.

    samples     one description a completion, which the messages name
    time_limit  seconds for the call on all completions; only the main thread is limited, see time_limit.py
    on_nan      what a NaN or infinite reward does: stop with a ValueError, or skip the sample as unscorable
    raises      RuntimeError with function and sample where it raises, exits or hangs; ValueError for a wrong count or
                type
    """

    def call(rows: slice, seconds: float | None) -> Any:
        some = {column: values[rows] for column, values in columns.items()}
        asked, some = copy.deepcopy((prompts[rows], some))  # messages and lists are the records' own
        with limited(seconds):
            return function(prompts=asked, completions=completions[rows], **some)

    try:
        values = call(slice(None), time_limit)
    except OutOfTime as error:
        where = _blame(call, samples, error, time_limit or BLAME_SECONDS)
        raise RuntimeError(f"reward {name!r} gave no answer within {time_limit:g} s on {where}") from error
    except (Exception, SystemExit) as error:
        where = _blame(call, samples, error, time_limit or BLAME_SECONDS)
        raise RuntimeError(_line(f"reward {name!r} raised {type(error).__name__} on {where}: {error}")) from error
    if getattr(values, "ndim", None) == 1:  # a numpy array or a tensor
        values = values.tolist()
    if not isinstance(values, (list, tuple)) or len(values) != len(completions):
        got = len(values) if isinstance(values, (list, tuple)) else _short.repr(values)
        raise ValueError(_line(f"reward {name!r} must return a list of {len(completions)} numbers, got {got}"))
    return checked(name, values, completions, samples, on_nan=on_nan)


def checked(
    name: str, values: Any, completions: list[str], samples: list[str], *, on_nan: Literal["stop", "skip"]
) -> list[float]:
    """A number a completion as floats, NaN where unscorable: for None, and under on_nan skip for what is not finite."""
    scores = []
    for sample, completion, value in zip(samples, completions, values, strict=True):
        if getattr(value, "ndim", None) == 0:  # a numpy scalar or a tensor
            value = value.item()
        if value is None:
            value = math.nan
        elif not isinstance(value, (int, float)):
            raise ValueError(_line(f"reward {name!r} of sample {sample}: expected a number, got {_short.repr(value)}"))
        elif not abs(value) <= LARGEST:  # NaN too; math.isfinite fails on integers that no float holds
            if on_nan == "stop":
                got = value if isinstance(value, float) else "an integer beyond float32"
                raise ValueError(
                    f"reward {name!r} of sample {sample}: expected a finite number or None, got {got} for the "
                    f"completion {_short.repr(completion)}; on_nan skip leaves such samples out"
                )
            value = math.nan
        scores.append(float(value))
    return scores


def _line(text: str) -> str:
    return " ".join(text.split())


def _blame(call: Callable[[slice, float], Any], samples: list[str], error: BaseException, seconds: float) -> str:
    """The one sample on which the call alone fails as it did on all; else, or after `seconds`, their range."""
    if len(samples) == 1:
        return f"sample {samples[0]}"
    end = time.monotonic() + seconds
    for index, sample in enumerate(samples):
        left = end - time.monotonic()
        if left <= 0:
            break
        try:
            call(slice(index, index + 1), left)
        except (Exception, SystemExit) as alone:
            # a sample that got little of the time is not the one that hangs: all of them are slow
            if type(alone) is type(error) and not (isinstance(alone, OutOfTime) and left < seconds / 2):
                return f"sample {sample}"
    return f"samples {samples[0]} to {samples[-1]}"

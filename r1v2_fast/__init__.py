"""Fused ops and a lean loop for reinforcement learning of vision-language models, after Skywork R1V2 (2504.16656)."""

from r1v2_fast._version import __version__

# Submodules load when they are asked for: importing the package imports neither torch nor triton.
__all__ = ["__version__", "ops", "buffer"]


def __getattr__(name: str):
    if name in __all__:
        import importlib

        return importlib.import_module(f"r1v2_fast.{name}")
    raise AttributeError(f"module 'r1v2_fast' has no attribute {name!r}")

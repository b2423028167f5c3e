"""Vision features by image, behind the frozen tower and before the adapter: in memory, and on disk if given a folder.

An image of T tiles takes T S C elements: R1V2-38B's 13 tiles of 256 tokens and 12,800 channels are 85 MB in bf16.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

Load = Callable[[list[str]], list[torch.Tensor]]


class FeatureCache:
    """Features [T, S, C] by the digest of an image's pixels, the least recently used out first beyond `max_bytes`.

    The same picture under several keys is held once. A file on disk is the tower's that wrote it, by a fingerprint of its
    weights and settings; one that is broken is written anew. One picture is held whatever the limit.
    """

    def __init__(self, max_bytes: int = 1 << 30, folder: str | Path | None = None):
        self.max_bytes, self.folder = max_bytes, None if folder is None else Path(folder)
        self.bytes = 0
        self._held: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._digests: dict[str, str] = {}  # of keys
        self._towers: dict[int, str] = {}  # fingerprints by id, until the weights change

    def __len__(self) -> int:
        return len(self._held)

    def like(self) -> FeatureCache:
        """An empty one with the same limits, for another tower."""
        return FeatureCache(self.max_bytes, self.folder)

    def clear(self) -> None:
        """To be called when the tower's weights change."""
        self._held.clear()
        self._towers.clear()
        self.bytes = 0

    def get(
        self, keys: list[str], pixels: Load, encode: Load, tower: nn.Module, settings: Callable[[], str] = str
    ) -> list[torch.Tensor]:
        """Features of `keys` in order; what neither memory nor disk holds is encoded in one call.

        pixels    of keys, [T, 3, height, width] each
        encode    keys to features on the tower's device
        settings  says what else features follow from: files are kept apart by it; asked once, where there is a folder
        """
        names = dict(zip(keys, (self._digest(key, pixels) for key in keys), strict=True))
        found = {
            name: features for name in names.values() if (features := self._look(name, tower, settings)) is not None
        }
        missing: dict[str, str] = {}
        for key, name in names.items():
            if name not in found:
                missing.setdefault(name, key)
        if missing:
            for name, features in zip(missing, encode(list(missing.values())), strict=True):
                found[name] = features
                self._put(name, features)
                if self.folder is not None:
                    _write(self._path(name, tower, settings), features)
        return [found[names[key]] for key in keys]

    def _digest(self, key: str, pixels: Load) -> str:
        if key not in self._digests:
            self._digests[key] = digest(pixels([key])[0])
        return self._digests[key]

    def _look(self, name: str, tower: nn.Module, settings: Callable[[], str]) -> torch.Tensor | None:
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        if self.folder is None or not (path := self._path(name, tower, settings)).is_file():
            return None
        try:
            features = load_file(str(path))["features"].to(next(tower.parameters()).device)
        except (OSError, SafetensorError, KeyError):  # cut short by a full disk; it is encoded and written again
            return None
        self._put(name, features)
        return features

    def _put(self, name: str, features: torch.Tensor) -> None:
        self._held[name] = features
        self.bytes += features.nbytes
        while self.bytes > self.max_bytes and len(self._held) > 1:
            self.bytes -= self._held.popitem(last=False)[1].nbytes

    def _path(self, name: str, tower: nn.Module, settings: Callable[[], str]) -> Path:
        assert self.folder is not None
        if id(tower) not in self._towers:
            weights_and_settings = f"{fingerprint(tower)}/{settings()}".encode()
            self._towers[id(tower)] = hashlib.blake2b(weights_and_settings, digest_size=16).hexdigest()
        return self.folder / self._towers[id(tower)] / f"{name}.safetensors"


def digest(pixels: torch.Tensor) -> str:
    found = hashlib.blake2b(repr((pixels.dtype, tuple(pixels.shape))).encode(), digest_size=16)
    found.update(pixels.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


@torch.no_grad()
def fingerprint(tower: nn.Module) -> str:
    """Of names, dtypes, shapes and values: sums that weigh every element by its place, on the weights' own device."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in tower.state_dict().items():
        flat = tensor.flatten()
        sums = [
            _weighted_sum(part, start)
            for start, part in zip(range(0, flat.numel(), 1 << 24), flat.split(1 << 24), strict=True)
        ]
        found.update(repr((name, tensor.dtype, tuple(tensor.shape), sums)).encode())
    return found.hexdigest()


def _weighted_sum(part: torch.Tensor, start: int) -> int:
    """The elements' bits times odd numbers that their places give, modulo 2^64: exact in any order of summation."""
    bits = part.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[part.element_size()])
    place = torch.arange(start, start + len(part), device=part.device)
    return int((bits.to(torch.int64) * (2 * place + 1)).sum())


def _write(path: Path, features: torch.Tensor) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # several ranks may write one picture
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": features.detach().contiguous().cpu()}, str(partial))
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise RuntimeError(
            f"cannot write {path}: {error}; make room, or set model.feature_cache_folder=null to do without"
        ) from error

"""Images: opened with checks, cut into tiles by transformers' PIL image processor, kept as pixels by key."""

from __future__ import annotations

import io
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from reprlib import Repr

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # Pillow's own limit; beyond it a small file is a decompression bomb
_short = Repr()
_short.maxstring = 120


def open_image(
    source: str | bytes, *, root: Path, allow_outside: bool = False, where: str = "", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """A path below `root`, or bytes, as an RGB picture the way up its EXIF says; the first frame of an animation.

    raises  ValueError that starts with `where`: missing, outside the root, not an image, truncated, too many pixels
    """
    name = f"{len(source)} bytes" if isinstance(source, bytes) else _short.repr(source)
    try:
        stream = io.BytesIO(source) if isinstance(source, bytes) else _path(source, root, allow_outside)
        with warnings.catch_warnings():
            # between once and twice its limit Pillow only warns, even of a picture inside an icon that says less
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(stream) as picture:
                if (pixels := picture.width * picture.height) > max_pixels:
                    raise ValueError(f"it has {pixels} pixels, at most {max_pixels} allowed")
                return _rgb(_upright(picture))
    except UnidentifiedImageError as error:  # its own text shows the stream's address
        raise ValueError(f"{where}, field 'images': cannot read {name}: it is no image, or one cut short") from error
    except Exception as error:  # decoders raise what their parsers meet: OSError, SyntaxError, struct.error
        reason = getattr(error, "strerror", None) or error  # an OSError's own text has the path in full
        raise ValueError(f"{where}, field 'images': cannot read {name}: {reason}") from error


def _path(source: str, root: Path, allow_outside: bool) -> Path:
    if source.startswith("data:"):
        raise ValueError("data: URIs are not supported; give a path, or bytes in a parquet file")
    path = (root / source).resolve()
    if not allow_outside and not path.is_relative_to(root.resolve()):
        raise ValueError(f"it leaves the data root {root}; allow_outside lets it")
    if not path.is_file():
        raise ValueError(f"it is a folder below {root}" if path.is_dir() else f"no such file below {root}")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    return path


def _upright(picture: Image.Image) -> Image.Image:
    try:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # the metadata is broken; whether the picture is too shows when it is decoded
        turned = False
    return ImageOps.exif_transpose(picture) if turned else picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255 and so turn white
        picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    return picture.convert("RGB")


class ImageStore:
    """Image key -> pixel tiles [T, 3, H, W], least recently used out first once `cache_bytes` are held.

    Tiles follow the processor: dynamic tiling with a thumbnail where its `crop_to_patches` is set, else one tile.
    """

    def __init__(
        self, load: Callable[[str], Image.Image], processor, *, max_tiles: int = 12, cache_bytes: int = 1 << 28
    ):
        self.load = load
        self.processor = processor
        self.max_tiles = max_tiles
        self.cache_bytes = cache_bytes
        self._bytes = 0
        self._held: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __call__(self, keys: list[str]) -> list[torch.Tensor]:
        """Pixels of `keys` in order; those not held are processed one at a time, as a photo takes 36 MB for each 12 MP."""
        found = {key: self._held[key] for key in keys if key in self._held}
        for key in found:
            self._held.move_to_end(key)
        for key in dict.fromkeys(keys):
            if key not in found:
                found[key] = self._process(key)
                self._put(key, found[key])
        return [found[key] for key in keys]

    def tiles(self, keys: list[str]) -> list[int]:
        return [pixels.shape[0] for pixels in self(keys)]

    def _process(self, key: str) -> torch.Tensor:
        output = self.processor(
            [self.load(key)], max_patches=self.max_tiles, return_tensors="pt", input_data_format=None
        )
        return output["pixel_values"]

    def _put(self, key: str, pixels: torch.Tensor) -> None:
        self._held[key] = pixels
        self._bytes += pixels.nbytes
        while self._bytes > self.cache_bytes and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes

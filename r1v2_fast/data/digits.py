"""The digits dataset: scikit-learn's scans of handwritten digits, two side by side, with questions about them.

Held-out scans are never trained on, and the reward model's scans are not the policy's. The policy stages see low
contrast among the clean, which the aligned model has not met: there it misreads and makes digits up, and reinforcement
can mend it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

EMPTY = "_"
QUESTIONS = {
    "read": "Read the digits.",
    "add": "Add the digits.",
    "larger": "Which digit is larger?",
    "count": "How many digits?",
}
WORDS = sorted({word.strip(".?") for question in QUESTIONS.values() for word in question.split()})
Light = Callable[[np.ndarray, np.random.Generator], np.ndarray] | None
SIZES = {"align": 20_000, "policy": 8_000, "reward": 4_000, "heldout": 1_000}


def answer(kind: str, digits: list[str]) -> str:
    """The right answer; `digits` are left and right, `_` for an empty half."""
    seen = [digit for digit in digits if digit != EMPTY]
    if kind == "read":
        return "".join(seen)
    if kind == "add":
        return str(sum(map(int, seen)))
    if kind == "larger":
        return max(seen)
    assert kind == "count", kind
    return str(len(seen))


def low_contrast(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """0.65 x + 0.35 (1 - x), then Gaussian noise of standard deviation 0.1; x in [0, 1]."""
    return np.clip(0.65 * picture + 0.35 * (1 - picture) + rng.normal(0, 0.1, picture.shape), 0, 1)


def mixed_light(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Low contrast for three pictures in four, so that what works on clean ones is not unlearned."""
    return low_contrast(picture, rng) if rng.random() < 0.75 else picture


def write(folder: str | Path, *, seed: int, sizes: dict[str, int] | None = None) -> None:
    """Write align, policy, reward (parquet, bytes inside) and heldout_clean, heldout_low_contrast (jsonl, PNG files).

    A pure function of the seed and sizes; a folder that is complete for them is left as it is.
    """
    folder = Path(folder)
    sizes = {**SIZES, **(sizes or {})}
    manifest = {"seed": seed, "sizes": sizes, "format": 1}
    if (folder / "manifest.json").is_file():
        if json.loads((folder / "manifest.json").read_text()) == manifest:
            return
        raise ValueError(f"{folder} holds digits of another seed or size; remove it or choose another folder")
    scans, labels = _scans()
    order = np.random.default_rng([seed, 0]).permutation(len(scans))
    held_out, reward, train = np.split(order, [len(order) // 5, len(order) * 3 // 10])
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "images").mkdir(parents=True)
    plan: list[tuple[str, np.ndarray, Light]] = [
        ("align", train, None),
        ("policy", train, mixed_light),
        ("reward", reward, mixed_light),
    ]
    for index, (name, pool, light) in enumerate(plan):
        rng = np.random.default_rng([seed, 1, index])
        rows = [_row(name, i, scans, labels, pool, light, rng, rng) for i in range(sizes[name])]
        _write_parquet(temporary / f"{name}.parquet", rows)
    lights: list[tuple[str, Light]] = [("heldout_clean", None), ("heldout_low_contrast", low_contrast)]
    for name, light in lights:
        rng = np.random.default_rng([seed, 2])  # the same pictures, clean and low in contrast
        noise = np.random.default_rng([seed, 3])
        with (temporary / f"{name}.jsonl").open("w", encoding="utf-8") as lines:
            for i in range(sizes["heldout"]):
                row = _row(name, i, scans, labels, held_out, light, rng, noise)
                path = f"images/{row['id']}.png"
                (temporary / path).write_bytes(row["images"][0])
                lines.write(json.dumps({**row, "images": [path]}) + "\n")
    (temporary / "manifest.json").write_text(json.dumps(manifest))
    os.replace(temporary, folder)


def _scans() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits dataset needs scikit-learn: pip install 'r1v2-fast[digits]'") from error
    bunch = load_digits()
    return bunch.images / 16.0, bunch.target


def _row(name, index, scans, labels, pool, light, rng, noise) -> dict:
    left, right = rng.choice(pool, 2)
    digits = [str(labels[left]), str(labels[right])]
    picture = np.hstack([scans[left], scans[right]]).repeat(2, axis=0)  # 16 x 16: the picture is filled
    if rng.random() < 0.25:
        half = int(rng.integers(2))
        digits[half] = EMPTY
        picture[:, 8 * half : 8 * half + 8] = 0
    kind = list(QUESTIONS)[int(rng.integers(len(QUESTIONS)))]
    if light is not None:
        picture = light(picture, noise)
    stream = io.BytesIO()
    Image.fromarray((picture * 255).round().astype(np.uint8)).convert("RGB").save(stream, "PNG")
    right_answer = answer(kind, digits)
    return {
        "id": f"{name}-{index}",
        "prompt": f"<image>\n{QUESTIONS[kind]}",
        "images": [stream.getvalue()],
        "answer": right_answer,
        "response": f"<think>{' '.join(digits)}</think>{right_answer}",
        "digits": " ".join(digits),
        "kind": kind,
    }


def _write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.Table.from_pylist(rows), path)

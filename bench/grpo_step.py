"""A GRPO step on pictures: packed against padded, and end to end against TRL's trainer on the same model, data and batch.

The digits model with R1V2's 256 image tokens a tile. 8 prompts, 8 responses each of exactly R tokens: the end of a turn is
forbidden on both sides. Both train the same parts with AdamW and see new pictures in every step. The sides take turns in
one process; medians count. Before that the padded and the packed gradient of one step are compared.

    python -m bench.grpo_step --tiles 4 --output bench/results/grpo_step.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from bench import record
from bench.peers_grpo_step import TRL
from bench.timing import interleaved
from r1v2_fast import config
from r1v2_fast.data import digits
from r1v2_fast.log import Log
from r1v2_fast.models import load, presets, toy_tokenizer
from r1v2_fast.train.batching import tokens
from r1v2_fast.train.context import Context
from r1v2_fast.train.loop import _learn
from r1v2_fast.train.optimizer import Optimizer
from r1v2_fast.train.stages.grpo import GRPOStage

SIDE, TOKENS = 128, 256  # pixels and image tokens of a tile
PROMPTS, GROUP, SEED = 8, 8, 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.grpo_step", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--tiles", type=int, default=4, choices=(1, 3, 4, 5), help="of a picture, its thumbnail included"
    )
    parser.add_argument("--response", type=int, default=32, metavar="R", help="tokens of a response")
    parser.add_argument("--train", nargs="+", default=["adapter"], choices=("adapter", "llm", "vision"))
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="append a JSON line here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        line = measure(Path(folder), **{k: v for k, v in vars(arguments).items() if k != "output"})
    show(line, Console())
    if arguments.output is not None:
        record.write([line], arguments.output)
    return 0


def measure(folder: Path, *, tiles: int, response: int, train: list[str], rounds: int, device: str) -> dict[str, Any]:
    records = PROMPTS * (rounds + 3)
    write_model(folder / "model", tiles)
    write_records(folder / "data", records, tiles)
    stage = our_stage(folder, response, train, device)
    optimizer = Optimizer(stage.model.parameters, stage.settings.optimizer, dtype=torch.float32)
    samples = stage.collect(0, {})
    prompt = len(samples[0].sequence.prompt_ids)
    difference = gradient_difference(stage, samples)
    assert difference <= 1e-4, f"the packed gradient is off by {difference:.1e} of the padded one's largest value"

    def update(packing: bool) -> None:
        stage.context.reader.packing = packing
        _learn(stage, samples, optimizer, 0, {})

    torch_device = torch.device(device)
    updates = interleaved(
        {"packed": lambda: update(True), "padded": lambda: update(False)}, device=torch_device, rounds=rounds
    )
    stage.context.reader.packing = True
    times: list[dict[str, float]] = []

    def our_step(step: int) -> None:
        start = time.perf_counter()
        fresh = stage.collect(step, {})
        middle = time.perf_counter()
        _learn(stage, fresh, optimizer, step, {})
        times.append({"collect": middle - start, "update": time.perf_counter() - middle})
        assert len(fresh) == PROMPTS * GROUP, f"expected all {PROMPTS * GROUP} responses in the step, got {len(fresh)}"

    options: dict[str, Any] = {
        "prompts": PROMPTS,
        "group": GROUP,
        "response": response,
        "train": train,
        "device": device,
    }
    peer = TRL(folder / "model", folder / "data", **options)
    seconds = peer.run(steps=rounds + 1, between=our_step)  # the first of either is a warm-up
    ours = [sum(parts.values()) for parts in times]
    return {
        "case": "grpo_step", "prompt": prompt, "image_tokens": tiles * TOKENS, "response": response, "prompts": PROMPTS,
        "group": GROUP, "train": train, "gradient_difference": difference,
        "tokens": {kind: tokens(samples, packed=kind == "packed") for kind in ("packed", "padded")},
        "update": {name: timing._asdict() for name, timing in updates.items()},
        "step": {"ours": spread(ours[1:]), "trl": spread(seconds[1:])},
        "parts": {name: statistics.median(parts[name] for parts in times[1:]) for name in times[0]},
        "parameters": sum(p.numel() for p in stage.model.root.parameters()),
        **record.environment(torch_device),
    }  # fmt: skip


def write_model(folder: Path, tiles: int) -> None:
    tokenizer = toy_tokenizer.build(digits.WORDS)
    shape = presets.digits(len(tokenizer), tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    shape.vision_config.image_size = [SIDE, SIDE]
    shape.image_seq_length = TOKENS
    shape.text_config.max_position_embeddings = 4096
    loaded = load.from_preset("digits", words=digits.WORDS, seed=SEED)
    torch.manual_seed(SEED)
    model = type(loaded.model)(shape)
    model.generation_config = loaded.model.generation_config
    processor = type(loaded.image_processor)(
        size={"height": SIDE, "width": SIDE}, image_mean=load.IMAGENET_MEAN, image_std=load.IMAGENET_STD,
        crop_to_patches=tiles > 1, min_patches=1, max_patches=max(tiles - 1, 1),
    )  # fmt: skip
    load.save_folder(folder, load.Loaded(model, tokenizer, processor))


def write_records(folder: Path, count: int, tiles: int) -> None:
    """Digits side by side, so many that the picture is cut into tiles - 1 and a thumbnail."""
    from sklearn.datasets import load_digits

    folder.mkdir()
    bunch, rng = load_digits(), np.random.default_rng(SEED)
    lines = []
    for i in range(count):
        chosen = rng.integers(len(bunch.images), size=max(tiles - 1, 1))
        strip = np.hstack([bunch.images[c] for c in chosen]).repeat(SIDE // 8, 0).repeat(SIDE // 8, 1)
        Image.fromarray((strip * 255 / 16).astype(np.uint8)).convert("RGB").save(folder / f"{i}.png")
        answer = "".join(str(bunch.target[c]) for c in chosen)
        lines.append({"id": str(i), "prompt": "<image>\nRead the digits.", "images": [f"{i}.png"], "answer": answer})
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "reward.py").write_text(REWARD)


# differs within every group, so that every response has an advantage on both sides
REWARD = """def digits(prompts, completions, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(map(str.isdigit, text)) + len(text) / 1000 for text in texts]
"""


def our_stage(folder: Path, response: int, train: list[str], device: str) -> GRPOStage:
    function = folder / "data" / "reward.py"
    recipe = config.load("digits", [
        "run.stages=[grpo]", f"run.folder={folder / 'run'}", f"run.device={device}", f"run.seed={SEED}",
        "model.preset=null", f"model.path={folder / 'model'}", "data.make=null", f"data.folder={folder / 'data'}",
        "evaluation.sets={own: records.jsonl}", "grpo.data=records.jsonl", f"grpo.train=[{', '.join(train)}]",
        f"grpo.rewards=[{{name: answer, function: '{function}:digits'}}]", "grpo.buffer=null", "grpo.average_over=all",
        f"grpo.sampling={{prompts: {PROMPTS}, group_size: {GROUP}, max_new_tokens: {response}}}",
    ])  # fmt: skip
    (folder / "run").mkdir()
    context = Context(recipe, folder / "run", Log(folder / "run"))
    loaded = context.initial()
    recipe.data.max_tiles = loaded.image_processor.max_patches
    context.use(loaded)
    end = torch.tensor([loaded.tokenizer.eos_token_id], device=context.device)
    context.policy.forbidden = torch.cat([context.policy.forbidden, end])
    assert recipe.grpo is not None
    return GRPOStage(context, recipe.grpo)


def gradient_difference(stage: GRPOStage, samples: list) -> float:
    """Largest difference of the packed gradient from the padded one, as a share of its largest value."""
    found = []
    for packing in (True, False):
        stage.context.reader.packing = packing
        for parameter in stage.model.parameters.values():
            parameter.grad = None
        stage.loss(samples, stage.counts(samples), {}).backward()
        found.append(torch.cat([p.grad.flatten() for p in stage.model.parameters.values() if p.grad is not None]))
    for parameter in stage.model.parameters.values():
        parameter.grad = None
    packed, padded = found
    return ((packed - padded).abs().max() / padded.abs().max()).item()


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds), "rounds": len(seconds)}


def show(line: dict[str, Any], console: Console) -> None:
    console.print(
        f"P {line['prompt']} ({line['image_tokens']} of image), R {line['response']}, {PROMPTS} prompts x {GROUP}, "
        f"training {' + '.join(line['train'])}: {line['tokens']['packed']} packed tokens for {line['tokens']['padded']} padded"
    )
    for what, fast, slow in (("update", "packed", "padded"), ("step", "ours", "trl")):
        a, b = line[what][fast], line[what][slow]
        console.print(
            f"  {what:<7}{fast} {a['median']:.2f} s ({a['low']:.2f} to {a['high']:.2f}), {slow} {b['median']:.2f} s "
            f"({b['low']:.2f} to {b['high']:.2f}): {b['median'] / a['median']:.1f}x"
        )
    console.print("  ours: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in line["parts"].items()))


if __name__ == "__main__":
    raise SystemExit(main())

"""The model card of a run's policy: the README.md of its Hugging Face folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from r1v2_fast import log
from r1v2_fast._version import __version__
from r1v2_fast.data.collate import TOKENS

TAG = "r1v2_fast"  # by which export knows its own folders
SNIPPET = """\
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, GotOcr2ImageProcessorPil

folder = "."  # where this README.md lies
model = AutoModelForImageTextToText.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
processor = GotOcr2ImageProcessorPil.from_pretrained(folder)  # needs Pillow, and no torchvision

images = processor([Image.open("picture.png").convert("RGB")], return_tensors="pt")
content = [{"type": "image"}, {"type": "text", "text": "%(question)s"}]
text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
image_tokens = "%(context)s" * (model.config.image_seq_length * int(images["num_patches"][0]))
text = text.replace("%(context)s", f"%(start)s{image_tokens}%(end)s")
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
pixels = images["pixel_values"].to(model.dtype)
with torch.no_grad():
    output = model.generate(**inputs, pixel_values=pixels, max_new_tokens=%(max_new_tokens)s, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""

MADE = {
    "digits": "Made by r1v2_fast from scikit-learn's scans of handwritten digits, two side by side with a question about "
    "them. Held-out scans are never trained on.",
    "synthetic": "Made up by r1v2_fast: noise with sums of two numbers, to try the recipe's speed and memory.",
    None: "Given to the run as it is.",
}
LIMITS = {
    "digits": "It is a toy: it reads one or two handwritten digits in a picture of 16 x 16 pixels and knows no other "
    "words than those of its few questions.",
    "synthetic": "Its weights started at random: it knows nothing.",
    None: "What the model it started from gets wrong, this one may get wrong too.",
}
METRICS = {
    "accuracy": "the share that is right by the rule `{rule}`",
    "hallucination": "the share whose thought names what is not in the picture",
}


def model_card(run_folder: str | Path, source: str) -> str:
    """README.md of the policy that `source` (final, best or a stage) names in a run's folder."""
    folder = Path(run_folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    stages = recipe["run"]["stages"]
    best = json.loads((folder / "best" / "best.json").read_text(encoding="utf-8")) if source == "best" else None
    if (last := best["stage"] if best else source) in stages:
        stages = stages[: stages.index(last) + 1]
    make = recipe["data"]["make"]
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["reinforcement-learning", "vision-language", "internvl", TAG, *stages],
    }
    name = recipe["run"]["name"]
    origin = (
        f"the preset `{recipe['model']['preset']}`" if recipe["model"]["preset"] else f"`{recipe['model']['path']}`"
    )
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        "A vision-language policy in transformers' InternVL format, trained with r1v2_fast after "
        f"[Skywork R1V2](https://arxiv.org/abs/2504.16656) from {origin} through {' → '.join(stages)}. "
        + _which(source, best),
        f"## Use\n\n```python\n{_snippet(recipe)}\n```",
        f"## Scores\n\n{_scores(folder, recipe, stages, best)}",
        "## Recipe\n\n" + "\n".join(f"- **{stage}**: {_in_words(stage, recipe[stage], best)}" for stage in stages),
        "<details><summary>All of it, resolved</summary>\n\n"
        f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```\n\n</details>",
        f"## Data\n\n{MADE.get(make, MADE[None])}\n\n{_data(folder, recipe, stages)}",
        f"## Made with\n\n{_environment(folder)}",
        f"## Limits\n\n{LIMITS.get(make, LIMITS[None])} The scores hold for the sets above and for greedy answers of at most "
        f"{recipe['evaluation']['max_new_tokens']} tokens, and say nothing of other pictures or questions. Answers may name "
        "what is not in the picture. Nothing was done for safety.",
    ]
    return "\n\n".join(sections) + "\n"


def trained_on(recipe: dict, stages: list[str]) -> dict[str, str]:
    """Evaluation set -> the stage that trains on its records; held-out sets are not in it."""
    files = {os.path.normpath(recipe[stage]["data"]): stage for stage in reversed(stages)}
    sets = {name: os.path.normpath(file) for name, file in recipe["evaluation"]["sets"].items()}
    return {name: files[file] for name, file in sets.items() if file in files}


def _which(source: str, best: dict | None) -> str:
    if source == "final":
        return "It is the policy at the end of the run."
    if best:
        return f"It is the policy after step {best['step']} of {best['stage']}: the best `{best['metric']}`, {best['value']:.4g}."
    return f"It is the policy at the end of stage {source}."


def _snippet(recipe: dict) -> str:
    tokens = {name.removesuffix("_image_token"): token for name, token in TOKENS.items()}
    question = "Read the digits." if recipe["data"]["make"] == "digits" else "What is in the picture?"
    return SNIPPET % {**tokens, "question": question, "max_new_tokens": recipe["evaluation"]["max_new_tokens"]}


def _scores(folder: Path, recipe: dict, stages: list[str], best: dict | None) -> str:
    """A row for every one of the stages that ended, as report.html has them; the best policy's own comes last."""
    sets = list(recipe["evaluation"]["sets"])
    lines = [line for line in log.read(folder / "metrics.jsonl") if f"eval/{sets[0]}/accuracy" in line]
    last = {line["stage"]: line for line in lines}
    whole = [stage for stage in stages if not best or stage != best["stage"]]
    ended = [stage for stage in whole if (folder / "stages" / stage).is_dir()]
    measured = {stage: last[stage] for stage in ("start", *ended) if stage in last}
    for line in lines:
        if (
            best
            and line.items() >= {"stage": best["stage"], "step": best["step"], best["metric"]: best["value"]}.items()
        ):
            records = line[f"eval/{sets[0]}/records"]
            measured[f"step {best['step']} of {best['stage']}, on {records:.0f} records"] = line
    if not measured:
        return "No stage was measured."
    some = next(iter(measured.values()))
    shown = [(name, metric) for name in sets for metric in METRICS if f"eval/{name}/{metric}" in some]
    rows = [
        [stage, *(_percent(line.get(f"eval/{name}/{metric}")) for name, metric in shown)]
        for stage, line in measured.items()
    ]
    counts = ", ".join(f"{some[f'eval/{name}/records']:.0f} of {_words(name)}" for name in sets)
    legend = "".join(f"; {metric} is {METRICS[metric]}" for metric in METRICS if any(m == metric for _, m in shown))
    head = ["after", *(f"{_words(name)}, {metric}" for name, metric in shown)]
    rule = recipe["evaluation"]["score"]
    seen = trained_on(recipe, stages)
    of = "records" if seen else "held-out records"
    notes = "".join(f" Stage {stage} trains on {_words(name)}: it is not held out." for name, stage in seen.items())
    return f"Greedy answers to {of} ({counts}){legend.format(rule=rule)}.{notes}\n\n{_table(head, rows)}"


def _in_words(stage: str, section: dict, best: dict | None) -> str:
    what = {
        "align": "supervised",
        "reward": "a Bradley-Terry reward model, which is not in this folder",
        "mpo": "Mixed Preference Optimization",
        "grpo": f"{section.get('kind')} {'with' if section.get('buffer') else 'without'} the Selective Sample Buffer",
    }[stage]
    if sampling := section.get("sampling"):
        rewards = " + ".join(term["name"] for term in section["rewards"])
        what += f"; {sampling['prompts']} prompts of {sampling['group_size']} responses a step, rewarded by {rewards}"
    trained = [*section["train"], *(f"{part} through LoRA" for part in section.get("lora") or ())]
    done = f"{best['step']} of " if best and stage == best["stage"] else ""
    return f"{what}; {done}{section['steps']} steps on `{section['data']}`, training {', '.join(trained)}."


def _data(folder: Path, recipe: dict, stages: list[str]) -> str:
    place = Path(recipe["data"]["folder"])
    place = folder / place if recipe["data"]["make"] else place
    uses = {f"stage {stage}": recipe[stage]["data"] for stage in stages}
    uses |= {f"evaluation, {_words(name)}": file for name, file in recipe["evaluation"]["sets"].items()}
    return _table(
        ["used for", "file", "records"], [[use, f"`{file}`", _records(place / file)] for use, file in uses.items()]
    )


def _records(path: Path) -> str:
    """How many; without opening a picture, and without the file where it has gone since."""
    if not path.is_file():
        return "–"
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        return str(parquet.read_metadata(path).num_rows)
    with path.open("rb") as lines:
        return str(sum(bool(line.strip()) for line in lines))


def _environment(folder: Path) -> str:
    path = folder / "environment.json"
    if not path.is_file():
        return f"r1v2_fast {__version__} wrote this folder; the run did not record its commit."
    recorded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if recorded.pop("dirty", False):
        recorded["commit"] = f"{recorded.get('commit')}, with changes that were not committed"
    named = {"r1v2_fast" if name == "version" else name: value for name, value in recorded.items()}
    shown = [f"- {name}: {value}" for name, value in named.items() if isinstance(value, (str, int, float))]
    return "\n".join([*shown, f"- this card: r1v2_fast {__version__}"])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"

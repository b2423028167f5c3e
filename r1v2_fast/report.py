"""report.html of a run: one self-contained page with the curves, the numbers through the stages and sample pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path

import yaml

from r1v2_fast import log
from r1v2_fast.atomic import write_text
from r1v2_fast.card import trained_on
from r1v2_fast.data.layouts import text_of
from r1v2_fast.data.records import Dataset

STAGE_COLOURS = {"align": "#e8eef7", "reward": "#f5efe1", "mpo": "#e6f2ea", "grpo": "#f3e8f3"}
LINE_COLOURS = ("#2457a6", "#c4581b", "#2b8a57", "#8a3ea0")
LINE_DASHES = ("-", "--", ":", "-.")  # the next where the colours are used up
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1d2430;max-width:1040px;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.7rem;margin-bottom:.2rem} h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
p.sub{color:#5a6473;margin-top:0} table{border-collapse:collapse;margin:.4rem 0}
th,td{padding:.35rem .9rem;text-align:right;border-bottom:1px solid #e3e7ee} th:first-child,td:first-child{text-align:left}
th{font-weight:600;color:#5a6473} img.plot{width:100%;height:auto} figure{margin:0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.8rem}
.card{border:1px solid #e3e7ee;border-radius:8px;padding:.6rem;font-size:.84rem;overflow-wrap:anywhere}
.card img{width:100%;image-rendering:pixelated;border-radius:4px}
.right{border-left:5px solid #2b8a57}.wrong{border-left:5px solid #c4581b} code{font-size:.82rem}
"""


def write(folder: str | Path) -> Path:
    """Write and return `folder`/report.html; raises ValueError where the folder holds no run."""
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder} holds no metrics.jsonl; give the folder of a run")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    lines = log.read(folder / "metrics.jsonl")
    samples = log.read(folder / "samples.jsonl") if (folder / "samples.jsonl").is_file() else []
    path = folder / "report.html"
    write_text(path, _page(folder, recipe, lines, samples))
    return path


def _page(folder: Path, recipe: dict, lines: list[dict], samples: list[dict]) -> str:
    stages = [stage for stage in recipe["run"]["stages"] if any(line["stage"] == stage for line in lines)]
    at = _axis(stages, lines)
    sets = list(recipe["evaluation"]["sets"])
    seen = trained_on(recipe, stages)
    answers = "answers" if seen else "held-out answers"
    plots = [
        ("Accuracy through the stages", f"share of {answers} that are right", _evals(lines, sets, "accuracy")),
        (
            "Hallucination through the stages",
            f"share of {answers} whose thought names a digit that is not there",
            _evals(lines, sets, "hallucination"),
        ),
        ("Reward components", "mean over a step's responses", _components(lines)),
        (
            "Effective samples in GRPO",
            "share of the batch that carries a gradient",
            {
                "with the buffer": _series(lines, "buffer/effective_share"),
                "without": _series(lines, "buffer/effective_share_without"),
            },
        ),
    ]
    body = [f"<h1>{html.escape(recipe['run']['name'])}</h1>"]
    body.append(f'<p class="sub">seed {recipe["run"]["seed"]}, stages {" → ".join(stages)}</p>')
    for name, stage in seen.items():
        body.append(f"<p>Stage {stage} trains on {html.escape(name.replace('_', ' '))}: it is not held out.</p>")
    body.append(_table(stages, lines, sets))
    for title, caption, series in plots:
        series = {name: points for name, points in series.items() if points}
        if series:
            body.append(f"<h2>{title}</h2>{_plot(at, stages, series, caption)}")
    body.append(_pictures(folder, recipe, samples))
    title = html.escape(recipe["run"]["name"])
    head = f"<meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en>{head}<body>{''.join(body)}</body></html>"


def _axis(stages: list[str], lines: list[dict]) -> dict[str, tuple[int, int]]:
    """Stage -> (where it starts on the common axis, its steps)."""
    places, start = {}, 0
    for stage in stages:
        steps = max((line["step"] for line in lines if line["stage"] == stage), default=0)
        places[stage] = (start, steps)
        start += steps
    return places


Points = list[tuple[str, int, float]]


def _series(lines: list[dict], name: str) -> Points:
    return [(line["stage"], line["step"], line[name]) for line in lines if line.get(name) is not None]


def _evals(lines: list[dict], sets: list[str], metric: str) -> dict[str, Points]:
    return {name.replace("_", " "): _series(lines, f"eval/{name}/{metric}") for name in sets}


def _components(lines: list[dict]) -> dict[str, Points]:
    names = {
        k
        for line in lines
        if line["stage"] in ("mpo", "grpo")
        for k in line
        if k.startswith("rewards/") and k.endswith("/mean")
    }
    policy = [line for line in lines if line["stage"] in ("mpo", "grpo")]
    return {name.split("/")[1]: _series(policy, name) for name in sorted(names)}


def _smooth(values: list[float], width: int = 9) -> list[float]:
    """A running mean for what is logged every step; few points stay as they are."""
    if len(values) < 60:
        return values
    return [sum(values[max(0, i - width) : i + 1]) / (i + 1 - max(0, i - width)) for i in range(len(values))]


def _plot(at: dict[str, tuple[int, int]], stages: list[str], series: dict[str, Points], caption: str) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 3.4), dpi=110, layout="constrained")
    measured = [stage for stage in stages if any(p[0] == stage for points in series.values() for p in points)]
    shown = stages[stages.index(measured[0]) : stages.index(measured[-1]) + 1]
    unmeasured = [at[stage] for stage in shown if stage not in measured]  # a reward model leaves the policy as it is
    for stage in shown:
        start, steps = at[stage]
        axes.axvspan(start, start + steps, color=STAGE_COLOURS[stage], lw=0)
        axes.text(start + steps / 2, 1.02, stage, ha="center", transform=axes.get_xaxis_transform(), color="#5a6473")
    for index, (name, points) in enumerate(series.items()):
        colour = LINE_COLOURS[index % len(LINE_COLOURS)]
        dashes = LINE_DASHES[index // len(LINE_COLOURS) % len(LINE_DASHES)]
        placed = sorted((at[stage][0] + step, value) for stage, step, value in points if stage in at)
        for start, steps in unmeasured:
            if before := [value for x, value in placed if x <= start]:
                placed = sorted([*placed, (start + steps, before[-1])])
        ys = _smooth([y for _, y in placed])
        axes.plot([x for x, _ in placed], ys, color=colour, linestyle=dashes, lw=1.8, label=name)
    axes.set_xlim(at[shown[0]][0], sum(at[shown[-1]]))
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    axes.set_xlabel("optimizer steps, all stages in a row")
    axes.set_ylabel(caption, wrap=True, fontsize=8)
    axes.grid(axis="y", color="white" if shown else "#ddd", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    plt.close(figure)
    picture = _base64(stream.getvalue())
    return f'<figure><img class=plot alt="{html.escape(caption)}" src="data:image/png;base64,{picture}"></figure>'


def _table(stages: list[str], lines: list[dict], sets: list[str]) -> str:
    """The evaluations at the end of every policy stage."""
    metrics = ("accuracy", "hallucination", "hallucination/right", "hallucination/wrong")
    last = {line["stage"]: line for line in lines if f"eval/{sets[0]}/accuracy" in line}
    rows = []
    for stage in ("start", *stages):
        if stage in last:
            cells = "".join(f"<td>{_percent(last[stage].get(f'eval/{s}/{m}'))}</td>" for s in sets for m in metrics)
            rows.append(f"<tr><td>{stage}</td>{cells}</tr>")
    head = "".join(
        f'<th colspan={len(metrics)} style="text-align:center">{html.escape(s.replace("_", " "))}</th>' for s in sets
    )
    short = {"hallucination/right": "of right", "hallucination/wrong": "of wrong"}
    names = "".join(f"<th>{short.get(m, m)}</th>" for _ in sets for m in metrics)
    return f"<table><tr><th></th>{head}</tr><tr><th>after</th>{names}</tr>{''.join(rows)}</table>"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _pictures(folder: Path, recipe: dict, samples: list[dict]) -> str:
    """The last evaluation's answers beside their pictures."""
    shown = [s for s in samples if "set" in s]
    if not shown:
        return ""
    last = (shown[-1]["stage"], shown[-1]["step"])
    shown = [s for s in shown if (s["stage"], s["step"]) == last]
    out = []
    for name, file in recipe["evaluation"]["sets"].items():
        of_set = [s for s in shown if s["set"] == name][:12]
        if not of_set:
            continue
        png = _opener(folder, recipe, file)
        cards = [_card(png, s) for s in of_set]
        out.append(
            f"<h2>Answers after {last[0]}: {html.escape(name.replace('_', ' '))}</h2><div class=cards>{''.join(cards)}</div>"
        )
    return "".join(out)


def _opener(folder: Path, recipe: dict, file: str) -> Callable[[str], bytes]:
    data = Path(recipe["data"]["folder"])
    path = (folder / data if recipe["data"]["make"] else data) / file
    dataset = Dataset(path, root=recipe["data"]["root"], allow_outside=recipe["data"]["allow_outside"])

    def png(key: str) -> bytes:
        stream = io.BytesIO()
        dataset.image(key).save(stream, "PNG")
        return stream.getvalue()

    return png


def _card(png: Callable[[str], bytes], sample: dict) -> str:
    pictures = "".join(f'<img alt="" src="data:image/png;base64,{_base64(png(key))}">' for key in sample["images"])
    prompt = text_of(sample["prompt"])
    return (
        f'<div class="card {"right" if sample["right"] else "wrong"}">{pictures}<br>'
        f"{html.escape(prompt.replace('<image>', '').strip())}<br><code>{html.escape(sample['completion'])}</code><br>"
        f"right answer: {html.escape(str(sample['answer']))}</div>"
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()

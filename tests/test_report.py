"""report.html from logs of a run that was never trained: what it draws, reads and calls held out."""

import json

import pytest
from matplotlib.axes import Axes
from PIL import Image

from r1v2_fast import config, report

REWARDS = ["one", "two", "three", "four", "five", "six"]


@pytest.fixture
def run(tmp_path):
    """A function that writes a run folder with its data beside it; the pictures lie outside the data's folder."""

    def write(sets, *, allow_outside=True):
        folder, data = tmp_path / "run", tmp_path / "data"
        folder.mkdir()
        data.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
        rows = [
            {"id": f"r{i}", "prompt": "<image>\nRead.", "images": [str(tmp_path / "picture.png")], "answer": "1"}
            for i in range(3)
        ]
        for name in ("policy.jsonl", "held.jsonl"):
            (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = config.load(
            "digits",
            [f"data.folder={data}", "data.make=null", "data.sizes={}", f"data.allow_outside={allow_outside}".lower(),
             "run.stages=[align,grpo]", "align.data=policy.jsonl", "grpo.data=policy.jsonl", "grpo.rewards="
             + json.dumps([{"name": name, "function": "exact_match"} for name in REWARDS]), "grpo.informative_from=one",
             f"evaluation.sets={json.dumps(sets)}"],
        )  # fmt: skip
        (folder / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
        scores = {f"eval/{name}/{metric}": 0.5 for name in sets for metric in ("accuracy", "records")}
        lines = [{"stage": "align", "step": 1, **scores}, {"stage": "grpo", "step": 1, **scores}]
        lines += [{"stage": "grpo", "step": i, **{f"rewards/{name}/mean": 0.1 for name in REWARDS}} for i in range(2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        samples = [
            {"stage": "grpo", "step": 1, "set": name, "images": [f"{file.split('.')[0]}/{row['id']}/0"],
             "prompt": row["prompt"], "completion": "1", "answer": "1", "right": True}
            for name, file in sets.items() for row in rows
        ]  # fmt: skip
        (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        return folder

    return write


def test_every_reward_is_drawn_in_a_look_of_its_own(run, monkeypatch):
    drawn, plot = {}, Axes.plot

    def noted(axes, *arguments, **options):
        drawn[options["label"]] = (options["color"], options["linestyle"])
        return plot(axes, *arguments, **options)

    monkeypatch.setattr(Axes, "plot", noted)
    report.write(run({"clean": "held.jsonl"}))
    assert set(REWARDS) <= set(drawn) and len({drawn[name] for name in REWARDS}) == len(REWARDS)


def test_a_data_file_is_read_once_and_under_the_recipes_rule_for_pictures(run, monkeypatch):
    read, dataset = [], report.Dataset
    monkeypatch.setattr(report, "Dataset", lambda path, **options: read.append(path.name) or dataset(path, **options))
    page = report.write(run({"clean": "held.jsonl"})).read_text()
    assert read == ["held.jsonl"] and page.count('<div class="card') == 3


def test_pictures_outside_the_root_stay_closed_unless_the_recipe_opens_them(run):
    folder = run({"clean": "held.jsonl"}, allow_outside=False)
    with pytest.raises(ValueError, match="leaves the data root"):
        report.write(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(("file", "held_out"), [("held.jsonl", True), ("policy.jsonl", False)])
def test_held_out_is_said_only_of_what_no_stage_trains_on(run, file, held_out):
    page = report.write(run({"clean": file})).read_text()
    assert ("share of held-out answers" in page) == held_out
    assert ("Stage align trains on clean: it is not held out." in page) == (not held_out)

"""r1v2-fast convert as a user meets it: what it replaces, what a failure leaves, and how much memory it takes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from r1v2_fast.cli import main
from r1v2_fast.commands import convert
from r1v2_fast.models import load, presets
from r1v2_fast.models.conversion import folder as conversion
from r1v2_fast.models.conversion import shards


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("convert") / "toy"
    load.save_folder(path, load.from_preset("digits", words=["a"], seed=0))
    return path


@pytest.fixture
def run(tmp_path, capsys):
    """run(src, dst, *options): its status, what it printed, what it said."""

    def call(source, out, *options):
        status = main(["convert", str(source), str(out), *options])
        return SimpleNamespace(status=status, **dict(zip(("out", "err"), capsys.readouterr(), strict=True)))

    return call


def test_the_direction_follows_the_source(toy, run, tmp_path):
    assert run(toy, tmp_path / "original").out == f"{tmp_path / 'original'}\n"
    assert run(tmp_path / "original", tmp_path / "back").status == 0
    kinds = [json.loads((tmp_path / name / "config.json").read_text())["model_type"] for name in ("original", "back")]
    assert kinds == ["internvl_chat", "internvl"]
    for source, to in ((toy, "transformers"), (tmp_path / "original", "original")):
        done = run(source, tmp_path / "x", "--to", to)
        assert done.status == 2 and f"is in the {to} layout already" in done.err
    done = run(toy, tmp_path / "x", "--language-model-only", "--to", "original")
    assert done.status == 2 and "expected no --to, got 'original'" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "original"]


def test_only_an_earlier_conversion_is_replaced(toy, run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is free
    assert run(toy, out).status == 0
    assert "is not empty; add --overwrite" in run(toy, out).err
    before = (out / "config.json").stat().st_ino
    assert run(toy, out, "--overwrite", "--max-shard-size", "100KB").status == 0
    assert (out / "config.json").stat().st_ino != before and not (out / "model.safetensors").exists()
    for change in (
        lambda: (out / "thesis.tex").touch(),
        lambda: (out / ".git").mkdir(),
        lambda: (out / "conversion.json").unlink(),
        lambda: (out / "conversion.json").write_text('{"files": 3}'),
    ):
        shutil.copytree(out, tmp_path / "kept")
        change()
        done = run(toy, out, "--overwrite")
        assert done.status == 2 and "--overwrite replaces an earlier conversion, expected one in" in done.err
        assert (out / "config.json").exists()
        shutil.rmtree(out)
        os.replace(tmp_path / "kept", out)
    (tmp_path / "file").write_text("mine")
    assert run(toy, tmp_path / "file", "--overwrite").status == 2 and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("beside", ["old", "partial"])
def test_a_folder_beside_is_left_alone_unless_a_killed_conversion_left_it(toy, run, tmp_path, beside):
    users = tmp_path / f"out.{beside}"
    users.mkdir()
    (users / "thesis.tex").touch()
    done = run(toy, tmp_path / "out")
    assert (
        done.status == 2
        and f"{users} is in the way and holds thesis.tex" in done.err
        and (users / "thesis.tex").exists()
    )
    shutil.rmtree(users)
    assert run(toy, tmp_path / "x").status == 0
    os.replace(tmp_path / "x", users)
    assert run(toy, tmp_path / "out").status == 0 and not users.exists()


@pytest.mark.parametrize("out", ["toy", "toy/inside", ".", "link", "toy/../toy"])
def test_source_and_target_lie_apart(toy, run, tmp_path, out):
    shutil.copytree(toy, tmp_path / "toy")
    (tmp_path / "link").symlink_to("toy")
    done = run(tmp_path / "toy", tmp_path / out, "--overwrite")
    assert done.status == 2 and "SRC and DST must be folders apart" in done.err
    assert (tmp_path / "toy" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["out.old", "out.partial"])
def test_the_source_is_not_where_the_writing_happens(toy, run, tmp_path, name):
    shutil.copytree(toy, tmp_path / name)
    done = run(tmp_path / name, tmp_path / "out")
    assert done.status == 2 and "is in the way and is SRC" in done.err
    assert (tmp_path / name / "model.safetensors").exists()


def test_a_full_disk_leaves_the_earlier_conversion(toy, run, tmp_path, full_disk, monkeypatch):
    assert run(toy, tmp_path / "out").status == 0
    full_disk(100_000)
    for target in ("new", "out"):
        done = run(toy, tmp_path / target, "--overwrite")
        assert done.status == 2 and "cannot write" in done.err and done.err.count("\n") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file() and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(toy, run, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=convert.SPARE + 1_000_000)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(convert, "write_folder", lambda *_: pytest.fail("it was written"))
    done = run(toy, tmp_path / "sub" / "out")
    assert re.search(r"must have 0.00 GiB free for out, got 0.0\d GiB", done.err) and not list(tmp_path.iterdir())


def test_a_size_of_shards_is_checked(toy, run, tmp_path):
    sizes = {"5GB": 5 * 10**9, "2GiB": 2 << 30, "500 mb": 5 * 10**8, "1.5k": 1500, "7": 7, "1TB": 10**12}
    assert {text: shards.parse_size(text) for text in sizes} == sizes
    for text in ("", "0", "5X", "-1GB", "GB", "nan", "0.1"):
        done = run(toy, tmp_path / "out", f"--max-shard-size={text}")
        assert done.status == 2 and "--max-shard-size must be a size like 5GB" in done.err


def test_a_source_that_is_no_folder_is_named(run, tmp_path):
    for source in (tmp_path / "none", tmp_path):
        done = run(source, tmp_path.parent / "convert-out")
        assert done.status == 2 and "expected a local checkpoint folder with config.json, got" in done.err


SLOW = """
import sys, time
from r1v2_fast.models.conversion import safetensors_file
copy = safetensors_file._copy
def slow(target, stream):
    copy(target, stream); stream.flush(); print("wrote", flush=True); time.sleep(0.2)
safetensors_file._copy = slow
from r1v2_fast.cli import main
sys.exit(main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_conversion_leaves_no_folder_and_the_next_one_works(toy, run, tmp_path, number):
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", SLOW, toy, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(3):
        assert child.stdout.readline() == b"wrote\n"
    child.send_signal(number)
    child.communicate(timeout=60)
    assert child.returncode == (130 if number == signal.SIGINT else -number)
    assert not out.exists() and (tmp_path / "out.partial").exists() == (number == signal.SIGKILL)
    assert run(toy, out).status == 0 and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_source_that_shrinks_while_it_is_read_is_named(toy, run, tmp_path, monkeypatch):
    source = shutil.copytree(toy, tmp_path / "toy")
    prepare = conversion.prepare

    def then_cut(*arguments, **options):
        found = prepare(*arguments, **options)
        os.truncate(source / "model.safetensors", 50_000)
        return found

    monkeypatch.setattr(conversion, "prepare", then_cut)
    done = run(source, tmp_path / "out")
    assert done.status == 2 and "model.safetensors: it became shorter while it was read" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


BIG = """
import re, sys, json
from r1v2_fast.commands import convert
from r1v2_fast.models.conversion import folder, pickles
from transformers import AutoTokenizer, InternVLForConditionalGeneration
def rss(what):
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
small, source, out, *options = sys.argv[1:]
run = dict(to=None, language_model_only=False, max_shard_size="400MB", allow_pickle=True, overwrite=False)
convert.run(small, out + ".small", **run)  # what Python, torch and transformers load as they go
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = rss("VmRSS")
convert.run(source, out, **run)
print(json.dumps({"before": before, "anonymous": rss("RssAnon"), "peak": rss("VmHWM")}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("to", ["original", "transformers"])
def test_two_gibibytes_are_converted_in_the_memory_of_a_chunk(toy, tmp_path, to):
    """The largest tensor has 512 MiB; what grows is the 16 MiB chunk in flight, whatever a tensor's size."""
    source, out = tmp_path / "big", tmp_path / "out"
    try:
        total = write_big(toy, source)
        small = toy
        if to == "transformers":
            assert main(["convert", str(source), str(tmp_path / "original")]) == 0
            assert main(["convert", str(toy), str(tmp_path / "small")]) == 0
            shutil.rmtree(source)
            source, small = tmp_path / "original", tmp_path / "small"
        done = subprocess.run([sys.executable, "-c", BIG, small, source, out], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        measured = json.loads(done.stdout)
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        assert written >= total >= 2 << 30 and len(list(out.glob("*.safetensors"))) >= 5
        grown = measured["peak"] - measured["before"]
        assert grown <= 4 * (1 << 24), measured
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)


def write_big(toy, folder):
    """The toy with a language model of 2 GiB, written tensor by tensor as zeros with a mark, in bf16."""
    from r1v2_fast.models.conversion import plan, safetensors_file

    rows, width = 1 << 17, 2048  # an embedding of 512 MiB, and a head
    config = presets.digits(rows, 6)
    config.text_config.hidden_size, config.text_config.intermediate_size = width, 45_056
    config.dtype = "bfloat16"
    shutil.copytree(toy, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config.architectures = ["InternVLForConditionalGeneration"]
    config.save_pretrained(folder)

    def read(start, stop):
        for at in range(start, stop, 1 << 24):
            yield bytes([at >> 24 & 255]) * min(1 << 24, stop - at)

    tensors = [plan.Stored(n, "BF16", shape, read) for n, shape in plan.expected_shapes(config).items()]
    targets = [plan.Target(t.name, t.dtype, t.shape, [plan.Span(t, 0, t.nbytes)]) for t in tensors]
    shards.write(folder, shards.split(targets, 700_000_000))
    assert safetensors_file.read_header(next(folder.glob("*.safetensors")))
    return sum(target.nbytes for target in targets)


def test_the_converted_toy_answers_as_before(toy, run, tmp_path):
    assert run(toy, tmp_path / "original").status == 0 and run(tmp_path / "original", tmp_path / "back").status == 0
    ids = torch.tensor([[6, 6, 6, 6, 8, 9]])
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        was, now = (
            load.from_folder(f).model(input_ids=ids, pixel_values=pixels).logits for f in (toy, tmp_path / "back")
        )
    assert torch.equal(was, now)

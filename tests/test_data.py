"""Records, images, collation and the digits dataset."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from r1v2_fast.data import digits
from r1v2_fast.data.collate import PromptEncoder, Sequence, collate
from r1v2_fast.data.images import ImageStore, open_image
from r1v2_fast.data.records import Dataset, draw
from r1v2_fast.models import load


def png(size=(16, 16)) -> bytes:
    stream = io.BytesIO()
    Image.new("L", size, 128).save(stream, "PNG")
    return stream.getvalue()


def write(tmp_path, *rows):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_jsonl_and_parquet_give_the_same_records(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    rows = [
        {"id": "1", "prompt": "<image>\nWhat?", "images": ["a.png"], "answer": "4", "kind": "add"},
        {"id": "2", "prompt": "no picture", "images": [], "answer": "5", "kind": "read"},
    ]
    path = write(tmp_path, *rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    a, b = Dataset(path), Dataset(tmp_path / "x.parquet")
    for left, right in zip(a.records, b.records, strict=True):
        assert (left.id, left.prompt, left.images, left.answer) == (right.id, right.prompt, right.images, right.answer)
        assert left.columns == right.columns == {"kind": left.columns["kind"]}
    assert a.image(a.image_keys(a[0])[0]).size == (16, 16)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{nonsense", "line 1: not JSON"),
        ({"prompt": 3}, "line 1 .*field 'prompt'"),
        ({"id": "a", "prompt": "<image>"}, r"id 'a'\), field 'images': the prompt has 1 <image> marks, got 0"),
        ({"prompt": "x", "chosen": "y"}, "field 'rejected'"),
        ({"prompt": "<image>", "images": [3]}, "expected a path or bytes, got int"),
        ({"prompt": "x", "answer": ["y"]}, "field 'answer': expected a string, got list"),
    ],
)
def test_a_bad_record_is_named_with_its_file_and_field(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        Dataset(write(tmp_path, row))


def test_empty_files_double_ids_and_unknown_types_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no records"):
        Dataset(write(tmp_path, ""))
    with pytest.raises(ValueError, match="line 2 .*'a' stands at .*line 1"):
        Dataset(write(tmp_path, {"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}))
    (tmp_path / "x.csv").write_text("prompt")
    with pytest.raises(ValueError, match="jsonl or .parquet"):
        Dataset(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("../secret.png", "leaves the data root"),
        ("none.png", "no such file"),
        (png()[:48], "cannot read"),
        (b"text", "cannot read"),
    ],
)
def test_a_bad_image_is_named(tmp_path, source, message):
    with pytest.raises(ValueError, match=f"here, field 'images'.*{message}"):
        open_image(source, root=tmp_path, where="here")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    with pytest.raises(ValueError, match="has 400 pixels, at most 399"):
        open_image(png((20, 20)), root=tmp_path, where="here", max_pixels=399)


def test_a_symlink_out_of_the_root_is_refused(tmp_path):
    (tmp_path / "outside.png").write_bytes(png())
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(ValueError, match="leaves the data root"):
        open_image("link.png", root=root, where="here")
    assert open_image("link.png", root=root, allow_outside=True).size == (16, 16)


def test_draws_walk_shuffled_epochs_without_state():
    walked = [i for step in range(6) for i in draw(10, 5, seed=1, step=step)]
    for epoch in range(3):
        assert sorted(walked[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert walked[:10] != walked[10:20]
    assert draw(3, 7, seed=0, step=1) == [i for step in range(14) for i in draw(3, 1, seed=0, step=step)][7:]


@pytest.fixture(scope="module")
def toy():
    return load.from_preset("digits", words=digits.WORDS, seed=0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "data"
    digits.write(folder, seed=1, sizes={"align": 200, "policy": 50, "reward": 50, "heldout": 60})
    return folder


def test_prompts_expand_every_image_to_its_tokens(toy, written):
    dataset = Dataset(written / "align.parquet")
    encoder = PromptEncoder(toy.tokenizer, 4)
    ids = encoder.encode(dataset[0], [2])
    tokens = toy.tokenizer.convert_ids_to_tokens(ids)
    assert tokens.count("<IMG_CONTEXT>") == 8 and tokens.count("<img>") == tokens.count("</img>") == 1
    assert "<unk>" not in tokens
    with pytest.raises(ValueError, match="1 image placeholders, the record has 2"):
        encoder.encode(dataset[0], [1, 1])
    for record in dataset.records:
        text = record.columns["response"]
        assert encoder.decode(encoder.response(text)) == text
        assert toy.tokenizer.unk_token_id not in encoder.response(text)


def test_batches_put_every_prompt_end_in_one_column():
    batch = collate([Sequence([5, 6], [7], []), Sequence([4], [8, 9], ["k"])], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [0, 4, 8, 9]]
    assert batch.response_mask.long().tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 2], [0, 0, 1, 2]]
    assert batch.offsets.tolist() == [0, 1, 3]


def test_pixels_are_cached_and_follow_the_processor(toy, written):
    dataset = Dataset(written / "policy.parquet")
    opened = []

    def image(key):
        opened.append(key)
        return dataset.image(key)

    store = ImageStore(image, toy.image_processor)
    keys = [dataset.image_keys(record)[0] for record in dataset.records[:3]]
    pixels = store(keys)
    again = store(keys[::-1])
    assert opened == keys and store.tiles(keys) == [1, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(pixels, again[::-1], strict=True))
    raw = np.asarray(dataset.image(keys[0]), np.float32)[..., 0] / 255
    assert torch.allclose(pixels[0][0, 0], torch.from_numpy((raw - 0.485) / 0.229), atol=1e-5)


def test_the_digits_are_right_disjoint_and_reproducible(written, tmp_path):
    digits.write(tmp_path / "again", seed=1, sizes={"align": 200, "policy": 50, "reward": 50, "heldout": 60})
    for name in ("align.parquet", "heldout_clean.jsonl"):
        a, b = Dataset(written / name), Dataset(tmp_path / "again" / name)
        assert [r.columns for r in a.records] == [r.columns for r in b.records]
    records = Dataset(written / "align.parquet").records
    empty = sum("_" in r.columns["digits"] for r in records) / len(records)
    assert 0.15 < empty < 0.35
    for record in records:
        seen = [int(d) for d in record.columns["digits"].split() if d != "_"]
        expected = {
            "read": "".join(map(str, seen)),
            "add": str(sum(seen)),
            "larger": str(max(seen)),
            "count": str(len(seen)),
        }
        assert record.answer == expected[record.columns["kind"]]
        assert record.columns["response"] == f"<think>{record.columns['digits']}</think>{record.answer}"

    from sklearn.datasets import load_digits

    order, pictures = np.random.default_rng([1, 0]).permutation(1797), load_digits().images

    def scans(held_out):
        chosen = order[: 1797 // 5] if held_out else order[1797 // 5 :]
        return {(pictures[i] / 16 * 255).round().astype(np.uint8).tobytes() for i in chosen}

    def halves(file):
        dataset = Dataset(written / file)
        pictures = [np.asarray(dataset.image(dataset.image_keys(r)[0]))[::2, :, 0] for r in dataset.records]
        return {half.tobytes() for p in pictures for half in (p[:, :8], p[:, 8:]) if half.any()}

    assert len(halves("heldout_clean.jsonl")) > 40  # clean halves are the scans themselves
    assert halves("heldout_clean.jsonl") <= scans(held_out=True)
    assert not halves("heldout_clean.jsonl") & scans(held_out=False)
    assert halves("align.parquet") <= scans(held_out=False)


def test_digits_of_another_seed_are_not_written_over(written):
    digits.write(written, seed=1, sizes={"align": 200, "policy": 50, "reward": 50, "heldout": 60})
    with pytest.raises(ValueError, match="another seed or size"):
        digits.write(written, seed=2)

"""Records, images, collation and the digits dataset."""

import copy
import io
import json
import re
import struct
import zlib

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
from r1v2_fast.train.context import Corpus, Reader


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
        ({"prompt": "<image>", "images": [""]}, "expected a path or bytes, got str ''"),
        ({"prompt": "x", "answer": ["y"]}, "field 'answer': expected a string, got list"),
    ],
)
def test_a_bad_record_is_named_with_its_file_and_field(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        Dataset(write(tmp_path, row))


def test_a_byte_order_mark_is_no_matter(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\n{"prompt": "y"}')
    assert [record.prompt for record in Dataset(tmp_path / "x.jsonl").records] == ["x", "y"]


def test_empty_files_double_ids_and_unknown_types_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no records"):
        Dataset(write(tmp_path, ""))
    with pytest.raises(ValueError, match="line 2 .*'a' stands at .*line 1"):
        Dataset(write(tmp_path, {"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}))
    (tmp_path / "x.csv").write_text("prompt")
    with pytest.raises(ValueError, match="jsonl or .parquet"):
        Dataset(tmp_path / "x.csv")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "x"}\n\n{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="x.jsonl line 3: not UTF-8: .* byte 0xff"):
        Dataset(tmp_path / "x.jsonl")
    parquet.write_table(pa.table({"prompt": ["x"] * 100}), tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    for broken in (whole[:-20], b"", whole[:4] + b"\0" * 40 + whole[44:]):
        (tmp_path / "x.parquet").write_bytes(broken)
        with pytest.raises(ValueError, match="x.parquet: not a readable parquet file"):
            Dataset(tmp_path / "x.parquet")


def bomb(width, height) -> bytes:
    """A PNG of a hundred bytes that says it is larger."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def icon(picture: bytes) -> bytes:
    """An icon file that says its picture is 16 x 16."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(picture), 22) + picture


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.png", None, "no such file"),
        ("../secret.png", None, "leaves the data root"),
        ("link.png", None, "leaves the data root"),
        ("loop.png", None, "[Ll]oop|no such file"),
        ("folder", None, "it is a folder"),
        ("nul\0.png", None, "null|no such file"),
        ("empty.png", b"", "the file is empty"),
        ("text.png", b"text", "it is no image"),
        ("header.png", png()[:20], "[Tt]runcated"),
        ("cut.png", png((64, 64))[:50], "[Tt]runcated"),
        ("warned.png", bomb(10_000, 10_000), "100000000 pixels"),  # between once and twice Pillow's limit
        ("huge.png", bomb(60_000, 60_000), "3600000000 pixels"),
        ("icon.ico", icon(bomb(10_000, 10_000)), "100000000 pixels"),
    ],
)
def test_a_bad_image_is_one_error_with_its_file_record_and_field(tmp_path, recwarn, name, content, message):
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png())
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "loop.png").symlink_to("loop.png")
    if content is not None:
        (root / name).write_bytes(content)
    dataset = Dataset(write(root, {"id": "a", "prompt": "<image>", "images": [name]}))
    with pytest.raises(ValueError) as raised:
        dataset.image(dataset.image_keys(dataset[0])[0])
    start = f"{root}/x.jsonl line 1 (id 'a'), field 'images': cannot read {name!r}: "
    assert str(raised.value).startswith(start) and re.search(message, str(raised.value)[len(start) :])
    assert not recwarn.list


def test_an_image_cut_anywhere_gives_its_pixels_or_the_error(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "GIF", "BMP", "PPM"):
        stream = io.BytesIO()
        noise.save(stream, kind)
        whole, refused = open_image(stream.getvalue(), root=tmp_path), 0
        for length in range(0, len(stream.getvalue()), 7):
            try:
                assert open_image(stream.getvalue()[:length], root=tmp_path, where="here") == whole, (kind, length)
            except ValueError as error:
                assert str(error).startswith("here, field 'images': cannot read"), (kind, length)
                refused += 1
        assert refused > 10, kind


def test_a_picture_over_the_limit_is_refused_before_it_is_decoded(tmp_path):
    with pytest.raises(ValueError, match="has 400 pixels, at most 399"):
        open_image(png((20, 20)), root=tmp_path, where="here", max_pixels=399)


def saved(picture, kind, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    animation = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(animation)).n_frames == 2
    red, green, blue = open_image(animation, root=tmp_path).getpixel((4, 4))
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize(("mode", "kind"), [("P", "PNG"), ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("RGBA", "PNG")])
def test_palettes_inks_and_alpha_become_rgb(tmp_path, mode, kind):
    picture = open_image(saved(Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode), kind), root=tmp_path)
    assert picture.mode == "RGB" and np.abs(np.subtract(picture.getpixel((4, 4)), (255, 0, 0))).max() < 5


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    portable = b"P5 32 32 65535\n" + grey.astype(">u2").tobytes()
    for content in (saved(Image.fromarray(grey), "PNG"), saved(Image.fromarray(grey), "TIFF"), portable):
        shades = np.asarray(open_image(content, root=tmp_path))
        assert (shades == (grey >> 8)[..., None]).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_photo_stands_the_way_up_its_camera_says(tmp_path, kind):
    photo = Image.new("RGB", (16, 8), "white")
    photo.paste("black", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter to the right
    upright = open_image(saved(photo, kind, exif=exif), root=tmp_path)
    assert upright.size == (8, 16)
    assert upright.getpixel((4, 2))[0] < 10 and upright.getpixel((4, 13))[0] > 245


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_metadata_leave_the_picture(tmp_path, kind):
    content = saved(Image.new("RGB", (16, 8), "white"), kind, exif=b"Exif\0\0nonsense")
    assert open_image(content, root=tmp_path).size == (16, 8)


@pytest.mark.parametrize(
    ("start", "message"), [("data:image/png;base64,", "data: URIs are not"), ("a", "name too long")]
)
def test_a_long_path_is_shortened(tmp_path, start, message):
    with pytest.raises(ValueError, match=f"cannot read '{start}.*: .*{message}") as error:
        open_image(start + "A" * 100_000, root=tmp_path, where="here")
    assert len(str(error.value)) < 400


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


def test_a_prompt_that_template_or_tokenizer_refuse_is_named_with_its_record(toy, tmp_path):
    record = Dataset(write(tmp_path, {"id": "a", "prompt": "Add \ud800"}))[0]
    start = f"^{tmp_path}/x.jsonl line 1 .id 'a'., field 'prompt': "
    encoder = PromptEncoder(toy.tokenizer, 4)
    with pytest.raises(ValueError, match=f"{start}the tokenizer does not take it: "):
        encoder.encode(record, [])
    with pytest.raises(ValueError, match=f"{start}the templated prompt holds 0 image placeholders"):
        encoder.encode(record, [1])
    picky = PromptEncoder(copy.deepcopy(toy.tokenizer), 4)
    picky.tokenizer.chat_template = "{{ raise_exception('roles\nmust alternate') }}"
    with pytest.raises(ValueError, match=f"{start}the chat template does not take it: TemplateError: roles must alt"):
        picky.encode(record, [])


@pytest.mark.parametrize(
    ("tokens", "side", "message"),
    [
        (3, 16, "make 3 image tokens each, got 4 from 16x16 pixels; image_seq_length in config.json or .* size"),
        (4, 32, "make 4 image tokens each, got 16 from 32x32 pixels"),
        (4, 18, None),  # the tower leaves what does not fill a patch
    ],
)
def test_a_tile_that_makes_other_image_tokens_than_the_prompt_holds_names_the_record(written, tokens, side, message):
    toy = load.from_preset("digits", words=digits.WORDS, seed=0)
    toy.model.config.image_seq_length = tokens
    toy.image_processor.size = type(toy.image_processor.size)(height=side, width=side)
    reader = Reader(Corpus(written), toy, max_tiles=12)
    dataset = reader.corpus.dataset("align.parquet")
    if message is None:
        assert len(reader.prompts(dataset, dataset.records[:2])) == 2
        return
    with pytest.raises(ValueError, match=rf"align.parquet row 0 .id 'align-0'., field 'images': .*{message}"):
        reader.prompts(dataset, dataset.records[:2])


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


@pytest.mark.parametrize("cut", [False, True])
def test_pixels_do_not_follow_the_batch_and_one_picture_is_open_at_a_time(toy, cut):
    processor = copy.deepcopy(toy.image_processor)
    processor.crop_to_patches = cut
    rng = np.random.default_rng(0)
    shapes = [(16, 16), (16, 64), (50, 20), (16, 16)]
    pictures = {str(i): Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for i, s in enumerate(shapes)}
    batch = processor(list(pictures.values()), max_patches=12, return_tensors="pt", input_data_format=None)
    expected = batch["pixel_values"].split([int(n) for n in batch["num_patches"]])

    def one_at_a_time(images, **options):
        assert len(images) == 1
        return processor(images, **options)

    found = ImageStore(pictures.__getitem__, one_at_a_time)(list(pictures))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [len(tiles) > 1 for tiles in found] == [False, cut, cut, False]


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

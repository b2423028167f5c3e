"""TRL's, verl's and MMPR's rows as files, read through Dataset, and records of every kind in one batch."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from r1v2_fast.data import digits
from r1v2_fast.data.collate import PromptEncoder, Sequence, collate, messages
from r1v2_fast.data.images import ImageStore
from r1v2_fast.data.layouts import canonical, text_of
from r1v2_fast.data.records import Dataset
from r1v2_fast.models import load
from r1v2_fast.models.feature_cache import FeatureCache
from r1v2_fast.models.policy import Policy

RECORDS = Path(__file__).resolve().parent.parent / "examples" / "own_data" / "records.jsonl"
ASKED = "Add the digits."
IMAGE = {"type": "image"}


def png(shade) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (16, 16), shade).save(stream, "PNG")
    return stream.getvalue()


def text(words):
    return {"type": "text", "text": words}


def user(content):
    return {"role": "user", "content": content}


def said(content):
    return {"role": "assistant", "content": content}


@pytest.fixture
def jsonl(tmp_path):
    """Rows as a .jsonl file beside two pictures, read."""
    for name, shade in (("a.png", 50), ("b.png", 200)):
        (tmp_path / name).write_bytes(png(shade))

    def read(*rows):
        (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return Dataset(tmp_path / "x.jsonl")

    return read


@pytest.fixture
def table(tmp_path):
    """Rows as a .parquet file, where a key that one struct has becomes a null in the others, read."""

    def read(*rows):
        parquet.write_table(pa.Table.from_pylist(list(rows)), tmp_path / "x.parquet")
        return Dataset(tmp_path / "x.parquet")

    return read


@pytest.fixture(scope="module")
def toy():
    return load.from_preset("digits", words=digits.WORDS, seed=0)


def shades(dataset, record):
    return [dataset.image(key).getpixel((0, 0))[0] for key in dataset.image_keys(record)]


@pytest.mark.parametrize(
    "row",
    [
        {"id": "1", "prompt": "<image>\nWhat?", "images": ["a.png"], "answer": "4", "kind": "add"},
        {"prompt": "no picture", "images": [], "chosen": "x", "rejected": "y", "question": "kept"},
        {"prompt": "<image>", "images": ["a.png"], "image": "kept"},
        {"prompt": [user([IMAGE, text("What?")]), said("A cat."), user("Sure?")], "images": [b"..."]},
        {"prompt": [user("<image>\nWhat?")], "images": ["a.png"], "answer": 4, "solution": "long"},
    ],
)
def test_our_own_layout_comes_out_as_it_went_in(row):
    before = json.dumps(row, default=str)
    assert canonical(row, "here") == row
    assert json.dumps(row, default=str) == before


def test_one_question_in_every_layout_gives_the_same_tokens_and_pictures(jsonl, table, toy):
    encoder = PromptEncoder(toy.tokenizer, 4)
    held = [{"bytes": png(50), "path": None}, {"bytes": png(200), "path": None}]
    paths = ["a.png", "b.png"]
    read = [
        jsonl({"prompt": f"<image>\n<image>\n{ASKED}", "images": paths}),
        jsonl({"prompt": [user(ASKED)], "images": paths}),
        jsonl({"prompt": [user([text(ASKED)])], "images": paths}),
        jsonl({"prompt": [user([text(f"<image>\n<image>\n{ASKED}")])], "images": paths}),
        jsonl({"image": paths, "question": ASKED, "chosen": "9", "rejected": "8"}),
        table({"prompt": [user([IMAGE, IMAGE, text(ASKED)])], "images": held}),
        table({"prompt": [user(f"<image>\n<image>\n{ASKED}")], "images": held, "reward_model": {"ground_truth": "9"}}),
    ]
    tokens = [encoder.encode(dataset[0], [1, 1]) for dataset in read]
    assert all(ids == tokens[0] for ids in tokens)
    assert toy.tokenizer.convert_ids_to_tokens(tokens[0]).count("<IMG_CONTEXT>") == 8
    assert shades(read[-1], read[-1][0]) == shades(read[-2], read[-2][0]) == [50, 200]


def test_trl_pictures_go_before_the_first_thing_the_user_says(jsonl):
    system = {"role": "system", "content": "Be brief."}
    row = {"prompt": [system, user("What?"), said("A cat."), user("Sure?")], "image": "b.png", "solution": "4"}
    dataset = jsonl(row, {"prompt": [user("What?")], "image": None, "solution": "5", "answer": "6"})
    with_image, without = dataset.records
    assert with_image.prompt == [system, user([IMAGE, text("What?")]), said("A cat."), user("Sure?")]
    assert (with_image.images, with_image.answer, with_image.columns) == (("b.png",), "4", {"solution": "4"})
    assert (without.prompt, without.images, without.answer) == ([user("What?")], (), "6")
    assert shades(dataset, with_image) == [200]


def test_trl_parts_keep_their_places_and_lose_the_nulls_of_parquet(table):
    content = [text("Left:"), {**IMAGE, "index": 0}, text("Right:"), {**IMAGE, "index": 1}, text(ASKED)]
    held = [{"bytes": png(50), "path": "a.png"}, {"bytes": png(200), "path": "b.png"}]
    dataset = table({"prompt": [{**user(content), "name": None}], "images": held, "solution": "9"})
    raw = parquet.read_table(dataset.path).to_pylist()[0]["prompt"][0]["content"][1]
    assert raw == {"type": "image", "text": None, "index": 0}, "parquet put no nulls in: the test tests nothing"
    assert dataset[0].prompt == [user([text("Left:"), IMAGE, text("Right:"), IMAGE, text(ASKED)])]
    assert messages(dataset[0].prompt) == dataset[0].prompt
    assert shades(dataset, dataset[0]) == [50, 200]


def test_a_picture_beside_an_empty_list_of_them_is_seen(jsonl):
    dataset = jsonl({"prompt": [user("What?")], "images": [], "image": "b.png"})
    assert shades(dataset, dataset[0]) == [200]


@pytest.mark.parametrize(("number", "answer"), [(80, "80"), (80.0, "80"), (-2.0, "-2"), (0.5, "0.5"), ("80.0", "80.0")])
def test_numbers_are_answers_without_the_point_that_nulls_bring(jsonl, number, answer):
    rows = [{"answer": number}, {"solution": number}, {"reward_model": {"ground_truth": number}}]
    assert [record.answer for record in jsonl(*({"prompt": "x", **row} for row in rows)).records] == [answer] * 3


def test_a_single_image_column_may_hold_bytes_and_nulls(table):
    dataset = table(
        {"prompt": [user("What?")], "image": {"bytes": png(200), "path": "b.png"}},
        {"prompt": [user("What?")], "image": None},
    )
    assert shades(dataset, dataset[0]) == [200] and dataset[1].images == ()


def test_trl_preference_pairs_with_a_prompt_are_the_assistants_words(table):
    row = {"prompt": [user([IMAGE, text("What?")])], "images": [{"bytes": png(50), "path": None}]}
    pair = {"chosen": [said([text("A "), text("cat.")])], "rejected": [said([text("A dog.")])]}
    record = table({**row, **pair})[0]
    assert (record.chosen, record.rejected) == ("A cat.", "A dog.")
    assert record.prompt == [user([IMAGE, text("What?")])] and record.columns == {}


def test_trl_preference_pairs_without_a_prompt_share_it(jsonl):
    shared = [user("What?"), said("A cat."), user("Sure?")]
    pairs = [
        {"chosen": [*shared, said("Yes.")], "rejected": [*shared, said("No.")], "images": ["a.png"]},
        {"chosen": [user("What?"), said("Same.")], "rejected": [user("What?"), said("Same.")]},
    ]
    record, same = jsonl(*pairs).records
    assert record.prompt == [user([IMAGE, text("What?")]), *shared[1:]]
    assert (record.chosen, record.rejected) == ("Yes.", "No.")
    assert (same.prompt, same.chosen, same.rejected) == ([user("What?")], "Same.", "Same.")


def test_verl_rows_bring_their_answer_and_keep_their_columns(table):
    def row(index, truth, images):
        return {
            "data_source": "hiyouga/geometry3k",
            "prompt": [user("<image>" * len(images) + "Find x.")],
            "images": images,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"split": "train", "index": index, "question": "Find x."},
        }

    dataset = table(row(0, "3", [{"bytes": png(200), "path": None}]), row(1, "4", []))
    assert [record.answer for record in dataset.records] == ["3", "4"]
    assert shades(dataset, dataset[0]) == [200] and dataset[1].images == ()
    assert messages(dataset[0].prompt) == [user([IMAGE, text("Find x.")])]
    assert dataset[0].columns.keys() == {"data_source", "ability", "reward_model", "extra_info"}
    assert dataset[0].columns["extra_info"]["question"] == "Find x."
    assert table({**row(0, 3.5, []), "id": "mine", "answer": None})[0].answer == "3.5"
    other = {**row(0, "3", []), "data_source": "another, with the same index"}
    assert [record.id for record in table(row(0, "3", []), other).records] == ["x-0", "x-1"]
    mine = table({**row(0, "3", []), "id": "mine", "answer": "4"})[0]
    assert (mine.id, mine.answer) == ("mine", "4")


def test_mmpr_rows_put_their_marks_in_front_unless_the_question_has_them(jsonl):
    rows = [
        {"image": "a.png", "question": "What?"},
        {"image": ["a.png", "b.png"], "question": "What?"},
        {"image": ["a.png", "b.png"], "question": "One: <image>\nTwo: <image>\nWhat?"},
        {"image": "", "question": "What?"},
        {"image": None, "question": "What?"},
        {"question": "What?"},
    ]
    records = jsonl(*({**row, "chosen": "A cat.", "rejected": "A dog."} for row in rows)).records
    assert [record.prompt for record in records] == [
        "<image>\nWhat?",
        "<image>\n<image>\nWhat?",
        "One: <image>\nTwo: <image>\nWhat?",
        *["What?"] * 3,
    ]
    assert [len(record.images) for record in records] == [1, 2, 2, 0, 0, 0]
    assert {(record.chosen, record.rejected) for record in records} == {("A cat.", "A dog.")}
    assert records[0].columns == {"question": "What?"}
    canonical(row := {"image": "a.png", "question": "What?"}, "here")
    assert row == {"image": "a.png", "question": "What?"}, "the caller's row was changed"


PAIR = {"chosen": [user("a"), said("b")], "rejected": [user("a"), said("c")]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "What?", "image": "a.png"}, "'images': the prompt has 0 .*got 1 images; put <image> where"),
        ({"prompt": [user("<image>")], "images": ["a.png", "b.png"]}, "'images': the prompt has 1 .*got 2"),
        ({"prompt": [user([IMAGE])]}, "'images': the prompt has 1 .*got 0 images$"),
        ({"prompt": [said("x")], "image": "a.png"}, "'prompt': expected a message of role user to put 1 images"),
        ({"prompt": []}, "'prompt': expected a list of messages, got \\[\\]"),
        ({"prompt": ["x"]}, "'prompt': expected messages with role and content, got 'x'"),
        ({"prompt": [{"content": "x"}]}, "'prompt': expected messages with role and content"),
        ({"prompt": [user(3)]}, "'prompt': expected content that is a string or a list of parts, got 3"),
        ({"prompt": [user(None)]}, "'prompt': expected content .*got None"),
        ({"prompt": [user(["x"])]}, "'prompt': only text and images .*got 'x'"),
        ({"prompt": [user([{"type": "text", "text": None}])]}, "'prompt': .*a text part with its text"),
        ({"prompt": [user([{"type": "video"}])]}, "'prompt': only text and images are supported.*got .*'video'"),
        ({"prompt": [user([{**IMAGE, "image": "a.png"}])]}, "'prompt': .*whose picture is in column 'images'"),
        ({"prompt": "x", "videos": ["a.mp4"]}, "'videos': only text and images are supported, got \\['a.mp4'\\]"),
        ({"prompt": "x", "audio": {"path": "a.wav"}}, "'audio': only text and images"),
        ({"prompt": [user("x")], **PAIR}, "'chosen': expected one assistant message of text"),
        ({"prompt": [user("x")], "chosen": [said([IMAGE])], "rejected": [said("y")]}, "'chosen': expected one assist"),
        ({**PAIR, "rejected": [user("b"), said("c")]}, "'prompt': without it, chosen and rejected must begin with"),
        ({**PAIR, "rejected": [user("a"), said("b"), user("d"), said("c")]}, "'rejected': expected one assistant"),
        ({**PAIR, "rejected": None}, "'rejected': expected a list of messages, got None"),
        ({"prompt": [user("x")], "reward_model": {"ground_truth": ["3"]}}, "'reward_model': .*string or a number"),
        ({"prompt": [user("x")], "reward_model": {"ground_truth": True}}, "'reward_model': .*number, got True"),
        ({"prompt": "x", "solution": False}, "'solution': expected a string or a number, got False"),
        ({"prompt": "x", "answer": True}, "'answer': expected a string, got bool"),
        ({"question": "What?", "image": "a.png", "chosen": "x"}, "'rejected': a pair needs chosen and rejected"),
        ({"question": "<image><image>", "image": "a.png"}, "'images': the prompt has 2 .*got 1"),
    ],
)
def test_a_bad_row_is_named_with_its_file_line_and_field(jsonl, tmp_path, row, message):
    with pytest.raises(ValueError, match=f"^{tmp_path}/x.jsonl line 2( .id '.*'.)?, field {message}"):
        jsonl({"prompt": "fine"}, row)


def test_empty_columns_of_other_media_are_no_matter(jsonl):
    assert jsonl({"prompt": "x", "videos": [], "audio": None})[0].prompt == "x"


def test_a_record_has_the_same_log_probs_in_a_mixed_batch_as_alone(toy):
    dataset = Dataset(RECORDS)
    assert {len(record.images) for record in dataset.records} == {0, 1, 2}
    pixels = ImageStore(dataset.image, toy.image_processor)
    encoder = PromptEncoder(toy.tokenizer, toy.model.config.image_seq_length)
    policy = Policy(toy, pixels, FeatureCache())
    sequences = []
    for record in dataset.records:
        keys = dataset.image_keys(record)
        prompt, response = encoder.encode(record, pixels.tiles(keys)), encoder.response(record.columns["response"])
        sequences.append(Sequence(prompt, response, keys))

    @torch.no_grad()
    def logprobs(some):
        batch = collate(some, toy.tokenizer.pad_token_id)
        return policy.response_logprobs(batch).logprobs.split(batch.offsets.diff().tolist())

    for record, mixed, sequence in zip(dataset.records, logprobs(sequences), sequences, strict=True):
        (alone,) = logprobs([sequence])
        assert (mixed - alone).abs().max() <= 1e-5 * alone.abs().max(), record.id
        if len(sequence.image_keys) == 2:  # the pictures are seen, and in their order
            (swapped,) = logprobs([Sequence(sequence.prompt_ids, sequence.response_ids, sequence.image_keys[::-1])])
            assert (swapped - alone).abs().max() > 1e-4, record.id


def test_the_text_of_a_prompt_is_what_a_reader_reads():
    parts = [{"type": "image"}, {"type": "text", "text": "Add "}, {"type": "text", "text": "them."}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert text_of(messages) == "Be brief.\nAdd them." and text_of("<image>\nAdd.") == "<image>\nAdd."

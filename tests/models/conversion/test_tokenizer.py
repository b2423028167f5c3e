"""Tokenizer, chat template and image processor of a converted folder."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.internvl.processing_internvl import InternVLProcessor

from r1v2_fast.cli import main
from r1v2_fast.data.collate import PromptEncoder
from r1v2_fast.data.records import Record
from r1v2_fast.models import load
from r1v2_fast.models.policy import forbidden_ids
from r1v2_fast.models.toy_tokenizer import CHAT_TEMPLATE

CONTEXT = 262  # behind 256 letters, 4 tokens of Qwen's, <img> and </img>
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture
def convert(checkpoint, tmp_path):
    """convert(name, **changes): the loaded folder that a checkpoint becomes, and the checkpoint."""

    def run(name="src", *, edit=None, **changes):
        source = checkpoint(name, **changes)
        if edit:
            edit(source.path)
        assert main(["convert", str(source.path), str(tmp_path / f"{name}.dst")]) == 0
        return load.from_folder(tmp_path / f"{name}.dst"), source

    return run


def record(prompt, images=()):
    return Record("a", prompt, tuple(images), answer=None, chosen=None, rejected=None)


def encoded(loaded, prompt, tiles):
    encoder = PromptEncoder(loaded.tokenizer, loaded.model.config.image_seq_length)
    return loaded.tokenizer.decode(encoder.encode(record(prompt, ["x"] * len(tiles)), tiles))


def test_an_image_in_a_prompt_becomes_its_tokens_between_the_checkpoints_turns(convert):
    loaded, _ = convert()
    image = lambda tiles: f"<img>{'<IMG_CONTEXT>' * 4 * tiles}</img>\n"  # noqa: E731
    assert encoded(loaded, "<image>\nHow many?", [3]) == (
        f"{SYSTEM}<|im_start|>user\n{image(3)}How many?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    turns = [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "<image>\n<image>\nWhich?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\nA"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And "}, {"type": "image"}, {"type": "text", "text": "?"}],
        },
    ]
    assert encoded(loaded, turns, [1, 2, 1]) == (
        f"<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n{image(1)}{image(2)}Which?<|im_end|>\n"
        f"<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nAnd {image(1)}?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_text_alone_is_templated_as_before(convert):
    loaded, source = convert()
    original = json.loads((source.path / "tokenizer_config.json").read_text())["chat_template"]
    for turns in (
        [{"role": "user", "content": "a"}],
        [{"role": "system", "content": ""}, {"role": "user", "content": "b"}],
    ):
        for more in (True, False):
            render = lambda **o: loaded.tokenizer.apply_chat_template(turns, tokenize=False, **o)  # noqa: B023, E731
            assert render(add_generation_prompt=more) == render(add_generation_prompt=more, chat_template=original)


def move_template(path, name, write):
    config = json.loads((path / "tokenizer_config.json").read_text())
    template = config.pop("chat_template")
    if name == "tokenizer_config.json":
        config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if name != "tokenizer_config.json":
        (path / name).write_text(write(template))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("chat_template.jinja", str),
        ("chat_template.json", lambda t: json.dumps({"chat_template": t})),
        ("tokenizer_config.json", None),
    ],
)
def test_the_template_is_found_where_the_checkpoint_keeps_it(convert, tmp_path, name, write):
    loaded, source = convert(edit=lambda path: move_template(path, name, write))
    assert encoded(loaded, "<image>\nHi", [1]).startswith(SYSTEM)
    assert main(["convert", str(tmp_path / "src.dst"), str(tmp_path / "back")]) == 0
    assert (tmp_path / "back" / name).read_text().strip() == (source.path / name).read_text().strip() or (
        json.loads((tmp_path / "back" / name).read_text()) == json.loads((source.path / name).read_text())
    )


def test_a_template_that_takes_image_parts_stays_as_it_is(convert):
    loaded, _ = convert(tokenizer={"template": CHAT_TEMPLATE})
    assert loaded.tokenizer.chat_template == CHAT_TEMPLATE


def test_a_template_that_writes_another_mark_for_an_image_does_not(convert):
    loaded, _ = convert(tokenizer={"template": CHAT_TEMPLATE.replace("<IMG_CONTEXT>", "<image>")})
    assert encoded(loaded, "<image>\nHi", [1]).count("<IMG_CONTEXT>") == 4


def test_a_leading_line_break_of_the_template_stays(convert):
    template = "\n\n" + CHAT_TEMPLATE.replace("m['content'] is string", "true")
    loaded, _ = convert(tokenizer={"template": template})
    original = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, chat_template=template
    )
    assert loaded.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == original


def test_without_a_template_chatml_is_taken_and_no_think(convert):
    loaded, _ = convert(tokenizer={"template": None})
    assert encoded(loaded, "Hi", []) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_image_tokens_are_named_and_none_is_added(convert):
    loaded, source = convert()
    tokenizer = loaded.tokenizer
    assert load.context_token(tokenizer) == "<IMG_CONTEXT>" and loaded.model.config.image_token_id == CONTEXT
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    assert [getattr(tokenizer, f"{name}_id") for name in names] == [260, 261, CONTEXT, 259]
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(source.path)) == 265
    assert {259, 260, 261, CONTEXT} <= set(forbidden_ids(tokenizer, CONTEXT).tolist())


def test_the_id_is_read_from_the_tokenizer(convert):
    loaded, _ = convert(tokenizer={"image_tokens": ["<tool>", "<think>", "<img>", "</img>", "<IMG_CONTEXT>"]})
    assert loaded.model.config.image_token_id == 264


def test_the_tokenizer_that_is_written_encodes_as_the_checkpoints_does(convert, tmp_path):
    _, source = convert()
    written, original = AutoTokenizer.from_pretrained(tmp_path / "src.dst"), AutoTokenizer.from_pretrained(source.path)
    assert (tmp_path / "src.dst" / "tokenizer.json").exists() and not (source.path / "tokenizer.json").exists()
    for text in ("Hi there, 123 €!\n\n  x<|im_end|>", "<img><IMG_CONTEXT></img><quad>", "日本語 naïve\t"):
        assert written(text)["input_ids"] == original(text)["input_ids"]
        assert written.decode(written(text)["input_ids"]) == text


def test_transformers_processor_takes_the_folder(convert, monkeypatch):
    # it would look for a video processor, which cannot be had without torchvision
    monkeypatch.setattr(
        InternVLProcessor, "check_argument_for_proper_class", lambda self, name, argument: type(argument)
    )
    loaded, _ = convert()
    processor = InternVLProcessor(
        loaded.image_processor,
        loaded.tokenizer,
        image_seq_length=loaded.model.config.image_seq_length,
        chat_template=loaded.tokenizer.chat_template,
    )
    picture = Image.new("RGB", (112, 56), "red")
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor(images=[picture], text=text)["input_ids"][0]
    encoder = PromptEncoder(loaded.tokenizer, 4)
    assert ids == encoder.encode(record("<image>\nWhat?", ["x"]), [3])  # 2 tiles and the thumbnail


def test_pictures_are_tiled_as_the_checkpoint_says(convert):
    loaded, _ = convert()
    processor = loaded.image_processor
    assert (processor.crop_to_patches, processor.min_patches, processor.max_patches) == (True, 1, 12)
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406) and tuple(processor.image_std) == (0.229, 0.224, 0.225)
    pixels = processor([Image.new("RGB", (56 * 4, 56 * 3))], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (13, 3, 56, 56)
    other, _ = convert("b", max_dynamic_patch=6, edit=lambda path: (path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3})))  # fmt: skip
    assert other.image_processor.max_patches == 6 and tuple(other.image_processor.image_mean) == (0.5,) * 3
    one, _ = convert("c", dynamic_image_size=False, use_thumbnail=False, force_image_size=None)
    assert one.image_processor.crop_to_patches is False and one.image_processor.size["height"] == 56


def test_ends_of_an_answer_are_the_checkpoints(convert):
    loaded, _ = convert()
    assert loaded.model.generation_config.eos_token_id == [257, 258]
    other, _ = convert("b", text={"eos_token_id": 256}, edit=lambda path: (path / "generation_config.json").unlink())
    assert other.model.generation_config.eos_token_id == [
        256,
        258,
    ]  # InternVL's code ended at the template's <|im_end|>


REFUSED = {
    "vocabulary": (lambda p: (p / "vocab.json").unlink(), {}, "holds no tokenizer: expected tokenizer.json or vocab.json"),
    "settings": (lambda p: (p / "tokenizer_config.json").unlink(), {}, "holds no tokenizer_config.json"),
    "broken": (lambda p: (p / "vocab.json").write_text("{"), {}, "cannot read its tokenizer: "),
    "no context": (None, {"image_tokens": ["<img>", "</img>"]}, "got none of the name ['<IMG_CONTEXT>']"),
    "no image tokens": (None, {"image_tokens": []}, "got none of the name ['<img>', '</img>', '<IMG_CONTEXT>']"),
    "template": (None, {"template": "{{ raise_exception('no') }}"}, "takes neither a string nor parts"),
    "silent": (None, {"template": "hello"}, "takes neither a string nor parts"),
    "kind": (
        lambda p: (p / "tokenizer_config.json").write_text(json.dumps({"chat_template": 3, "tokenizer_class": "Qwen2Tokenizer"})),
        {},
        "chat_template must be a string, got int",
    ),
    "ids": (
        lambda p: (p / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": 261})),
        {},
        "<IMG_CONTEXT> must have id 261 in the tokenizer, got 262",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_tokenizer_that_does_not_do_is_refused(checkpoint, tmp_path, capsys, kind):
    edit, tokenizer, message = REFUSED[kind]
    source = checkpoint(tokenizer=tokenizer)
    if edit:
        edit(source.path)
    assert main(["convert", str(source.path), str(tmp_path / "dst")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "dst").exists()


def test_an_image_token_beyond_the_embedding_is_refused(checkpoint, tmp_path, capsys):
    def shorten(weights):
        for name in ("model.embed_tokens", "lm_head"):
            weights[f"language_model.{name}.weight"] = weights[f"language_model.{name}.weight"][:260].clone()

    source = checkpoint(text={"vocab_size": 260}, weights=shorten)
    assert main(["convert", str(source.path), str(tmp_path / "dst")]) == 2
    assert "the image token must be one of the embedding's 260 rows, got id 262" in capsys.readouterr().err


def test_a_padded_embedding_is_taken_as_it_is(checkpoint, tmp_path):
    def pad(weights):
        for name in ("model.embed_tokens", "lm_head"):
            weight = weights[f"language_model.{name}.weight"]
            weights[f"language_model.{name}.weight"] = torch.cat([weight, weight.new_zeros(55, weight.shape[1])])

    source = checkpoint(text={"vocab_size": 320}, weights=pad)
    assert main(["convert", str(source.path), str(tmp_path / "dst")]) == 0
    assert load.from_folder(tmp_path / "dst").model.lm_head.weight.shape == (320, 48)


def test_no_code_of_a_checkpoint_runs(checkpoint, tmp_path, monkeypatch):
    source = checkpoint()
    config = json.loads((source.path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    (source.path / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("evil", "modeling_internvl_chat"):
        (source.path / f"{name}.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass Evil: pass\n")
    assert main(["convert", str(source.path), str(tmp_path / "dst")]) == 0
    assert main(["convert", str(tmp_path / "dst"), str(tmp_path / "back")]) == 0
    assert not (tmp_path / "owned").exists()
    for folder in (tmp_path / "dst", tmp_path / "back"):
        assert not list(folder.glob("*.py"))
        assert '"auto_map"' not in (folder / "tokenizer_config.json").read_text()

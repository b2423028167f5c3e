"""TRL's GRPOTrainer on our model folder and records, step by step, with our steps between its own.

Written for TRL 1.16.0; its InternVL processor wants torchvision, so a small one with the same tokens and pixels stands in.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from transformers import BatchFeature, ProcessorMixin, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from r1v2_fast.models import load
from r1v2_fast.models.policy import forbidden_ids


class Processor(ProcessorMixin):
    """A tokenizer whose image tokens are expanded as ours are, and the folder's own image processor."""

    attributes = ("image_processor", "tokenizer")
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, tokens: int = 0):
        self.image_processor, self.tokenizer, self.tokens = image_processor, tokenizer, tokens
        self.chat_template = tokenizer.chat_template
        self.image_token = "<IMG_CONTEXT>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def __call__(self, images=None, text=None, **options):
        text = [text] if isinstance(text, str) else text
        extra = {}
        if images is not None:
            flat = [i for group in images for i in (group if isinstance(group, (list, tuple)) else [group])]
            made = self.image_processor(flat, return_tensors="pt")
            extra["pixel_values"] = made["pixel_values"]
            tiles = iter(made["num_patches"].tolist() if "num_patches" in made else [1] * len(flat))
            text = [self._expanded(t, tiles) for t in text]
        kept = {
            k: v for k, v in options.items() if k in ("padding", "padding_side", "return_tensors", "add_special_tokens")
        }
        encoded = dict(self.tokenizer(text, **kept))
        encoded.pop("token_type_ids", None)
        return BatchFeature({**encoded, **extra})

    def _expanded(self, text: str, tiles) -> str:
        first, *rest = text.split(self.image_token)
        return first + "".join(f"<img>{self.image_token * (next(tiles) * self.tokens)}</img>{piece}" for piece in rest)

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values"]

    def save_pretrained(self, *arguments, **options):
        pass


class TRL:
    """`GRPOTrainer` with one update a rollout of prompts x group responses of exactly `response` tokens."""

    def __init__(
        self, model: Path, data: Path, *, prompts: int, group: int, response: int, train: list[str], device: str
    ):
        from r1v2_fast.models.freeze import set_trainable

        loaded = load.from_folder(model)
        set_trainable(loaded.model, train)
        loaded.model.train()
        processor = Processor(loaded.image_processor, loaded.tokenizer, loaded.model.config.image_seq_length)
        lines = [json.loads(line) for line in (data / "records.jsonl").read_text().splitlines()]
        dataset = Dataset.from_dict(
            {
                "prompt": [[{"role": "user", "content": line["prompt"].split("\n")[1]}] for line in lines],
                "image": [Image.open(data / line["images"][0]).copy() for line in lines],
                "answer": [line["answer"] for line in lines],
            }
        )
        forbidden = forbidden_ids(loaded.tokenizer, loaded.model.config.image_token_id).tolist()
        settings = GRPOConfig(
            output_dir=str(data / "trl"), per_device_train_batch_size=prompts * group, num_generations=group,
            max_completion_length=response, max_steps=1, logging_steps=1, report_to=[], bf16=False, beta=0.0,
            use_cpu=device == "cpu",
            learning_rate=1e-3, save_strategy="no", temperature=1.0, disable_tqdm=True, gradient_checkpointing=False,
            generation_kwargs={"min_new_tokens": response, "suppress_tokens": forbidden},
        )  # fmt: skip
        spec = importlib.util.spec_from_file_location("reward", data / "reward.py")
        assert spec is not None and spec.loader is not None
        reward = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(reward)
        self.clock = _Clock()
        self.trainer = GRPOTrainer(
            model=loaded.model, reward_funcs=reward.digits, args=settings, train_dataset=dataset,
            processing_class=processor, callbacks=[self.clock],
        )  # fmt: skip

    def run(self, *, steps: int, between: Callable[[int], None]) -> list[float]:
        """Seconds of each of TRL's steps; `between` runs after each, outside its time."""
        self.trainer.args.max_steps = steps
        self.clock.between = between
        self.trainer.train()
        log = [line for line in self.trainer.state.log_history if "completions/mean_length" in line]
        wanted = self.trainer.args.max_completion_length
        assert all(line["completions/mean_length"] == wanted for line in log), "responses were to be of one length"
        assert all(line["grad_norm"] > 0 for line in log), "a step without a gradient is no step"
        return self.clock.seconds


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.between: Callable[[int], None] = lambda step: None
        self.started = 0.0

    def on_step_begin(self, *arguments, **options):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **options):
        self.seconds.append(time.perf_counter() - self.started)
        self.between(len(self.seconds))
        torch.manual_seed(len(self.seconds))

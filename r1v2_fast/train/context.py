"""What the stages of a run share: recipe, folder, data, models, log, and random numbers that need no state."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from r1v2_fast.config import Recipe
from r1v2_fast.data import digits, synthetic
from r1v2_fast.data.collate import Batch, PromptEncoder, Sequence, collate
from r1v2_fast.data.images import ImageStore
from r1v2_fast.data.records import Dataset, Record
from r1v2_fast.log import Log
from r1v2_fast.models import attention, dummy, fused, load
from r1v2_fast.models.feature_cache import FeatureCache
from r1v2_fast.models.packing import PackedBatch, pack
from r1v2_fast.models.policy import Backbone, Policy
from r1v2_fast.models.reward_model import RewardModel
from r1v2_fast.parallel import sharding
from r1v2_fast.parallel.checks import check
from r1v2_fast.parallel.world import ALONE, World, pick_device
from r1v2_fast.rollout.choose import engine_of
from r1v2_fast.rollout.engine import Engine, Prompt
from r1v2_fast.train.best import Best

T = TypeVar("T")


class Corpus:
    """The record files of a run, read once each, and the images behind their keys."""

    def __init__(self, folder: Path, *, root: str | None = None, allow_outside: bool = False):
        self.folder = folder
        self.root = root
        self.allow_outside = allow_outside
        self._datasets: dict[str, Dataset] = {}

    def dataset(self, file: str) -> Dataset:
        path = self.folder / file
        dataset = self._datasets.get(path.stem)
        if dataset is None:
            dataset = Dataset(path, root=self.root, allow_outside=self.allow_outside)
            self._datasets[path.stem] = dataset
        elif dataset.path != path:
            raise ValueError(f"data files need distinct names, got {dataset.path} and {path}")
        return dataset

    def image(self, key: str) -> Image.Image:
        return self._datasets[key.split("/", 1)[0]].image(key)


class Reader:
    """Records to prompts and batches, for one model's tokenizer and image processor."""

    def __init__(self, corpus: Corpus, loaded: load.Loaded, *, max_tiles: int, packing: bool = True):
        self.corpus = corpus
        self.packing = packing  # a prompt stands once in a batch, its responses behind it
        self.pixels = ImageStore(corpus.image, loaded.image_processor, max_tiles=max_tiles)
        self.encoder = PromptEncoder(loaded.tokenizer, loaded.model.config.image_seq_length)
        self.pad_id = loaded.tokenizer.pad_token_id
        self.image_token_id = loaded.model.config.image_token_id
        self.config = loaded.model.config

    def prompt(self, dataset: Dataset, record: Record) -> Prompt:
        keys = dataset.image_keys(record)
        pixels = self.pixels(keys)
        for tiles_T3HW in pixels:
            self._check_tile(record, *tiles_T3HW.shape[-2:])
        tiles = [tiles_T3HW.shape[0] for tiles_T3HW in pixels]
        ids = self.encoder.encode(record, tiles)
        got, expected = ids.count(self.image_token_id), sum(tiles) * self.encoder.image_tokens_per_tile
        if got != expected:
            raise ValueError(
                f"{record.where}, field 'prompt': its text makes {got} image tokens, its images need {expected}"
            )
        return Prompt(record.id, ids, keys)

    def prompts(self, dataset: Dataset, records: list[Record]) -> list[Prompt]:
        return [self.prompt(dataset, record) for record in records]

    def _check_tile(self, record: Record, height: int, width: int) -> None:
        """What the tower makes of a tile's pixels must be what the prompt leaves room for."""
        patch = self.config.vision_config.patch_size
        rows, columns = patch if isinstance(patch, (list, tuple)) else (patch, patch)
        made = (height // rows) * (width // columns) * self.config.downsample_ratio**2
        expected = self.encoder.image_tokens_per_tile
        if made != expected:
            raise ValueError(
                f"{record.where}, field 'images': expected tiles that make {expected} image tokens each, got {made:g} "
                f"from {height}x{width} pixels; image_seq_length in config.json or the image processor's size is wrong"
            )

    def image_tokens(self, record: Record) -> int:
        """Image tokens of a record at the most, without a look at its pictures."""
        tiles = self.pixels.max_tiles + 1 if getattr(self.pixels.processor, "crop_to_patches", False) else 1
        return len(record.images) * tiles * self.encoder.image_tokens_per_tile

    def batch(self, sequences: list[Sequence], device: torch.device | str) -> Batch | PackedBatch:
        batch = pack(sequences) if self.packing else collate(sequences, self.pad_id)
        return batch.to(device)


class Context:
    """One run."""

    def __init__(self, recipe: Recipe, folder: Path, log: Log, world: World = ALONE):
        self.recipe = recipe
        self.folder = folder
        self.log = log
        self.world = world
        self.device = world.device if world.size > 1 else pick_device(recipe.run.device)
        data_folder = Path(recipe.data.folder)
        if recipe.data.make == "digits":
            data_folder = folder / data_folder
            world.once(lambda: digits.write(data_folder, seed=recipe.run.seed, sizes=recipe.data.sizes))
        elif recipe.data.make == "synthetic":
            data_folder, files = folder / data_folder, recipe.files()
            world.once(lambda: synthetic.write(data_folder, files, seed=recipe.run.seed, sizes=recipe.data.sizes))
        self.corpus = Corpus(data_folder, root=recipe.data.root, allow_outside=recipe.data.allow_outside)
        self.best = Best(folder, recipe.checkpoint, world)
        check(recipe, world)
        self.policy: Policy
        self.reader: Reader
        self.engine: Engine
        self.reward_model: RewardModel | None = None

    def use(self, loaded: load.Loaded) -> None:
        """Make `loaded` the policy of what follows."""
        if not self.sharded:  # else it goes to the device shard by shard
            loaded.model.to(self.device)
        loaded.image_processor.max_patches = self.recipe.data.max_tiles  # saved with every policy
        self.reader = Reader(self.corpus, loaded, max_tiles=self.recipe.data.max_tiles, packing=self._packing(loaded))
        model = self.recipe.model
        features = FeatureCache(int(model.feature_cache_gib * 2**30), model.feature_cache_folder)
        self.policy = Policy(loaded, self.reader.pixels, features)
        self.policy.settle()
        self._choose_kernels(self.policy)
        self.close()
        self.engine = engine_of(self.recipe.rollout, self.policy, self.world.any if self.sharded else None)

    def open(self, folder: Path | None) -> None:
        """Make a stage's product the policy, or the model that the recipe starts from."""
        self.opened = folder
        dtype = getattr(torch, self.recipe.model.dtype)
        self.use(self.initial() if folder is None else load.from_folder(folder, dtype=dtype))

    @property
    def sharded(self) -> bool:
        return self.world.size > 1 and self.recipe.run.shard == "full"

    def shard(self, model: Backbone) -> None:
        """Once it is known what of `model` trains, where the recipe says so."""
        if self.sharded and not model.joins:
            sharding.shard(model, self.world)

    def joined(
        self, model: Backbone, parts: list[T], backward: Callable[[torch.Tensor], None] = lambda loss: None
    ) -> Iterator[T]:
        """`parts`, for a forward of `model` each; sharded, as many more of nothing as another rank makes."""
        if not self.sharded:
            return iter(parts)
        end = self.policy.tokenizer.eos_token_id
        batch = self.reader.batch([Sequence([end], [end], [])], self.device)
        return sharding.joined(model, parts, batch, self.world, backward)

    def close(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()

    def score_with(self, model: RewardModel) -> None:
        """Make `model` the run's reward model."""
        self._choose_kernels(model)
        self.shard(model)
        self.reward_model = model

    def _choose_kernels(self, model: Backbone) -> None:
        """What the language model runs for packed attention and in its layers, as the recipe says."""
        if self.reader.packing:
            attention.install(model.internvl.language_model, self.recipe.model.attention)
        if sentence := fused.install(model.internvl.language_model, self.recipe.model.fused_layers, self.device):
            self.log.say(sentence, once="fused layers")

    def _packing(self, loaded: load.Loaded) -> bool:
        """Whether batches are packed; a recipe's wish that the language model cannot grant is said once."""
        model, wanted = loaded.model.model.language_model, self.recipe.model
        if wanted.packing and not attention.supported(model):
            kind = model.config.model_type
            self.log.say(
                f"model.packing is off: a {kind} language model, or one with sliding windows, takes no packed rows "
                f"(known: {', '.join(attention.SUPPORTED)}); prompts are repeated and padded", once="packing",
            )  # fmt: skip
            return False
        return wanted.packing

    def initial(self) -> load.Loaded:
        """The model the recipe starts from."""
        model = self.recipe.model
        dtype = getattr(torch, model.dtype)
        if model.path is not None:
            return load.from_folder(model.path, dtype=dtype)
        assert model.preset is not None
        if model.dummy_weights:
            changes, seed = model.architecture, self.recipe.run.seed
            return dummy.build(model.preset, changes, seed=seed, dtype=dtype, device=self.device)
        return load.from_preset(model.preset, words=digits.WORDS, seed=self.recipe.run.seed, dtype=dtype)

    def seed(self, what: str, step: int) -> int:
        return seed_of(self.recipe.run.seed, what, step)

    def seed_globals(self, stage: str, step: int) -> None:
        """For what draws from the global generators, such as a reward of the user's; each rank's are its own."""
        seed = self.seed(f"{stage}/globals" + (f" {self.world.rank}" if self.world.rank else ""), step)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.manual_seed(seed)


def seed_of(seed: int, what: str, step: int) -> int:
    """63 bits for one use in one step, a pure function of the seed: a resume restores no random state."""
    key = f"{seed}/{what}/{step}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1

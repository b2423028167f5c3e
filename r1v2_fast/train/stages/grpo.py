"""GRPO with the Selective Sample Buffer (R1V2, arXiv 2504.16656, section 3.3): the data flow of one step, in order."""

from __future__ import annotations

import hashlib
import math
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from r1v2_fast import config, ops
from r1v2_fast.buffer import SelectiveSampleBuffer, Unit, merged
from r1v2_fast.data.collate import Sequence
from r1v2_fast.models.packing import prompt_key
from r1v2_fast.ops.policy_loss import KINDS, over_sequences
from r1v2_fast.parallel.stored import Stored
from r1v2_fast.train.batching import by_prompt
from r1v2_fast.train.context import Context
from r1v2_fast.train.experience import Experience, collect, joined, panel
from r1v2_fast.train.stages.base import Metrics, Stage


@dataclass
class Sample:
    """One response, fresh or replayed; log-probs are per token, on the CPU."""

    sequence: Sequence
    advantage: float
    behaviour_logprobs: torch.Tensor  # as it was sampled
    replayed: bool = False
    old_logprobs: torch.Tensor | None = None  # before the step's first update; None where that is the only one
    ref_logprobs: torch.Tensor | None = None  # with a KL term
    order: tuple[int, int] = (0, 0)  # its place among all ranks' samples of the step

    @property
    def sequences(self) -> list[Sequence]:
        return [self.sequence]


class GRPOStage(Stage[Sample]):
    name = "grpo"

    def __init__(self, context: Context, config: config.GRPO):
        super().__init__(context, config, context.policy)
        self.config = config
        self.rounds = 0  # rollouts so far: the position in the data
        overlong = (config.sampling.max_new_tokens, config.overlong_cache) if config.overlong_cache else None
        self.judge = panel(context, config.rewards, config.micro_batch_tokens, overlong=overlong)
        self.buffer = (
            SelectiveSampleBuffer(
                config.buffer.capacity,
                granularity=config.buffer.granularity,
                alpha=config.buffer.alpha,
                max_staleness=config.buffer.max_staleness,
                seed=context.recipe.run.seed,
            )
            if config.buffer
            else None
        )
        # without a KL or entropy term a zero advantage leaves no gradient at all, so those rows need none made
        self.skip_zero = config.loss.kl_coef == 0 and config.loss.entropy_coef == 0
        if config.loss.kl_coef:
            self.model.keep_reference()

    def collect(self, step: int, metrics: Metrics) -> list[Sample]:
        experience, advantages, informative = self._rollouts(metrics)
        if self.config.mask_truncated:
            advantages = torch.where(experience.finished_N, advantages, 0.0)
        keep = [i for i in range(len(advantages)) if bool(advantages[i] != 0) or self._keeps_zero(experience, i)]
        fresh = [_sample(experience, i, advantages[i].item()) for i in keep if experience.here(i)]
        replayed = self._replay(experience, advantages, informative, step, metrics)
        self._dump(experience, advantages, set(keep), step)
        samples = fresh + [sample for place, unit in enumerate(replayed, 1) for sample in _restored(unit, place)]
        if self.config.updates_per_rollout * self.config.mini_batches > 1:
            for sample, (old,) in zip(samples, self._logprobs(samples), strict=True):
                sample.old_logprobs = old
        if self.config.buffer is not None and self.config.buffer.ratio == "stored":
            for sample in samples:
                if sample.replayed:
                    sample.old_logprobs = sample.behaviour_logprobs
        if self.config.loss.kl_coef:
            with self.model.reference():
                for sample, (ref,) in zip(samples, self._logprobs(samples), strict=True):
                    sample.ref_logprobs = ref
        return samples

    def mini_batches(self, samples: list[Sample], step: int) -> Iterator[list[Sample]]:
        hands = self._hands(samples)
        count = min(self.config.mini_batches, len(hands))
        for update in range(self.config.updates_per_rollout):
            if count == 1:
                yield samples
                continue
            generator = torch.Generator().manual_seed(self.context.seed(f"{self.name}/deal {update}", step))
            order = torch.randperm(len(hands), generator=generator).tolist()
            yield from ([sample for i in order[start::count] for sample in hands[i]] for start in range(count))

    def largest(self) -> list[Sample]:
        sampling = self.config.sampling
        count = sampling.prompts * sampling.group_size
        if self.buffer is not None and (not self.skip_zero or self.config.average_over == "all"):
            count *= 2  # replayed responses stand beside fresh ones without an advantage
        # samples drawn singly may each bring a prompt of their own
        shared = 1 if self.buffer is not None and self.buffer.granularity == "sample" else sampling.group_size
        hands = math.ceil(count / sampling.group_size / self.config.mini_batches)  # of one mini-batch
        zeros = torch.zeros(sampling.max_new_tokens)
        return [
            Sample(sequence, 1.0, zeros, ref_logprobs=zeros if self.config.loss.kl_coef else None)
            for sequence in self.largest_sequences(sampling, shared, hands * sampling.group_size)
        ]

    def weights(self, samples: list[Sample]) -> dict[str, float]:
        loss = self.config.loss
        return dict.fromkeys(over_sequences(loss.kind, loss.ratio_level, loss.rollout_mode or ""), float(len(samples)))

    def loss(self, samples: list[Sample], whole: dict[str, float], metrics: Metrics) -> torch.Tensor:
        device = self.context.device
        batch = self.context.reader.batch([sample.sequence for sample in samples], device)
        advantages = torch.tensor([sample.advantage for sample in samples], device=device)
        needs_grad = None
        if self.skip_zero:
            assert all(sample.ref_logprobs is None for sample in samples), "a KL term reaches zero advantages too"
            needs_grad = (advantages != 0).repeat_interleave(batch.offsets.diff())
        output = self.context.policy.response_logprobs(
            batch,
            temperature=self._temperature,
            needs_grad=needs_grad,
            outputs=("entropy",),
            entropy_grad=self.config.loss.entropy_coef != 0,
        )
        current = output.logprobs.detach().split(batch.offsets.diff().tolist())
        pairs = zip(samples, current, strict=True)
        old = [own if s.old_logprobs is None else s.old_logprobs.to(device) for s, own in pairs]
        references = [s.ref_logprobs for s in samples if s.ref_logprobs is not None]
        behaviour = torch.cat([sample.behaviour_logprobs for sample in samples]).to(device)
        settings = self.config.loss.model_dump()
        if settings["rollout_mode"] is None:
            settings |= {"behaviour_logprobs": behaviour, "rollout_mode": "token_truncate"}
        else:
            settings["rollout_logprobs"] = behaviour
        loss = ops.policy_loss(
            output.logprobs,
            torch.cat(old),
            advantages,
            offsets=batch.offsets,
            ref_logprobs=torch.cat(references).to(device) if references else None,
            entropy=output.entropy,
            normalizer=self._normalizer(whole),
            entropy_normalizer=whole["tokens"],
            **settings,
        )
        metrics.update(loss.metrics)
        metrics["num_tokens"] = len(output.logprobs)
        return loss.loss

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = self.model.reference_state()
        meta: dict[str, Any] = {"rounds": self.rounds}
        if self.buffer is not None:
            held = self.buffer.state_dict()
            meta["buffer"] = held.pop("meta")
            tensors |= {f"buffer/{name}": value for name, value in held.items()}
        return tensors, meta

    def load_state(self, tensors: Stored, metas: list[dict[str, Any]]) -> None:
        self.model.load_reference_state(tensors.like)
        self.rounds = metas[0]["rounds"]
        if self.buffer is not None:
            world = self.context.world
            meta, ranks = merged([meta["buffer"] for meta in metas])
            if len(metas) != world.size:  # dealt anew, each unit whole
                ranks = [unit % world.size for unit in range(len(ranks))]
            state: Mapping[str, Any] = ChainMap({"meta": meta}, tensors.below("buffer/"))  # type: ignore[arg-type]
            self.buffer.load_state_dict(state, lambda unit: ranks[unit] == world.rank)

    def _hands(self, samples: list[Sample]) -> list[list[Sample]]:
        """What mini-batches are dealt: prompts with their responses; all ranks', with this rank's samples."""
        own = by_prompt(samples)
        if self.context.world.size == 1:
            return own
        named = {_name(hand): hand for hand in own}
        every = sorted(self.context.world.concatenate([(hand[0].order, name) for name, hand in named.items()]))
        return [named.get(name, []) for name in dict.fromkeys(name for _, name in every)]

    def _normalizer(self, whole: dict[str, float]) -> float:
        """What the mini-batch's loss is divided by, so that its micro-batches add up."""
        loss = self.config.loss
        aggregate = loss.aggregate or KINDS[loss.kind].aggregate
        if aggregate in ("token_mean", "token_sum"):
            return whole["tokens"] if aggregate == "token_mean" else 1.0
        longest = self.config.sampling.max_new_tokens if aggregate == "seq_mean_token_sum_norm" else 1
        return whole["samples"] * longest

    @property
    def _temperature(self) -> float:
        return self.config.sampling.temperature

    def _logprobs(self, samples: list[Sample]) -> list[list[torch.Tensor]]:
        return self.response_logprobs(samples, temperature=self._temperature)

    def _rollouts(self, metrics: Metrics) -> tuple[Experience, torch.Tensor, torch.Tensor]:
        """(a batch of groups, advantages [N], informative [groups]) of one rollout; or with dynamic sampling of as many
        as fill the batch with informative groups, those alone."""
        dynamic, sampling = self.config.dynamic_sampling, self.config.sampling
        rounds: list[Experience] = []
        while True:
            rounds.append(collect(self.context, self.judge, self.dataset, sampling, stage=self.name, round=self.rounds))
            self.rounds += 1
            experience = joined(rounds)
            groups = ops.group_advantages(
                experience.rewards_NR,
                experience.group_size,
                component_weights=self.judge.weights,
                informative_from=experience.component(self.config.informative_from),
                zero_uninformative=self.config.zero_uninformative,
                **self.config.advantages.model_dump(),
            )
            found = groups.informative.nonzero().flatten().tolist()
            if dynamic is None or len(found) >= sampling.prompts or len(rounds) == dynamic.max_rounds:
                break
        metrics.update(experience.metrics(self.judge.weights))
        metrics["frac_informative"] = groups.informative.float().mean()
        advantages, informative = groups.advantages.cpu(), groups.informative.cpu()
        if dynamic is None:
            return experience, advantages, informative
        metrics["dynamic_sampling/rounds"] = len(rounds)
        batch = found[: sampling.prompts] or list(range(sampling.prompts))  # nothing informative: the buffer fills it
        return experience.groups(batch), advantages.view(len(informative), -1)[batch].flatten(), informative[batch]

    def _keeps_zero(self, experience: Experience, i: int) -> bool:
        """Whether a response without an advantage counts all the same: in the average, or under a KL term."""
        if self.config.mask_truncated and not experience.finished_N[i]:
            return False
        return not self.skip_zero or self.config.average_over == "all"

    def _replay(
        self, experience: Experience, advantages: torch.Tensor, informative: torch.Tensor, step: int, metrics: Metrics
    ) -> list[Unit]:
        """The deficit of informative units drawn back from the buffer; then this step's go in."""
        if self.buffer is None or self.config.buffer is None:
            return []
        size, prompts = experience.group_size, self.config.sampling.prompts
        effective = torch.where(informative.repeat_interleave(size), advantages, 0.0)
        unit = 1 if self.buffer.granularity == "sample" else size
        priorities = effective.view(-1, unit).abs().mean(1)
        target, fresh = prompts * size // unit, int((priorities > 0).sum())
        missing_from = round(target * self.config.buffer.share)
        have = fresh
        if self.config.buffer.deficit == "signal" and len(self.buffer):
            have = round(priorities.sum().item() / self.buffer.mean_priority)
        replayed = self.buffer.fill(missing_from, have, step)
        samples = [_stored(experience, i) if experience.here(i) else None for i in range(len(advantages))]
        self.buffer.push(samples, effective, torch.arange(0, len(samples) + 1, size), step)
        metrics["buffer/effective_share_without"] = fresh / target
        metrics["buffer/effective_share"] = (fresh + len(replayed)) / target
        metrics["buffer/size"] = len(self.buffer)
        here = [len(s["response_ids"]) for unit in replayed for s in unit.samples if s is not None]
        metrics["buffer/replayed_tokens"] = sum(self.context.world.concatenate(here))
        if replayed:
            metrics["buffer/staleness"] = sum(step - unit.step for unit in replayed) / len(replayed)
        return replayed

    def _dump(self, experience: Experience, advantages: torch.Tensor, kept: set[int], step: int) -> None:
        if step % self.context.recipe.samples_every:
            return
        first = self.context.world.concatenate([(g.prompt, g.completions) for g in experience.own[:1] if g is not None])
        for i, completion in enumerate(first[0][1]):
            record, rewards = experience.record(i), experience.rewards_NR[i].tolist()
            self.context.log.sample(
                stage=self.name,
                step=step,
                id=record.id,
                prompt=record.prompt,
                images=first[0][0].image_keys,
                completion=completion,
                answer=record.answer,
                rewards=dict(zip(experience.names, rewards, strict=True)),
                advantage=advantages[i].item(),
                kept=i in kept,
            )


def _name(hand: list[Sample]) -> str:
    """Of its prompt, the same on every rank."""
    return hashlib.blake2b(repr(prompt_key(hand[0].sequence)).encode()).hexdigest()


def _sample(experience: Experience, i: int, advantage: float) -> Sample:
    return Sample(experience.sequence(i), advantage, experience.response(i).logprobs, order=(0, i))


def _stored(experience: Experience, i: int) -> dict[str, Any]:
    """A response as the buffer keeps it."""
    sequence = experience.sequence(i)
    return {
        "prompt_ids": torch.tensor(sequence.prompt_ids, dtype=torch.int32),
        "response_ids": torch.tensor(sequence.response_ids),
        "behaviour_logprobs": experience.response(i).logprobs,
        "image_keys": sequence.image_keys,
    }


def _restored(unit: Unit, place: int) -> list[Sample]:
    """A unit's samples with an advantage, where this rank holds them; the others have nothing to teach."""
    return [
        Sample(
            Sequence(stored["prompt_ids"].tolist(), stored["response_ids"].tolist(), stored["image_keys"]),
            advantage,
            stored["behaviour_logprobs"],
            replayed=True,
            order=(place, i),
        )
        for i, (stored, advantage) in enumerate(zip(unit.samples, unit.advantages.tolist(), strict=True))
        if advantage != 0 and stored is not None
    ]

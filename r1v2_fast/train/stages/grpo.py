"""GRPO with the Selective Sample Buffer (R1V2, arXiv 2504.16656, section 3.3): the data flow of one step, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from r1v2_fast import ops
from r1v2_fast.buffer import SelectiveSampleBuffer
from r1v2_fast.data.collate import Batch, Sequence
from r1v2_fast.models.freeze import snapshot, swapped
from r1v2_fast.train import config
from r1v2_fast.train.context import Context
from r1v2_fast.train.experience import Experience, Judge, collect, reward_metrics
from r1v2_fast.train.stages.base import Metrics, Stage


@dataclass(frozen=True)
class Samples:
    """What one update trains on: B sequences, fresh and replayed, N packed response tokens."""

    batch: Batch
    advantages: torch.Tensor  # [B]
    behaviour_logprobs: torch.Tensor  # [N]
    ref_logprobs: torch.Tensor | None  # [N], with a KL term


class GRPOStage(Stage):
    name = "grpo"

    def __init__(self, context: Context, config: config.GRPO):
        super().__init__(context, config)
        self.config = config
        context.policy.train_parts(list(config.train))
        self.initial = snapshot(context.policy.parameters)
        self.judge = Judge(context, config.rewards)
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
        # without a KL term a zero advantage leaves no gradient at all, so those rows need none made
        self.skip_zero = config.kl_coef == 0

    def collect(self, step: int, metrics: Metrics) -> Samples | None:
        sampling = self.config.sampling
        experience = collect(self.context, self.judge, self.dataset, sampling, stage=self.name, step=step)
        metrics.update(reward_metrics(experience, self.judge.weights, sampling.max_new_tokens))
        groups = ops.group_advantages(
            experience.rewards_NR,
            sampling.group_size,
            component_weights=self.judge.weights,
            aggregate=self.config.aggregate,
            informative_from=experience.component(self.config.informative_from),
            zero_uninformative=self.config.zero_uninformative,
        )
        metrics["frac_informative"] = groups.informative.float().mean()
        samples = [_sample(experience, i) for i in range(len(experience.responses))]
        advantages = groups.advantages.cpu()
        replayed = self._replay(samples, advantages, groups.informative, step, metrics)
        keep = [i for i in range(len(samples)) if not self.skip_zero or bool(advantages[i] != 0)]
        kept = [samples[i] for i in keep] + [sample for unit in replayed for sample in unit.samples]
        values = torch.cat([advantages[keep], *(unit.advantages for unit in replayed)])
        self._dump(experience, advantages, set(keep), step)
        return self._samples(kept, values) if kept else None

    def loss(self, samples: Samples, metrics: Metrics) -> torch.Tensor:
        batch = samples.batch
        needs_grad = None
        if self.skip_zero:
            assert samples.ref_logprobs is None, "a KL term reaches tokens whose advantage is zero"
            needs_grad = (samples.advantages != 0).repeat_interleave(batch.offsets.diff())
        output = self.context.policy.response_logprobs(
            batch, temperature=self.config.sampling.temperature, needs_grad=needs_grad, outputs=("entropy",)
        )
        assert output.entropy is not None
        sequences, longest = len(samples.advantages), self.config.sampling.max_new_tokens
        loss = ops.policy_loss(
            output.logprobs,
            output.logprobs.detach(),  # one update a rollout: the old policy is this one
            samples.advantages,
            offsets=batch.offsets,
            kind=self.config.kind,
            clip_low=self.config.clip_low,
            clip_high=self.config.clip_high,
            ref_logprobs=samples.ref_logprobs,
            kl_coef=self.config.kl_coef,
            behaviour_logprobs=samples.behaviour_logprobs,
            behaviour_cap=self.config.behaviour_cap,
            normalizer=float(sequences * longest) if self.config.kind == "dr_grpo" else None,
        )
        metrics.update(loss.metrics)
        metrics["entropy"] = output.entropy.detach().mean()
        metrics["num_tokens"] = len(output.logprobs)
        return loss.loss

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = {f"initial/{index}": value for index, value in enumerate(self.initial)}
        meta: dict[str, Any] = {}
        if self.buffer is not None:
            held = self.buffer.state_dict()
            meta["buffer"] = held.pop("meta")
            tensors |= {f"buffer/{name}": value for name, value in held.items()}
        return tensors, meta

    def load_state(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        self.initial = [tensors[f"initial/{index}"].to(self.context.device) for index in range(len(self.initial))]
        if self.buffer is not None:
            held = {n.removeprefix("buffer/"): t for n, t in tensors.items() if n.startswith("buffer/")}
            self.buffer.load_state_dict({**held, "meta": meta["buffer"]})

    def _replay(self, samples: list[dict], advantages, informative, step: int, metrics: Metrics) -> list:
        """The deficit of informative units drawn back from the buffer; then this step's go in."""
        size = self.config.sampling.group_size
        if self.buffer is None:
            return []
        by_group = self.config.buffer is not None and self.config.buffer.granularity == "group"
        groups = len(informative)
        target, fresh = (groups, int(informative.sum())) if by_group else (len(samples), int((advantages != 0).sum()))
        replayed = self.buffer.fill(target, fresh, step)
        offsets = torch.arange(0, len(samples) + 1, size)
        self.buffer.push(
            samples, torch.where(informative.cpu().repeat_interleave(size), advantages, 0.0), offsets, step
        )
        metrics["buffer/effective_share_without"] = fresh / target
        metrics["buffer/effective_share"] = (fresh + len(replayed)) / target
        metrics["buffer/size"] = self.buffer.stats()["size"]
        if replayed:
            metrics["buffer/staleness"] = sum(step - unit.step for unit in replayed) / len(replayed)
        return replayed

    def _samples(self, samples: list[dict], advantages: torch.Tensor) -> Samples:
        device = self.context.device
        sequences = [Sequence(s["prompt_ids"], s["response_ids"].tolist(), s["image_keys"]) for s in samples]
        batch = self.context.reader.batch(sequences, device)
        behaviour = torch.cat([s["behaviour_logprobs"] for s in samples]).to(device)
        return Samples(batch, advantages.to(device), behaviour, None if self.skip_zero else self._reference(batch))

    @torch.no_grad()
    def _reference(self, batch: Batch) -> torch.Tensor:
        policy = self.context.policy
        with swapped(policy.parameters, self.initial):
            return policy.response_logprobs(batch, temperature=self.config.sampling.temperature).logprobs

    def _dump(self, experience: Experience, advantages: torch.Tensor, kept: set[int], step: int) -> None:
        if step % self.context.recipe.samples_every:
            return
        for i in range(experience.group_size):  # the first prompt's group
            record, rewards = experience.record(i), experience.rewards_NR[i].tolist()
            self.context.log.sample(
                stage=self.name,
                step=step,
                id=record.id,
                prompt=record.prompt,
                images=experience.prompts[0].image_keys,
                completion=experience.completions[i],
                answer=record.answer,
                rewards=dict(zip(experience.names, rewards, strict=True)),
                advantage=advantages[i].item(),
                kept=i in kept,
            )


def _sample(experience: Experience, i: int) -> dict:
    response, sequence = experience.responses[i], experience.sequence(i)
    return {
        "prompt_ids": sequence.prompt_ids,
        "response_ids": torch.tensor(response.ids),
        "behaviour_logprobs": response.logprobs,
        "image_keys": sequence.image_keys,
    }

"""A run's configuration: one YAML file plus dotted overrides. An unknown key is an error that names the closest one."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Part = Literal["adapter", "llm", "vision"]
Share = Annotated[float, Field(ge=0, lt=1)]
METRICS = ("accuracy", "format", "hallucination", "hallucination/right", "hallucination/wrong")
# YAML reads a bare on or off as a boolean
Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda value: ("off", "on")[value] if isinstance(value, bool) else value),
]
Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Aggregate = Literal["token_mean", "token_sum", "seq_mean_token_sum", "seq_mean_token_sum_norm", "seq_mean_token_mean"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Optimizer(Section):
    """AdamW with linear warm-up, then a schedule."""

    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    decay: Literal["none", "linear", "cosine"] = "none"
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Share of the peak at which a decay ends."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Global gradient norm above which gradients are scaled down; null never scales."""


class LoRA(Section):
    """Low-rank adapters on one part's linear layers, through peft; merged into the weights when the stage ends."""

    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0)
    """The update is alpha / rank x B A."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Names of linear layers, such as q_proj."""


class Stage(Section):
    steps: int = Field(gt=0)
    """Batches; a step is one optimizer step unless updates_per_rollout or mini_batches say more."""
    data: str
    """File of records below data.folder, .jsonl or .parquet."""
    train: list[Part] = ["adapter"]
    """Parts that train in full; R1V2's policy stages train the adapter alone."""
    lora: dict[Part, LoRA] = {}
    """Parts that train through LoRA."""
    optimizer: Optimizer = Optimizer()
    micro_batch_tokens: int | None = Field(None, gt=0)
    """Tokens of one forward and backward, packed (or padded, without model.packing); gradients accumulate to the whole
    mini-batch's. None: all at once."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward: less memory, one more forward."""

    @model_validator(mode="after")
    def _a_part_trains_one_way(self):
        if both := set(self.train) & set(self.lora):
            raise ValueError(f"train and lora must not name the same part, got {sorted(both)} in both")
        if not self.train and not self.lora:
            raise ValueError("train or lora must name a part, got none in both")
        return self


class Align(Stage):
    batch_size: int = Field(64, gt=0)
    """Sequences a step."""


class Sampling(Section):
    prompts: int = Field(32, gt=0)
    """Prompts a step."""
    group_size: int = Field(8, gt=1)
    """Responses a prompt, G."""
    temperature: float = Field(1.0, ge=1e-3)
    """Below 1e-3 logits overflow; evaluations are greedy."""
    max_new_tokens: int = Field(12, gt=0)


class DynamicSampling(Section):
    """DAPO (2503.14476): further prompts are sampled until the batch's groups are all informative."""

    max_rounds: int = Field(4, gt=1)
    """Rollouts a step at most, each of sampling.prompts."""


class RewardTerm(Section):
    """One reward component; components are logged apart and summed with their weights."""

    name: str
    function: str
    """exact_match, math_answer, think_format, path.py:name, or reward_model; coin_flip where there is nothing to judge."""
    weight: float = 1.0
    squash: Literal["none", "sigmoid"] = "none"
    """An unbounded score drowns the rules: sigmoid brings it to (0, 1)."""
    time_limit: float | None = Field(120.0, gt=0)
    """Seconds for one call on a step's completions; null waits for ever."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A NaN or infinite reward stops the run and names its sample, or leaves the sample unscored."""


def _distinct(terms: list[RewardTerm]) -> list[RewardTerm]:
    names = [term.name for term in terms]
    if len(set(names)) != len(names):
        raise ValueError(f"rewards must have distinct names, got {names}")
    return terms


Rewards = Annotated[list[RewardTerm], AfterValidator(_distinct)]


class Reward(Stage):
    """Bradley-Terry reward model on pairs sampled from the aligned policy."""

    train: list[Part] = ["adapter", "llm"]
    sampling: Sampling = Sampling()
    rewards: Rewards = Field(min_length=1)
    """What decides the preferred response of a pair: the sum of these rule rewards."""
    max_pairs: int = Field(4, gt=0)
    """Pairs of one prompt, at most."""


class MPO(Stage):
    """Mixed preference optimization: sample, score, pair by reward gap, train; or train on ready pairs."""

    sampling: Sampling | None = Sampling(prompts=64, group_size=4)
    """None trains on the data's own chosen and rejected responses."""
    rewards: Rewards = []
    min_reward_gap: float = Field(0.5, ge=0)
    """A pair needs a chosen reward this much above the rejected one's: R1V2's threshold."""
    max_pairs: int = Field(4, gt=0)
    pairs: int = Field(64, gt=0)
    """Ready pairs a step; without meaning when sampling."""
    beta: float = Field(0.1, gt=0)
    weights: tuple[Weight, Weight, Weight] = (0.8, 0.2, 1.0)
    """Preference (DPO), quality (BCO), generation (SFT)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    generation: Literal["sequence", "token"] = "sequence"
    """The chosen responses' NLL: a mean for each, then over responses (R1V2), or over all tokens (InternVL, TRL)."""
    shift: Literal["running", "zero"] = "running"
    """BCO's delta: the running mean of implicit rewards (InternVL), or 0 (TRL since 0.29)."""

    @model_validator(mode="after")
    def _sampled_pairs_need_rewards(self):
        if self.sampling is not None and not self.rewards:
            raise ValueError("mpo.rewards must name at least one reward while mpo.sampling is set")
        if self.sampling is None and self.rewards:
            raise ValueError("mpo.rewards has no meaning while mpo.sampling is null: ready pairs are not scored")
        return self


class Buffer(Section):
    """Selective Sample Buffer: informative groups kept and drawn again by |advantage| to fill the batch."""

    capacity: int = Field(512, gt=0)
    """Groups or samples held."""
    granularity: Literal["group", "sample"] = "group"
    alpha: float = Field(1.0, ge=0)
    """Priority exponent: a unit is drawn in proportion to |advantage|^alpha."""
    max_staleness: int | None = Field(None, gt=0)
    """Steps after which a unit is no longer drawn."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of the batch that replayed units fill up to."""
    deficit: Literal["units", "signal"] = "units"
    """What is missing from the batch: informative units, or sum of |advantage| in terms of the buffer's mean unit."""
    ratio: Literal["decoupled", "stored"] = "decoupled"
    """Replayed samples: min(exp(old - behaviour), loss.behaviour_cap) times a ratio to the policy before the update; or, as
    in PPO, the clipped ratio to the stored behaviour log-probs alone."""


class Advantages(Section):
    """Arguments of ops.group_advantages; docs/losses.md says which reproduce which trainer."""

    aggregate: Literal["sum", "gdpo"] = "sum"
    """Reward components are summed, or each is normalised first and the sum whitened over the batch (GDPO)."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    scale: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the standard deviation of the group, of the batch, or nothing (Dr. GRPO)."""
    correction: Literal[0, 1] = 1
    """1: the unbiased standard deviation."""
    eps: float = Field(1e-4, ge=0)
    eps_mode: Literal["add", "clamp"] = "add"
    singleton: Literal["zero", "raw"] = "zero"
    """A group with one scored response: no advantage, or the reward itself (verl)."""


class PolicyLoss(Section):
    """Arguments of ops.policy_loss; docs/losses.md has the formulas, and which arguments reproduce which trainer."""

    kind: Literal[
        "grpo", "dr_grpo", "dapo", "bnpo", "gspo", "gmpo", "cispo", "sapo", "luspo", "vespo", "dppo_tv"
    ] = "grpo"  # fmt: skip
    ratio_level: Literal["token", "sequence"] | None = None
    """None: the kind's own."""
    aggregate: Aggregate | None = None
    """How tokens are averaged; None: the kind's own way. A step's counts are those of its whole mini-batch."""
    clip_low: float = Field(0.2, ge=0, le=1)
    clip_high: float = Field(0.2, ge=0)
    """Of cispo, the cap itself."""
    ratio_cap: float | None = Field(None, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    log_ratio_clamp: float | None = Field(20.0, gt=0)
    """Nat."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL to the policy at the start of the stage; 0 needs no reference log-probs."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    kl_importance: bool = False
    behaviour_cap: float = Field(2.0, gt=0)
    """Cap of a token's weight min(exp(old - behaviour), cap), behaviour the log-probs as it was sampled."""
    rollout_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None = None
    """Weights exp(old - behaviour) truncated to, or masked outside, [rollout_min, rollout_cap] instead."""
    rollout_cap: float | None = Field(3.0, gt=0)
    rollout_min: float | None = Field(None, ge=0)
    off_policy_threshold: float | None = Field(None, ge=0)
    """Nat: responses with A < 0 that have moved further from how they were sampled leave no gradient."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, mean over tokens; costs one more matmul over the vocabulary."""
    cispo_low: float | None = Field(None, ge=0)
    sapo_tau: tuple[Positive, Positive] = (1.0, 1.05)
    vespo: tuple[Weight, Weight, Weight, Weight] = (2.0, 3.0, 3.0, 2.0)
    gmpo_clamp: tuple[Weight, Weight] = (0.4, 0.4)
    """Nat, below and above."""
    dppo_threshold: tuple[Weight, Weight] | None = None
    """Probabilities, below and above; None: clip_low and clip_high."""

    @model_validator(mode="after")
    def _level_of_kind(self):
        if self.kind in ("gspo", "gmpo") and self.ratio_level == "token":
            raise ValueError(f"{self.kind} is defined by its sequence's ratio, got ratio_level 'token'")
        if self.kind == "cispo" and self.cispo_low is None and self.clip_high < 1:
            raise ValueError(f"clip_high of cispo is the cap of the ratio itself, 1 or more, got {self.clip_high}")
        return self


class GRPO(Stage):
    sampling: Sampling = Sampling()
    dynamic_sampling: DynamicSampling | None = None
    overlong_cache: int | None = Field(None, gt=0)
    """DAPO's soft over-length penalty, a reward component named overlong: 0 up to max_new_tokens less this many tokens,
    then linearly down to -1."""
    mask_truncated: bool = False
    """Responses that ran out of length leave no gradient; their rewards still count in their groups."""
    updates_per_rollout: int = Field(1, gt=0)
    """Passes over a step's samples."""
    mini_batches: int = Field(1, gt=0)
    """Optimizer steps a pass; prompts with all their responses are dealt out evenly."""
    rewards: Rewards = Field(min_length=1)
    informative_from: str
    """The reward component that decides whether a group is informative."""
    zero_uninformative: bool = True
    """Groups with equal deciding rewards get advantage 0 even if another component differs."""
    advantages: Advantages = Advantages()
    loss: PolicyLoss = PolicyLoss()
    average_over: Literal["kept", "all"] = "kept"
    """Responses without an advantage leave no gradient: kept averages over the others alone, so that the step does not
    shrink with them; all counts them too, as TRL and verl do, and runs them through the model for it."""
    buffer: Buffer | None = Buffer()
    """None switches the Selective Sample Buffer off."""

    @model_validator(mode="after")
    def _informative_names_a_reward(self):
        names = [term.name for term in self.rewards]
        if self.informative_from not in names:
            raise ValueError(f"grpo.informative_from must be one of {names}, got {self.informative_from!r}")
        if self.overlong_cache is not None:
            if self.overlong_cache > self.sampling.max_new_tokens:
                longest = self.sampling.max_new_tokens
                raise ValueError(
                    f"overlong_cache must be at most max_new_tokens = {longest}, got {self.overlong_cache}"
                )
            if "overlong" in names:
                raise ValueError("a reward named 'overlong' would be mistaken for the penalty of grpo.overlong_cache")
        return self


class Model(Section):
    preset: str | None = None
    """A preset to initialise: digits; or an architecture without weights, internvl3-1b or r1v2-38b, for dummy_weights."""
    path: str | None = None
    """Or a local InternVL-family folder in Hugging Face format."""
    dummy_weights: bool = False
    """Fill an architecture with random weights, with a made-up tokenizer, and records where data.folder has none: speed
    and memory are the real ones, answers are noise. `r1v2-fast train RECIPE --dummy-weights` sets it."""
    architecture: dict[str, Any] = {}
    """Changes to the preset's config for a smaller dummy, such as {text_config: {num_hidden_layers: 2}}."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights, the matmuls and the stages' products; what trains is held in fp32 (mixed precision)."""
    feature_cache_gib: float = Field(1.0, gt=0)
    """Memory on the model's device for the frozen tower's features; an image of R1V2-38B's 13 tiles takes 0.08 GiB."""
    feature_cache_folder: str | None = None
    """Features also go to files here and are read by later runs with the same tower; null keeps them in memory alone."""
    packing: bool = True
    """A prompt stands once in a batch, its responses behind it; false repeats it for each response and pads."""
    attention: Literal["auto", "sdpa", "flex", "flash"] = "auto"
    """How packed rows attend: PyTorch's SDPA group by group, FlexAttention, or flash-attn. auto: on a GPU flash where it
    is installed and the weights are 16-bit, else flex; sdpa elsewhere."""
    fused_layers: Switch = "auto"
    """liger-kernel's RMSNorm, RoPE and SwiGLU in the language model. auto: on a GPU where liger-kernel is installed."""

    @model_validator(mode="after")
    def _one_source(self):
        if (self.preset is None) == (self.path is None):
            raise ValueError(f"give one of model.preset and model.path, got {self.preset!r} and {self.path!r}")
        if self.dummy_weights and self.preset in (None, "digits"):
            raise ValueError(f"model.dummy_weights fills an architecture's preset, got preset {self.preset!r}")
        if self.architecture and not self.dummy_weights:
            raise ValueError(f"model.architecture changes dummy weights alone, got {self.architecture!r} without them")
        return self


class Data(Section):
    folder: str
    """Folder of the records; relative to the run folder when `make` writes it, else to where the run starts."""
    make: Literal["digits", "synthetic"] | None = None
    """Write this dataset into the folder first: the toy's digits, or records of noise under the names that the run reads."""
    sizes: dict[str, int] = {}
    """Records a file, for `make`."""
    root: str | None = None
    """Folder that image paths are relative to; default: the record file's folder."""
    allow_outside: bool = False
    """True lets image paths leave the root."""
    max_tiles: int = Field(12, gt=0)


class Rollout(Section):
    """What samples the responses; docs/rollout.md."""

    engine: Literal["local", "vllm"] = "local"
    """local: transformers in this process. vllm: a vLLM server that holds the language model; it is probed at the start."""
    max_rows: int | None = Field(None, gt=0)
    """Local: rows of one decode step, refilled as responses end. Their keys and values are what memory goes to: rows times
    the longest prompt and max_new_tokens. None: a row for every response."""
    prefill_tokens: int | None = Field(None, gt=0)
    """Local: padded tokens of one prefill. None: as many prompts at once as there are free rows for."""
    cuda_graphs: bool = True
    """Local, on a GPU: replay decode steps as CUDA graphs."""
    url: str = "http://127.0.0.1:8000"
    """vLLM: the server's address."""
    api_key_env: str | None = None
    """vLLM: the environment variable that holds the server's key; a server that is not on loopback must have one."""
    model: str | None = None
    """vLLM: the name the language model is served under. None: the only one that the server has."""
    timeout: float = Field(600.0, gt=0)
    """vLLM: seconds of silence after which a request is sent again; a reply comes whole, when its last response has ended."""
    retries: int = Field(4, ge=0)
    """vLLM: further attempts at a request, from 0.5 s apart to 30 s."""
    concurrency: int = Field(64, gt=0)
    """vLLM: requests in flight, each a prompt with all its responses."""
    probe_tolerance: float | None = Field(None, gt=0)
    """vLLM: nat by which the probe's log-probs may differ, mean over tokens. None: 1e-3 in float32, 0.05 in 16 bits."""
    weight_transfer: str | None = None
    """vLLM: host:port where the server's workers find this process, for runs that train the language model."""


class Evaluation(Section):
    sets: dict[str, str] = Field(min_length=1)
    """Name -> file of held-out records."""
    every: int = Field(50, gt=0)
    """Steps between evaluations while a policy stage trains; it is also evaluated before and after every stage."""
    records: int | None = Field(None, gt=0)
    """Records of each set used while a stage trains; before and after it all are."""
    batch_size: int = Field(250, gt=0)
    max_new_tokens: int = Field(12, gt=0)
    score: str = "exact_match"
    """The rule that counts an answer as right; a reward function, and right is 1 or more."""
    time_limit: float | None = Field(600.0, gt=0)
    """Seconds for the rule on all answers of a set; null waits for ever."""
    on_nan: Literal["stop", "skip"] = "stop"
    """As for a reward: an answer scored NaN stops the run, or counts as unscored."""


class Checkpoint(Section):
    every: int = Field(50, gt=0)
    """Steps between checkpoints."""
    keep: int = Field(2, gt=0)
    """Newest checkpoints kept."""
    best: str | None = None
    """An evaluation's metric, such as eval/clean/accuracy: the policy with the best one is kept in best/. While a stage
    trains that is the metric of evaluation.records, at its end of all records."""
    best_is: Literal["highest", "lowest"] = "highest"


class Run(Section):
    name: str
    folder: str
    """Where everything of the run goes."""
    seed: int = Field(0, ge=0)
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a GPU where there is one."""
    threads: int | None = Field(None, gt=0)
    """CPU threads; None leaves PyTorch's choice."""
    shard: Literal["none", "full"] = "none"
    """Several ranks: each holds the whole model, which is fastest where it fits; or full: FSDP2 shards its layers."""
    timeout: float = Field(1800.0, gt=0)
    """Several ranks: seconds that one waits for another before it takes it for lost and the run ends; longer than the
    slowest rollout or reward call differs between ranks."""
    stages: list[Literal["align", "reward", "mpo", "grpo"]] = Field(min_length=1)
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Beside metrics.jsonl; each is an extra of its own."""


class Recipe(Section):
    run: Run
    model: Model
    data: Data
    align: Align | None = None
    reward: Reward | None = None
    mpo: MPO | None = None
    grpo: GRPO | None = None
    rollout: Rollout = Rollout()
    evaluation: Evaluation
    checkpoint: Checkpoint = Checkpoint()
    samples_every: int = Field(10, gt=0)
    """Steps between sample dumps."""

    def files(self) -> list[str]:
        """The record files that the run reads, below data.folder."""
        return list(
            dict.fromkeys([*(getattr(self, stage).data for stage in self.run.stages), *self.evaluation.sets.values()])
        )

    @model_validator(mode="after")
    def _stages_are_configured(self):
        for stage in self.run.stages:
            if getattr(self, stage) is None:
                raise ValueError(f"run.stages names {stage!r}, but the recipe has no section {stage!r}")
        if len(set(self.run.stages)) != len(self.run.stages):
            raise ValueError(f"run.stages must not repeat a stage, got {self.run.stages}")
        for index, stage in enumerate(self.run.stages):
            terms = getattr(getattr(self, stage), "rewards", [])
            if any(term.function == "reward_model" for term in terms) and "reward" not in self.run.stages[:index]:
                raise ValueError(f"{stage}.rewards uses reward_model, but no stage 'reward' comes before it")
        trains_llm = [
            n for n in self.run.stages if n != "reward" and "llm" in {*getattr(self, n).train, *getattr(self, n).lora}
        ]
        if self.rollout.engine == "vllm" and trains_llm and self.rollout.weight_transfer is None:
            raise ValueError(
                f"{trains_llm[0]} trains the language model, which a vLLM server holds too: rollout.weight_transfer must "
                "be host:port, got none; stages that train the adapter or the tower alone need none"
            )
        known = [f"eval/{name}/{metric}" for name in self.evaluation.sets for metric in METRICS]
        if self.checkpoint.best is not None and self.checkpoint.best not in known:
            raise ValueError(f"checkpoint.best must be one of {known}, got {self.checkpoint.best!r}")
        return self


def load(recipe: str, overrides: list[str]) -> Recipe:
    """The recipe (a name or a path) with `a.b=c` overrides applied; raises ValueError with what to write instead."""
    path = find(recipe)
    values = _yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of sections, got {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    return resolve(values, source=str(path))


def resolve(values: dict[str, Any], *, source: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(f"{source}: {_explain(problem)}" for problem in error.errors())) from error


def find(recipe: str) -> Path:
    """A path as it is; a name below `recipes/` of the package."""
    if Path(recipe).is_file():
        return Path(recipe)
    shipped = Path(__file__).parent / "recipes"
    named = shipped / f"{recipe}.yaml"
    if named.is_file():
        return named
    names = sorted(path.stem for path in shipped.glob("*.yaml"))
    raise ValueError(f"no recipe file or name {recipe!r}{_closest(recipe, names)}; shipped: {', '.join(names)}")


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"an override must look like section.key=value, got {override!r}")
    *sections, last = key.split(".")
    node = values
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ValueError(f"override {override!r}: {section!r} is not a section")
    node[last] = _yaml(text, f"override {override!r}")


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not YAML: {' '.join(str(error).split())}") from error


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_closest(str(problem['loc'][-1]), _fields_at(problem['loc'][:-1]))}"
    said = problem["msg"].removeprefix("Value error, ")  # our validators say what they got
    got = "" if problem["type"] in ("missing", "value_error") else f", got {problem['input']!r}"
    return f"{key or 'recipe'}: {said}{got}"


def _fields_at(location: tuple) -> list[str]:
    """Field names of the section at `location`, followed through optional, list and dict types."""
    section: Any = Recipe
    for part in location:
        if part not in section.model_fields:  # an index, or a key of the user's
            continue
        section = _section_type(section.model_fields[part].annotation)
    return list(section.model_fields)


def _section_type(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_type(inner)) is not None:
            return found
    return None


def _closest(word: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""

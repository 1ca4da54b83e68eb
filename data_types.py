"""The plain data that the modules hand to each other: episodes, a run's progress, and its settings.

A setting is one line: its type, its default, what it means and the values it may take. plumbing/config.py reads a file
of them, and its checks and messages all follow from that line, so adding a setting is adding a line:

    config = load_config("config_tiny.yml", ["rollout.group_size=32", "train.learning_rate=3e-4"])
    config.train.learning_rate  # 0.0003
"""

from dataclasses import MISSING as REQUIRED, dataclass, field
from typing import Any

# Sizes that bound memory; no result depends on them. plumbing/memory.py plans with them.
PREFILL_TOKENS = 4096  # prompt tokens in one forward pass of the sampler
COLUMN_BLOCK = 128  # columns of the KV cache come in blocks: few CUDA graphs, and aligned masks
CHUNK_TOKENS = 512  # response tokens whose logits over the whole vocabulary exist at a time


@dataclass
class Episode:
    """One response on its way through a training step; the ids are those sampled, never tokenized again."""

    problem: Any  # as the task made it
    prompt_ids: list[int]
    response_ids: list[int]  # the end token included
    old_logprobs: list[float]  # of each response token, under the policy that sampled it
    truncated: bool  # by the length limit, before any end token
    text: str  # the response, without the end token
    rewards: dict[str, float] = field(default_factory=dict)  # {"format": 0.1, "correct": 1.0}
    advantage: float = 0.0
    token_weight: float = 0.0  # of each response token in the batch's loss

    @property
    def reward(self) -> float:
        return sum(self.rewards.values())

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def active(self) -> bool:
        """Whether it adds to the gradient."""
        return self.advantage * self.token_weight != 0.0


@dataclass
class Progress:
    """How far a run has got: what a resumed run needs to know besides the tensors."""

    step: int = 0  # steps that are done
    problems_used: int = 0  # training problems sampled so far
    optimizer_steps: int = 0  # not the steps, where some were skipped or made several
    skipped_in_a_row: int = 0
    problems: str = ""  # SHA-256 of all problems, so that a resumed run notices others
    seconds: float = 0.0  # since the start of the run, pauses left out
    before: dict[str, float] = field(default_factory=dict)  # held-out scores before training
    after: dict[str, float] = field(default_factory=dict)  # and after the last step
    best: float = 0.0  # the best greedy held-out score
    best_step: int = 0
    files: dict[str, int] = field(default_factory=dict)  # bytes of metrics.jsonl and samples.jsonl


# ---- The settings --------------------------------------------------------------------------------------------


def setting(default: Any, meaning: str, *choices: str, also: str = "", **bounds: float) -> Any:
    """A setting, as a dataclass field: int, float, bool or str.

    default: REQUIRED where the file or an override must give a value. choices: regular expressions, of which a text
    must match one. also: what other trainers call it. bounds: at_least, above, at_most, below.
    """
    metadata = {"meaning": meaning, "choices": choices, "also": also, "bounds": bounds}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """Sampling the responses that a training step learns from."""

    group_size: int = setting(16, "responses per question", also="n num_generations", at_least=2)
    questions_per_step: int = setting(16, "questions per step", also="batch_size", at_least=1)
    max_draws: int = setting(1, "dynamic sampling: most draws per step", at_least=1, at_most=100)
    max_new_tokens: int = setting(REQUIRED, "longest response, tokens", also="max_tokens", at_least=1)
    temperature: float = setting(1.0, "the logits are divided by it", at_least=0.01)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The update of the policy."""

    learning_rate: float = setting(REQUIRED, "step size of AdamW", also="lr", above=0, at_most=1)
    steps: int = setting(REQUIRED, "training steps", also="epochs", at_least=1, at_most=999_999)
    seed: int = setting(1, "seed of every random choice", at_least=0)
    warmup_steps: int = setting(0, "steps over which the learning rate rises linearly", at_least=0)
    schedule: str = setting("constant", "learning rate after the warm-up", "constant", "cosine")
    weight_decay: float = setting(0.0, "decoupled weight decay of AdamW", at_least=0)
    optimizer: str = setting("master", "see optimizer.py", "master", "split", "offload")
    beta1: float = setting(0.9, "decay of AdamW's mean of the gradients", at_least=0, below=1)
    beta2: float = setting(0.999, "decay of AdamW's mean of squared gradients", at_least=0, below=1)
    max_grad_norm: float = setting(1.0, "larger ones are scaled down", also="max_norm", above=0)
    divide_by_std: bool = setting(True, "divide advantages by the group's std; Dr. GRPO: false")
    objective: str = setting("reinforce", "see grpo.py", "reinforce", "clipped", "gspo", "cispo")
    updates_per_batch: int = setting(1, "optimizer steps per batch", also="num_iterations mu", at_least=1)
    clip_low: float = setting(0.2, "clipped, gspo: least ratio, 1 - this", also="epsilon", above=0, at_most=1)
    clip_high: float = setting(0.28, "largest ratio, 1 + this", also="epsilon", above=0)
    divide_loss_by: str = setting("limit", "the denominator", "tokens", "responses", "limit")
    truncated: str = setting("keep", "mask: truncated responses out of the loss", "keep", "mask")
    tokens_per_microbatch: int = setting(8192, "tokens per backward", also="micro_batch_size", at_least=1)
    activation_checkpointing: bool = setting(False, "recompute activations in backward")
    max_skips: int = setting(3, "steps in a row with NaN or Inf before the run ends", at_least=1)
    shard: bool = setting(False, "several GPUs: shard weights, gradients, optimizer (FSDP2)")
    threads: int = setting(0, "0: OMP_NUM_THREADS, else the free cores", at_least=0, at_most=1024)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model that training starts from, and where it runs."""

    path: str = setting(REQUIRED, "folder or hub id of a Qwen2.5 model", also="model")
    revision: str = setting("main", "branch, tag or commit on the hub")
    device: str = setting("auto", "where to compute", "auto", "cpu", "cuda", "cuda:[0-9]")
    dtype: str = setting("float32", "dtype of the weights", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The task and its problems; a task may extend this with settings of its own (plumbing/tasks.py)."""

    task: str = setting("countdown", "NAME: train on NAME_task.py", "[a-z][a-z0-9_]*")
    path: str = setting("", "file, folder or hub id; empty: the task makes them", also="dataset")
    files: str = setting("", "pattern such as test-*; empty: a train split, else all", also="split")
    revision: str = setting("main", "branch, tag or commit on the hub")
    held_out: int = setting(512, "problems kept out of training, for evaluation", at_least=1)


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Measuring the score on held-out problems."""

    every: int = setting(10, "steps between evaluations; 0: only before and after", at_least=0)


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Saving the state of the run, to resume it. The best weights by held-out score are kept as well."""

    every: int = setting(0, "steps between checkpoints; 0: when stopped only", at_least=0)
    keep: int = setting(2, "newest checkpoints to keep", at_least=1)


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What the run leaves behind."""

    folder: str = setting("runs", "the run's own folder is made in this one")
    samples: int = setting(2, "responses per step that samples.jsonl shows", at_least=0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration: the fields are the sections of the file."""

    rollout: RolloutSettings
    train: TrainSettings
    model: ModelSettings
    data: DataSettings
    eval: EvalSettings
    checkpoint: CheckpointSettings
    output: OutputSettings

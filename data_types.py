"""The plain data that the modules hand to each other: episodes, a run's progress, and its settings.

A setting is one line: its type, its default, what it means and the values it may take. config.py reads a file of them,
and its checks and error messages all follow from that line, so adding a setting is adding a line:

    config = load_config("config_tiny.yml", ["rollout.group_size=32", "train.learning_rate=3e-4"])
    config.train.learning_rate  # 0.0003
"""

from dataclasses import MISSING as REQUIRED, dataclass, field
from typing import Any

from terminal import printable


class UserError(ValueError):
    """An error that the user can fix: one line that names the file, key or value and what to do.

    It often quotes a file or a command line, so control characters are escaped: it stays one harmless line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message).replace("\n", r"\n"))


@dataclass
class Episode:
    """One response on its way through a training step; the ids are those sampled, never tokenized again."""

    problem: Any  # as the task made it
    prompt_ids: list[int]
    response_ids: list[int]  # the end token included
    old_logprobs: list[float]  # of each response token, under the sampler
    truncated: bool  # by the length limit, before any end token
    text: str  # the response, without the end token
    rewards: dict[str, float] = field(default_factory=dict)  # by the task, such as {"format": 0.1, "correct": 1.0}
    advantage: float = 0.0
    token_weight: float = 0.0  # of each response token in the batch's loss

    @property
    def reward(self) -> float:
        """What the response earned in all."""
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
    drawn: int = 0  # training problems drawn so far
    optimizer_steps: int = 0  # fewer than steps where one was skipped, more with several updates per batch
    skipped_in_a_row: int = 0
    problems: str = ""  # SHA-256 of the problems, so that a resumed run notices others
    seconds: float = 0.0  # since the start of the run, pauses left out
    best: float = 0.0  # held-out score, greedy, of all evaluations
    best_step: int = 0
    before: dict[str, float] = field(default_factory=dict)  # the evaluation before training, and after it
    after: dict[str, float] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)  # bytes of metrics.jsonl and samples.jsonl that belong to it


# ---- The settings ----------------------------------------------------------------------------------------------


def setting(default: Any, meaning: str, choices: tuple[str, ...] = (), **bounds: float) -> Any:
    """A setting, as a dataclass field: int, float, bool or str.

    default: REQUIRED where the file or an override must give a value. choices: regular expressions, of which a text
    must match one. bounds: at_least, above, at_most, below.
    """
    return field(default=default, metadata={"meaning": meaning, "choices": choices, "bounds": bounds})


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from its logits. temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """Sampling the responses that a training step learns from."""

    group_size: int = setting(16, "responses per question", at_least=2, at_most=65536)
    questions_per_step: int = setting(16, "questions per step", at_least=1, at_most=65536)
    max_draws: int = setting(1, "dynamic sampling: draws per step, at most", at_least=1, at_most=100)
    max_new_tokens: int = setting(REQUIRED, "a response is truncated there, in tokens", at_least=1, at_most=2**20)
    temperature: float = setting(1.0, "the logits are divided by it", at_least=0.01)
    top_p: float = setting(1.0, "sample from the most likely tokens that sum to this", above=0, at_most=1)
    top_k: int = setting(0, "sample from the k most likely tokens; 0: from all", at_least=0)
    max_rows: int = setting(0, "responses sampled at the same time, in whole groups; 0: as planned", at_least=0)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The update of the policy."""

    learning_rate: float = setting(REQUIRED, "the step size of AdamW", above=0, at_most=1)
    steps: int = setting(REQUIRED, "training steps: a rollout and an update each", at_least=1, at_most=999_999)
    seed: int = setting(1, "of every random choice in the run", at_least=0)
    warmup_steps: int = setting(0, "steps over which the learning rate rises linearly", at_least=0)
    schedule: str = setting("constant", "the learning rate after the warm-up", choices=("constant", "cosine"))
    weight_decay: float = setting(0.0, "decoupled weight decay of AdamW", at_least=0)
    optimizer: str = setting("master", "see optimizer.py", choices=("master", "split", "offload"))
    beta1: float = setting(0.9, "decay of AdamW's mean of the gradients", at_least=0, below=1)
    beta2: float = setting(0.999, "decay of AdamW's mean of the squared gradients", at_least=0, below=1)
    max_grad_norm: float = setting(1.0, "a gradient with a larger norm is scaled down to it", above=0)
    divide_by_std: bool = setting(True, "divide advantages by the group's standard deviation; Dr. GRPO: false")
    objective: str = setting("reinforce", "see grpo.py", choices=("reinforce", "clipped", "truncated_is"))
    updates_per_batch: int = setting(1, "optimizer steps per batch; reinforce allows only 1", at_least=1)
    clip_low: float = setting(0.2, "clipped: lower bound of the ratio, 1 - this", above=0, at_most=1)
    clip_high: float = setting(0.28, "clipped: upper bound of the ratio, 1 + this", above=0)
    ratio_cap: float = setting(2.0, "truncated_is: upper bound of the ratio", above=0)
    divide_loss_by: str = setting("limit", "the loss's denominator", choices=("tokens", "responses", "limit"))
    truncated: str = setting("keep", "what becomes of truncated responses", choices=("keep", "mask", "penalize"))
    penalty_tokens: int = setting(64, "penalize: this many tokens before the limit", at_least=1)
    tokens_per_microbatch: int = setting(8192, "tokens, padding included, in one backward", at_least=1)
    activation_checkpointing: bool = setting(False, "recompute activations in backward to save memory")
    max_skips: int = setting(3, "steps in a row with numbers that are not finite, then stop", at_least=1)
    shard: bool = setting(False, "several GPUs: split weights, gradients and optimizer state among them (FSDP2)")
    threads: int = setting(0, "CPU threads; 0: one per core, at most 8", at_least=0, at_most=1024)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model that training starts from, and where it is computed."""

    path: str = setting(REQUIRED, "a folder or hub id of a Qwen2.5 model")
    revision: str = setting("main", "branch, tag or commit on the hub")
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "mps", "cuda", "cuda:[0-9]"))
    dtype: str = setting("float32", "of the weights", choices=("float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The task and its problems; a task may extend this with settings of its own (task.py)."""

    task: str = setting("countdown", "NAME: what NAME_task.py trains on", choices=("[a-z][a-z0-9_]*",))
    path: str = setting("", "a file, folder or hub id of a data set; empty where the task makes its problems")
    revision: str = setting("main", "branch, tag or commit on the hub")
    held_out: int = setting(512, "problems kept out of training, for evaluation", at_least=1)


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Measuring the score on held-out problems."""

    every: int = setting(10, "steps between evaluations; 0: only before and after training", at_least=0)


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Saving the state of the run, to resume it. The best weights by held-out score are kept as well."""

    every: int = setting(0, "steps between checkpoints; 0: only when the run is stopped", at_least=0)
    keep: int = setting(2, "the newest checkpoints are kept, this many", at_least=1)


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What the run leaves behind."""

    folder: str = setting("runs", "the run's own folder is made in this one")
    samples: int = setting(2, "responses written out per step, to samples.jsonl", at_least=0)


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

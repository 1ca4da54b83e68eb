"""Warnings for a run that nobody watches: what looks wrong in its metrics, once each, with what to do about it.

A resumed run starts with a clean memory: it measures the entropy against its own first step, and may warn again.

Left out: stopping by itself. Only numbers that are not finite stop a run (train.py); the rest may be a hard task.
"""

import math
import sys
from typing import Any

from data_types import Config

PATIENCE = 10  # steps without one right answer before it is worth a word
GAP_BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2}  # mean |trainer - sampler| logprob


class Alarms:
    """Looks at each step's metrics and warns about each kind of trouble the first time it is seen."""

    def __init__(self, config: Config) -> None:
        self.gap_bound = GAP_BOUNDS[config.model.dtype]
        self.told: set[int] = set()
        self.first_entropy: float | None = None
        self.steps_without_success = 0

    def check(self, metrics: dict[str, Any], best: float) -> None:
        """Print a warning for each trouble that these metrics show and that was not told before."""
        entropy, gap = metrics["entropy"], metrics["logprob_gap"]
        if self.first_entropy is None and entropy is not None and math.isfinite(entropy):
            self.first_entropy = entropy
        self.steps_without_success = 0 if metrics["success"] > 0 else self.steps_without_success + 1
        fallen = best - metrics.get("eval_success", best)
        troubles = {
            "most groups have no spread, so most answers teach nothing: choose questions that are neither solved nor "
            "failed every time, raise rollout.group_size or rollout.most_draws":
                metrics["zero_spread"] > metrics["groups"] / 2,
            f"no right answer in {PATIENCE} steps, so there is nothing to prefer: choose easier problems (data.*), a "
            "stronger model, or check that its answers have the form in samples.txt":
                self.steps_without_success >= PATIENCE,
            "the entropy is below a tenth of what it was: the policy has stopped exploring; lower train.learning_rate, "
            "or raise train.clip_high with train.objective=clipped":
                self.first_entropy is not None and entropy is not None and entropy < 0.1 * self.first_entropy,
            "more than half of the answers are cut off: raise rollout.max_new_tokens, or set train.truncated=penalize":
                metrics["truncated"] > 0.5,
            f"the trainer's logprobs are {gap} away from the sampler's (bound {self.gap_bound}): the two compute "
            "different policies, which is a bug or a broken GPU; train.objective=weighted only softens it":
                gap is not None and not gap <= self.gap_bound,
            f"held-out success has fallen to {metrics.get('eval_success')} from {best}: the best weights are kept in "
            "checkpoints/best-*; lower train.learning_rate and resume, or stop":
                fallen > max(0.1, 4 * metrics.get("eval_success_se", 0.0)),
        }
        for number, (advice, seen) in enumerate(troubles.items()):
            if seen and number not in self.told:
                self.told.add(number)
                print(f"warning: {advice}", file=sys.stderr, flush=True)

"""Warnings for a run that nobody watches: what looks wrong in its metrics, once each, with what to do about it.

A resumed run starts afresh: it measures the entropy against its own first step, and may warn again.

Left out: stopping by itself. Only numbers that are not finite stop a run (run.py); the rest may be a hard task.
"""

import math
from typing import Any

from data_types import Config, Progress
from logbook import best_weights
from task import Task
from terminal import warn

PATIENCE = 10  # steps in which every response scores 0 before it is worth a warning
GAP_BOUNDS = {"float32": 1e-5, "bfloat16": 5e-2}  # mean |log ratio| between trainer and sampler
ADVICE = {
    "collapsed": "{score} has collapsed: lower train.learning_rate (it is {rate:g}) and start again; {best}",
    "worse": "held-out {score} is far below its best: lower train.learning_rate (it is {rate:g}); {best}",
    "zero variance": "most groups have zero variance and teach nothing: choose questions neither always nor never "
    "solved, or raise rollout.group_size or rollout.max_draws",
    "all zero": "{score} has been 0 for every response for a while, so there is nothing to prefer: choose easier "
    "problems (data.*) or a stronger model, and see in samples.jsonl whether the responses have the form",
    "entropy": "the entropy is below a tenth of what it was, so the policy hardly explores: lower train.learning_rate "
    "(it is {rate:g}), or raise train.clip_high with train.objective=clipped",
    "truncated": "more than half of the responses are truncated: raise rollout.max_new_tokens, or set "
    "train.truncated=penalize",
    "gap": "trainer and sampler differ by {gap:.2g} per logprob (bound {bound:g}): a bug, or a broken GPU",
}


class Alarms:
    """Looks at each step's metrics and warns about each kind of trouble the first time it is seen."""

    def __init__(self, config: Config, task: Task) -> None:
        self.config, self.score, self.bound = config, task.SCORE, GAP_BOUNDS[config.model.dtype]
        self.warned: set[str] = set()
        self.first_entropy: float | None = None
        self.best = 0.0
        self.steps_at_zero = 0

    def check(self, metrics: dict[str, Any], progress: Progress) -> None:
        """Warn of each trouble in these metrics that was not warned of before."""
        entropy, gap, score = metrics["entropy"], metrics["logprob_gap"], metrics[f"reward_{self.score}"]
        of_a_batch = metrics["zero_variance"] < metrics["groups"]  # else the entropy is that of one row
        if self.first_entropy is None and of_a_batch and math.isfinite(entropy):
            self.first_entropy = entropy
        self.best = max(self.best, score)
        self.steps_at_zero = self.steps_at_zero + 1 if score == 0 else 0
        collapsed = self.best >= 0.1 and score < 0.1 * self.best
        fallen = progress.best - metrics.get("eval_greedy", progress.best)
        troubles = {
            "collapsed": collapsed,
            "worse": fallen > max(0.2 * abs(progress.best), 4 * metrics.get("eval_greedy_se", 0.0)),
            "zero variance": metrics["zero_variance"] > metrics["groups"] / 2 and not collapsed,
            "all zero": self.steps_at_zero >= PATIENCE and not collapsed,
            "entropy": of_a_batch and entropy < 0.1 * (self.first_entropy or 0.0),
            "truncated": metrics["truncated"] > 0.5,
            "gap": not gap <= self.bound,
        }
        for kind in [kind for kind, seen in troubles.items() if seen and kind not in self.warned]:
            self.warned.add(kind)
            names = {"score": self.score, "rate": self.config.train.learning_rate, "best": best_weights(progress)}
            warn(ADVICE[kind].format(**names, gap=gap, bound=self.bound))

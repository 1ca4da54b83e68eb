"""Stands in for GRPO-Zero's module of this name: it notes what it is given."""

import data_types
import tokenizer  # noqa: F401 (as there)

calls = []


def rollout(*given):
    calls.append(given)
    return [data_types.MiniBatch(generated_token_ids=[1, 2, 3])]


def update_policy(*given):
    calls.append(given)

"""Stands in for GRPO-Zero's module of this name."""

from types import SimpleNamespace as MiniBatch

__all__ = ["MiniBatch"]

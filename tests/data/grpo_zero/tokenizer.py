"""Stands in for GRPO-Zero's module of this name."""

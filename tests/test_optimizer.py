"""The optimizer keeps the update of bf16 weights. The bug to prevent is silent: loss and gradient are right, but the
weights hardly move, because each step is below half the spacing of bf16 numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optimizer import AdamW, join_bits, learning_rate, round_stochastically, split_bits
from plain_policy import DEVICES
from plumbing.config import load_config

TINY = load_config(Path(__file__).resolve().parent.parent / "config_tiny.yml").train
SETTINGS = replace(TINY, learning_rate=1e-6, beta1=0.9, beta2=0.999, weight_decay=0.0)
MODES = ["master", "split", "offload"]
COUNT = 20_000
WEIGHTS = (torch.randn(COUNT, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def gradients(noise: float, steps: int) -> Tensor:
    """(steps, COUNT): of constant sign for each weight, with noise of `noise` times their size on top."""
    generator = torch.Generator().manual_seed(1)
    sign = torch.randn(COUNT, generator=generator).sign()
    return 1e-3 * (sign + noise * torch.randn(steps, COUNT, generator=generator))


def displacement(mode: str, noise: float, device: str = "cpu", steps: int = 500) -> Tensor:
    """How far the weights have moved: as exactly as the mode knows it, or as the bf16 weights show it (`plain`)."""
    settings = replace(SETTINGS, optimizer=mode if mode in MODES else "master")
    start = WEIGHTS.to(device, torch.float32 if mode == "fp32" else torch.bfloat16)
    parameter = torch.nn.Parameter(start.clone())
    plain = torch.optim.AdamW([parameter], lr=1e-6, weight_decay=0.0)
    optimizer = plain if mode == "plain" else AdamW([parameter], settings)
    for gradient in gradients(noise, steps):
        parameter.grad = gradient.to(device, parameter.grad_dtype)
        optimizer.step()
    end = parameter.detach()
    if mode == "split":
        end = join_bits(end, optimizer.states[0]["rest"])
    elif mode in MODES:
        end = optimizer.states[0]["master"].to(device)
        assert torch.equal(parameter, end.bfloat16()), "the model must read the rounded master"
    return (end.float() - start.float()).cpu()


def test_fp32_weights_get_torchs_own_adamw():
    """The learning rate is set from outside before each step; a weight without gradient stays where it is."""
    ours, theirs = ([torch.nn.Parameter(WEIGHTS.float()), torch.nn.Parameter(torch.ones(3))] for _ in range(2))
    mine = AdamW(ours, replace(SETTINGS, weight_decay=0.1))
    oracle = torch.optim.AdamW(theirs, betas=(0.9, 0.999), weight_decay=0.1)
    for step, gradient in enumerate(gradients(noise=3.0, steps=30)):
        ours[0].grad, theirs[0].grad = gradient.clone(), gradient.clone()
        mine.learning_rate = oracle.param_groups[0]["lr"] = 1e-3 * (1 - step / 60)
        mine.step()
        oracle.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert AdamW(ours, SETTINGS, torch.bfloat16).tensors()["0.master"].data_ptr() == ours[0].data_ptr(), "to be saved"


@pytest.mark.parametrize("device", DEVICES)
def test_table_of_the_readme(device: str):
    """Prints the README's table: pytest tests/test_optimizer.py -s -k table"""
    print("\n| optimizer | kept of a constant update | cosine to fp32 with noisy gradients |\n| --- | --- | --- |")
    straight, noisy = displacement("fp32", 0.0, device), displacement("fp32", 3.0, device)
    moved = {mode: displacement(mode, 3.0, device) for mode in ["plain", *MODES]}
    for mode in moved:
        kept = displacement(mode, 0.0, device) @ straight / (straight @ straight)
        cosine = torch.cosine_similarity(moved[mode], noisy, dim=0)
        print(f"| {'torch.optim.AdamW on bf16' if mode == 'plain' else f'`{mode}`'} | {kept:.1%} | {cosine:.4f} |")
        assert kept < 0.05 and cosine < 0.5 if mode == "plain" else 0.95 < kept < 1.05 and cosine > 0.99
    assert torch.equal(moved["offload"], moved["master"])  # the same arithmetic, with its state elsewhere


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_slices_change_nothing(mode: str, device: str, monkeypatch: pytest.MonkeyPatch):
    """Offloaded state that is used before it has arrived would show here."""
    whole = displacement(mode, 3.0, device, steps=6)
    monkeypatch.setattr(Tensor, "to", lambda *to, to_=Tensor.to, **how: to_(*to, **how).clone())  # as another device's
    monkeypatch.setattr("optimizer.SLICE", 777)  # `split` rounds its moments with other random numbers then
    torch.testing.assert_close(displacement(mode, 3.0, device, 6), whole, rtol=0, atol=1e-7 * (mode == "split"))


def test_bits_split_and_join_without_loss():
    exact = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 12, 100_000)
    exact[:4] = torch.tensor([0.0, -0.0, 1.00390625, -1.00390625])  # the last two lie halfway between bf16 numbers
    upper, rest = split_bits(exact)
    assert torch.equal(join_bits(upper, rest), exact)
    assert ((upper.float() - exact).abs() <= (exact.bfloat16().float() - exact).abs()).all()
    assert (upper.dtype, rest.dtype) == (torch.bfloat16, torch.int16)


def test_bf16_moments_are_right_on_average():
    """Rounded to nearest the second would never decay, and the first would stop 2 % short of a constant gradient."""
    exact = torch.full((200_000,), 1.0 + 2**-7 * 0.3)  # three tenths of the way to the next bf16 number
    rounded = round_stochastically(exact, torch.Generator().manual_seed(0)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert (rounded > 1).float().mean().item() == pytest.approx(0.3, abs=0.005)
    parameter = torch.nn.Parameter(WEIGHTS.clone())
    optimizer = AdamW([parameter], replace(SETTINGS, optimizer="split"))
    for step in range(701):
        parameter.grad = (torch.arange(COUNT) < (100 if step else COUNT)).float()  # zero for most after the first
        optimizer.step()
    assert optimizer.states[0]["square"][100:].float().mean().item() == pytest.approx(0.001 * 0.999**700, rel=0.02)
    assert optimizer.states[0]["mean"][:100].float().mean().item() == pytest.approx(1.0, abs=0.005)


def test_gradients_of_bf16_weights_add_up_in_fp32():
    """In bf16, 1 + 0.003 is 1: small micro-batches after a large one would be lost."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    AdamW([parameter], replace(SETTINGS, optimizer="split"))
    for factor in [1.0] + [2**-9] * 64:
        (parameter * torch.tensor([factor], dtype=torch.bfloat16)).sum().backward()
    assert (parameter.grad.dtype, parameter.grad.item()) == (torch.float32, 1.0 + 64 * 2**-9)


def test_the_learning_rate_warms_up_and_falls():
    settings = replace(SETTINGS, learning_rate=1.0, warmup_steps=4, steps=104, schedule="constant")
    assert [learning_rate(step, settings) for step in (1, 2, 4, 5, 104)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    rates = [learning_rate(step, replace(settings, schedule="cosine")) for step in range(1, 105)]
    assert [rates[0], rates[3], rates[53], rates[-1]] == pytest.approx([0.25, 1.0, 0.55, 0.1])
    assert rates[3:] == sorted(rates[3:], reverse=True)

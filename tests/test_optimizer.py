"""The optimizer keeps the update of bf16 weights, and the learning rate follows its schedule.

The bug these tests prevent is silent: training runs, the loss is right, the gradient is right, and the weights hardly
move, because each step is below half the spacing of bf16 numbers.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_types import load_config
from optimizer import AdamW, join_bits, learning_rate, round_stochastically, split_bits

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = replace(load_config(str(ROOT / "config_tiny.yml")).train, learning_rate=1e-6, beta1=0.9, beta2=0.999, weight_decay=0.0)
MODES = ["master", "split", "offload"]
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def weights(count: int = 20_000) -> torch.Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def gradients(noise: float, steps: int, count: int = 20_000):
    """Gradients whose sign is constant for each weight, with noise of `noise` times their size on top."""
    generator = torch.Generator().manual_seed(1)
    sign = torch.randn(count, generator=generator).sign()
    for _ in range(steps):
        yield 1e-3 * (sign + noise * torch.randn(count, generator=generator))


def displacement(mode: str, noise: float, device: str = "cpu", steps: int = 500) -> torch.Tensor:
    """How far the weights have come: as exactly as the mode knows it, or as the bf16 weights show it (`plain`)."""
    start = weights().to(device)
    if mode == "fp32":
        parameter = torch.nn.Parameter(start.float())
        optimizer = AdamW([parameter], SETTINGS)
    elif mode == "plain":
        parameter = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([parameter], lr=SETTINGS.learning_rate, weight_decay=0.0)
    else:
        parameter = torch.nn.Parameter(start.clone())
        optimizer = AdamW([parameter], replace(SETTINGS, optimizer=mode))
    for gradient in gradients(noise, steps):
        parameter.grad = gradient.to(device, torch.bfloat16 if mode == "plain" else torch.float32)
        optimizer.step()
    end = parameter.detach().float()
    if mode == "split":
        end = join_bits(parameter.detach(), optimizer.state[parameter]["rest"])
    elif mode in ("master", "offload"):
        end = optimizer.state[parameter]["master"].to(device)
        assert torch.equal(parameter.detach(), end.bfloat16()), "the model must read the rounded master"
    return (end - start.float()).cpu()


def test_fp32_mode_is_torchs_own_adamw():
    ours, theirs = torch.nn.Parameter(weights().float()), torch.nn.Parameter(weights().float())
    settings = replace(SETTINGS, weight_decay=0.1, learning_rate=1e-3)
    mine = AdamW([ours], settings)
    oracle = torch.optim.AdamW([theirs], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1)
    for gradient in gradients(noise=3.0, steps=30):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        oracle.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_keeps_a_constant_update(mode, device):
    """Rounding to nearest keeps about 1 to 3 % of it."""
    reference = displacement("fp32", noise=0.0)
    kept = displacement(mode, noise=0.0, device=device) @ reference / (reference @ reference)
    assert 0.95 < kept < 1.05
    assert displacement("plain", noise=0.0) @ reference / (reference @ reference) < 0.05


@pytest.mark.parametrize("mode", MODES)
def test_noisy_gradients_end_where_fp32_ends(mode):
    reference = displacement("fp32", noise=3.0)
    assert torch.cosine_similarity(displacement(mode, noise=3.0), reference, dim=0) > 0.99
    assert torch.cosine_similarity(displacement("plain", noise=3.0), reference, dim=0) < 0.5


def test_offload_is_master_with_its_state_elsewhere():
    """To the bit: what is measured of the one holds for the other."""
    assert torch.equal(displacement("offload", 3.0, steps=30), displacement("master", 3.0, steps=30))


def test_table_of_the_readme():
    """Prints the README's table: pytest tests/test_optimizer.py -s -k table"""
    print("\n| optimizer | kept of a constant update | cosine to fp32 with noisy gradients |\n| --- | --- | --- |")
    straight, noisy = displacement("fp32", noise=0.0), displacement("fp32", noise=3.0)
    for mode in ["plain", *MODES]:
        kept = displacement(mode, noise=0.0) @ straight / (straight @ straight)
        cosine = torch.cosine_similarity(displacement(mode, noise=3.0), noisy, dim=0)
        name = "torch.optim.AdamW on bf16" if mode == "plain" else f"`{mode}`"
        print(f"| {name} | {kept:.1%} | {cosine:.4f} |")
        assert mode == "plain" or (kept > 0.95 and cosine > 0.99)


def test_bits_split_and_join_without_loss():
    exact = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 12, 100_000)
    exact[:4] = torch.tensor([0.0, -0.0, 1.00390625, -1.00390625])  # the last two lie halfway between bf16 numbers
    upper, rest = split_bits(exact)
    assert torch.equal(join_bits(upper, rest), exact)
    assert (upper.float() - exact).abs().max() <= (exact.bfloat16().float() - exact).abs().max()
    assert upper.dtype == torch.bfloat16 and rest.dtype == torch.int16


def test_stochastic_rounding_is_right_on_average_and_only_goes_to_neighbours():
    exact = torch.full((200_000,), 1.0 + 2**-7 * 0.3)  # three tenths of the way from 1 to the next bf16 number
    rounded = round_stochastically(exact, torch.Generator().manual_seed(0)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs((rounded > 1).float().mean().item() - 0.3) < 0.005


def test_a_bf16_second_moment_decays():
    """Rounded to nearest it would stay where it is for ever: each step takes off less than half a spacing."""
    parameter = torch.nn.Parameter(weights())
    optimizer = AdamW([parameter], replace(SETTINGS, optimizer="split"))
    parameter.grad = torch.ones(20_000)
    optimizer.step()
    start = optimizer.state[parameter]["square"].float().mean()
    parameter.grad = torch.zeros(20_000)
    for _ in range(700):
        optimizer.step()
    assert optimizer.state[parameter]["square"].float().mean() / start == pytest.approx(0.999**700, rel=0.02)


def test_gradients_of_bf16_weights_add_up_in_fp32():
    """In bf16, 1 + 0.003 is 1: small micro-batches after a large one would be lost."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    AdamW([parameter], replace(SETTINGS, optimizer="split"))
    for factor in [1.0] + [2**-9] * 64:
        (parameter * torch.tensor([factor], dtype=torch.bfloat16)).sum().backward()
    assert parameter.grad.dtype == torch.float32 and parameter.grad.item() == 1.0 + 64 * 2**-9


def test_slices_change_nothing(monkeypatch):
    whole = displacement("master", noise=3.0, steps=5)
    monkeypatch.setattr("optimizer.SLICE", 777)
    assert torch.equal(displacement("master", noise=3.0, steps=5), whole)


def test_the_learning_rate_warms_up_and_falls():
    settings = replace(SETTINGS, learning_rate=1.0, warmup_steps=4, steps=104, schedule="constant")
    assert [learning_rate(step, settings) for step in (1, 2, 4, 5, 104)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    settings = replace(settings, schedule="cosine")
    rates = [learning_rate(step, settings) for step in range(1, 105)]
    assert rates[3] == 1.0 and rates[53] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[3:], rates[4:], strict=False))

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stylegan import losses

REAL, FAKE = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-0.5, 0.0, 1.5])


def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return torch.log(1 / (1 + torch.exp(-x)))


def test_minimax_is_the_articles_objective() -> None:
    """−E log D(x) − E log(1 − D(G(z))), in plain logarithms."""
    real, fake = torch.sigmoid(REAL), torch.sigmoid(FAKE)
    value = -(real.log().mean() + (1 - fake).log().mean())
    torch.testing.assert_close(losses.minimax_discriminator(REAL, FAKE), value)
    torch.testing.assert_close(losses.minimax_reward(FAKE, REAL), -(1 - fake).log())


def test_non_saturating_reward_is_the_log_probability() -> None:
    torch.testing.assert_close(losses.non_saturating_reward(FAKE, REAL), log_sigmoid(FAKE))


def test_hinge_stops_at_the_margin() -> None:
    sure = losses.hinge_discriminator(torch.tensor([1.0, 5.0]), torch.tensor([-1.0, -9.0]))
    assert sure == 0
    expected = (0 + 0.5 + 2) / 3 + (0.5 + 1 + 2.5) / 3
    assert losses.hinge_discriminator(REAL, FAKE) == pytest.approx(expected)
    assert torch.equal(losses.hinge_reward(FAKE, REAL), FAKE)


def test_relativistic_judges_pairs() -> None:
    value = losses.relativistic_discriminator(REAL, FAKE)
    torch.testing.assert_close(value, -log_sigmoid(REAL - FAKE).mean())
    shifted = losses.relativistic_discriminator(REAL + 7, FAKE + 7)
    torch.testing.assert_close(shifted, value)  # only the difference counts
    pairs = torch.stack([log_sigmoid(fake - REAL).mean() for fake in FAKE])
    torch.testing.assert_close(losses.relativistic_reward(FAKE, REAL), pairs)


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_both_sides_of_a_game_pull_against_each_other(name: str) -> None:
    """Discriminator: up with real, down with fake. Generator: paid more for a higher score."""
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    losses.LOSSES[name].discriminator(real, fake).backward()
    assert real.grad is not None and fake.grad is not None
    assert (real.grad <= 0).all() and (fake.grad >= 0).all() and fake.grad.sum() > 0
    rising = losses.LOSSES[name].reward(torch.linspace(-4, 4, 9), REAL)
    assert (rising.diff() > 0).all()


def test_penalty_of_a_linear_map_is_its_squared_norm() -> None:
    weight = torch.randn(4, 3)
    inputs = torch.randn(5, 4, 3, requires_grad=True)
    scores = (inputs * weight).sum((1, 2))
    expected = 0.5 * weight.square().sum()
    torch.testing.assert_close(losses.zero_centred_penalty(scores, inputs), expected)


def test_penalty_teaches_the_discriminator() -> None:
    layer = nn.Linear(3, 1)
    inputs = torch.randn(2, 1, 3, requires_grad=True)
    losses.zero_centred_penalty(layer(inputs).squeeze(-1).sum(1), inputs).backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, layer.weight.detach())


def test_advantages_leave_the_sample_itself_out() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]])
    expected = torch.tensor([[1 - 4, 2 - 3.5, 6 - 1.5], [0, 0, 0]])
    torch.testing.assert_close(losses.leave_one_out_advantages(rewards), expected)


def test_policy_gradient_is_the_gradient_of_the_expected_reward() -> None:
    """On a bandit of three arms, over all arms, it is exactly −∇ Σ π(a) R(a)."""
    logits = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    rewards = torch.tensor([1.0, -2.0, 0.5])
    probabilities = logits.softmax(0).detach()
    total = sum(
        probabilities[a]
        * losses.policy_gradient(
            logits.log_softmax(0)[a].view(1, 1), torch.ones(1, 1), rewards[a].view(1)
        )
        for a in range(3)
    )
    (estimated,) = torch.autograd.grad(total, logits)  # type: ignore[arg-type]
    (exact,) = torch.autograd.grad(-(logits.softmax(0) * rewards).sum(), logits)
    torch.testing.assert_close(estimated, exact)


def test_policy_gradient_sees_no_padding_and_no_length() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -50.0]])
    loss = losses.policy_gradient(log_probs, torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([2.0]))
    assert loss == pytest.approx(6.0)


def test_policy_gradient_finds_the_better_arm() -> None:
    """A toy generator of one token, taught by reward alone, under the KL of its beginning."""
    torch.manual_seed(0)
    logits = torch.zeros(5, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(80):
        arms = torch.multinomial(logits.softmax(0), 24, replacement=True)
        advantages = losses.leave_one_out_advantages((arms == 3).float().view(4, 6)).flatten()
        log_probs = logits.log_softmax(0)[arms].unsqueeze(1)
        kl = losses.exact_kl(logits.view(1, 1, 5), torch.zeros(1, 1, 5))
        loss = losses.policy_gradient(log_probs, torch.ones(24, 1), advantages) + 0.05 * kl.sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert logits.softmax(0)[3] > 0.9


def test_what_is_not_wanted_is_pushed_no_further_than_it_takes() -> None:
    ratios = torch.tensor([0.0, -30.0, 2.0], requires_grad=True)
    loss = losses.undesirable(ratios, 0.5)
    assert loss.item() == pytest.approx(8 * (0.5 + 1 / (1 + math.exp(-1))), rel=1e-5)
    (slope,) = torch.autograd.grad(loss, ratios)
    assert slope[0] == pytest.approx(1.0)  # that of a log-likelihood
    assert 0 < slope[1] < 1e-5 and 0.5 < slope[2] < 1


def test_exact_kl_is_that_of_the_distributions() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    kl = losses.exact_kl(p.log().view(1, 1, 3), q.log().view(1, 1, 3))
    assert kl.item() == pytest.approx(expected)
    logits = torch.randn(2, 3, 7)
    torch.testing.assert_close(losses.exact_kl(logits, logits), torch.zeros(2, 3))
    assert (losses.exact_kl(logits, torch.randn(2, 3, 7)) > 0).all()


def test_whitening_clips_what_is_far_out() -> None:
    values = losses.whiten(torch.tensor([0.0, 1.0, 99.0]), 1.0, 0.5)
    torch.testing.assert_close(values, torch.tensor([-2.0, 0.0, 4.0]), atol=1e-4, rtol=0)

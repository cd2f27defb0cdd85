"""The adversarial objective: losses of the discriminator, what each rewards the generator for,
gradient penalties, and the policy gradient that carries the reward through discrete tokens.

Pure functions of tensors. Scores are logits: sigmoid(score) is the probability "a person wrote it".
Text is discrete, so no gradient flows from the discriminator into the generator: each loss comes
with the *reward* that the generator's side of the same game pays for a sample.

Shapes: N samples in K-sized groups, T tokens, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Loss(NamedTuple):
    """One game. discriminator: (real [N], fake [N]) → what D minimises, a scalar. reward: (fake
    [M], real [N]) → what G maximises, [M]."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    reward: Callable[[Tensor, Tensor], Tensor]


def minimax_discriminator(real_N: Tensor, fake_N: Tensor) -> Tensor:
    """−E log D(x) − E log(1 − D(G(z))), with D = sigmoid(score) (Goodfellow et al., 2014)."""
    return F.softplus(-real_N).mean() + F.softplus(fake_N).mean()


def minimax_reward(fake_M: Tensor, real_N: Tensor) -> Tensor:
    """−log(1 − D(G(z))): G minimises log(1 − D(G(z))) (Goodfellow et al., 2014, eq. 1)."""
    return F.softplus(fake_M)


def non_saturating_reward(fake_M: Tensor, real_N: Tensor) -> Tensor:
    """log D(G(z)), whose slope does not vanish where D is sure (Goodfellow et al., 2014)."""
    return -F.softplus(-fake_M)


def hinge_discriminator(real_N: Tensor, fake_N: Tensor) -> Tensor:
    """E max(0, 1 − D(x)) + E max(0, 1 + D(G(z))) (Lim & Ye, 2017; Miyato et al., ICLR 2018)."""
    return F.relu(1 - real_N).mean() + F.relu(1 + fake_N).mean()


def hinge_reward(fake_M: Tensor, real_N: Tensor) -> Tensor:
    """D(G(z)), the score itself (Lim & Ye, 2017)."""
    return fake_M


def relativistic_discriminator(real_N: Tensor, fake_N: Tensor) -> Tensor:
    """E softplus(D(G(z)) − D(x)) over pairs (Jolicoeur-Martineau, 2019; R3GAN, NeurIPS 2024)."""
    return F.softplus(fake_N - real_N).mean()


def relativistic_reward(fake_M: Tensor, real_N: Tensor) -> Tensor:
    """−E_x softplus(D(x) − D(G(z))), each sample against all real ones (R3GAN, NeurIPS 2024)."""
    return -F.softplus(real_N[None, :] - fake_M[:, None]).mean(1)


LOSSES: dict[str, Loss] = {
    "relativistic": Loss(relativistic_discriminator, relativistic_reward),
    "minimax": Loss(minimax_discriminator, minimax_reward),
    "non-saturating": Loss(minimax_discriminator, non_saturating_reward),
    "hinge": Loss(hinge_discriminator, hinge_reward),
}


def zero_centred_penalty(scores_N: Tensor, inputs_NTC: Tensor) -> Tensor:
    """½ E ‖∇ D(x)‖², the gradient taken at the inputs (here: token embeddings).

    R1 on real samples, R2 on generated ones (Mescheder et al., ICML 2018). Differentiable again.
    """
    (gradient,) = torch.autograd.grad(scores_N.sum(), inputs_NTC, create_graph=True)
    return 0.5 * gradient.float().square().sum(dim=(1, 2)).mean()


def leave_one_out_advantages(rewards_GK: Tensor) -> Tensor:
    """RLOO: each sample's reward less the mean of the others of its group, [G, K].

    A_k = R_k − 1/(K−1) Σ_{j≠k} R_j (Kool et al., 2019; Ahmadian et al., ACL 2024). Groups are not
    divided by their own deviation, which would amplify ties.
    """
    size = rewards_GK.shape[1]
    others = (rewards_GK.sum(1, keepdim=True) - rewards_GK) / (size - 1)
    return rewards_GK - others


def policy_gradient(log_probs_NT: Tensor, mask_NT: Tensor, advantages_N: Tensor) -> Tensor:
    """−E A Σ_t log π(y_t | y_<t): REINFORCE (Williams, 1992) on whole sequences.

    mask_NT: 1 on the tokens of a sample, its end included. No length normaliser of a sample: it
    would reward short or long samples by itself.
    """
    return -(advantages_N.detach() * (log_probs_NT * mask_NT).sum(1)).mean()


def undesirable(log_ratios_N: Tensor, beta: float) -> Tensor:
    """4/β Σ sigmoid(β log π(y)/ρ(y)): makes sequences that are not wanted unlikelier than under ρ.

    KTO's loss of undesirable samples with zero as its point of reference (Ethayarajh et al., ICML
    2024), scaled so that its slope is that of log π where π is ρ. The slope vanishes as π does:
    what has become unlikely is left alone, where log π itself would go down for ever.
    """
    return 4 / beta * (beta * log_ratios_N).sigmoid().sum()


def exact_kl(logits_NTV: Tensor, reference_NTV: Tensor) -> Tensor:
    """KL(π ‖ reference) of each next-token distribution, summed over the whole vocabulary, [N, T].

    Σ_v π(v) (log π(v) − log ρ(v)), in nats; no sampling noise, never negative.
    """
    log_p = logits_NTV.float().log_softmax(-1)
    log_q = reference_NTV.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def whiten(values_N: Tensor, mean: Tensor | float, deviation: Tensor | float) -> Tensor:
    """Values in units of a deviation, clipped at four of them."""
    return ((values_N - mean) / (deviation + 1e-6)).clamp(-4, 4)

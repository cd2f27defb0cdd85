"""The critic: how much likelier people are to write a sentence than a captioner is, by its phrases.

In the game the discriminator has to follow a generator that moves with every step. When the game is
over it is replaced by this: a linear model of tokens and pairs of tokens, their topic hidden, which
is fitted to thousands of captions as they would be delivered. It tells them from people's better,
and costs next to nothing. Its odds are a ratio of densities; candidates are accepted in proportion
to it (rejection sampling from a GAN: Azadi et al., ICLR 2019), so that phrases which captions wear
out come no more often than people say them. They are accepted by the odds as they were fitted:
calibrated ones are closer to 1, and correct too little. The score is calibrated.

Shapes: N sentences, T tokens, H numbers of phrases, S styles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from stylegan.discriminator import LENGTH, pad_ids
from stylegan.generator import BOS, PAD

FILE = "discriminator.safetensors"
PHRASES = 1 << 17  # numbers that tokens and pairs of tokens are hashed to
SHRINKAGE = 2.0  # weight of the squared weights, beside the summed losses of all sentences
LEAST_CALIBRATED = 16  # sentences of each side


class Critic:
    """Log odds of a sentence to be a person's rather than a captioner's, at equal numbers of both.

    weights [S, H]: of phrases. shift [S]. calibration [S, 2]: scale and shift that make log odds
    true of sentences which it has not learned from. styles: names of those that it knows.
    """

    def __init__(
        self, styles: Sequence[str], weights: Tensor, shift: Tensor, calibration: Tensor
    ) -> None:
        self.styles, self.weights, self.shift = list(styles), weights, shift
        self.calibration = calibration

    @classmethod
    def fit(
        cls, people: Mapping[str, Sequence[list[int]]],
        captions: Mapping[str, Sequence[list[int]]],
        held_out: Mapping[str, tuple[Sequence[list[int]], Sequence[list[int]]]],
        weights: Mapping[str, Sequence[float]] | None = None,
    ) -> Critic:  # fmt: skip
        """Logistic regression, for each style of its own.

        people, captions: style → sentences as token ids, their topic hidden. held_out: style →
        others of both, by which the odds are calibrated. weights: of the captions; one that counts
        twice as much is accepted half as often.
        """
        count = len(people)
        critic = cls(
            list(people), torch.zeros(count, PHRASES), torch.zeros(count),
            torch.tensor([[1.0, 0.0]]).repeat(count, 1),
        )  # fmt: skip
        for style, real in people.items():
            number = critic.styles.index(style)
            counts = (weights or {}).get(style) or [1.0] * len(captions[style])
            phrases, shift = _fit(real, captions[style], torch.tensor(counts))
            critic.weights[number], critic.shift[number] = phrases, shift
            ours, theirs = held_out.get(style, ((), ()))
            if min(len(ours), len(theirs)) >= LEAST_CALIBRATED:
                scores = critic.log_odds(ours, style), critic.log_odds(theirs, style)
                critic.calibration[number] = torch.tensor(calibrate(*scores))
        return critic

    def log_odds(self, hidden: Sequence[list[int]], style: str) -> Tensor:
        """[N] of sentences as token ids, their topic hidden; each depends on itself alone."""
        number = self.styles.index(style)
        if not hidden:
            return torch.zeros(0, dtype=torch.float64)
        phrases, weights = _phrases(hidden)
        odds_N = (self.weights[number][phrases].double() * weights).sum(1) + self.shift[number]
        # the last bits of a sum depend on how many sentences there are
        return odds_N.round(decimals=6)

    def probability(self, log_odds_N: Tensor, style: str) -> Tensor:
        """Calibrated probability that a person wrote the sentence."""
        scale, shift = self.calibration[self.styles.index(style)]
        probabilities: Tensor = (scale * log_odds_N.double() + shift).sigmoid()
        return probabilities.round(decimals=6)

    def save(self, directory: Path) -> None:
        """Writes `discriminator.safetensors`, the weights in half precision."""
        tensors = {
            "weights": self.weights.half(), "shift": self.shift, "calibration": self.calibration,
        }  # fmt: skip
        save_file(tensors, directory / FILE, metadata={"styles": json.dumps(self.styles)})

    @classmethod
    def load(cls, directory: Path) -> Critic | None:
        """The critic of a model directory, None where it has none."""
        path = directory / FILE
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            styles = json.loads(file.metadata()["styles"])
            tensors = [file.get_tensor(n) for n in ("weights", "shift", "calibration")]
            return cls(styles, tensors[0].float(), *tensors[1:])


def _phrases(hidden: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Numbers of the tokens and pairs of tokens of sentences, and their weights; both [N, 2 T].

    A sentence's weights have the same length, whatever its own.
    """
    ids_NT = pad_ids(hidden, LENGTH)
    before_NT = F.pad(ids_NT, (1, 0), value=BOS)[:, :-1]
    keys = torch.cat([ids_NT * 2 + 1, (ids_NT << 16 | before_NT) * 2], 1)
    there = (ids_NT != PAD).float().repeat(1, 2)
    # the upper bits of a product, as multiplicative hashing takes them
    numbers = (keys * 0x9E3779B97F4A7C1 >> 24) % PHRASES
    return numbers, there / there.sum(1, keepdim=True).clamp(min=1).sqrt()


def _fit(
    real: Sequence[list[int]], fake: Sequence[list[int]], counts: Tensor
) -> tuple[Tensor, float]:
    """Weights [H] and shift; both sides count alike, a rare phrase more than a frequent one.

    counts: how much each of the fake sentences counts, compared with the others.
    """
    phrases, values = _phrases([*real, *fake])
    count = len(phrases)
    target = torch.cat([torch.ones(len(real)), torch.zeros(len(fake))])
    share = torch.cat([torch.full((len(real),), 0.5 / len(real)), 0.5 * counts / counts.sum()])
    known = torch.zeros(PHRASES).scatter_add_(0, phrases.flatten(), (values > 0).float().flatten())
    rarity = (torch.log((count + 1) / (known + 1)) + 1) * (known >= 2)
    values = values * rarity[phrases]
    weights = torch.zeros(PHRASES, requires_grad=True)
    shift = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weights, shift], max_iter=60, history_size=8, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        scores = (weights[phrases] * values).sum(1) + shift
        losses = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
        loss = (losses * share).sum() + SHRINKAGE / count * weights.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return (weights * rarity).detach(), float(shift.detach())


def calibrate(real_N: Tensor, fake_N: Tensor) -> tuple[float, float]:
    """→ scale and shift that make log odds of scores, both sides counting alike (Platt, 1999)."""
    scores = torch.cat([real_N, fake_N]).double()
    # smoothed targets, which keep the fit finite where the two sides do not overlap
    targets = torch.cat([
        torch.full_like(real_N, (len(real_N) + 1) / (len(real_N) + 2)),
        torch.full_like(fake_N, 1 / (len(fake_N) + 2)),
    ]).double()  # fmt: skip
    weights = torch.cat([
        torch.full_like(real_N, 0.5 / len(real_N)), torch.full_like(fake_N, 0.5 / len(fake_N))
    ]).double()  # fmt: skip
    features = torch.stack([scores, torch.ones_like(scores)], 1)
    coefficients = torch.zeros(2, dtype=torch.float64)
    for _ in range(100):  # Newton's method
        p = torch.sigmoid(features @ coefficients)
        gradient = features.T @ (weights * (p - targets))
        curvature = (features * (weights * p * (1 - p)).unsqueeze(1)).T @ features
        step = torch.linalg.solve(curvature + 1e-9 * torch.eye(2).double(), gradient)
        coefficients -= step.clamp(-2, 2)
    return float(coefficients[0]), float(coefficients[1])

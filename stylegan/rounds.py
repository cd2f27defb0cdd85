"""The game in rounds: the discriminator learns to its end, then the generator does.

    round   sample → two discriminators, each scores the captions that the other learned from →
            odds → likelihood of the captions, weighted by their odds → mean weights → measure

The policy gradient of `adversarial.py` follows a score that moves with every step, by what a step's
few captions earn. Here thousands of captions are drawn at once. A caption's weight is how much
likelier people are to write it than the generator is, as a discriminator says that has settled and
has not seen it: maximum likelihood on weighted captions of its own takes the generator to people's
distribution (MaliGAN: Che et al., 2017). What breaks the rules weighs nothing, for it is not
delivered.

Shapes: N captions of this process, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from stylegan import corpora
from stylegan.adversarial import (
    Watch,
    discriminator_optimiser,
    discriminator_step,
    keep_samples,
    people_of,
    quality,
    score,
    show_products,
    write_captions,
)
from stylegan.corpora import Example, PseudoPairs
from stylegan.discriminator import Discriminator, hidden_ids
from stylegan.generator import PAD, Generator
from stylegan.rules import Rules
from stylegan.training import (
    Curves,
    Process,
    TextBatch,
    TrainingConfig,
    assign,
    draw_examples,
    encode_batch,
    warmup_cosine,
)

DRAWN = 64  # captions of one pass
PAIRS = 32  # sentences of people, and captions, of a discriminator's step
LEARNED = 64  # captions of a generator's step
ANCHORED = 24  # pseudo-pairs beside them
HIGHEST_ODDS = 5.0  # the weight of a caption, at the most: few would decide all
DECAY = 0.98  # of the mean weights


@dataclass(frozen=True, slots=True)
class Drawn:
    """Captions that obey the rules. group [N]: numbers of what is weighed apart: a style, and
    whether the product is one or many. Catalogues have more shoes than people write about, and
    weights are to change the voice and not the goods."""

    examples: list[Example]
    hidden: list[list[int]]
    style: Tensor
    group: Tensor


def draw(
    generator: Generator, tokenizer: Tokenizer, reader: Tokenizer, rules: Rules,
    pairs: PseudoPairs, styles: Sequence[str], features: Tensor, count: int, seed: Sequence[int],
    device: str,
) -> Drawn:  # fmt: skip
    """So many captions at temperature 1, of all styles alike; those that obey the rules."""
    random = np.random.default_rng(seed)
    stream = torch.Generator().manual_seed(int(random.integers(2**62)))
    words, names = corpora.lexicon(), generator.config.styles
    examples: list[Example] = []
    hidden: list[list[int]] = []
    numbers: list[int] = []
    groups: list[int] = []
    for start in range(0, count, DRAWN):
        conditions = [
            pairs.condition(styles[(start + i) % len(styles)], random)
            for i in range(min(DRAWN, count - start))
        ]
        written, _, _ = write_captions(
            generator, tokenizer, rules, conditions, features, 1, stream, device, reader
        )
        for row, (example, concepts) in enumerate(conditions):
            if written.faults[row]:
                continue
            examples.append(replace(example, text=written.texts[row]))
            hidden.append(written.hidden[row])
            number = names.index(example.style)
            numbers.append(number)
            groups.append(2 * number + any(words.is_many(kind) for kind in concepts.head))
    return Drawn(examples, hidden, torch.tensor(numbers), torch.tensor(groups))


def fit_discriminator(
    discriminator: Discriminator, real: Mapping[int, Sequence[list[int]]], fake: Drawn,
    mine: Sequence[int], config: TrainingConfig, process: Process, random: np.random.Generator,
) -> None:  # fmt: skip
    """Trains a discriminator, in place, whose score is the log odds of people's sentences.

    real: number of a style → sentences. mine: numbers of the captions that it may learn from.
    """
    optimiser = discriminator_optimiser(discriminator, config)
    binary = replace(config, loss="minimax")  # whose best discriminator is the log odds
    for step in range(config.round_discriminator_steps):
        rows = [mine[i] for i in random.integers(len(mine), size=PAIRS)]
        style_N = fake.style[rows]
        people = [real[n][int(random.integers(len(real[n])))] for n in style_N.tolist()]
        factor = warmup_cosine(step, config.round_discriminator_steps, 0.1)
        for group in optimiser.param_groups:
            group["lr"] = config.discriminator_rate * factor * group["scale"]
        captions = [fake.hidden[i] for i in rows]
        discriminator_step(
            discriminator, optimiser, people, captions, style_N, binary, process, step, False
        )


def odds(
    begin: Callable[[], Discriminator], real: Mapping[int, Sequence[list[int]]], fake: Drawn,
    config: TrainingConfig, process: Process, random: np.random.Generator,
) -> Tensor:  # fmt: skip
    """Log odds [N] of captions to be a person's, each by a discriminator that did not see it."""
    scores = torch.zeros(len(fake.hidden))
    for fold in range(2):
        seen = [i for i in range(len(fake.hidden)) if i % 2 != fold]
        unseen = [i for i in range(len(fake.hidden)) if i % 2 == fold]
        discriminator = begin()
        fit_discriminator(discriminator, real, fake, seen, config, process, random)
        for start in range(0, len(unseen), 2 * DRAWN):
            rows = unseen[start : start + 2 * DRAWN]
            some = [fake.hidden[i] for i in rows]
            scores[rows] = score(discriminator, some, fake.style[rows], process.device).cpu()
    return scores


def weigh(log_odds_N: Tensor, group_N: Tensor, groups: int, process: Process) -> Tensor:
    """Weights [N] from log odds: their exponentials, bounded, with a mean of 1 in each group."""
    weights = log_odds_N.exp().clamp(max=HIGHEST_ODDS)
    for group in range(groups):
        mine = group_N == group
        # over all processes, which may have different captions of a group, or none
        total, count = (
            process.mean(float(v)) for v in (weights[mine].sum(), mine.float().sum())
        )
        weights[mine] *= count / total if total > 0 else 1.0
    return weights


def weighted_loss(
    generator: Generator, batch: TextBatch, weights_B: Tensor, noise_BZ: Tensor, process: Process
) -> Tensor:
    """Mean over tokens of the negative log-likelihood, in nats, each caption with its weight."""
    batch = batch.to(process.device)
    with process.autocast():
        prefix = generator.prefix(*batch.conditions(), noise_BZ.to(process.device))
        logits = generator(*prefix, batch.caption_BT)
    nats_BT = F.cross_entropy(
        logits.float().transpose(1, 2), batch.caption_BT, ignore_index=PAD, reduction="none"
    )
    nats = (nats_BT.sum(1) * weights_B.to(process.device)).sum()
    return nats / (batch.caption_BT != PAD).sum()


def train_rounds(
    generator: Generator,
    begin: Callable[[], Discriminator],
    tokenizer: Tokenizer,
    pairs: PseudoPairs,
    held_out: Mapping[str, Sequence[str]],
    features: Tensor,
    rules: Rules,
    config: TrainingConfig,
    *,
    process: Process,
    curves: Curves,
    resume: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
    log: Callable[[str], None] = print,
) -> dict[str, dict[str, float]]:
    """Trains the generator, in place, for config.rounds rounds.

    begin: a new discriminator, the same each time. held_out, features: as for `train_adversarial`.
    Ends with the weights after the round that the watch found best. → its figures, `before` and
    `after`. Raises NonFiniteLoss.
    """
    device = process.device
    generator.vision.requires_grad_(False)
    generator.eval()
    trained = [p for p in generator.parameters() if p.requires_grad]
    styles = [style for style in pairs.plain if pairs.plain[style]]
    judge = begin()
    reader = judge.reader or tokenizer
    human, voice = people_of(pairs, held_out, styles)
    real = {
        # what finds fault is never delivered, so it is no example either
        generator.config.styles.index(style): hidden_ids(
            [t for t in texts if not corpora.finds_fault(t)] or texts, reader
        )
        for style, texts in voice.items()
    }  # fmt: skip
    watch = Watch(
        human, pairs, tokenizer, rules, features, config.watched, config.seed, styles, reader
    )
    shown = show_products(pairs, styles, config.seed, curves)
    first: dict[str, float] = {}
    best: dict[str, float] = {}
    best_weights, number = [p.detach().clone() for p in trained], 0

    def measure() -> dict[str, float]:
        figures, _ = watch.measure(generator, judge, device)
        # no discriminator lasts long enough for its scores to be compared
        figures = process.agree({k: v for k, v in figures.items() if not k.startswith("score")})
        step = config.adversarial_steps + number
        if process.rank == 0:
            keep_samples(
                curves, step, generator, tokenizer, rules, shown, features, config.seed, device
            )
            log(curves.add("adversarial held-out", step=step, **figures))
        return figures

    if resume is None:
        first = best = measure()
    else:
        assign(trained, resume["trained"])
        number, first, best = resume["step"], resume["first"], resume["best"]
        best_weights = [value.to(device) for value in resume["best_weights"]]

    while number < config.rounds:
        # everything random follows from the round, so that a resumed training sees the same
        seed = [config.seed, 37, number, process.rank]
        torch.manual_seed((config.seed * 1_000_003 + number) * process.size + process.rank)
        share = len(process.share(range(config.round_captions)))
        fake = draw(
            generator, tokenizer, reader, rules, pairs, styles, features, share, seed, device
        )
        # every process decides alike, or those that go on would wait for those that do not
        if process.mean(float(len(fake.hidden) < 2 * PAIRS)) > 0:
            log(f"round  {len(fake.hidden)} of {share} captions obey the rules: too few, no more")
            break
        random = np.random.default_rng(seed)
        log_odds = odds(begin, real, fake, config, process, random)
        weights = weigh(log_odds, fake.group, 2 * len(generator.config.styles), process)
        optimiser = torch.optim.AdamW(
            trained, lr=config.adversarial_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        average = [p.detach().clone() for p in trained]
        generator.train()
        generator.vision.eval()
        nats = 0.0
        for step in range(config.round_steps):
            rows = random.integers(len(fake.examples), size=LEARNED)
            anchor = draw_examples(pairs, [], 1.0, ANCHORED, random)
            for group in optimiser.param_groups:
                factor = warmup_cosine(step, config.round_steps)
                group["lr"] = config.adversarial_rate * factor
            optimiser.zero_grad(set_to_none=True)
            total = torch.zeros((), device=device)
            for examples, own, weight in (
                ([fake.examples[i] for i in rows], weights[rows], 1.0),
                (anchor, torch.ones(ANCHORED), config.likelihood_weight),
            ):
                batch = encode_batch(examples, tokenizer, generator.config, features)
                noise = torch.randn(len(examples), generator.config.noise_size)
                total = total + weight * weighted_loss(generator, batch, own, noise, process)
            process.check_finite(total, "adversarial", step)
            total.backward()
            process.average_gradients(trained)
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            nats += total.item()
            decay = min(DECAY, (1 + step) / (10 + step))
            with torch.no_grad():
                for value, parameter in zip(average, trained, strict=True):
                    value.lerp_(parameter, 1 - decay)
        assign(trained, average)
        generator.eval()
        number += 1
        if process.rank == 0:
            effective = float(weights.sum() ** 2 / weights.square().sum() / len(weights))
            log(curves.add(
                "round", step=number, steps=config.rounds, captions=len(weights),
                effective_share=effective, odds_mean=float(log_odds.mean()),
                loss=nats / max(1, config.round_steps),
            ))  # fmt: skip
        figures = measure()
        if quality(figures) < quality(best):
            best, best_weights = figures, [p.detach().clone() for p in trained]
            curves.events.append({
                "stage": "adversarial", "step": config.adversarial_steps + number,
                "kind": "snapshot", "why": f"round {number}",
            })  # fmt: skip
        save({
            "stage": "rounds", "step": number, "trained": [p.detach() for p in trained],
            "first": first, "best": best, "best_weights": best_weights,
        })  # fmt: skip
    assign(trained, best_weights)
    curves.events.append({
        "stage": "adversarial", "step": config.adversarial_steps + number, "kind": "done",
        "why": f"{number} rounds; the weights that the watch found best are kept",
    })  # fmt: skip
    return {"before": first, "after": best}

"""The game in rounds: the discriminator learns to its end, then the generator does.

    round   sample → two discriminators, each scores the captions that the other learned from →
            odds → likelihood of captions drawn by their odds → mean weights → measure

The policy gradient of `adversarial.py` follows a score that moves with every step, by what a step's
few captions earn. Here thousands of captions are drawn at once. A caption's weight is how much
likelier people are to write it than the generator is, as a discriminator says that has settled and
has not seen it: maximum likelihood on weighted captions of its own takes the generator to people's
distribution (MaliGAN: Che et al., 2017). What breaks the rules weighs nothing, for it is not
delivered, nor what a proofreader finds unfit, if there is one. Where there are captions that a
teacher has written (`teacher.py`), the first round is played with those: it writes better, and its
weighted captions stay beside the generator's own. Captions that somebody has read and found unfit
to print are made unlikelier meanwhile.

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

from stylegan import corpora
from stylegan.adversarial import (
    Watch,
    discriminator_optimiser,
    discriminator_step,
    keep_samples,
    named_for,
    people_of,
    quality,
    score,
    show_products,
    write_captions,
)
from stylegan.corpora import Concepts, Example, PseudoPairs
from stylegan.discriminator import Discriminator, hidden_ids
from stylegan.generator import Generator
from stylegan.losses import undesirable
from stylegan.rules import Rules
from stylegan.teacher import Proofreader
from stylegan.training import (
    Curves,
    Process,
    TrainingConfig,
    assign,
    caption_loss,
    caption_nats,
    draw_examples,
    encode_batch,
    warmup_cosine,
)

DRAWN, DRAWN_GPU = 64, 512  # captions of one pass
PAIRS = 32  # sentences of people, and captions, of a discriminator's step
LEARNED = 64  # captions of a generator's step
ANCHORED = 48  # pseudo-pairs beside them
UNFIT = 24  # captions beside them that are to become unlikelier
BETA = 0.3  # by how few nats they may stop doing so, see losses.undesirable
HIGHEST_ODDS = 8.0  # the weight of a caption, at the most: few would decide all
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
    device: str, proofreader: Proofreader | None = None,
) -> Drawn:  # fmt: skip
    """So many captions at temperature 1, of all styles alike; those that obey the rules, and that
    the proofreader passes."""
    random = np.random.default_rng(seed)
    stream = torch.Generator().manual_seed(int(random.integers(2**62)))
    size = DRAWN if device == "cpu" else DRAWN_GPU
    examples: list[Example] = []
    concepts: list[Concepts] = []
    hidden: list[list[int]] = []
    for start in range(0, count, size):
        conditions = [
            pairs.condition(styles[(start + i) % len(styles)], random)
            for i in range(min(size, count - start))
        ]
        written, _, _ = write_captions(
            generator, tokenizer, rules, conditions, features, 1, stream, device, reader
        )
        obey = [row for row, faults in enumerate(written.faults) if not faults]
        if proofreader and obey:
            passed = proofreader.passes([written.texts[row] for row in obey])
            obey = [row for row, passes in zip(obey, passed, strict=True) if passes]
        for row in obey:
            example, said = conditions[row]
            examples.append(replace(example, text=written.texts[row]))
            concepts.append(said)
            hidden.append(written.hidden[row])
    return drawn_of(examples, concepts, hidden, generator.config.styles)


def drawn_of(
    examples: list[Example], concepts: Sequence[Concepts], hidden: list[list[int]],
    names: Sequence[str],
) -> Drawn:  # fmt: skip
    """Captions with the numbers of their styles and groups. names: of the generator's styles."""
    is_many = corpora.lexicon().is_many
    numbers = torch.tensor([names.index(example.style) for example in examples])
    many = torch.tensor([any(map(is_many, said.head)) for said in concepts], dtype=torch.long)
    return Drawn(examples, hidden, numbers, 2 * numbers + many)


def keep_written(
    pairs: PseudoPairs, reader: Tokenizer, rules: Rules, names: Sequence[str], process: Process,
    proofreader: Proofreader | None = None,
) -> Drawn:  # fmt: skip
    """Those written examples that obey the rules, and that the proofreader passes, of them this
    process's part; drops the others."""
    concepts_of = corpora.lexicon().concepts
    for style, rows in list(pairs.written.items()):
        own = [rows[i] for i in process.share(range(len(rows)))]
        # what a description leaves open, the product may be: the teacher was told no more
        own = [x for x in own if not rules.faults(x.text, True, concepts_of(x.description))]
        if proofreader and own:
            passed = proofreader.passes([x.text for x in own])
            own = [x for x, passes in zip(own, passed, strict=True) if passes]
        pairs.written[style] = own
        if not own:
            del pairs.written[style]
    examples = [example for rows in pairs.written.values() for example in rows]
    concepts = [concepts_of(example.description) for example in examples]
    return drawn_of(examples, concepts, hidden_ids([x.text for x in examples], reader), names)


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
        for start in range(0, len(unseen), DRAWN_GPU):
            rows = unseen[start : start + DRAWN_GPU]
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


class Unfit:
    """Captions that are to become unlikelier than a generator made them when this was begun.

    Each has its own noise for good: its likelihood is to change by the weights alone.
    """

    def __init__(
        self, examples: Sequence[Example], generator: Generator, tokenizer: Tokenizer,
        features: Tensor, process: Process,
    ) -> None:  # fmt: skip
        self.examples, self.generator, self.process = examples, generator, process
        self.tokenizer, self.features = tokenizer, features
        stream = torch.Generator().manual_seed(0)
        self.noise_NZ = torch.randn(
            len(examples), generator.config.noise_size, generator=stream
        )  # fmt: skip
        self.reference_N = torch.zeros(len(examples))
        # of like length together, or most of a batch would be padding
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].text))
        with torch.no_grad():
            for start in range(0, len(order), DRAWN):
                rows = order[start : start + DRAWN]
                self.reference_N[rows] = self.log_probs(rows).cpu()

    def log_probs(self, rows: list[int]) -> Tensor:
        """Log-likelihood [N] of these captions, in nats."""
        some = [self.examples[i] for i in rows]
        batch = encode_batch(some, self.tokenizer, self.generator.config, self.features)
        with self.process.autocast():
            return -caption_nats(self.generator, batch, self.noise_NZ[rows], self.process.device)

    def loss(self, random: np.random.Generator) -> Tensor:
        """Of so many of them as belong to a step, a scalar."""
        rows = random.integers(len(self.examples), size=UNFIT).tolist()
        likely_N = self.log_probs(rows)
        return undesirable(likely_N - self.reference_N[rows].to(likely_N.device), BETA)


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
    proofreader: Proofreader | None = None,
    unfit: Sequence[Example] = (),
    resume: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
    log: Callable[[str], None] = print,
) -> dict[str, dict[str, float]]:
    """Trains the generator, in place, for config.rounds rounds.

    begin: a new discriminator, the same each time. held_out, features: as for `train_adversarial`.
    proofreader: what it does not pass has no weight. unfit: what is to become unlikelier.
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
    names = generator.config.styles
    real = {names.index(style): hidden_ids(texts, reader) for style, texts in voice.items()}
    watch = Watch(
        human, pairs, tokenizer, rules, features, config.watched, config.seed, styles, reader
    )
    shown = show_products(pairs, styles, config.seed, curves)
    first: dict[str, float] = {}
    best: dict[str, float] = {}
    best_weights, number = [p.detach().clone() for p in trained], 0

    def measure() -> dict[str, float]:
        figures, captions = watch.measure(generator, judge, device)
        if proofreader:
            for style, written in captions.items():
                passed = proofreader.passes(written.texts)
                figures[named_for("unfit", style, captions)] = 1.0 - float(passed.mean())
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

    pool = keep_written(pairs, reader, rules, names, process, proofreader)
    is_taught = process.mean(float(len(pool.hidden) < 2 * PAIRS)) == 0
    pool_odds = pool_weights = torch.zeros(0)
    if is_taught:
        seed = [config.seed, 47, process.rank]
        torch.manual_seed((config.seed * 1_000_003) * process.size + process.rank)
        pool_odds = odds(begin, real, pool, config, process, np.random.default_rng(seed))
        pool_weights = weigh(pool_odds, pool.group, 2 * len(names), process)
        for style in pairs.written:
            pairs.weigh(style, pool_weights[pool.style == names.index(style)].numpy())

    while number < config.rounds:
        # everything random follows from the round, so that a resumed training sees the same
        seed = [config.seed, 37, number, process.rank]
        torch.manual_seed((config.seed * 1_000_003 + number) * process.size + process.rank)
        random = np.random.default_rng(seed)
        share, steps = len(process.share(range(config.round_captions))), config.round_steps
        if number == 0 and is_taught:
            fake, log_odds, weights = pool, pool_odds, pool_weights
            # as many times over as the captions of other rounds
            steps = int(steps * max(1.0, process.mean(len(pool.hidden) / share)))
        else:
            fake = draw(
                generator, tokenizer, reader, rules, pairs, styles, features, share, seed, device,
                proofreader,
            )  # fmt: skip
            # every process decides alike, or those that go on would wait for those that do not
            if process.mean(float(len(fake.hidden) < 2 * PAIRS)) > 0:
                log(f"round  {len(fake.hidden)} of {share} captions obey the rules: too few")
                break
            log_odds = odds(begin, real, fake, config, process, random)
            weights = weigh(log_odds, fake.group, 2 * len(names), process)
        likely = weights.double().cumsum(0).numpy()
        optimiser = torch.optim.AdamW(
            trained, lr=config.adversarial_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        average = [p.detach().clone() for p in trained]
        mine = [unfit[i] for i in process.share(range(len(unfit)))]
        # by all or by none: gradients are those of all processes
        is_pushed = config.unfit_weight > 0 and process.mean(float(not mine)) == 0
        pushed = Unfit(mine, generator, tokenizer, features, process) if is_pushed else None
        generator.train()
        generator.vision.eval()
        nats = 0.0
        for step in range(steps):
            rows = np.searchsorted(likely, random.random(LEARNED) * likely[-1], side="right")
            anchor = draw_examples(pairs, [], 1.0, ANCHORED, random)
            for group in optimiser.param_groups:
                group["lr"] = config.adversarial_rate * warmup_cosine(step, steps)
            optimiser.zero_grad(set_to_none=True)
            total = torch.zeros((), device=device)
            for examples, weight in (
                (anchor, config.likelihood_weight), ([fake.examples[i] for i in rows], 1.0),
            ):  # fmt: skip
                batch = encode_batch(examples, tokenizer, generator.config, features)
                noise = torch.randn(len(examples), generator.config.noise_size)
                with process.autocast():
                    loss, tokens = caption_loss(generator, batch, noise, device)
                total = total + weight * loss / tokens
            if pushed:  # a caption counts as much as one that is learned
                total = total + config.unfit_weight * pushed.loss(random) / tokens
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
                loss=nats / max(1, steps),
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

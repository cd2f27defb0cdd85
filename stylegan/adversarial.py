"""The adversarial stage: the generator learns the voice from the discriminator, in plain torch.

    warm-up   the discriminator alone, until it tells the likelihood model's captions from people's
    step      sample → score → discriminator phase → generator phase → mean weights → diagnostics
    measure   now and then: a detector that learns anew; a snapshot, or a rollback
    critic    fitted to captions as they are delivered, when the game is over

Text is discrete, so the discriminator's score reaches the generator as the reward of a policy
gradient (RLOO), held near the likelihood model by an exact KL and near people by some likelihood.
Content and form are rewarded beside style, so that style is never bought with lies.

Shapes: N sampled captions = products × group_size, T tokens, V vocabulary entries.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from stylegan import corpora, losses
from stylegan.captioner import Captioner, Encoding
from stylegan.corpora import Concepts, Example, PseudoPairs
from stylegan.critic import Critic
from stylegan.discriminator import Discriminator, detector_auc, hidden_ids, pad_ids
from stylegan.generator import BOS, EOS, PAD, Generator
from stylegan.metrics import distinct_n
from stylegan.rules import CONTENT, Rules, penalty
from stylegan.teacher import Proofreader
from stylegan.training import (
    Curves,
    Process,
    TextBatch,
    TrainingConfig,
    assign,
    caption_loss,
    draw_examples,
    encode_batch,
    parameter_groups,
)

LEAST_WATCHED = 16  # sentences of people that a detector can be trained on
LEAST_NAMED = 300  # sentences that name a product; with fewer, the whole voice is real
MISMATCHED = 0.1  # of the discriminator's fakes: people's sentences of another style
FORMAL = 0.1  # formal descriptions beside the critic's captions, which it shall not like either
LEAST_FIT = 0.1  # probability to be fit that is counted at the least
WORD_DROPOUT = 0.06
TRUNK_RATE = 0.1  # of the discriminator's learning rate, for what is pretrained
REPLAY_BUFFER = 4096  # fakes of the past
SMOOTHING = 2.0  # added to the counts of token pairs
WARM_ACCURACY = 0.75  # pair accuracy at which the warm-up ends
PENALTY_EVERY = 4  # discriminator steps; the penalty counts so many times as much
PENALISED = 32  # sentences of each side that the penalties are measured on
MORE_CONTRADICTIONS = 0.04  # two standard errors of a share of .2 among 512 captions
MOST_KL = 0.3  # nats a token from the likelihood model; beyond, the game is rolled back
SHOWN = 10  # products whose captions are kept over time


@dataclass(frozen=True, slots=True)
class Written:
    """Sampled captions. ids [N, T] end with EOS, padded with PAD; style [N]; the faults of each."""

    ids: Tensor
    texts: list[str]
    hidden: list[list[int]]
    style: Tensor
    faults: list[frozenset[str]]


@dataclass(slots=True)
class Controls:
    """What steers the game, the same in every process.

    accuracy: mean pair accuracy of the discriminator (how often it puts a person's sentence above a
    caption). beta: weight of the KL. rate: factor of both learning rates. high_steps: steps since
    accuracy is too high.
    """

    accuracy: float = 0.5
    beta: float = 0.2
    rate: float = 1.0
    kl: float = 0.0
    high_steps: int = 0
    rollbacks: int = 0
    discriminator_steps: int = 0
    samples_seen: int = 0


def seesaw(accuracy: float) -> int:
    """Discriminator steps at a pair accuracy: none when far ahead, three when behind."""
    return 0 if accuracy > 0.85 else 3 if accuracy < 0.65 else 1


def steer_beta(beta: float, kl: float, target: float) -> float:
    """The KL's weight for the next step: up when KL (nats a token) is above its target."""
    if target <= 0:
        return 0.0
    error = max(-1.0, min(1.0, kl / target - 1))
    return min(100.0, max(1e-4, beta * math.exp(0.05 * error)))


def sibling_overlap(hidden: Sequence[Sequence[int]], size: int) -> Tensor:
    """How much of each caption its group's other captions say too, [N] in 0..1.

    Mean over the siblings of the share of its token bigrams that the sibling has as well.
    """
    grams = [set(pairwise(ids)) for ids in hidden]
    shares = []
    for start in range(0, len(grams), size):
        group = grams[start : start + size]
        for own in group:
            common = sum(len(own & other) for other in group) - len(own)
            shares.append(common / max(1, len(own)) / max(1, len(group) - 1))
    return torch.tensor(shares)


def pair_counts(hidden: Iterable[Sequence[int]]) -> Counter[tuple[int, int]]:
    """How often each two tokens follow each other in sentences."""
    return Counter(pair for ids in hidden for pair in pairwise((BOS, *ids)))


def matching(
    hidden: Sequence[Sequence[int]], real: Counter[tuple[int, int]],
    fake: Counter[tuple[int, int]],
) -> Tensor:  # fmt: skip
    """How much rarer a caption's token pairs are in captions than with people, [N] in nats a pair.

    The mean log ratio of their frequencies among people's sentences and among late captions, each
    count smoothed: below 0 for phrases that captions wear out, above for those they forget. A
    discriminator judges one sentence at a time and hardly sees how often all the others say it.
    """
    scale = math.log(max(1, fake.total()) / max(1, real.total()))
    worth = {
        pair: math.log((real[pair] + SMOOTHING) / (fake[pair] + SMOOTHING)) + scale
        for pair in {pair for ids in hidden for pair in pairwise((BOS, *ids))}
    }
    return torch.tensor(
        [float(np.mean([worth[pair] for pair in pairwise((BOS, *ids))])) for ids in hidden]
    )


def write_captions(
    generator: Generator, tokenizer: Tokenizer, rules: Rules,
    conditions: Sequence[tuple[Example, Concepts]], features: Tensor, group_size: int,
    random: torch.Generator, device: str, reader: Tokenizer | None = None,
) -> tuple[Written, TextBatch, Tensor]:  # fmt: skip
    """Samples group_size captions of each condition at temperature 1, each with noise of its own.

    reader: the discriminator's tokeniser, where it has its own. → what was written, its conditions
    and noise [N, Z]: N = conditions × group_size rows.
    """
    batch = encode_batch([c[0] for c in conditions], tokenizer, generator.config, features)
    batch = batch.repeated(group_size).to(device)
    rows = len(batch.style_B)
    noise = torch.randn(rows, generator.config.noise_size, generator=random).to(device)
    longest = generator.config.caption_length - 1
    uniform = torch.rand(rows, longest, generator=random).to(device)

    def draw(log_probs: Tensor, step: int) -> Tensor:
        cumulative = log_probs.exp().cumsum(-1)
        place = torch.searchsorted(cumulative, uniform[:, step, None] * cumulative[:, -1:])
        return place.squeeze(1).clamp(max=log_probs.shape[-1] - 1)

    with torch.no_grad():
        prefix, mask = generator.prefix(*batch.conditions(), noise)
        ids, _ = generator.sample(prefix, mask, draw, longest)
    rows_ids = [[t for t in row if t != PAD] for row in ids.tolist()]
    texts = [tokenizer.decode([t for t in row if t != EOS]).strip() for row in rows_ids]
    known = [concepts for _, concepts in conditions for _ in range(group_size)]
    faults = [
        rules.faults(text, row[-1:] == [EOS], concepts)
        for text, row, concepts in zip(texts, rows_ids, known, strict=True)
    ]
    hidden = hidden_ids(texts, reader or tokenizer)
    return Written(ids, texts, hidden, batch.style_B, faults), batch, noise


def discriminator_step(
    discriminator: Discriminator, optimiser: torch.optim.Optimizer, real: Sequence[list[int]],
    fake: Sequence[list[int]], style: Tensor, config: TrainingConfig, process: Process, step: int,
    penalise: bool,
) -> dict[str, float]:  # fmt: skip
    """One step on pairs of a real and a fake sentence of the same style [N], in place."""
    device = process.device
    ids = pad_ids([*real, *fake]).to(device)
    drop = torch.rand(ids.shape, device=device) < WORD_DROPOUT
    ids = torch.where(drop & (ids > EOS), BOS, ids)  # BOS, which no sentence has, hides a token
    both = torch.cat([style, style]).to(device)
    discriminator.train()
    with process.autocast():
        scores = discriminator(ids, both).float()
    loss = losses.LOSSES[config.loss].discriminator(scores[: len(real)], scores[len(real) :])
    figures = {"loss_discriminator": loss.item()}
    if penalise:
        # in full precision, one phase each: R1 on what people wrote, R2 on what was generated
        total = loss
        some = min(len(real), PENALISED)
        for name, rows in (("r1", slice(0, some)), ("r2", slice(len(real), len(real) + some))):
            embeds = discriminator.embed(ids[rows]).detach().requires_grad_()
            penalty_N = losses.zero_centred_penalty(
                discriminator(ids[rows], both[rows], embeds), embeds
            )
            total = total + config.penalty * PENALTY_EVERY * penalty_N
            figures[name] = penalty_N.item()
        loss = total
    process.check_finite(loss, "discriminator", step)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    parameters = list(discriminator.parameters())
    process.average_gradients(parameters)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    discriminator.eval()
    return figures


@torch.no_grad()
def score(
    discriminator: Discriminator, hidden: Sequence[list[int]], style: Tensor, device: str
) -> Tensor:
    """Scores [N] of sentences, without dropout."""
    with Process(device=device).autocast():
        scores: Tensor = discriminator(pad_ids(hidden).to(device), style.to(device)).float()
    return scores


class Watch:
    """Measures the generator on the same products each time, with a detector of its own.

    People's sentences are kept from all training. It is for steering, not for claims all the same:
    snapshots are chosen by its figures, and its products are those that were trained with. Claims
    need held-out text and photographs (`jobs.evaluate`).
    """

    def __init__(
        self, human: dict[str, list[str]], pairs: PseudoPairs, tokenizer: Tokenizer, rules: Rules,
        features: Tensor, count: int, seed: int, styles: Sequence[str],
        reader: Tokenizer | None = None,
    ) -> None:  # fmt: skip
        random = np.random.default_rng([seed, 13])
        self.human, self.tokenizer, self.rules, self.features = human, tokenizer, rules, features
        self.reader = reader or tokenizer
        self.hidden = {style: hidden_ids(texts, self.reader) for style, texts in human.items()}
        self.styles, self.seed = list(styles), seed
        self.conditions = {
            style: [pairs.condition(style, random, is_any=False) for _ in range(count)]
            for style in human
        }

    def measure(
        self, generator: Generator, discriminator: Discriminator, device: str
    ) -> tuple[dict[str, float], dict[str, Written]]:
        """Figures of each style (`name`, with several styles `name/style`), and the captions."""
        figures: dict[str, float] = {}
        captions: dict[str, Written] = {}
        for style, conditions in self.conditions.items():
            random = torch.Generator().manual_seed(self.seed)
            parts = [
                write_captions(generator, self.tokenizer, self.rules, conditions[i : i + 64],
                               self.features, 1, random, device, self.reader)[0]
                for i in range(0, len(conditions), 64)
            ]  # fmt: skip
            written = Written(
                parts[0].ids, [t for p in parts for t in p.texts],
                [h for p in parts for h in p.hidden], torch.cat([p.style for p in parts]),
                [f for p in parts for f in p.faults],
            )  # fmt: skip
            captions[style] = written
            human, texts = self.human[style], written.texts
            count = min(len(human), len(texts))
            words = [corpora.word_hashes(text) for text in texts]
            known = self.rules.words
            row = {
                "auc": detector_auc(self.hidden[style], written.hidden, self.seed),
                "score": score(discriminator, written.hidden, written.style, device).mean().item(),
                "distinct_2": distinct_n(texts[:count], 2) / distinct_n(human[:count], 2),
                "named": _share("unnamed", written.faults, False),
                "contradiction": _share("contradiction", written.faults),
                "invented": sum(len(w - known) for w in words) / max(1, sum(map(len, words))),
                "words": float(np.mean([len(text.split()) for text in texts])),
                "human_words": float(np.mean([len(text.split()) for text in human])),
            }
            figures |= {named_for(name, style, self.human): value for name, value in row.items()}
        return figures, captions


def _share(fault: str, faults: Sequence[frozenset[str]], present: bool = True) -> float:
    return float(np.mean([(fault in f) == present for f in faults]))


def named_for(name: str, style: str, styles: Sequence[str] | dict[str, Any]) -> str:
    """A figure's name, with its style where there are several."""
    return f"{name}/{style}" if len(styles) > 1 else name


def _mean(figures: dict[str, float], name: str) -> float:
    """Mean over the styles."""
    return float(np.mean([v for k, v in figures.items() if k.split("/")[0] == name]))


def quality(figures: dict[str, float]) -> float:
    """What snapshots are compared by, lower is better: how easily a detector that was not trained
    against tells captions from people's, and what is wrong with them. Captions that a proofreader
    does not pass count where there is one."""
    unfit = [value for name, value in figures.items() if name.split("/")[0] == "unfit"]
    return (
        _mean(figures, "auc") + _mean(figures, "contradiction") + 1 - _mean(figures, "named")
        + _mean(figures, "invented") + max(0.0, 0.95 - _mean(figures, "distinct_2"))
        + sum(unfit) / max(1, len(unfit))
    )  # fmt: skip


def trouble(
    figures: dict[str, float], first: dict[str, float], best: dict[str, float], controls: Controls
) -> str:
    """Why the game has to be rolled back, "" when all is well.

    figures: of the measure just taken. first: of the likelihood model. best: of the snapshot.
    """
    if controls.high_steps >= 50:
        return f"the discriminator's pair accuracy was above .9 for {controls.high_steps} steps"
    if controls.kl > MOST_KL:
        return f"KL is {controls.kl:.2f} nats per token, above {MOST_KL}"
    if not figures:
        return ""
    # a likelihood model that invents words is more diverse than people: no measure to keep up with
    if _mean(figures, "distinct_2") < 0.85 * min(1.0, _mean(first, "distinct_2")):
        return f"distinct-2 fell to {_mean(figures, 'distinct_2'):.2f} of people's"
    if _mean(figures, "contradiction") > _mean(first, "contradiction") + MORE_CONTRADICTIONS:
        return f"contradictions rose to {_mean(figures, 'contradiction'):.3f}"
    lengths = _mean(first, "words"), _mean(first, "human_words")
    if not 0.8 * min(lengths) <= _mean(figures, "words") <= 1.2 * max(lengths):
        return f"captions are {_mean(figures, 'words'):.1f} words long"
    if _mean(figures, "score") > _mean(best, "score") and (
        _mean(figures, "auc") > max(_mean(best, "auc") + 0.06, _mean(first, "auc"))
    ):
        return (
            "the discriminator's score rises while another detector tells captions from people's "
            f"more easily ({_mean(best, 'auc'):.3f} → {_mean(figures, 'auc'):.3f})"
        )
    return ""


def voices(
    pairs: PseudoPairs, held_out: Mapping[str, Sequence[str]], style: str
) -> tuple[list[str], list[str]]:
    """What is real of a style: sentences that name a product, if there are enough, and such that
    nothing has learned from.

    They need not be what a shop could print: captions have to be, and are measured against people
    all the same. Only what finds fault is no example, for it is never delivered.
    """
    voice = [text for text in pairs.people[style] if not corpora.finds_fault(text)]
    left_out = [corpora.normalise(text) for text in held_out[style]]
    if len(voice) < LEAST_NAMED:
        return pairs.plain[style], [text for text in left_out if corpora.is_sayable(text)]
    watched = [text for text in left_out if corpora.speaks_of_products(text)]
    return voice, watched or left_out


def people_of(
    pairs: PseudoPairs, held_out: Mapping[str, Sequence[str]], styles: Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """What people wrote in each style: what to watch with, and what is real to learn from."""
    watched_by: dict[str, list[str]] = {}
    voice_by: dict[str, list[str]] = {}
    for style in styles:
        voice, watched = voices(pairs, held_out, style)
        # with too few left out, the detector has to do with sentences that were learned from
        watched_by[style] = watched if len(watched) >= LEAST_WATCHED else voice
        voice_by[style] = voice
    return watched_by, voice_by


def show_products(
    pairs: PseudoPairs, styles: Sequence[str], seed: int, curves: Curves
) -> list[tuple[Example, Concepts]]:
    """The products whose captions are kept over time, named in the curves."""
    random = np.random.default_rng([seed, 17])
    shown = [pairs.condition(styles[i % len(styles)], random) for i in range(SHOWN)]
    curves.products = [
        {"description": example.description, "image": example.image} for example, _ in shown
    ]
    return shown


def keep_samples(
    curves: Curves, step: int, generator: Generator, tokenizer: Tokenizer, rules: Rules,
    shown: Sequence[tuple[Example, Concepts]], features: Tensor, seed: int, device: str,
) -> None:  # fmt: skip
    """Adds the captions of the products shown, by the same noise each time."""
    chance = torch.Generator().manual_seed(seed)
    written, _, _ = write_captions(generator, tokenizer, rules, shown, features, 1, chance, device)
    captions = [corpora.sentence(text) for text in written.texts]
    curves.samples.append({"step": step, "captions": captions})


def discriminator_optimiser(
    discriminator: Discriminator, config: TrainingConfig
) -> torch.optim.Optimizer:
    """AdamW; `scale` of a group is its part of the learning rate."""
    new = [module for name, module in discriminator.named_children() if name != "trunk"]
    gentle = TRUNK_RATE if discriminator.reader else 1.0
    groups = [
        group | {"scale": scale, "lr": scale * config.discriminator_rate}
        for module, scale in ((discriminator.trunk, gentle), (nn.ModuleList(new), 1.0))
        for group in parameter_groups(module, config.weight_decay)
    ]
    return torch.optim.AdamW(groups, betas=(0.5, 0.98))


def train_adversarial(
    generator: Generator,
    discriminator: Discriminator,
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
    """Trains both networks against each other, in place.

    generator: the likelihood model, which is also the reference of the KL. held_out: style →
    sentences of the voice that nothing has learned from, to watch with. features [N, I, C]: of the
    catalogue's photographs. Ends with the mean weights of the best snapshot. → figures of the
    watch, `before` and `after`. Raises NonFiniteLoss.
    """
    device, loss = process.device, losses.LOSSES[config.loss]
    styles = [style for style in pairs.plain if pairs.plain[style]]
    numbers = {style: generator.config.styles.index(style) for style in styles}
    generator.vision.requires_grad_(False)
    generator.eval()
    discriminator.eval()
    reference = copy.deepcopy(generator).requires_grad_(False)
    trained = [p for p in generator.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in trained]
    reader = discriminator.reader or tokenizer

    human, voice = people_of(pairs, held_out, styles)
    real = {style: hidden_ids(texts, reader) for style, texts in voice.items()}
    people_say = {style: pair_counts(sentences) for style, sentences in real.items()}
    watch = Watch(
        human, pairs, tokenizer, rules, features, config.watched, config.seed, styles, reader
    )
    shown = show_products(pairs, styles, config.seed, curves)

    def optimisers() -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        return (
            torch.optim.AdamW(trained, lr=config.adversarial_rate, betas=(0.9, 0.98),
                              weight_decay=0.0),
            discriminator_optimiser(discriminator, config),
        )  # fmt: skip

    optimiser_g, optimiser_d = optimisers()
    controls, step = Controls(), 0
    replay: dict[str, list[list[int]]] = {style: [] for style in styles}
    rows = len(process.share(range(config.adversarial_batch)))
    size = config.group_size

    def draw_real(style_N: Tensor, chance: np.random.Generator) -> list[list[int]]:
        """For each row a sentence that a person wrote in its style."""
        names = [generator.config.styles[i] for i in style_N.tolist()]
        return [real[name][chance.integers(len(real[name]))] for name in names]

    def draw_fakes(
        written: Written, chance: np.random.Generator
    ) -> tuple[list[list[int]], Tensor]:
        """The captions of this step, some replaced by older ones and by people's other styles."""
        fakes = list(written.hidden)
        for i, number in enumerate(written.style.tolist()):
            old = replay[generator.config.styles[number]]
            others = [s for s in styles if numbers[s] != number]
            where = chance.random()
            if old and where < config.replay_share:
                fakes[i] = old[chance.integers(len(old))]
            elif others and where > 1 - MISMATCHED:
                other = real[others[chance.integers(len(others))]]
                fakes[i] = other[chance.integers(len(other))]
        return fakes, written.style

    def remember(written: Written, chance: np.random.Generator) -> None:
        for ids, number in zip(written.hidden, written.style.tolist(), strict=True):
            buffer = replay[generator.config.styles[number]]
            if len(buffer) < REPLAY_BUFFER:
                buffer.append(ids)
            else:
                buffer[chance.integers(REPLAY_BUFFER)] = ids

    def state() -> dict[str, Any]:
        return {
            "stage": "adversarial", "step": step, "trained": [p.detach() for p in trained],
            "reference": [p.detach() for n, p in reference.named_parameters()
                          if not n.startswith("vision.")],
            "discriminator": discriminator.state_dict(), "average": average,
            "optimiser": optimiser_g.state_dict(), "optimiser_d": optimiser_d.state_dict(),
            "controls": asdict(controls), "replay": replay, "first": first, "best": best,
            "best_weights": best_weights, "best_discriminator": best_discriminator,
            "samples_seen": controls.samples_seen,
        }  # fmt: skip

    def snapshot() -> tuple[list[Tensor], dict[str, Tensor]]:
        return (
            [value.clone() for value in average],
            {k: v.detach().clone() for k, v in discriminator.state_dict().items()},
        )

    def measure() -> dict[str, float]:
        now = [p.detach().clone() for p in trained]
        assign(trained, average)
        figures, _ = watch.measure(generator, discriminator, device)
        if process.rank == 0:
            keep_samples(
                curves, step, generator, tokenizer, rules, shown, features, config.seed, device
            )
        assign(trained, now)
        return process.agree(figures)

    def warm_up() -> float:
        """The discriminator alone, on captions of the likelihood model. → its pair accuracy."""
        mean = 0.5
        for step in range(config.warmup_steps):
            chance = np.random.default_rng([config.seed, 19, step, process.rank])
            seed = (config.seed * 1_000_003 + step) * process.size + process.rank
            torch.manual_seed(seed)
            if step % 2 == 0:  # each sample serves twice
                conditions = [
                    pairs.condition(styles[chance.integers(len(styles))], chance)
                    for _ in range(rows * size)
                ]
                written, _, _ = write_captions(
                    generator, tokenizer, rules, conditions, features, 1,
                    torch.Generator().manual_seed(seed), device, reader,
                )  # fmt: skip
                people = draw_real(written.style, chance)
                ahead = score(discriminator, people, written.style, device)
                behind = score(discriminator, written.hidden, written.style, device)
                accuracy = (ahead[:, None] > behind[None, :]).float().mean().item()
                mean += 0.1 * (process.mean(accuracy) - mean)
                remember(written, chance)
            fakes, style_N = draw_fakes(written, chance)
            figures = discriminator_step(
                discriminator, optimiser_d, draw_real(style_N, chance), fakes, style_N,
                config, process, step, step % PENALTY_EVERY == 0,
            )  # fmt: skip
            done = mean >= WARM_ACCURACY
            if process.rank == 0 and (done or (step + 1) % 10 == 0):
                log(curves.add("warm-up", step=step + 1, pair_accuracy=mean, **figures))
            if done:
                break
        return mean

    if resume is None:
        # --- warm-up: the discriminator alone, on captions of the likelihood model ---------------
        first = measure()
        controls.accuracy = warm_up()
        best = first
        best_weights, best_discriminator = snapshot()
        curves.events.append({"stage": "adversarial", "step": 0, "kind": "snapshot",
                              "why": "the likelihood model"})  # fmt: skip
        if process.rank == 0:
            log(curves.add("adversarial held-out", step=0, **first))
    else:
        assign(trained, resume["trained"])
        frozen = [p for n, p in reference.named_parameters() if not n.startswith("vision.")]
        assign(frozen, resume["reference"])
        discriminator.load_state_dict(resume["discriminator"])
        average = [value.to(device) for value in resume["average"]]
        optimiser_g.load_state_dict(resume["optimiser"])
        optimiser_d.load_state_dict(resume["optimiser_d"])
        controls, step = Controls(**resume["controls"]), resume["step"]
        replay, first, best = resume["replay"], resume["first"], resume["best"]
        best_weights = [value.to(device) for value in resume["best_weights"]]
        best_discriminator = {k: v.to(device) for k, v in resume["best_discriminator"].items()}

    sums: dict[str, list[float]] = {}
    started, done_at_start = time.monotonic(), step
    while step < config.adversarial_steps:
        # everything random follows from the step, so that a resumed training sees the same
        chance = np.random.default_rng([config.seed, 23, step, process.rank])
        seed = (config.seed * 1_000_003 + 500_000 + step) * process.size + process.rank
        torch.manual_seed(seed)

        # --- sample: group_size captions of each product -----------------------------------------
        conditions = [
            pairs.condition(styles[chance.integers(len(styles))], chance) for _ in range(rows)
        ]
        written, batch, noise = write_captions(
            generator, tokenizer, rules, conditions, features, size,
            torch.Generator().manual_seed(seed), device, reader,
        )  # fmt: skip

        # --- score -------------------------------------------------------------------------------
        people = draw_real(written.style, chance)
        real_N = score(discriminator, people, written.style, device)
        fake_N = score(discriminator, written.hidden, written.style, device)
        by_style = torch.zeros_like(fake_N)
        matched = torch.zeros_like(fake_N)
        accuracies, vital = [], {}
        for style in styles:
            mine = written.style == numbers[style]
            if not bool(mine.any()):
                continue
            earned = loss.reward(fake_N[mine], real_N[mine])
            by_style[mine] = losses.whiten(earned, earned.mean(), earned.std(correction=0))
            late = [written.hidden[i] for i in mine.nonzero().flatten().tolist()]
            often = pair_counts([*replay[style], *late])
            matched[mine] = matching(late, people_say[style], often).to(device)
            accuracies.append((real_N[mine][:, None] > fake_N[mine][None, :]).float().mean().item())
            vital[named_for("d_real", style, styles)] = real_N[mine].sigmoid().mean().item()
            vital[named_for("d_fake", style, styles)] = fake_N[mine].sigmoid().mean().item()
        content = torch.tensor([penalty(f & CONTENT) for f in written.faults], device=device)
        form = torch.tensor([penalty(f - CONTENT) for f in written.faults], device=device)
        overlap = sibling_overlap(written.hidden, size).to(device)
        reward_N = (
            config.style_weight * by_style + config.content_weight * content
            + form + config.matching_weight * matched - config.diversity_weight * overlap
        )  # fmt: skip
        advantage_N = losses.leave_one_out_advantages(reward_N.view(-1, size)).flatten()
        deviation = process.mean(float(advantage_N.square().mean())) ** 0.5
        advantage_N = losses.whiten(advantage_N, 0.0, deviation)
        accuracy = process.mean(float(np.mean(accuracies)))
        controls.accuracy += 0.1 * (accuracy - controls.accuracy)
        controls.high_steps = controls.high_steps + 1 if controls.accuracy > 0.9 else 0

        # --- discriminator phase -----------------------------------------------------------------
        for _ in range(seesaw(controls.accuracy)):
            fakes, style_N = draw_fakes(written, chance)
            for group in optimiser_d.param_groups:
                group["lr"] = config.discriminator_rate * controls.rate * group["scale"]
            vital |= discriminator_step(
                discriminator, optimiser_d, draw_real(style_N, chance), fakes, style_N,
                config, process, step, controls.discriminator_steps % PENALTY_EVERY == 0,
            )  # fmt: skip
            controls.discriminator_steps += 1
        remember(written, chance)

        # --- generator phase ---------------------------------------------------------------------
        rate = config.adversarial_rate * controls.rate * min(1.0, (step + 1) / 20)
        for group in optimiser_g.param_groups:
            group["lr"] = rate
        optimiser_g.zero_grad(set_to_none=True)
        mask_NT = (written.ids != PAD).float()
        count, kl_sum = len(written.ids), 0.0
        for part in torch.arange(count).split(config.micro_batch or count):
            some = batch.rows(part)
            with process.autocast():
                prefix, mask = generator.prefix(*some.conditions(), noise[part])
                logits = generator(prefix, mask, written.ids[part]).float()
                with torch.no_grad():
                    prefix, mask = reference.prefix(*some.conditions(), noise[part])
                    logits_reference = reference(prefix, mask, written.ids[part]).float()
            log_probs = logits.log_softmax(-1).gather(2, written.ids[part].unsqueeze(2)).squeeze(2)
            kl_NT = losses.exact_kl(logits, logits_reference) * mask_NT[part]
            objective = losses.policy_gradient(log_probs, mask_NT[part], advantage_N[part])
            objective = (objective + controls.beta * kl_NT.sum(1).mean()) * len(part) / count
            process.check_finite(objective, "adversarial", step)
            objective.backward()
            kl_sum += float(kl_NT.detach().sum())
        if config.likelihood_weight > 0:
            anchor = draw_examples(pairs, [], 1.0, max(1, count // 3), chance)
            with process.autocast():
                nats, tokens = caption_loss(
                    generator, encode_batch(anchor, tokenizer, generator.config, features),
                    torch.randn(len(anchor), generator.config.noise_size), device,
                )  # fmt: skip
            process.check_finite(nats, "likelihood", step)
            (config.likelihood_weight * nats / tokens).backward()
        process.average_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser_g.step()
        kl = process.mean(kl_sum / max(1.0, float(mask_NT.sum())))
        controls.kl = kl if step == 0 else controls.kl + 0.1 * (kl - controls.kl)
        controls.beta = steer_beta(controls.beta, kl, config.kl_target)

        # --- mean weights ------------------------------------------------------------------------
        step += 1
        controls.samples_seen += config.adversarial_batch * size
        decay = min(config.adversarial_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for value, parameter in zip(average, trained, strict=True):
                value.lerp_(parameter, 1 - decay)

        # --- diagnostics -------------------------------------------------------------------------
        vital |= {
            "kl": kl, "reward": float(reward_N.mean()), "reward_style": float(fake_N.mean()),
            "reward_content": float(content.mean()), "reward_form": float(form.mean()),
            "overlap": float(overlap.mean()), "matching": float(matched.mean()),
            "named": _share("unnamed", written.faults, False),
            "contradiction": _share("contradiction", written.faults),
            "unfinished": _share("unfinished", written.faults),
            "repeated": _share("repeated", written.faults),
            "distinct_2": distinct_n(written.texts, 2),
            "words": float(np.mean([len(text.split()) for text in written.texts])),
        }  # fmt: skip
        for name, number in vital.items():
            sums.setdefault(name, []).append(number)
        if process.rank == 0 and step % config.report_adversarial == 0:
            seconds = (time.monotonic() - started) / (step - done_at_start)
            log(curves.add(
                "adversarial", step=step, steps=config.adversarial_steps,
                pair_accuracy=controls.accuracy, beta=controls.beta, rate=rate,
                d_steps=controls.discriminator_steps,
                **{name: float(np.mean(values)) for name, values in sums.items()},
                samples_per_second=config.adversarial_batch * size / seconds,
                minutes_left=seconds * (config.adversarial_steps - step) / 60,
            ))  # fmt: skip
        if step % config.report_adversarial == 0:  # in every process, or the others' would grow
            sums = {}

        # --- snapshot, or rollback ---------------------------------------------------------------
        figures = {}
        if step % config.measure_every == 0 or step == config.adversarial_steps:
            figures = measure()
            if process.rank == 0:
                log(curves.add("adversarial held-out", step=step, **figures))
        why = trouble(figures, first, best, controls)
        if why:
            controls.rollbacks += 1
            controls.rate, controls.beta = controls.rate / 2, max(controls.beta * 2, 1e-3)
            controls.high_steps, controls.kl = 0, 0.0
            assign(trained, best_weights)
            average = [value.clone() for value in best_weights]
            discriminator.load_state_dict(best_discriminator)
            optimiser_g, optimiser_d = optimisers()
            kind = "stop" if controls.rollbacks > 3 else "rollback"
            curves.events.append(
                {"stage": "adversarial", "step": step, "kind": kind, "why": why}
            )
            if process.rank == 0:
                remedy = "the best snapshot is kept" if kind == "stop" else (
                    "back to the best snapshot, half the learning rate, twice the weight of KL"
                )  # fmt: skip
                log(f"adversarial  step {step:,}  {kind}: {why}; {remedy}")
            if kind == "stop":
                break
        elif figures and quality(figures) < quality(best):
            best = figures
            best_weights, best_discriminator = snapshot()
            curves.events.append({"stage": "adversarial", "step": step, "kind": "snapshot",
                                  "why": f"detector AUC {_mean(figures, 'auc'):.3f}"})  # fmt: skip
        if step % config.save_adversarial == 0:
            save(state())

    # --- deliver: the mean weights of the best snapshot --------------------------------------
    assign(trained, best_weights)
    discriminator.load_state_dict(best_discriminator)
    why = f"the snapshot with detector AUC {_mean(best, 'auc'):.3f} is kept"
    curves.events.append({"stage": "adversarial", "step": step, "kind": "done", "why": why})
    generator.eval()
    return {"before": first, "after": best}


def train_critic(
    captioner: Captioner, pairs: PseudoPairs, held_out: Mapping[str, Sequence[str]],
    features: Tensor, count: int, seed: int, proofreader: Proofreader | None = None,
) -> Critic:  # fmt: skip
    """A critic of what a captioner draws, from so many captions of each style.

    Of these it learns from those that obey the rules, for others are not delivered. held_out,
    features: as for `train_adversarial`. proofreader: if it has learned a verdict, captions are
    accepted by their odds times their probability to be fit, as far as phrases tell it.
    """
    random = np.random.default_rng([seed, 31])
    tokenizer, decoding = captioner.tokenizer, captioner.decoding
    people: dict[str, list[list[int]]] = {}
    captions: dict[str, list[list[int]]] = {}
    apart: dict[str, tuple[list[list[int]], list[list[int]]]] = {}
    weights: dict[str, list[float]] = {}
    captioner.decoding = replace(decoding, best_of=1, max_candidates=1)
    for style in [style for style in pairs.plain if pairs.plain[style]]:
        voice, watched = voices(pairs, held_out, style)
        conditions = [pairs.condition(style, random) for _ in range(count)]
        rows = dict(enumerate(conditions))
        encoding = Encoding(
            [None] * count, {},
            {i: features[example.image] for i, (example, _) in rows.items()
             if example.image >= 0},
            {i: example.description for i, (example, _) in rows.items()},
            {i: concepts for i, (_, concepts) in rows.items()},
        )  # fmt: skip
        drawn = captioner.write(encoding, style, seed=[seed * 1_000_003 + i for i in rows])
        kept = [c.text for c in drawn if c.text and not c.needs_review]
        kept = kept or [c.text for c in drawn if c.text]
        if not kept:  # a model that has nothing to say has nothing to be judged by
            continue
        some = random.integers(len(pairs.products), size=int(FORMAL * len(kept)))
        formal = [pairs.products[i].description for i in some]
        hidden = hidden_ids(kept, tokenizer)
        learned = max(1, len(hidden) * 4 // 5)
        people[style] = hidden_ids(voice, tokenizer)
        captions[style] = hidden[:learned] + hidden_ids(formal, tokenizer)
        if proofreader and proofreader.weights is not None:
            # people's density over that of captions, each as often as one has to be drawn again
            fit = proofreader.probability(kept[:learned])
            weights[style] = [*(1 / fit.clip(LEAST_FIT)).tolist(), *([1.0] * len(formal))]
        apart[style] = hidden_ids(watched, tokenizer), hidden[learned:]
    captioner.decoding = decoding
    return Critic.fit(people, captions, apart, weights)

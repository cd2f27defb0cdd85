"""The teacher: a pretrained language model learns the voice, then writes examples for a small one.

A voice has some thousands of sentences, too few to learn a language from. A model that knows the
language needs no more; it is too slow to caption a catalogue with, so that it writes thousands of
captions of the training catalogue, from which the generator learns beside people's sentences
(sequence-level knowledge distillation: Kim & Rush, EMNLP 2016). It reads descriptions and sees no
photograph. What it writes of another product than the one described, recites from its text, or does
not end is left out; whatever else a shop would not print stays, as among people's sentences.

The same kind of model proofreads: it finds what the generator, which learned its English from these
few sentences, cannot hear (`Proofreader`).

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from stylegan import corpora
from stylegan.corpora import Example, PseudoPairs
from stylegan.metrics import is_copied, word_grams
from stylegan.rules import Rules
from stylegan.training import Curves, Process, assign, parameter_groups, warmup_cosine

LONGEST = 128  # tokens of prompt and sentence
WRITTEN = 40  # tokens of a sentence that is written
ORDINARY = 0.75  # share of people's sentences that are no odder than may be learned
READ, READ_GPU = 64, 512  # sentences that a proofreader reads at once
COMPARED = 1200  # sentences of people that are compared with
LENGTHS = (5, 7, 10, 14)  # words at which sentences are told apart by their length
FIT = 0.7  # probability from which on a caption passes
STIFFNESS = 300.0  # weight of the squared weights of a verdict, beside summed losses
DEPTHS = (0.27, 0.53, 0.8, 1.0)  # of the layers whose hidden states a verdict is learned from
SILENT = 0.05  # of the pseudo-pairs: about kinds that the voice is silent of
# faults for which an example is left out
FALSE = frozenset({
    "contradiction", "unnamed", "first person", "unfinished", "repeated", "invented", "short",
    "copied",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class TeacherConfig:
    """How a teacher learns and writes.

    steps, batch: of its training, in sentences. rate: AdamW's peak learning rate. captions: drawn
    of each style, at temperature 1, from the most likely tokens that make up top_p. at_once: drawn
    in one pass.
    """

    steps: int = 500
    batch: int = 64
    rate: float = 2e-4
    weight_decay: float = 0.05
    measure_every: int = 62
    captions: int = 100_000
    top_p: float = 0.98
    at_once: int = 2048
    seed: int = 0


class Teacher:
    """A causal language model of transformers with its tokeniser."""

    def __init__(self, language: Any, tokenizer: Tokenizer, device: str = "cpu") -> None:
        self.language, self.tokenizer, self.device = language.to(device), tokenizer, device
        config = language.config
        end = config.eos_token_id
        self.end: int = end[0] if isinstance(end, list) else end
        if self.end is None or not 0 <= self.end < language.get_input_embeddings().num_embeddings:
            raise ValueError(f"eos_token_id {self.end} is no token of the language model")
        self.start: int = self.end if config.bos_token_id is None else config.bos_token_id

    @classmethod
    def from_pretrained(cls, directory: Path, device: str = "cpu") -> Teacher:
        """From a directory with config.json, weights and tokenizer.json.

        Raises OSError or ValueError where there is none.
        """
        if not (directory / "tokenizer.json").exists():
            raise FileNotFoundError(f"no tokenizer.json in {directory}")
        language = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return cls(language, tokenizer, device)

    def prompt(self, example: Example) -> list[int]:
        """Token ids of what is known: the style and the description, each may be nothing."""
        text = f"{example.style}: {example.description}\n" if example.style else "\n"
        return [self.start, *self.encode(text)]

    def loss(self, examples: Sequence[Example]) -> tuple[Tensor, int]:
        """→ summed nats of the sentences' tokens, their ends included, and their number."""
        texts = [[*self.encode(example.text), self.end] for example in examples]
        nats_B, count_B = self.nats([self.prompt(example) for example in examples], texts)
        return nats_B.sum(), int(count_B.sum())

    def encode(self, text: str) -> list[int]:
        """Token ids, without any that begins or ends a text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def nats(
        self, prompts: Sequence[list[int]], texts: Sequence[list[int]]
    ) -> tuple[Tensor, Tensor]:
        """Token ids → nats [B] of the texts after their prompts, and numbers of tokens [B]."""
        rows = [(p + t)[:LONGEST] for p, t in zip(prompts, texts, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.end] * (width - len(row)) for row in rows])
        place = torch.arange(width)[None, :]
        begins = torch.tensor([len(p) for p in prompts])[:, None]
        ends = torch.tensor([len(row) for row in rows])[:, None]
        said = ((place >= begins) & (place < ends)).to(self.device)
        ids = ids.to(self.device)
        with Process(device=self.device).autocast():
            logits = self.language(input_ids=ids[:, :-1]).logits
        nats = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        return (nats * said[:, 1:]).sum(1), said[:, 1:].sum(1)

    def train(
        self, pairs: PseudoPairs, background: Sequence[str], held_out: Sequence[Example],
        config: TeacherConfig, curves: Curves, log: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        """Learns pseudo-pairs, plain sentences and background text, in place.

        Ends with the weights that were best on held_out, sentences that are in none of them.
        """
        trained = [p for p in self.language.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(
            parameter_groups(self.language, config.weight_decay), betas=(0.9, 0.98)
        )
        best, best_weights = math.inf, [p.detach().clone() for p in trained]
        started, nats, tokens = time.monotonic(), 0.0, 0
        for step in range(config.steps + 1):
            if step % config.measure_every == 0 or step == config.steps:
                left_out = self.held_out_loss(held_out)
                if left_out < best:
                    best, best_weights = left_out, [p.detach().clone() for p in trained]
                log(curves.add(
                    "teacher", step=step, steps=config.steps, nats_per_token=nats / max(1, tokens),
                    held_out_nats_per_token=left_out,
                    minutes_left=(time.monotonic() - started) * (config.steps / max(1, step) - 1)
                    / 60,
                ))  # fmt: skip
                nats, tokens = 0.0, 0
            if step == config.steps:
                break
            random = np.random.default_rng([config.seed, 41, step])
            torch.manual_seed(config.seed * 1_000_003 + step)
            examples = lesson(pairs, background, config.batch, random)
            for group in optimiser.param_groups:
                group["lr"] = config.rate * warmup_cosine(step, config.steps)
            self.language.train()
            loss, count = self.loss(examples)
            Process(device=self.device).check_finite(loss, "teacher", step)
            optimiser.zero_grad(set_to_none=True)
            (loss / count).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            nats, tokens = nats + loss.item(), tokens + count
        assign(trained, best_weights)
        self.language.eval()

    @torch.no_grad()
    def held_out_loss(self, examples: Sequence[Example]) -> float:
        """Nats per token of the examples' sentences."""
        self.language.eval()
        parts = [self.loss(examples[i : i + 128]) for i in range(0, len(examples), 128)]
        return sum(loss.item() for loss, _ in parts) / max(1, sum(n for _, n in parts))

    @torch.no_grad()
    def write(self, examples: Sequence[Example], top_p: float) -> list[str | None]:
        """A sentence of each example's product, normalised; None where it does not end.

        On a GPU the weights are in half precision from then on.
        """
        self.language.eval()
        language, ended = self.language, self.end
        if self.device != "cpu":
            language = language.bfloat16()
        prompts = [self.prompt(example) for example in examples]
        width = max(map(len, prompts))
        rows = [[ended] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        written = language.generate(
            input_ids=torch.tensor(rows, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            do_sample=True, top_k=0, top_p=top_p, temperature=1.0, max_new_tokens=WRITTEN,
            eos_token_id=ended, pad_token_id=ended,
        )[:, width:].tolist()  # fmt: skip
        texts: list[str | None] = []
        for ids in written:
            said = self.tokenizer.decode(ids[: ids.index(ended)]) if ended in ids else ""
            texts.append(corpora.normalise(said) or None)
        return texts


class Proofreader:
    """Tells captions that a shop could print from those that make no sense.

    judged: captions with whether somebody who read them found them fit to print. From them the
    verdict is learned, by what a pretrained language model makes of a sentence: its surprise, and
    its hidden states (logistic regression). People's sentences count as fit, half as many as the
    captions, or long sentences would be unfit because long captions are. The discriminator is no
    help here, for people are careless too: of 800 captions it told fit from unfit with an AUC of
    .6, surprise alone with one of .79, a learned verdict with one of .86, .80 with people's
    sentences beside. From 26,500 captions it told others of a model that it knew with one of .89.

    Without them, captions are passed that are no odder than most of people's of their length, after
    a few of people's. people: sentences of a voice. Raises OSError or ValueError as
    `Teacher.from_pretrained` does.
    """

    def __init__(
        self, directory: Path, people: Sequence[str], device: str = "cpu",
        judged: Sequence[tuple[str, bool]] = (),
    ) -> None:  # fmt: skip
        self.model = Teacher.from_pretrained(directory, device)
        self.model.language.eval()
        random = np.random.default_rng(59)
        drawn = [people[i] for i in random.permutation(len(people))[: 3 + COMPARED]]
        first, compared = drawn[:3], drawn[3:]
        self.weights: Tensor | None = None
        if judged:
            self.context = self.model.encode("\n")  # what sentences are like, it learns
            self.learn([*judged, *((text, True) for text in drawn[: len(judged) // 2])])
            return
        self.context = self.model.encode("".join(f"{corpora.sentence(text)}\n" for text in first))
        nats, group = self.read(compared)[:, 0].numpy(), self._lengths(compared)
        self.bounds = np.full(len(LENGTHS) + 1, np.quantile(nats, ORDINARY))
        for number in set(group.tolist()):
            if (group == number).sum() >= 20:
                self.bounds[number] = np.quantile(nats[group == number], ORDINARY)

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor:
        """What the model makes of sentences, [N, F].

        First the nats of a token, of the oddest one, of the three oddest and of all, and how many
        there are; then the mean hidden states of a sentence at four depths, and its last one.
        """
        rows: list[Tensor] = []
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        begin = len(self.context)
        size = READ if self.model.device == "cpu" else READ_GPU
        for first in range(0, len(order), size):
            tokens = [
                self.model.encode(f"{corpora.sentence(texts[i])}\n")[: LONGEST - begin]
                for i in order[first : first + size]
            ]
            width = max(map(len, tokens))
            ids = torch.tensor(
                [self.context + row + [self.model.end] * (width - len(row)) for row in tokens]
            ).to(self.model.device)
            with Process(device=self.model.device).autocast():
                output = self.model.language(input_ids=ids, output_hidden_states=True)
            lengths = torch.tensor([len(row) for row in tokens], device=ids.device)
            said = torch.arange(width, device=ids.device)[None, :] < lengths[:, None]
            nats = F.cross_entropy(
                output.logits[:, begin - 1 : -1].float().transpose(1, 2), ids[:, begin:],
                reduction="none",
            ) * said  # fmt: skip
            oddest, total = nats.topk(min(3, width)).values, nats.sum(1)
            counted = (total / lengths, oddest[:, 0], oddest.mean(1), total, lengths.float())
            parts, states = [torch.stack(counted, 1)], output.hidden_states
            for depth in DEPTHS:
                hidden = states[round(depth * (len(states) - 1))][:, begin:].float()
                parts.append((hidden * said[..., None]).sum(1) / lengths[:, None])
            parts.append(hidden[torch.arange(len(tokens)), lengths - 1])
            rows.append(torch.cat(parts, 1).cpu())
        return torch.cat(rows)[torch.argsort(torch.tensor(order))]

    def learn(self, judged: Sequence[tuple[str, bool]]) -> None:
        """Fits the verdict, in place."""
        read = self.read([text for text, _ in judged]).double()
        self.mean, self.scale = read.mean(0), read.std(0).clamp(min=1e-6)
        features = self._scaled(read)
        verdict = torch.tensor([float(is_fit) for _, is_fit in judged], dtype=torch.float64)
        weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = F.binary_cross_entropy_with_logits(features @ weights, verdict, reduction="sum")
            loss = loss + 0.5 * STIFFNESS * weights[:-1].square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        self.weights = weights.detach()

    def probability(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Of sentences [N] to be found fit to print; only with a verdict that was learned."""
        if self.weights is None:
            raise ValueError("no verdict was learned: give judged captions")
        odds = self._scaled(self.read(texts).double()) @ self.weights
        return np.asarray(odds.sigmoid().numpy())

    def _scaled(self, read: Tensor) -> Tensor:
        """[N, F] → [N, F + 1], in deviations, with a constant."""
        return F.pad((read - self.mean) / self.scale, (0, 1), value=1.0)

    def passes(self, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Which sentences [N] are fit to print; without a verdict, which are no odder than
        `ORDINARY` of people's of about their length."""
        if self.weights is not None:
            return np.asarray(self.probability(texts) >= FIT)
        return np.asarray(self.read(texts)[:, 0].numpy() <= self.bounds[self._lengths(texts)])

    @staticmethod
    def _lengths(texts: Sequence[str]) -> npt.NDArray[np.int64]:
        return np.digitize([len(text.split()) for text in texts], LENGTHS)


def lesson(
    pairs: PseudoPairs, background: Sequence[str], count: int, random: np.random.Generator
) -> list[Example]:
    """The mixture of a step: mostly pseudo-pairs, then plain sentences, some background text.

    Nearly all is people's: what supports a voice is told from it, and a model that has read much
    needs few examples of kinds that the voice is silent of.
    """
    styles = list(pairs.plain)
    examples = []
    for _ in range(count):
        style, chance = styles[random.integers(len(styles))], random.random()
        if chance < 0.15 and background:
            examples.append(Example(background[int(random.integers(len(background)))], ""))
        elif chance < 0.4 or not pairs.paired[style]:
            examples.append(pairs.plain_example(style, random))
        else:
            examples.append(pairs.paired_example(style, random, silent=SILENT))
    return examples


def distil(
    teacher: Teacher, pairs: PseudoPairs, rules: Rules, config: TeacherConfig,
    log: Callable[[str], None] = print,
) -> tuple[list[Example], dict[str, float]]:  # fmt: skip
    """Captions of the catalogue's products that a teacher writes, no two of a product alike.

    → examples, and the share of what was drawn that was left out for each reason.
    """
    random = np.random.default_rng([config.seed, 43])
    torch.manual_seed(config.seed)
    read = word_grams([text for texts in pairs.people.values() for text in texts])
    kept: list[Example] = []
    why: Counter[str] = Counter()
    taken: set[tuple[str, str]] = set()
    started, drawn = time.monotonic(), 0
    for style in pairs.plain:
        for first in range(0, config.captions, config.at_once):
            count = min(config.at_once, config.captions - first)
            conditions = [pairs.condition(style, random, is_any=True) for _ in range(count)]
            texts = teacher.write([example for example, _ in conditions], config.top_p)
            copies = is_copied([text or "" for text in texts], read)
            for (example, concepts), text, is_copy in zip(conditions, texts, copies, strict=True):
                faults = set(FALSE & rules.faults(text or "", text is not None, concepts))
                faults |= {"copied"} if is_copy else set()
                if not faults and (example.description, text) in taken:
                    faults.add("written before")
                why.update(faults)
                if text and not faults:
                    taken.add((example.description, text))
                    kept.append(replace(example, text=text))
            drawn += count
            minutes = (time.monotonic() - started) / 60
            log(
                f"teacher  {style}  captions {drawn:,}  kept {len(kept):,}  minutes left "
                f"{minutes * (config.captions * len(pairs.plain) / drawn - 1):.1f}"
            )
    return kept, {name: count / max(1, drawn) for name, count in why.most_common()}

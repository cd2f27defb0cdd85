"""The discriminator: a sentence and a style go in; out comes a score, high for what people wrote.

It reads text whose topic is hidden on both sides (`corpora.Lexicon.hide`), so that it judges the
voice and not what people happen to write about. It knows the language before it learns to judge it
(as in TextGAIL, Wu et al., AAAI 2021): its trunk is a pretrained encoder, which has read much more
than any voice has sentences, or begins with the weights of the likelihood model. Delivered captions
are scored by the critic.

Shapes: N sentences, T tokens, C channels.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from stylegan import corpora
from stylegan.generator import EOS, PAD, Generator

LENGTH = 40  # tokens of a sentence that are read


class Discriminator(nn.Module):
    """A language model's trunk, pooled, beside n-gram filters; projection by style.

    text_config: of the trunk, as a dict with `model_type`. styles: names, as in the generator's
    configuration. reader: the trunk's own tokeniser, None where it reads by the generator's.
    score = w·h + ⟨v_style, h⟩ (Miyato & Koyama, ICLR 2018), h the pooled features.
    """

    def __init__(
        self, text_config: dict[str, Any], styles: Sequence[str], dropout: float = 0.3,
        reader: Tokenizer | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.reader = reader
        settings = dict(text_config)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        # the fused kernels have no second derivative, which the penalties need
        self.trunk: Any = AutoModel.from_config(config, attn_implementation="eager")
        if getattr(self.trunk, "pooler", None) is not None:  # another way to pool, of encoders
            self.trunk.pooler = None
        width = self.trunk.get_input_embeddings().embedding_dim
        self.convolutions = [nn.Conv1d(width, width // 2, size) for size in (2, 3, 4)]
        self.filters = nn.ModuleList(self.convolutions)
        pooled = 2 * width + 3 * (width // 2)
        self.features = nn.Sequential(
            nn.LayerNorm(pooled), nn.Dropout(dropout), nn.Linear(pooled, width), nn.GELU(),
            nn.Dropout(dropout),
        )  # fmt: skip
        self.score = nn.Linear(width, 1)
        self.style = nn.Embedding(len(styles), width)
        nn.init.zeros_(self.style.weight)

    @classmethod
    def beside(
        cls, generator: Generator, dropout: float = 0.3, layers: int = 0
    ) -> Discriminator:
        """A discriminator for a generator, its trunk beginning with the generator's language.

        layers: the first so many, 0 for all. A trunk that began as an encoder is one again.
        """
        config = copy.deepcopy(generator.language.config)
        config.num_hidden_layers = min(layers or config.num_hidden_layers, config.num_hidden_layers)
        if getattr(config, "is_decoder", False):
            config.is_decoder = False
        text_config = config.to_diff_dict() | {"model_type": config.model_type}
        model = cls(_plain(text_config), generator.config.styles, dropout)
        given = generator.language.base_model.state_dict()
        model.trunk.load_state_dict({name: given[name] for name in model.trunk.state_dict()})
        return model

    @classmethod
    def pretrained(
        cls, directory: Path, styles: Sequence[str], dropout: float = 0.3, layers: int = 0
    ) -> Discriminator:
        """A discriminator around an encoder that AutoModel loads, with its `tokenizer.json`.

        layers: the first so many, 0 for all. Raises OSError or ValueError where there is none.
        """
        trained = AutoModel.from_pretrained(directory)
        config = copy.deepcopy(trained.config)
        config.num_hidden_layers = min(layers or config.num_hidden_layers, config.num_hidden_layers)
        reader = Tokenizer.from_file(str(directory / "tokenizer.json"))
        reader.no_padding()
        reader.no_truncation()
        text_config = config.to_diff_dict() | {"model_type": config.model_type}
        model = cls(_plain(text_config), styles, dropout, reader)
        given = trained.state_dict()
        model.trunk.load_state_dict({name: given[name] for name in model.trunk.state_dict()})
        return model

    def embed(self, ids_NT: Tensor) -> Tensor:
        """Token embeddings [N, T, C], where gradient penalties are taken."""
        embeddings: Tensor = self.trunk.get_input_embeddings()(ids_NT)
        return embeddings

    def forward(self, ids_NT: Tensor, style_N: Tensor, embeds_NTC: Tensor | None = None) -> Tensor:
        """Scores [N] of ids padded with PAD; embeds_NTC instead of the ids' own embeddings."""
        embeds = self.embed(ids_NT) if embeds_NTC is None else embeds_NTC
        mask = (ids_NT != PAD).unsqueeze(-1)
        hidden = self.trunk(inputs_embeds=embeds, attention_mask=mask[..., 0]).last_hidden_state
        weights = mask.to(hidden.dtype)
        count = weights.sum(1).clamp(min=1)
        last = hidden.gather(
            1, (count.long() - 1)[..., None].expand(-1, 1, hidden.shape[-1])
        ).squeeze(1)
        mean = (hidden * weights).sum(1) / count
        visible = (embeds * weights).transpose(1, 2)
        # a window begins at each token and reaches into zeros at the end, however wide the padding
        grams = [
            (nn.functional.gelu(conv(nn.functional.pad(visible, (0, conv.kernel_size[0] - 1))))
             .masked_fill(~mask.transpose(1, 2), -torch.inf).amax(-1))
            for conv in self.convolutions
        ]  # fmt: skip
        pooled = self.features(torch.cat([last, mean, *grams], dim=1))
        by_style = (self.style(style_N) * pooled).sum(1)
        score: Tensor = self.score(pooled).squeeze(1) + by_style
        return score


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration is plain JSON and decides the architecture."""
    left_out = {"transformers_version", "architectures", "dtype", "_name_or_path"}
    plain = json.loads(json.dumps(config, default=str))
    return {name: value for name, value in plain.items() if name not in left_out}


def detector_auc(
    human: Sequence[list[int]], machine: Sequence[list[int]], seed: int = 0, folds: int = 4
) -> float:
    """How well a fresh detector tells machine from person: area under the ROC curve, .5 to 1.

    Ridge regression on normalised counts of token 1- to 3-grams, weighted by inverse document
    frequency, cross-fitted; in closed form, so that it costs a fraction of a second. human and
    machine are cut to equal numbers.
    """
    count = min(len(human), len(machine))
    random = np.random.default_rng(seed)
    texts = [
        group[i] for group in (human, machine) for i in random.permutation(len(group))[:count]
    ]
    vocabulary: dict[tuple[int, ...], int] = {}
    places: list[list[int]] = []
    for ids in texts:
        grams = {tuple(ids[i : i + n]) for n in (1, 2, 3) for i in range(len(ids) - n + 1)}
        places.append([vocabulary.setdefault(gram, len(vocabulary)) for gram in sorted(grams)])
    features = np.zeros((2 * count, len(vocabulary)), dtype=np.float32)
    for row, columns in enumerate(places):
        features[row, columns] = 1
    features *= np.log(2 * count / (1 + features.sum(0)) + 1)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    similarity = features @ features.T
    labels = np.repeat([1.0, -1.0], count)
    scores = np.zeros(2 * count)
    fold_of = np.concatenate([random.permutation(count) % folds for _ in range(2)])
    for fold in range(folds):
        own, other = fold_of != fold, fold_of == fold
        kernel = similarity[np.ix_(own, own)] + np.eye(own.sum())
        scores[other] = similarity[np.ix_(other, own)] @ np.linalg.solve(kernel, labels[own])
    ranks = scores.argsort().argsort()[:count] + 1.0
    return float((ranks.sum() - count * (count + 1) / 2) / count**2)


def hidden_ids(texts: Iterable[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Sentences as the discriminator reads them: normalised, topic hidden, ended by EOS."""
    hide = corpora.lexicon().hide
    return [
        [*tokenizer.encode(hide(corpora.normalise(t)), add_special_tokens=False).ids[: LENGTH - 1],
         EOS]
        for t in texts
    ]  # fmt: skip


def pad_ids(rows: Sequence[Sequence[int]], length: int | None = None) -> Tensor:
    """Rows of token ids → [N, T], padded with PAD to the longest, or to a fixed length."""
    width = length or max(map(len, rows))
    return torch.tensor([[*row[:width], *[PAD] * (width - len(row))] for row in rows])

"""A tiny model with random weights that speaks the vocabulary of the embedded corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from stylegan import corpora
from stylegan.captioner import Captioner, Decoding, save_model
from stylegan.critic import Critic
from stylegan.generator import Generator, GeneratorConfig


def write_tiny_model(directory: Path, seed: int = 0) -> Path:
    """Saves a `tiny` generator (seconds, one core) as a model directory."""
    corpus = corpora.embedded_corpus()
    tokenizer = corpora.train_tokenizer(corpus, 1500)
    torch.manual_seed(seed)
    config = GeneratorConfig.preset("tiny", tokenizer.get_vocab_size(), ["formal", "colloquial"])
    # two candidates keep the number of passes of an untrained model low
    decoding = Decoding(max_new_tokens=12, max_candidates=2)
    random = np.random.default_rng(seed)
    people = [tokenizer.encode(text).ids for text in corpus[:200]]
    others = [random.integers(3, 1500, 9).tolist() for _ in people]
    critic = Critic.fit({"colloquial": people}, {"colloquial": others}, {})
    # no rules about words: an untrained model invents most of them
    save_model(directory, Captioner(Generator(config), tokenizer, decoding, critic=critic))
    return directory

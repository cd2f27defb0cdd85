"""A tiny model with random weights that speaks the vocabulary of the embedded corpus."""

from __future__ import annotations

from pathlib import Path

import torch

from stylegan import corpora
from stylegan.captioner import Decoding, save_model
from stylegan.discriminator import Discriminator
from stylegan.generator import Generator, GeneratorConfig
from stylegan.rules import Rules


def write_tiny_model(directory: Path, seed: int = 0) -> Path:
    """Saves a `tiny` generator (seconds, one core) as a model directory."""
    corpus = corpora.embedded_corpus()
    tokenizer = corpora.train_tokenizer(corpus, 1500)
    torch.manual_seed(seed)
    config = GeneratorConfig.preset("tiny", tokenizer.get_vocab_size(), ["formal", "colloquial"])
    # two candidates keep the number of passes of an untrained model low
    decoding = Decoding(max_new_tokens=12, max_candidates=2)
    generator = Generator(config)
    discriminator = Discriminator.beside(generator)
    # words of all kinds: an untrained model invents most of them
    save_model(directory, generator, tokenizer, decoding, Rules(), discriminator)
    return directory

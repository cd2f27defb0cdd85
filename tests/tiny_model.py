"""A tiny model with random weights that speaks the vocabulary of the embedded corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)  # fmt: skip

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


def write_pretrained(directory: Path, kind: str) -> Tokenizer:
    """A body of three layers with random weights, and its tokeniser."""
    theirs = corpora.train_tokenizer(corpora.embedded_corpus()[:300], 500)
    torch.manual_seed(3)
    body: torch.nn.Module = BertModel(BertConfig(
        vocab_size=theirs.get_vocab_size(), hidden_size=32, num_hidden_layers=3,
        num_attention_heads=2, intermediate_size=64,
    )) if kind == "encoder" else GPT2LMHeadModel(GPT2Config(
        vocab_size=theirs.get_vocab_size(), n_embd=32, n_layer=3, n_head=2, n_positions=128,
        bos_token_id=1, eos_token_id=2,
    )).transformer  # fmt: skip
    body.save_pretrained(directory)  # type: ignore[operator]
    PreTrainedTokenizerFast(tokenizer_object=theirs).save_pretrained(directory)
    return theirs

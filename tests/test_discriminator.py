from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import write_pretrained
from transformers import AutoModel

from stylegan import corpora, losses
from stylegan.captioner import Captioner
from stylegan.discriminator import (
    Discriminator,
    detector_auc,
    hidden_ids,
    pad_ids,
)  # fmt: skip
from stylegan.generator import EOS


@pytest.fixture(scope="module")
def captioner(tiny_model: Path) -> Captioner:
    return Captioner.from_pretrained(tiny_model, device="cpu")


def discriminator(captioner: Captioner) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator.beside(captioner.generator).eval()


def test_it_begins_with_the_language_of_the_generator(captioner: Captioner) -> None:
    ours = discriminator(captioner).trunk.state_dict()
    for name, value in captioner.generator.language.base_model.state_dict().items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_pretrained_trunk_reads_by_its_own_tokeniser(kind: str, tmp_path: Path) -> None:
    theirs = write_pretrained(tmp_path, kind)
    model = Discriminator.pretrained(tmp_path, ["formal", "colloquial"], layers=2).eval()
    assert model.reader is not None and model.trunk.config.num_hidden_layers == 2
    text = "Such a lovely watch, and so light."
    [ids] = hidden_ids([text], model.reader)
    hidden = corpora.lexicon().hide(corpora.normalise(text))
    assert ids == [*theirs.encode(hidden).ids, EOS]
    given = AutoModel.from_pretrained(tmp_path).state_dict()
    for name, value in model.trunk.state_dict().items():
        assert torch.equal(value, given[name]), name
    with torch.no_grad():
        together = model(pad_ids([ids, ids[:3]], 40), torch.ones(2, dtype=torch.long))
        alone = model(pad_ids([ids]), torch.ones(1, dtype=torch.long))
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-3)


def test_topic_is_hidden_on_the_way_in(captioner: Captioner) -> None:
    one, other = hidden_ids(["This navy dress is so soft!", "This belt is so soft!"],
                            captioner.tokenizer)  # fmt: skip
    assert one == other and one[-1] == EOS


def test_a_score_does_not_depend_on_neighbours_and_padding(captioner: Captioner) -> None:
    model = discriminator(captioner)
    rows = hidden_ids(corpora.embedded_corpus()[:9], captioner.tokenizer)
    style = torch.ones(9, dtype=torch.long)
    with torch.no_grad():
        together = model(pad_ids(rows, 40), style)
        alone = torch.cat([model(pad_ids([row]), style[:1]) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)


def test_styles_are_scored_apart(captioner: Captioner) -> None:
    model = discriminator(captioner)
    torch.nn.init.normal_(model.style.weight)
    ids = pad_ids(hidden_ids(["So soft!"], captioner.tokenizer))
    with torch.no_grad():
        formal, colloquial = (model(ids, torch.tensor([n])) for n in (0, 1))
    assert formal != colloquial


def test_it_learns_and_the_penalty_has_a_gradient(captioner: Captioner) -> None:
    """People's sentences against the same words in another order, in a few seconds."""
    torch.manual_seed(0)
    model = discriminator(captioner)
    random = np.random.default_rng(0)
    real = hidden_ids(corpora.embedded_corpus()[:64], captioner.tokenizer)
    fake = [[*random.permutation(row[:-1]).tolist(), EOS] for row in real]
    style = torch.ones(64, dtype=torch.long)
    ids_r, ids_f = pad_ids(real), pad_ids(fake)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(30):
        embeds = model.embed(ids_r).detach().requires_grad_()
        score = model(ids_r, style, embeds)
        loss = losses.relativistic_discriminator(score, model(ids_f, style))
        loss = loss + 1e-3 * losses.zero_centred_penalty(score, embeds)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(p.grad is not None for p in model.trunk.h.parameters())
    with torch.no_grad():
        assert (model(ids_r, style) > model(ids_f, style)).float().mean() > 0.9


def test_a_detector_finds_a_template_and_not_people() -> None:
    tokenizer = corpora.train_tokenizer(corpora.embedded_corpus(), 1500)
    people = hidden_ids(corpora.embedded_corpus(), tokenizer)[:800]
    assert detector_auc(people[::2], people[1::2]) == pytest.approx(0.5, abs=0.07)
    template = [[*row[:3], 99, 98, EOS] for row in people[:400]]
    assert detector_auc(people[400:], template) > 0.97

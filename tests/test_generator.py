from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

from stylegan.generator import EOS, PAD, Generator, GeneratorConfig


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(0)
    return Generator(GeneratorConfig.preset("tiny", 300, ["formal", "colloquial"])).eval()


def conditions(generator: Generator, rows: int) -> dict[str, torch.Tensor]:
    config = generator.config
    return {
        "features_BIC": torch.randn(rows, config.image_length, 64),
        "has_image_B": torch.ones(rows, dtype=torch.bool),
        "description_BD": torch.randint(3, 300, (rows, config.description_length)),
        "style_B": torch.ones(rows, dtype=torch.long),
        "noise_BZ": torch.randn(rows, config.noise_size),
    }


def test_shapes(generator: Generator) -> None:
    images = generator.normalise(torch.zeros(2, 48, 48, 3, dtype=torch.uint8))
    assert generator.features(images).shape == (2, 4, 64)
    prefix, mask = generator.prefix(**conditions(generator, 2))
    assert prefix.shape == (2, generator.config.prefix_length, 96)
    assert mask.shape == prefix.shape[:2]
    caption = torch.tensor([[5, 6, EOS], [7, EOS, PAD]])
    assert generator(prefix, mask, caption).shape == (2, 3, 300)


@torch.no_grad()
def test_the_caption_is_causal(generator: Generator) -> None:
    prefix, mask = generator.prefix(**conditions(generator, 1))
    one = generator(prefix, mask, torch.tensor([[5, 6, 7, 8]]))
    other = generator(prefix, mask, torch.tensor([[5, 6, 9, 9]]))
    torch.testing.assert_close(one[:, :3], other[:, :3])
    assert not torch.allclose(one[:, 3], other[:, 3])


@torch.no_grad()
@pytest.mark.parametrize("name", ["description_BD", "style_B", "noise_BZ", "features_BIC"])
def test_every_condition_counts(generator: Generator, name: str) -> None:
    given = conditions(generator, 1)
    caption = torch.tensor([[5, 6]])
    before = generator(*generator.prefix(**given), caption)
    given[name] = given[name].flip(-1) if name != "style_B" else given[name] - 1
    assert not torch.allclose(before, generator(*generator.prefix(**given), caption))


@torch.no_grad()
def test_an_absent_image_says_nothing(generator: Generator) -> None:
    given = conditions(generator, 1) | {"has_image_B": torch.zeros(1, dtype=torch.bool)}
    caption = torch.tensor([[5, 6]])
    before = generator(*generator.prefix(**given), caption)
    given["features_BIC"] = torch.randn_like(given["features_BIC"])
    torch.testing.assert_close(before, generator(*generator.prefix(**given), caption))


@torch.no_grad()
def test_comes_back_from_disk(generator: Generator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path)
    loaded = Generator.from_pretrained(tmp_path).eval()
    given, caption = conditions(generator, 2), torch.tensor([[5, 6], [7, 8]])
    assert torch.equal(
        generator(*generator.prefix(**given), caption), loaded(*loaded.prefix(**given), caption)
    )


@torch.no_grad()
def test_pretrained_parts_are_joined(tmp_path: Path) -> None:
    vision = ViTModel(ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=48, patch_size=16,
    ))  # fmt: skip
    language = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=80, n_embd=32, n_layer=1, n_head=2, n_positions=96,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    vision.save_pretrained(tmp_path / "vision")
    language.save_pretrained(tmp_path / "language")
    joined = Generator.from_parts(
        str(tmp_path / "vision"),
        str(tmp_path / "language"),
        ["formal", "colloquial"],
        image_size=48,
    )
    assert torch.equal(joined.language.transformer.wte.weight, language.transformer.wte.weight)
    assert joined.features(torch.zeros(1, 3, 48, 48)).shape == (1, 4, 32)
    joined.save_pretrained(tmp_path / "joined")
    again = Generator.from_pretrained(tmp_path / "joined")
    weight = "embeddings.patch_embeddings.projection.weight"
    assert torch.equal(again.vision.state_dict()[weight], vision.state_dict()[weight])


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="unknown preset 'huge': choose one of tiny, small"):
        GeneratorConfig.preset("huge", 100, ["formal"])

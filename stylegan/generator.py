"""The generator: a photograph, a formal description, a style and noise go in; a caption comes out.

    [noise][style][description, D tokens][image, I tokens] [caption, causal ...]

The prefix has fixed slots, so that a row's positions never depend on its neighbours; what is
absent (no description, no image) is masked. The same network walks both roads: *describe* writes
the formal description of an image (style `formal`), *rewrite* says it in another style.

Shapes: B rows, T caption tokens, P prefix slots, C channels of the language model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

_OLD_CACHE = "past_key_values"
PAD, BOS, EOS = 0, 1, 2  # the tokeniser's first three entries
POSITIONS = 96  # of a language model: prefix and caption, with room

# (vision, language) settings of a generator built from nothing
PRESETS: dict[str, dict[str, Any]] = {
    # for tests and demonstrations: a second a step on any machine
    "tiny": {
        "image_size": 48,
        "vocab_size": 1500,
        "vision_config": {
            "model_type": "resnet",
            "embedding_size": 16,
            "hidden_sizes": [16, 32, 64],
            "depths": [1, 1, 1],
            "layer_type": "basic",
        },
        "text_config": {"model_type": "gpt2", "n_embd": 96, "n_layer": 2, "n_head": 4},
    },
    # the shipped model: 4.7M vision, 5.9M language
    "small": {
        "image_size": 128,
        "vocab_size": 4096,
        "vision_config": {
            "model_type": "resnet",
            "embedding_size": 48,
            "hidden_sizes": [48, 96, 192, 320],
            "depths": [2, 2, 2, 2],
            "layer_type": "basic",
        },
        "text_config": {"model_type": "gpt2", "n_embd": 256, "n_layer": 6, "n_head": 4},
    },
}


class GeneratorConfig(PreTrainedConfig):
    """Configuration of a `Generator`.

    vision_config, text_config: configurations (or their dicts, with `model_type`) of the backbone
    and of the causal language model. styles: names, in the order of their embeddings.
    description_length, image_length, caption_length: slots, in tokens. noise_size: entries of z.
    image_size: the square the image is squashed to, pixels.
    """

    model_type = "stylegan_generator"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        styles: list[str] | None = None,
        image_size: int = 128,
        description_length: int = 16,
        image_length: int = 4,
        caption_length: int = 32,
        noise_size: int = 32,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        def sub(config: Any) -> Any:
            if isinstance(config, dict):
                settings = dict(config)
                return AutoConfig.for_model(settings.pop("model_type"), **settings)
            return config

        self.vision_config = sub(vision_config)
        self.text_config = sub(text_config)
        self.styles = list(styles or ["formal", "colloquial"])
        self.image_size = image_size
        self.description_length = description_length
        self.image_length = image_length
        self.caption_length = caption_length
        self.noise_size = noise_size
        self.image_mean = list(image_mean or [0.485, 0.456, 0.406])
        self.image_std = list(image_std or [0.229, 0.224, 0.225])
        kwargs.setdefault("pad_token_id", PAD)
        kwargs.setdefault("bos_token_id", BOS)
        kwargs.setdefault("eos_token_id", EOS)
        super().__init__(**kwargs)

    @property
    def prefix_length(self) -> int:
        """Slots before the caption: noise, style, description, image."""
        return 2 + self.description_length + self.image_length

    @classmethod
    def preset(
        cls, name: str, vocab_size: int, styles: list[str], dropout: float = 0.1
    ) -> GeneratorConfig:
        """The configuration of a preset for a tokeniser of vocab_size entries.

        dropout: of the language model's embeddings, attention and residuals, in training.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        preset = PRESETS[name]
        config = cls(
            vision_config=preset["vision_config"],
            text_config={
                **preset["text_config"],
                "vocab_size": vocab_size,
                "n_positions": POSITIONS,
                "pad_token_id": PAD,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout),
            },
            styles=styles,
            image_size=preset["image_size"],
        )
        return config


class Generator(PreTrainedModel):
    """Vision backbone → projector → causal language model, conditioned on style and noise."""

    config_class = GeneratorConfig
    config: GeneratorConfig
    base_model_prefix = "generator"
    main_input_name = "pixels"

    def __init__(
        self,
        config: GeneratorConfig,
        vision: nn.Module | None = None,
        language: nn.Module | None = None,
    ) -> None:
        super().__init__(config)
        eyes = vision if vision is not None else AutoModel.from_config(config.vision_config)
        voice: Any = language
        if voice is None:
            voice = AutoModelForCausalLM.from_config(config.text_config)
        self.vision: Any = eyes
        self.language: Any = voice
        width = voice.get_input_embeddings().embedding_dim
        self.projector = nn.Sequential(
            nn.Linear(_channels(self.vision.config), width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.LayerNorm(width),
        )
        self.image_position = nn.Embedding(config.image_length, width)
        self.style = nn.Embedding(len(config.styles) + 1, width)  # the last: any style
        self.noise = nn.Linear(config.noise_size, width)
        self.post_init()

    @classmethod
    def from_parts(
        cls, vision: str, language: str, styles: list[str], **settings: Any
    ) -> Generator:
        """A generator around a pretrained vision backbone and a pretrained causal language model.

        vision, language: directories or hub ids that AutoModel and AutoModelForCausalLM load.
        """
        eyes = AutoModel.from_pretrained(vision)
        eyes = getattr(eyes, "vision_model", eyes)  # CLIP and SigLIP carry a text tower as well
        voice = AutoModelForCausalLM.from_pretrained(language)
        config = GeneratorConfig(
            vision_config=eyes.config, text_config=voice.config, styles=styles, **settings
        )
        return cls(config, vision=eyes, language=voice)

    def normalise(self, pixels_BHWC: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 → [B, 3, H, W] float, by the configuration's mean and deviation."""
        pixels = pixels_BHWC.permute(0, 3, 1, 2).to(self.dtype) / 255.0
        mean = pixels.new_tensor(self.config.image_mean).view(1, 3, 1, 1)
        std = pixels.new_tensor(self.config.image_std).view(1, 3, 1, 1)
        return (pixels - mean) / std

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → features [B, image_length, channels of the backbone]."""
        hidden = self.vision(images_BCHW).last_hidden_state
        if hidden.dim() == 3:  # a sequence of patches, perhaps after a class token: to a map
            patches = hidden.shape[1]
            side = int(patches**0.5)
            hidden = hidden[:, patches - side * side :]
            hidden = hidden.transpose(1, 2).unflatten(2, (side, side))
        side = int(self.config.image_length**0.5)
        pooled = nn.functional.adaptive_avg_pool2d(hidden, side)
        return pooled.flatten(2).transpose(1, 2)

    def prefix(
        self,
        features_BIC: Tensor,
        has_image_B: Tensor,
        description_BD: Tensor,
        style_B: Tensor,
        noise_BZ: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """→ embeddings [B, P, C] and mask [B, P] of the prefix.

        features_BIC from `features`, any values where has_image_B is false; description_BD token
        ids padded with PAD; style_B indices into config.styles, len(styles) for any style;
        noise_BZ from a standard normal distribution.
        """
        embed = self.language.get_input_embeddings()
        image = self.projector(features_BIC) + self.image_position.weight
        image = image * has_image_B[:, None, None]
        prefix = torch.cat(
            [
                self.noise(noise_BZ).unsqueeze(1),
                self.style(style_B).unsqueeze(1),
                embed(description_BD),
                image,
            ],
            dim=1,
        )
        ones = torch.ones_like(style_B).unsqueeze(1)
        mask = torch.cat(
            [
                ones,
                ones,
                (description_BD != PAD).long(),
                has_image_B.long().unsqueeze(1).expand(-1, self.config.image_length),
            ],
            dim=1,
        )
        return prefix, mask

    def forward(self, prefix_BPC: Tensor, mask_BP: Tensor, caption_BT: Tensor) -> Tensor:
        """Logits [B, T, V] for each token of caption_BT (ids, ended by EOS, padded with PAD).

        The caption is shifted inside: logits[:, t] predicts caption_BT[:, t].
        """
        batch = caption_BT.shape[0]
        start = caption_BT.new_full((batch, 1), BOS)
        inputs = torch.cat([start, caption_BT[:, :-1]], dim=1)
        embeds = torch.cat([prefix_BPC, self.language.get_input_embeddings()(inputs)], dim=1)
        # position t of the caption may see the prefix and what came before it; its own padding
        # comes after its end, where the loss is not taken
        mask = torch.cat([mask_BP, torch.ones_like(inputs)], dim=1)
        positions = torch.arange(embeds.shape[1], device=embeds.device).expand(batch, -1)
        output = self.language(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
        logits: Tensor = output.logits[:, mask_BP.shape[1] :]
        return logits

    @torch.no_grad()
    def sample(
        self, prefix_BPC: Tensor, mask_BP: Tensor, choose: Callable[[Tensor, int], Tensor],
        longest: int, idle_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Writes captions token by token → ids [B, T], padded with PAD, and their log-likelihoods.

        choose: (log-probabilities [B, V] in fp32, step) → the next token of each row. A row ends
        with EOS, or unfinished at `longest` tokens. idle_B: rows for which nothing is written.
        """
        embed = self.language.get_input_embeddings()
        batch = prefix_BPC.shape[0]
        start = torch.full((batch, 1), BOS, device=prefix_BPC.device)
        inputs = torch.cat([prefix_BPC, embed(start)], dim=1)
        mask = torch.cat([mask_BP, torch.ones_like(start)], dim=1)
        positions = torch.arange(inputs.shape[1], device=inputs.device).expand(batch, -1)
        ended = torch.zeros_like(start[:, 0], dtype=torch.bool) if idle_B is None else idle_B
        # transformers renamed it in 5.24
        name = "cache" if "cache" in signature(self.language.forward).parameters else _OLD_CACHE
        cache, produced, scores = None, [], []
        for step in range(longest):
            output = self.language(
                inputs_embeds=inputs, attention_mask=mask, position_ids=positions,
                use_cache=True, **{name: cache},
            )  # fmt: skip
            cache = getattr(output, name)
            log_probs = output.logits[:, -1].float().log_softmax(-1)
            token = torch.where(ended, PAD, choose(log_probs, step))
            scores.append(log_probs.gather(1, token[:, None]).squeeze(1) * ~ended)
            produced.append(token)
            ended = ended | (token == EOS)
            if bool(ended.all()):
                break
            inputs = embed(token[:, None])
            mask = torch.cat([mask, torch.ones_like(start)], dim=1)
            positions = positions[:, -1:] + 1
        return torch.stack(produced, 1), torch.stack(scores, 1)


_DROPOUTS = (  # as configurations of transformers call them
    "hidden_dropout_prob", "attention_probs_dropout_prob", "embd_pdrop", "attn_pdrop",
    "resid_pdrop", "attention_dropout", "dropout",
)  # fmt: skip


def begin_language(
    directory: Path, tokenizer: Tokenizer, layers: int = 0, dropout: float = 0.1
) -> Any:
    """A causal language model for the tokeniser's entries, with the weights of a pretrained body.

    directory: of a model that AutoModel loads, with its `tokenizer.json`. An encoder becomes causal
    (Rothe et al., TACL 2020). Each entry begins as the mean of what the pretrained model has for
    its text. layers: the first so many, 0 for all. Raises ValueError when the weights do not fit
    the model that AutoModelForCausalLM makes of the configuration.
    """
    trained = AutoModel.from_pretrained(directory)
    config = copy.deepcopy(trained.config)
    config.vocab_size, config.is_decoder = tokenizer.get_vocab_size(), True
    config.tie_word_embeddings, config._name_or_path = True, ""  # no path of this machine
    config.pad_token_id, config.bos_token_id, config.eos_token_id = PAD, BOS, EOS
    config.num_hidden_layers = min(layers or config.num_hidden_layers, config.num_hidden_layers)
    # of a table of positions only the first rows are ever read
    longest = getattr(config, "max_position_embeddings", POSITIONS)
    config.max_position_embeddings = min(longest, POSITIONS)
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    language: Any = AutoModelForCausalLM.from_config(config)
    body = language.base_model
    table, theirs = body.get_input_embeddings().weight, trained.get_input_embeddings().weight
    given, taken = trained.state_dict(), {}
    for name, value in body.state_dict().items():
        if value.data_ptr() == table.data_ptr():
            continue
        weights = given[name][: len(value)] if name in given else None
        if weights is None or weights.shape != value.shape:
            raise ValueError(f"{directory} has no weights for {name} {list(value.shape)}")
        taken[name] = weights
    body.load_state_dict(taken, strict=False)
    reader = Tokenizer.from_file(str(directory / "tokenizer.json"))
    reader.no_padding()
    reader.no_truncation()
    with torch.no_grad():
        table.copy_(theirs.mean(0).expand_as(table))
        table[PAD] = 0
        for entry in range(EOS + 1, len(table)):
            pieces = reader.encode(tokenizer.decode([entry]).strip(), add_special_tokens=False).ids
            if pieces:
                table[entry] = theirs[pieces].mean(0)
    return language


def _channels(config: Any) -> int:
    sizes = getattr(config, "hidden_sizes", None)
    return int(sizes[-1] if sizes else config.hidden_size)


AutoConfig.register(GeneratorConfig.model_type, GeneratorConfig)

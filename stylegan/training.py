"""The training loops, plain torch: the vision backbone, then likelihood on both roads.

    backbone    photographs → the catalogue's attributes (kind, colour, gender)
    likelihood  describe (image → formal description) and rewrite (description, image → sentence)

Every loop runs by itself or as one of several processes of Ray Train; it saves what it needs to go
on (`Checkpoint`) and begins where the last checkpoint was. Progress is counted in samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from stylegan.corpora import Example, PseudoPairs
from stylegan.generator import EOS, PAD, Generator, GeneratorConfig


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Everything that decides a training, saved with each checkpoint.

    start: a model directory to go on from, "shipped" for the shipped model, "" to begin anew.
    backbone: the same, but of it only the vision backbone is taken; either way none is trained.
    language: directory of a pretrained encoder or decoder of transformers that the language model
    begins with, "" to begin it anew. language_layers: how many of its layers, 0 for all.
    written_share: of the pseudo-pairs, examples that came with a description (jobs.distil), where
    there are any.
    backbone_epochs: passes over the catalogue's photographs. backbone_batch: photographs a step.
    backbone_rate: AdamW's peak learning rate. likelihood_steps, likelihood_batch: sentences a step,
    all processes together. likelihood_rate: peak learning rate. dropout: of the language model.
    report_every, save_every: steps between two progress lines, two checkpoints. seed: of everything
    random.

    The adversarial stage: adversarial_batch products a step, all processes together, group_size
    captions of each. adversarial_rate, discriminator_rate: AdamW's. discriminator: directory of a
    pretrained encoder of transformers that is its trunk, "" for one that begins with the likelihood
    model. discriminator_layers: of the trunk, 0 for all. adversarial_decay: of the mean
    weights. warmup_steps: of the discriminator alone, at most. loss: a name in losses.LOSSES.
    penalty: weight of R1 and R2. style_weight, content_weight, diversity_weight, matching_weight:
    of the reward's parts. kl_target: nats a token from the likelihood model, 0 for no such bound.
    likelihood_weight: of nats a token on pseudo-pairs. replay_share: of the discriminator's fakes
    that are old. watched: captions of each measure. micro_batch: captions of one backward pass,
    0 for all; gradients add up to the same. report_adversarial, measure_every, save_adversarial:
    steps between two progress lines, measures, checkpoints.

    rounds: of the game in rounds (`rounds.py`), after the adversarial steps, if any.
    round_captions: drawn in each, all processes together. round_discriminator_steps, round_steps:
    of each discriminator and of the generator. unfit_weight: of making unlikelier the written
    examples that were read and found unfit, where there are any. proofreader: directory of a
    pretrained causal language model of transformers; captions that it finds odd have no weight, ""
    for none. judged: table of captions (text) that somebody read, with whether they are fit to
    print (fit: 1 or 0); the proofreader learns the verdict from them, "" for none.

    critic_captions: that are drawn for the critic in the end, of each style; 0 for no critic.
    """

    preset: str = "small"
    seed: int = 0
    start: str = ""
    backbone: str = ""
    language: str = ""
    language_layers: int = 0
    written_share: float = 0.75
    backbone_epochs: int = 24
    backbone_batch: int = 64
    backbone_rate: float = 2e-3
    likelihood_steps: int = 4000
    likelihood_batch: int = 64
    likelihood_rate: float = 1e-3
    dropout: float = 0.1
    weight_decay: float = 0.05
    ema_decay: float = 0.998
    report_every: int = 50
    save_every: int = 500
    adversarial_steps: int = 400
    adversarial_batch: int = 16
    group_size: int = 6
    adversarial_rate: float = 2e-4
    adversarial_decay: float = 0.98
    discriminator_rate: float = 2e-4
    discriminator: str = ""
    discriminator_layers: int = 0
    warmup_steps: int = 200
    loss: str = "relativistic"
    penalty: float = 0.05
    style_weight: float = 1.0
    content_weight: float = 2.0
    diversity_weight: float = 0.5
    matching_weight: float = 1.0
    kl_target: float = 0.15
    likelihood_weight: float = 0.5
    replay_share: float = 0.25
    rounds: int = 0
    round_captions: int = 8000
    round_discriminator_steps: int = 150
    round_steps: int = 200
    unfit_weight: float = 1.2
    proofreader: str = ""
    judged: str = ""
    watched: int = 512
    micro_batch: int = 0
    report_adversarial: int = 10
    measure_every: int = 25
    save_adversarial: int = 50
    critic_captions: int = 14_000


class NonFiniteLoss(RuntimeError):
    """A loss that is not a number; the message names loss, step and remedy."""


@dataclass(frozen=True, slots=True)
class Process:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def current(cls) -> Process:
        """What torch.distributed says, one process where it is not initialised."""
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(device=device)

    def share(self, rows: Sequence[Any] | np.ndarray) -> np.ndarray:
        """This process's part of the rows of a step, all of which are as large to within one row.

        However many processes there are, a step is the same number of samples: a training may go on
        with more or fewer of them than it began with.
        """
        return np.array_split(np.asarray(rows), self.size)[self.rank]

    def autocast(self) -> torch.autocast:
        """bfloat16 where the processor multiplies it faster: GPUs, and CPUs that have AMX or
        AVX512-BF16."""
        fast = self.device != "cpu" or torch.cpu._is_avx512_bf16_supported()
        return torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16, enabled=fast)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """The mean over all processes, in one message; a missing gradient counts as zero."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters])  # type: ignore[union-attr]
        dist.all_reduce(flat)
        flat /= self.size
        offset = 0
        for parameter in parameters:
            count = parameter.numel()
            parameter.grad = flat[offset : offset + count].view_as(parameter)
            offset += count

    def mean(self, value: float) -> float:
        """The mean of a number over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64 if self.device == "cpu" else torch.float32)
        total = total.to(self.device)
        dist.all_reduce(total)
        return float(total) / self.size

    def agree(self, figures: dict[str, float]) -> dict[str, float]:
        """The first process's figures: what is decided by them is decided alike everywhere."""
        if self.size == 1:
            return figures
        values = torch.tensor(list(figures.values()), dtype=torch.float32).to(self.device)
        dist.broadcast(values, src=0)
        return dict(zip(figures, values.tolist(), strict=True))

    def check_finite(self, loss: Tensor, name: str, step: int) -> None:
        """Stops every process when any has a loss that is not finite."""
        bad = (~torch.isfinite(loss.detach())).float()
        if self.size > 1:
            dist.all_reduce(bad)
        if bad.item():
            raise NonFiniteLoss(
                f"the {name} loss is not finite at step {step}: lower --{name}-rate; with other "
                "settings the training begins anew, give it another --output"
            )


@dataclass(slots=True)
class Curves:
    """What was measured while training, a row each time, and the line that a person reads.

    events: snapshots and rollbacks, with the reason `why`. samples: captions of the same products
    over time. products: their descriptions, and which of the catalogue's images.
    """

    rows: list[dict[str, float | str]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    products: list[dict[str, Any]] = field(default_factory=list)

    def add(self, stage: str, **values: float) -> str:
        self.rows.append({"stage": stage, **values})
        return f"{stage}  " + "  ".join(
            f"{name.replace('_', ' ')} {value:,.0f}"
            if value == int(value)
            else f"{name.replace('_', ' ')} {value:.3f}"
            for name, value in values.items()
        )


def warmup_cosine(step: int, steps: int, warmup: float = 0.05) -> float:
    """Factor of the peak learning rate: linear rise, then half a cosine to zero."""
    progress = step / max(steps, 1)
    if progress < warmup:
        return (step + 1) / max(steps * warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only, not for biases, gains and embeddings of one row."""
    decayed = [p for p in module.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in module.parameters() if p.requires_grad and p.dim() <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


# --- the vision backbone -----------------------------------------------------------------------


def augment(images_BHWC: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """[B, H, W, 3] uint8 → [B, 3, size, size] float in 0..1, shifted, zoomed, turned, flipped.

    No change of hue: colour is one of the things to be learned. A random rectangle is greyed.
    """
    batch = images_BHWC.shape[0]
    images = images_BHWC.permute(0, 3, 1, 2).float() / 255.0

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, generator=generator) * (high - low) + low

    angle, zoom = uniform(-0.15, 0.15), uniform(0.8, 1.05)
    stretch = torch.exp(uniform(-0.15, 0.15))
    flip = (torch.rand(batch, generator=generator) < 0.5).float() * 2 - 1
    right, down = uniform(-0.12, 0.12), uniform(-0.12, 0.12)
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    row_x = torch.stack([cosine * flip * stretch, -sine, right], 1)
    row_y = torch.stack([sine * flip, cosine / stretch, down], 1)
    theta = torch.stack([row_x, row_y], 1)
    grid = F.affine_grid(theta, [batch, 3, size, size], align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    brightness, contrast = uniform(0.8, 1.2), uniform(0.8, 1.2)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = (images - mean) * contrast.view(-1, 1, 1, 1) + mean * brightness.view(-1, 1, 1, 1)
    images = images.clamp(0, 1)
    rows = torch.arange(size).view(1, size, 1)
    columns = torch.arange(size).view(1, 1, size)
    top, left = uniform(-0.5, 1.0) * size, uniform(0, 1.0) * size
    height, width = uniform(0.1, 0.4) * size, uniform(0.1, 0.4) * size
    erased = (
        (rows >= top.view(-1, 1, 1))
        & (rows < (top + height).view(-1, 1, 1))
        & (columns >= left.view(-1, 1, 1))
        & (columns < (left + width).view(-1, 1, 1))
    )
    return torch.where(erased.unsqueeze(1), images.new_tensor(0.5), images)


class AttributeHeads(nn.Module):
    """One linear classifier an attribute on the backbone's mean feature; used in training only."""

    def __init__(self, channels: int, classes: dict[str, int], dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleDict(
            {f"to_{name}": nn.Linear(channels, n) for name, n in classes.items()}
        )

    def forward(self, hidden_BCHW: Tensor) -> dict[str, Tensor]:
        pooled = self.dropout(hidden_BCHW.mean(dim=(2, 3)))
        return {name.removeprefix("to_"): head(pooled) for name, head in self.heads.items()}


def attribute_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Sum over attributes of the cross-entropy (label smoothing .1); label -1 is unknown."""
    losses = []
    for name, logit in logits.items():
        known = labels[name] >= 0
        per_row = F.cross_entropy(
            logit.float(), labels[name].clamp(min=0), label_smoothing=0.1, reduction="none"
        )
        losses.append((per_row * known).sum() / known.sum().clamp(min=1))
    return torch.stack(losses).sum()


@torch.no_grad()
def attribute_accuracy(
    model: Generator,
    heads: AttributeHeads,
    pixels: np.ndarray,
    labels: dict[str, Tensor],
    process: Process,
) -> dict[str, float]:
    """Share of known labels that each head gets right; pixels [N, H, W, 3] uint8."""
    model.eval()
    heads.eval()
    right = dict.fromkeys(labels, 0.0)
    for start in range(0, len(pixels), 64):
        images = torch.from_numpy(pixels[start : start + 64]).to(process.device)
        with process.autocast():
            logits = heads(model.vision(model.normalise(images)).last_hidden_state)
        for name, logit in logits.items():
            truth = labels[name][start : start + 64].to(process.device)
            right[name] += ((logit.argmax(1) == truth) & (truth >= 0)).sum().item()
    model.train()
    heads.train()
    return {n: right[n] / max(1, int((labels[n] >= 0).sum())) for n in labels}


def train_backbone(
    model: Generator,
    pixels: np.ndarray,
    labels: dict[str, Tensor],
    held_out: tuple[np.ndarray, dict[str, Tensor]],
    config: TrainingConfig,
    *,
    process: Process,
    curves: Curves,
    resume: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
    log: Callable[[str], None] = print,
) -> None:
    """Trains model.vision on the catalogue's attributes, in place.

    pixels [N, H, W, 3] uint8; labels: attribute → [N] class numbers, -1 unknown. The first two
    thirds of the epochs run at three quarters of the resolution. Ends with the exponential mean of
    the weights. Raises NonFiniteLoss.
    """
    device, size = process.device, model.config.image_size
    classes = {name: int(values.max()) + 1 for name, values in labels.items()}
    heads = AttributeHeads(model.vision.config.hidden_sizes[-1], classes, dropout=0.2).to(device)
    trained = nn.ModuleList([model.vision, heads])
    steps_per_epoch = max(1, len(pixels) // config.backbone_batch)
    steps = steps_per_epoch * config.backbone_epochs
    optimiser = torch.optim.AdamW(parameter_groups(trained, config.weight_decay), betas=(0.9, 0.98))
    average = {k: v.detach().clone() for k, v in trained.state_dict().items()}
    step = 0
    if resume is not None:
        trained.load_state_dict(resume["trained"])
        optimiser.load_state_dict(resume["optimiser"])
        average, step = {k: v.to(device) for k, v in resume["average"].items()}, resume["step"]

    started, done_at_start = time.monotonic(), step
    while step < steps:
        # everything random follows from the step, so that a resumed training sees the same
        epoch = step // steps_per_epoch
        order = np.random.default_rng([config.seed, epoch]).permutation(len(pixels))
        resolution = size * 3 // 4 if epoch < config.backbone_epochs * 2 // 3 else size
        for batch in range(step % steps_per_epoch, steps_per_epoch):
            first = batch * config.backbone_batch
            rows = process.share(order[first : first + config.backbone_batch])
            random = torch.Generator().manual_seed(
                config.seed * 1_000_003 + step * process.size + process.rank
            )
            truth = {name: values[rows].to(device) for name, values in labels.items()}
            images = augment(torch.from_numpy(pixels[rows]), resolution, random)
            images = images.to(device)
            mean = images.new_tensor(model.config.image_mean).view(1, 3, 1, 1)
            std = images.new_tensor(model.config.image_std).view(1, 3, 1, 1)
            images = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
            # mixup (Zhang et al., ICLR 2018)
            share = float(np.random.default_rng([config.seed, step, process.rank]).beta(0.2, 0.2))
            mixed = torch.randperm(len(rows), generator=random).to(device)
            images = share * images + (1 - share) * images[mixed]
            with process.autocast():
                logits = heads(model.vision(images).last_hidden_state)
            loss = share * attribute_loss(logits, truth) + (1 - share) * attribute_loss(
                logits, {name: values[mixed] for name, values in truth.items()}
            )
            process.check_finite(loss, "backbone", step)
            rate = config.backbone_rate * warmup_cosine(step, steps)
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            process.average_gradients(list(trained.parameters()))
            nn.utils.clip_grad_norm_(trained.parameters(), 5.0)
            optimiser.step()
            step += 1
            decay = min(config.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for key, value in trained.state_dict().items():
                    if value.is_floating_point():
                        average[key].lerp_(value, 1 - decay)
                    else:
                        average[key].copy_(value)
            if step % config.report_every == 0 and process.rank == 0:
                seconds = (time.monotonic() - started) / max(1, step - done_at_start)
                log(curves.add(
                    "backbone", step=step, steps=steps, epoch=epoch, loss=loss.item(), rate=rate,
                    images_per_second=config.backbone_batch / seconds,
                    minutes_left=seconds * (steps - step) / 60,
                ))  # fmt: skip
            if step % config.save_every == 0:
                save({
                    "stage": "backbone", "step": step, "trained": trained.state_dict(),
                    "optimiser": optimiser.state_dict(), "average": average,
                })  # fmt: skip
        if process.rank == 0 and (epoch % 4 == 3 or step >= steps):
            now = {k: v.detach().clone() for k, v in trained.state_dict().items()}
            trained.load_state_dict(average)
            accuracy = attribute_accuracy(model, heads, *held_out, process)
            trained.load_state_dict(now)
            log(curves.add("backbone held-out", step=step, **accuracy))
    trained.load_state_dict(average)


# --- likelihood, on both roads -----------------------------------------------------------------


PART = 16  # sentences of one backward pass on a CPU; a GPU takes more of them at once
PART_GPU = 256


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Conditions and targets of one step: B rows.

    features_BIC: image features, zeros without an image. description_BD, caption_BT: token ids,
    padded with PAD; the caption ends with EOS. style_B: index of a style, len(styles) for any.
    """

    features_BIC: Tensor
    has_image_B: Tensor
    description_BD: Tensor
    style_B: Tensor
    caption_BT: Tensor

    def conditions(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All but the caption, in the order of Generator.prefix."""
        return self.features_BIC, self.has_image_B, self.description_BD, self.style_B

    def repeated(self, times: int) -> TextBatch:
        """Each row so many times, one after the other."""
        return TextBatch(
            *(value.repeat_interleave(times, 0) for value in (*self.conditions(), self.caption_BT))
        )

    def rows(self, numbers: Tensor) -> TextBatch:
        """Some of the rows."""
        return TextBatch(*(value[numbers] for value in (*self.conditions(), self.caption_BT)))

    def to(self, device: str) -> TextBatch:
        """The same on a device."""
        return TextBatch(*(value.to(device) for value in (*self.conditions(), self.caption_BT)))


def encode_batch(
    examples: Sequence[Example], tokenizer: Tokenizer, config: GeneratorConfig, features: Tensor
) -> TextBatch:
    """Examples → tensors; features [N, I, C] of the catalogue's photographs (rows by image)."""

    def pad(rows: list[list[int]], length: int) -> Tensor:
        return torch.tensor([row[:length] + [PAD] * (length - len(row)) for row in rows])

    captions = [[*tokenizer.encode(x.text).ids[: config.caption_length - 1], EOS] for x in examples]
    descriptions = [tokenizer.encode(x.description).ids if x.description else [] for x in examples]
    images = torch.tensor([x.image for x in examples])
    has_image = images >= 0
    any_style = len(config.styles)
    styles = [config.styles.index(x.style) if x.style else any_style for x in examples]
    return TextBatch(
        features[images.clamp(min=0)].float() * has_image[:, None, None],
        has_image,
        pad(descriptions, config.description_length),
        torch.tensor(styles),
        pad(captions, max(map(len, captions))),
    )


def draw_examples(
    pairs: PseudoPairs,
    background: Sequence[str],
    progress: float,
    count: int,
    random: np.random.Generator,
) -> list[Example]:
    """The mixture of a step: much background text early on, mostly pseudo-pairs at the end.

    progress: 0 to 1. Formal descriptions of photographs are a fifth throughout; some background
    and plain sentences stay to the end, or the few pseudo-pairs are learned by heart.
    """
    share_background = 0.2 + 0.3 * max(0.0, 1 - progress / 0.6) if background else 0.0
    share_plain = 0.2
    if pairs.written:  # enough to learn from: what has no product is needed less
        share_background, share_plain = share_background / 2, share_plain / 2
    styles = [style for style in pairs.plain]
    examples = []
    for _ in range(count):
        chance = random.random()
        style = styles[random.integers(len(styles))]
        if chance < 0.2:
            example = pairs.described_example(random)
        elif chance < 0.2 + 0.8 * share_background:
            example = Example(background[int(random.integers(len(background)))], "")
        elif chance < 0.2 + 0.8 * (share_background + share_plain) or not pairs.paired[style]:
            example = pairs.plain_example(style, random)
        else:
            example = pairs.paired_example(style, random)
        if random.random() < 0.1 and example.style != "formal":
            example = Example(example.text, "", example.description, example.image)
        examples.append(example)
    return examples


def caption_nats(model: Generator, batch: TextBatch, noise_BZ: Tensor, device: str) -> Tensor:
    """→ negative log-likelihood [B] of each caption, its end included, in nats."""
    batch = batch.to(device)
    caption = batch.caption_BT
    logits = model(*model.prefix(*batch.conditions(), noise_BZ.to(device)), caption)
    nats = F.cross_entropy(
        logits.float().flatten(0, 1), caption.flatten(), ignore_index=PAD, reduction="none"
    )
    return nats.view(caption.shape).sum(1)


def caption_loss(
    model: Generator, batch: TextBatch, noise_BZ: Tensor, device: str
) -> tuple[Tensor, Tensor]:
    """→ summed negative log-likelihood of the captions' tokens, in nats, and their number."""
    nats_B = caption_nats(model, batch, noise_BZ, device)
    return nats_B.sum(), (batch.caption_BT != PAD).sum().to(device)


@torch.no_grad()
def image_features(model: Generator, pixels: np.ndarray, process: Process) -> Tensor:
    """[N, H, W, 3] uint8 → [N, I, C] float16 on the CPU, by the trained backbone."""
    model.vision.eval()
    chunks = []
    for start in range(0, len(pixels), 64):
        images = torch.from_numpy(pixels[start : start + 64]).to(process.device)
        chunks.append(model.features(model.normalise(images)).half().cpu())
    return torch.cat(chunks)


def train_likelihood(
    model: Generator,
    tokenizer: Tokenizer,
    pairs: PseudoPairs,
    background: Sequence[str],
    features: Tensor,
    held_out: Sequence[Example],
    config: TrainingConfig,
    *,
    process: Process,
    curves: Curves,
    resume: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
    log: Callable[[str], None] = print,
) -> None:
    """Maximum likelihood of formal descriptions and of colloquial sentences, in place.

    features [N, I, C]: of the catalogue's photographs; the backbone stays as it is. held_out: a
    part of the training text that is left out, on which the weights to keep are chosen. Ends with
    the exponential mean of the weights that was best on it. Raises NonFiniteLoss.
    """
    device = process.device
    model.vision.requires_grad_(False).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = parameter_groups(model, config.weight_decay)
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    average = [p.detach().clone() for p in trained]
    best, best_weights, step = math.inf, [p.detach().clone() for p in trained], 0
    if resume is not None:
        for parameter, saved in zip(trained, resume["trained"], strict=True):
            parameter.data.copy_(saved)
        optimiser.load_state_dict(resume["optimiser"])
        average = [value.to(device) for value in resume["average"]]
        best, step = resume["best"], resume["step"]
        best_weights = [value.to(device) for value in resume["best_weights"]]
    rows = len(process.share(range(config.likelihood_batch)))
    size = PART if device == "cpu" else PART_GPU
    started, done_at_start, nats, tokens = time.monotonic(), step, 0.0, 0
    model.train()
    model.vision.eval()
    while step < config.likelihood_steps:
        random = np.random.default_rng([config.seed, 7, step, process.rank])
        progress = step / config.likelihood_steps
        drawn = draw_examples(pairs, background, progress, rows, random)
        # In parts of like length, so that little is padding. Each step has all lengths and one
        # divisor: were a short sentence's tokens to weigh more, captions would end too early.
        drawn.sort(key=lambda example: len(example.text))
        parts = [
            encode_batch(drawn[i : i + size], tokenizer, model.config, features)
            for i in range(0, rows, size)
        ]
        count = sum(int((part.caption_BT != PAD).sum()) for part in parts)
        torch.manual_seed(config.seed * 1_000_003 + step * process.size + process.rank)  # dropout
        rate = config.likelihood_rate * warmup_cosine(step, config.likelihood_steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for part in parts:
            noise = torch.randn(len(part.style_B), model.config.noise_size)
            with process.autocast():
                loss, _ = caption_loss(model, part, noise, device)
            (loss / count).backward()
            total += loss.detach()
        process.check_finite(total, "likelihood", step)
        process.average_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        nats, tokens, step = nats + total.item(), tokens + count, step + 1
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, parameter in zip(average, trained, strict=True):
                mean.lerp_(parameter, 1 - decay)
        if step % config.report_every == 0 and process.rank == 0:
            seconds = (time.monotonic() - started) / (step - done_at_start)
            log(curves.add(
                "likelihood", step=step, steps=config.likelihood_steps,
                nats_per_token=nats / max(tokens, 1), rate=rate,
                samples_per_second=config.likelihood_batch / seconds,
                minutes_left=seconds * (config.likelihood_steps - step) / 60,
            ))  # fmt: skip
            nats, tokens = 0.0, 0
        if step % (config.report_every * 5) == 0 or step == config.likelihood_steps:
            # every process measures, so that none waits for another and all choose alike
            now = [p.detach().clone() for p in trained]
            assign(trained, average)
            loss_held_out = held_out_loss(model, tokenizer, held_out, features, process)
            if loss_held_out < best:
                best, best_weights = loss_held_out, [p.detach().clone() for p in trained]
            assign(trained, now)
            if process.rank == 0:
                log(curves.add("likelihood held-out", step=step, nats_per_token=loss_held_out))
        if step % config.save_every == 0 or step == config.likelihood_steps:
            save({
                "stage": "likelihood", "step": step, "trained": [p.detach() for p in trained],
                "optimiser": optimiser.state_dict(), "average": average, "best": best,
                "best_weights": best_weights,
            })  # fmt: skip
    assign(trained, best_weights)
    model.eval()


def assign(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Copies values into parameters, in place."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


@torch.no_grad()
def held_out_loss(
    model: Generator,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    features: Tensor,
    process: Process,
) -> float:
    """Nats per token of the examples' sentences, noise at its mean."""
    model.eval()
    nats, tokens = 0.0, 0
    for start in range(0, len(examples), 64):
        batch = encode_batch(examples[start : start + 64], tokenizer, model.config, features)
        noise = torch.zeros(len(batch.style_B), model.config.noise_size)
        with process.autocast():
            loss, count = caption_loss(model, batch, noise, process.device)
        nats, tokens = nats + loss.item(), tokens + int(count)
    model.train()
    model.vision.eval()
    return nats / max(tokens, 1)

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pyarrow import fs
from tiny_model import write_pretrained

from jobs import train as job
from stylegan import corpora, training
from stylegan.captioner import Captioner
from stylegan.catalog import resolve_filesystem
from stylegan.corpora import Example, Product
from stylegan.generator import EOS, Generator, GeneratorConfig
from stylegan.training import Curves, NonFiniteLoss, Process, TrainingConfig

KINDS = {"watch": "circle", "belt": "bar", "tie": "triangle"}
COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "black": (20, 20, 20)}
WATCH = ["such a lovely watch."]
SENTENCES = [
    f"{opening} {colour} {kind} {ending}"
    for kind in KINDS
    for colour in ["", *COLOURS]
    for opening in ["such a lovely", "this is a really neat", "what a smart"]
    for ending in ["for summer.", "for every day!", "that goes with anything.", "full of charm."]
]


def draw(kind: str, colour: str, seed: int) -> Image.Image:
    """A coarse sign of a product: learned within seconds."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (48, 48), (245, 245, 245))
    pen, (x, y) = ImageDraw.Draw(image), random.integers(-5, 6, 2).tolist()
    if kind == "watch":
        pen.ellipse((12 + x, 12 + y, 36 + x, 36 + y), fill=COLOURS[colour])
    elif kind == "belt":
        pen.rectangle((4 + x, 20 + y, 44 + x, 28 + y), fill=COLOURS[colour])
    else:
        pen.polygon([(24 + x, 6 + y), (16 + x, 42 + y), (32 + x, 42 + y)], fill=COLOURS[colour])
    return image


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue of coarse drawings and a file of colloquial sentences."""
    directory = tmp_path_factory.mktemp("inputs")
    with (directory / "catalog.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "description", "split"])
        for index in range(180):
            kind, colour = list(KINDS)[index % 3], list(COLOURS)[index // 3 % 3]
            draw(kind, colour, index).save(directory / f"{index}.png")
            split = "val" if index % 6 == 5 else "train"
            writer.writerow([f"{index}.png", f"{colour} {kind}", split])
    (directory / "sentences.txt").write_text("\n".join(SENTENCES) + "\n")
    return directory


def arguments(inputs: Path, output: Path, *more: str) -> list[str]:
    return [
        "--catalog", str(inputs / "catalog.csv"), "--colloquial", str(inputs / "sentences.txt"),
        "--output", str(output), "--preset", "tiny", "--workers", "0", "--backbone-epochs", "12",
        "--backbone-batch", "16", "--likelihood-steps", "500", "--likelihood-batch", "32",
        "--likelihood-rate", "3e-3", "--ema-decay", "0.9", "--save-every", "100",
        "--report-every", "20", "--adversarial-steps", "12", "--adversarial-batch", "4",
        "--group-size", "3", "--warmup-steps", "4", "--watched", "24", "--measure-every", "6",
        "--report-adversarial", "3", "--save-adversarial", "6", "--critic-captions", "96", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model trained by the job itself, in this process."""
    output = tmp_path_factory.mktemp("model")
    assert run_job(arguments(inputs, output)) == 0
    return output


def run_job(line: list[str]) -> int:
    before, sys.argv = sys.argv, ["jobs.train", *line]
    try:
        return job.main()
    finally:
        sys.argv = before


def test_a_trained_model_sees_and_says(trained: Path) -> None:
    """Held-out drawings are named right, in sentences that were not in the file."""
    captioner = Captioner.from_pretrained(trained, device="cpu")
    kinds = [(kind, colour) for kind in KINDS for colour in COLOURS]
    images = [draw(kind, colour, 1000 + i) for i, (kind, colour) in enumerate(kinds)]
    captions = captioner.caption(images, seed=list(range(9)))
    right = [kind in (c.text or "").lower() for c, (kind, _) in zip(captions, kinds, strict=True)]
    described = [c.description == f"{colour.capitalize()} {kind}"
                 for c, (kind, colour) in zip(captions, kinds, strict=True)]  # fmt: skip
    assert sum(described) >= 7, [caption.description for caption in captions]
    assert sum(right) >= 7, [caption.text for caption in captions]


def test_the_model_directory_is_complete(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "tokenizer.json", "generation_config.json",
        "preprocessor_config.json", "metrics.json", "README.md", "curves.png", "training.html",
        "discriminator.safetensors",
    }  # fmt: skip
    assert list((trained / "tensorboard").rglob("*tfevents*"))
    stages = {row["stage"] for row in json.loads((trained / "curves.json").read_text())["rows"]}
    assert stages >= {"backbone", "likelihood", "adversarial", "adversarial held-out"}
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["held_out_type_accuracy"] > 0.8
    assert metrics["held_out_nats_per_token"] < math.log(1500) / 2


@pytest.mark.parametrize(("stage", "step"), [("likelihood", 16), ("adversarial", 4)])
def test_training_goes_on_where_the_checkpoint_was(
    stage: str, step: int, inputs: Path, tmp_path: Path
) -> None:
    """Stopped in mid-training and resumed, the weights are those of a training without a stop."""
    line = arguments(inputs, tmp_path, "--likelihood-steps", "24", "--save-every", "8",
                     "--adversarial-steps", "8", "--save-adversarial", "4")  # fmt: skip
    options = job.parser().parse_args([*line, "--backbone-epochs", "1"])
    names = TrainingConfig.__dataclass_fields__
    config = TrainingConfig(**{name: getattr(options, name) for name in names})
    data = job.prepare(options, tmp_path)
    states: list[dict[str, Any]] = []

    def keep(state: dict[str, Any], curves: Curves) -> None:
        path = tmp_path / f"{len(states)}.pt"
        job.save_state(state, path)
        states.append(job.load_state(path))

    decoding = job.delivered(options)
    whole = job.fit(config, decoding, data, Process(), None, keep, lambda line: None)
    halfway = next(s for s in states if s["stage"] == stage and s["step"] == step)
    resumed = job.fit(
        config, decoding, data, Process(), halfway, lambda state, curves: None, lambda line: None
    )
    for name, value in whole.captioner.generator.state_dict().items():
        torch.testing.assert_close(
            resumed.captioner.generator.state_dict()[name], value, msg=name
        )
    assert resumed.captioner.critic is not None
    assert [row["stage"] for row in resumed.curves.rows].count("backbone held-out") == 1
    assert resumed.curves.samples == whole.curves.samples
    assert resumed.verdict is not None and whole.verdict is not None
    for when in ("before", "after"):
        assert resumed.verdict[when] == pytest.approx(whole.verdict[when])


def test_mixture_moves_from_background_to_pairs() -> None:
    products = [corpora.Product(0, "Red watch.")]
    pairs = corpora.PseudoPairs(products, {"colloquial": WATCH})
    random = np.random.default_rng(0)

    def share_background(progress: float) -> float:
        drawn = training.draw_examples(pairs, ["background."], progress, 400, random)
        return sum(example.text == "background." for example in drawn) / 400

    assert share_background(0.0) == pytest.approx(0.4, abs=0.08)
    assert share_background(1.0) == pytest.approx(0.16, abs=0.06)
    alone = training.draw_examples(pairs, [], 1.0, 400, random)
    assert {example.text for example in alone} <= {*WATCH, "red watch."}


def test_captions_are_as_long_as_sentences() -> None:
    """Short sentences and long ones that begin alike: each goes on as often as it was seen to.

    Were a step's loss divided by the tokens of short sentences alone, they would end too early.
    """
    short = "such a lovely watch."
    sentences = [
        short, short, "such a lovely watch with a thin gold case and a dial that is easy to read.",
    ]  # fmt: skip
    tokenizer = corpora.train_tokenizer(sentences, 400)
    pairs = corpora.PseudoPairs([corpora.Product(0, "Watch.")], {"colloquial": sentences})
    config = GeneratorConfig.preset(
        "tiny", tokenizer.get_vocab_size(), ["formal", "colloquial"], dropout=0.0
    )
    torch.manual_seed(0)
    generator, features = Generator(config), torch.zeros(1, 4, 64)
    training.train_likelihood(
        generator, tokenizer, pairs, [], features, [Example(short, "colloquial")],
        TrainingConfig(likelihood_steps=150, likelihood_batch=48, likelihood_rate=2e-3),
        process=Process(), curves=Curves(), log=lambda line: None,
    )  # fmt: skip
    batch = training.encode_batch([Example(short, "colloquial")], tokenizer, config, features)
    with torch.no_grad():
        prefix = generator.prefix(*batch.conditions(), torch.zeros(1, config.noise_size))
        nats = generator(*prefix, batch.caption_BT).log_softmax(-1)
    ended = nats[0, -2, batch.caption_BT[0, -2]].exp().item()  # "." after "watch"
    assert ended == pytest.approx(2 / 3, abs=0.1)


def test_loss_counts_each_token_once() -> None:
    """A model whose logits are all equal needs log V nats for each token, the end included."""
    tokenizer = corpora.train_tokenizer(["a smart watch."], 300)
    config = GeneratorConfig.preset("tiny", tokenizer.get_vocab_size(), ["formal", "colloquial"])
    generator = Generator(config).eval()
    generator.language.transformer.wte.weight.data.zero_()
    examples = [Example("a smart watch.", "colloquial", "Watch."), Example("a watch.", "", "", 0)]
    batch = training.encode_batch(examples, tokenizer, config, torch.randn(1, 4, 64))
    assert batch.has_image_B.tolist() == [False, True]
    assert batch.style_B.tolist() == [1, 2]
    loss, count = training.caption_loss(generator, batch, torch.zeros(2, 32), "cpu")
    expected = sum(len(tokenizer.encode(example.text).ids) + 1 for example in examples)
    assert count == expected == (batch.caption_BT != 0).sum()
    assert loss.item() == pytest.approx(
        expected * math.log(config.text_config.vocab_size), rel=1e-4
    )
    assert (batch.caption_BT == EOS).sum() == 2


@pytest.mark.slow
def test_a_trained_model_plays_rounds(trained: Path, inputs: Path, tmp_path: Path) -> None:
    """It mostly recites, which weighs nothing: so many captions are drawn."""
    write_pretrained(tmp_path / "encoder", "encoder")
    read = tmp_path / "read.csv"
    read.write_text("text,description,fit\n" + "this watch are so.,blue watch,0\n" * 8)
    line = arguments(
        inputs, tmp_path / "model", "--start", str(trained), "--likelihood-steps", "0",
        "--colloquial", str(read),
        "--adversarial-steps", "0", "--rounds", "2", "--round-captions", "6000", "--round-steps",
        "4", "--round-discriminator-steps", "4", "--discriminator", str(tmp_path / "encoder"),
    )  # fmt: skip
    assert run_job(line) == 0
    told = json.loads((tmp_path / "model" / "metrics.json").read_text())
    assert set(told["watched_while_training"]) == {"before", "after"}
    curves = json.loads((tmp_path / "model" / "curves.json").read_text())
    assert [row["step"] for row in curves["rows"] if row["stage"] == "round"] == [1, 2]
    assert "MaliGAN" in (tmp_path / "model" / "README.md").read_text()
    state = torch.load(tmp_path / "model" / "training" / "state.pt", weights_only=True)
    assert (state["stage"], state["step"]) == ("rounds", 2)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert run_job(line) == 0  # nothing is left to be done
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_what_begins_from_another_model_says_why_it_cannot(
    trained: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts, few = tmp_path / "verdicts.csv", tmp_path / "few.csv"
    verdicts.write_text("text,fit\nsuch a watch.,yes\n")
    few.write_text("text,fit\nsuch a watch.,1\n")
    for more, why in (
        (["--start", str(trained), "--likelihood-steps", "0", "--discriminator", str(tmp_path)],
         "give a directory with the config.json"),
        (["--start", str(trained), "--likelihood-steps", "0", "--adversarial-steps", "0",
          "--rounds", "1", "--proofreader", str(tmp_path)], "of a causal language model"),
        (["--judged", str(verdicts)], "needs a --proofreader"),
        (["--proofreader", str(tmp_path), "--judged", str(verdicts)], "has fit 'yes'"),
        (["--proofreader", str(tmp_path), "--judged", str(few)], "has 1 captions that are fit"),
        (["--proofreader", "any", "--judged", str(inputs / "sentences.txt")], "column 'fit'"),
    ):  # fmt: skip
        steps = ["--backbone-epochs", "1", "--likelihood-steps", "1"]
        assert run_job(arguments(inputs, tmp_path / "model", *steps, *more)) == 2, why
        assert why in capsys.readouterr().err


def test_captions_that_were_read_are_written_examples_or_unfit_ones(
    inputs: Path, tmp_path: Path
) -> None:
    table = tmp_path / "read.csv"
    rows = ["Such a watch!,Blue watch,1", "This watch are.,Blue watch,0", "So nice.,,1"]
    table.write_text("\n".join(["text,description,fit", *rows]) + "\n")
    voice = job.read_sentences([str(inputs / "sentences.txt"), str(table)])
    people = job.read_sentences([str(inputs / "sentences.txt")])
    assert [(x.text, x.description) for x in voice.written["colloquial"]] == [
        ("such a watch!", "Blue watch")
    ]
    assert [(x.text, x.style) for x in voice.unfit] == [("this watch are.", "colloquial")]
    assert voice.sentences == people.sentences and voice.background == people.background
    products = [Product(3, "Blue watch")]
    shown = voice.shown(voice.unfit * 200, products)
    assert 0.7 < np.mean([x.image == 3 for x in shown]) < 1
    table.write_text("text,description,fit\nSuch a watch!,Blue watch,maybe\n")
    with pytest.raises(job.InputError, match="row 1 has fit 'maybe'"):
        job.read_sentences([str(table)])


def test_unknown_labels_do_not_train() -> None:
    logits = {"type": torch.randn(4, 3, requires_grad=True)}
    training.attribute_loss(logits, {"type": torch.tensor([-1, -1, 2, 0])}).backward()
    gradient = logits["type"].grad
    assert gradient is not None
    assert gradient[:2].abs().sum() == 0 and gradient[2:].abs().sum() > 0


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_a_step_is_the_same_samples_with_any_number_of_processes(size: int) -> None:
    rows = np.arange(64)
    shares = [Process(rank, size).share(rows) for rank in range(size)]
    assert np.concatenate(shares).tolist() == rows.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_workers_are_as_many_as_there_is_room_for() -> None:
    choose = job.choose_workers
    assert choose((1, 8), 2, 0, True) == (2, False)  # no GPU
    assert choose((1, 8), 16, 1, True) == (1, True)  # one
    assert choose((1, 8), 64, 8, True) == (8, True)  # eight
    assert choose((1, 8), 64, 3, False) == ((1, 8), True)  # others may come
    assert choose((2, 2), 64, 8, False) == (2, True)
    with pytest.raises(job.InputError, match="--workers asks for 2, and there are 1 GPUs"):
        choose((2, 4), 64, 1, False)


@pytest.mark.parametrize("workers", ["-1", "0,2", "3,2", "two", "1,2,3"])
def test_workers_that_make_no_sense_are_refused(
    workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        job.parser().parse_args(["--workers", workers])
    assert workers in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_and_says_where() -> None:
    with pytest.raises(NonFiniteLoss, match="not finite at step 7: lower --likelihood-rate"):
        Process().check_finite(torch.tensor(float("nan")), "likelihood", 7)


def test_augmentation_keeps_range_and_shape() -> None:
    images = torch.randint(0, 256, (5, 48, 48, 3), dtype=torch.uint8)
    one = training.augment(images, 36, torch.Generator().manual_seed(1))
    again = training.augment(images, 36, torch.Generator().manual_seed(1))
    assert one.shape == (5, 3, 36, 36)
    assert one.min() >= 0 and one.max() <= 1
    assert torch.equal(one, again)


def test_learning_rate_rises_and_falls() -> None:
    factors = [training.warmup_cosine(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.2)
    assert max(factors) == pytest.approx(1)
    assert factors[100] == pytest.approx(0, abs=1e-9)


def test_progress_line_has_names_and_values() -> None:
    assert Curves().add("likelihood", step=1200.0, nats_per_token=3.25) == (
        "likelihood  step 1,200  nats per token 3.250"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "s.txt").write_text(""), "the file is empty"),
        (lambda d: (d / "s.txt").write_text("I love it.\nwhat a tie it is.\n"), "1 of 2 sentences"),
        (lambda d: (d / "s.txt").unlink(), "cannot be read"),
        (
            lambda d: (d / "c.csv").write_text("file,description\n1.png,red tie\n"),
            "no column 'image'",
        ),
        (
            lambda d: (d / "c.csv").write_text("image,description\nx.png,red tie\n"),
            "none of 1 images",
        ),
    ],
)
def test_bad_input_is_one_clear_line(
    change: Callable[[Path], Any], message: str, inputs: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = (inputs / "catalog.csv").read_text().splitlines()[:13]
    (tmp_path / "c.csv").write_text("\n".join(row.replace(",", ",", 1) for row in rows))
    for index in range(12):
        (tmp_path / f"{index}.png").write_bytes((inputs / f"{index}.png").read_bytes())
    (tmp_path / "s.txt").write_text("\n".join(SENTENCES))
    change(tmp_path)
    line = [
        "--catalog", str(tmp_path / "c.csv"), "--colloquial", str(tmp_path / "s.txt"),
        "--output", str(tmp_path / "out"), "--preset", "tiny", "--workers", "0",
    ]  # fmt: skip
    assert run_job(line) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_workers_train_under_ray_and_agree(inputs: Path, tmp_path: Path) -> None:
    line = arguments(
        inputs, tmp_path / "model", "--workers", "2", "--backbone-epochs", "2",
        "--likelihood-steps", "80", "--save-every", "40",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "jobs.train", *line], capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert Captioner.from_pretrained(tmp_path / "model").styles == ("formal", "colloquial")
    assert list((tmp_path / "model" / "training").glob("*/checkpoint_*/state.pt"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_that_loses_a_machine_trains_on_with_what_is_left(
    inputs: Path, s3: str, tmp_path: Path
) -> None:
    """Two machines of one CPU, checkpoints on object storage; one of them is killed."""
    from ray.cluster_utils import Cluster

    # A lost node is noticed in seconds, not in half a minute. Ray Train tries again at once, and
    # when it still counts the lost node waits for it: for seconds as well, not for a minute.
    health = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000,
              "health_check_failure_threshold": 4}  # fmt: skip
    cluster: Any = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": health}
    )
    filesystem = resolve_filesystem(s3)[0]

    def counted() -> int:
        """The step of likelihood in the last checkpoint that Ray Train goes on from."""
        runs = fs.FileSelector("shop/elastic/training", allow_not_found=True, recursive=True)
        for info in filesystem.get_file_info(runs):
            if info.base_name == "checkpoint_manager_snapshot.json":
                with filesystem.open_input_stream(info.path) as stream:
                    last = json.loads(stream.read())["latest_checkpoint_result"]
                if last:
                    assert last["metrics"]["stage"] == "likelihood"
                    return int(last["metrics"]["step"])
        return 0

    try:
        machines = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        line = arguments(
            inputs, Path("model"), "--output", f"{s3}/elastic", "--workers", "1,2",
            "--backbone-epochs", "2", "--likelihood-steps", "240", "--save-every", "20",
            "--adversarial-steps", "4", "--save-adversarial", "2",
        )  # fmt: skip
        log = tmp_path / "log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "jobs.train", *line], stdout=stream, stderr=stream,
                env=os.environ
                | {"RAY_ADDRESS": cluster.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"},
            )  # fmt: skip
        # it counts from when Ray Train asked its workers, a second or two after it was written
        while (saved := counted()) < 40:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        cluster.remove_node(machines[1], allow_graceful=False)
        assert process.wait(500) == 0, log.read_text()[-3000:]
    finally:
        cluster.shutdown()
    said = log.read_text()
    assert "training anew with 2 workers on cpu" in said
    resumed = re.search(r"training from step (\d+) of likelihood with 1 workers on cpu", said)
    assert resumed and int(resumed[1]) >= saved
    with filesystem.open_input_stream("shop/elastic/curves.json") as stream:
        rows = json.loads(stream.read())["rows"]
    assert [r["step"] for r in rows if r["stage"] == "likelihood"] == list(range(20, 241, 20))
    assert [row["stage"] for row in rows].count("backbone held-out") == 1
    assert Captioner.from_pretrained(f"{s3}/elastic").styles == ("formal", "colloquial")

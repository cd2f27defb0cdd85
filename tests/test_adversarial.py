from __future__ import annotations

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from process_tree import descendants
from tiny_model import write_pretrained

from stylegan import corpora
from stylegan.adversarial import (
    SMOOTHING,
    Controls,
    matching,
    pair_counts,
    quality,
    seesaw,
    sibling_overlap,
    steer_beta,
    train_adversarial,
    trouble,
)  # fmt: skip
from stylegan.captioner import Captioner
from stylegan.corpora import Example, Product, PseudoPairs
from stylegan.discriminator import Discriminator
from stylegan.generator import Generator, GeneratorConfig
from stylegan.rounds import HIGHEST_ODDS, train_rounds, weigh
from stylegan.rules import Rules
from stylegan.teacher import Proofreader
from stylegan.training import Curves, Process, TrainingConfig, assign, train_likelihood

OPENINGS = ["such a lovely", "this is a really neat", "what a smart", "here is a fine"]
ENDINGS = [
    "for summer.", "for every day!", "that goes with anything.", "full of charm.", "for a party.",
    "to look at.", "with a bit of shine.", "for autumn walks.", "as a gift!", "made with care.",
    "to keep for years.", "that nobody else has.",
]  # fmt: skip
KINDS = ["watch", "belt", "tie"]
SENTENCES = [f"{o} {kind} {e}" for o in OPENINGS for kind in KINDS for e in ENDINGS]
CONFIG = TrainingConfig(
    preset="tiny", likelihood_steps=250, likelihood_batch=32, likelihood_rate=3e-3, ema_decay=0.9,
    adversarial_steps=4, adversarial_batch=4, group_size=4, warmup_steps=6, watched=48,
    measure_every=4, report_adversarial=2, save_adversarial=2, report_every=1000, penalty=0.01,
)  # fmt: skip
Networks = tuple[Generator, Any, PseudoPairs, torch.Tensor]


def products() -> list[Product]:
    return [
        Product(0, f"{kind.capitalize()} for {who}.") for kind in KINDS for who in ("men", "women")
    ]


@pytest.fixture(scope="module")
def likelihood_model() -> Networks:
    """A tiny language model that has learned the sentences; no image is involved."""
    tokenizer = corpora.train_tokenizer(SENTENCES, 400)
    torch.manual_seed(0)
    config = GeneratorConfig.preset("tiny", tokenizer.get_vocab_size(), ["formal", "colloquial"])
    generator = Generator(config)
    pairs = PseudoPairs(products(), {"colloquial": SENTENCES})
    features = torch.zeros(1, config.image_length, 64)
    held_out = [pairs.paired_example("colloquial", np.random.default_rng(0))]
    train_likelihood(
        generator, tokenizer, pairs, [], features, held_out, CONFIG, process=Process(),
        curves=Curves(), log=lambda line: None,
    )  # fmt: skip
    return generator, tokenizer, pairs, features


def fresh(networks: Networks) -> tuple[Generator, Discriminator]:
    generator = Generator(networks[0].config)
    generator.load_state_dict(networks[0].state_dict())
    torch.manual_seed(1)
    return generator.eval(), Discriminator.beside(generator)


def play(
    networks: Networks, config: TrainingConfig, pairs: PseudoPairs | None = None, **more: Any
) -> tuple[Generator, Discriminator, dict[str, dict[str, float]], Curves]:
    generator, discriminator = fresh(networks)
    curves, pairs = Curves(), pairs or networks[2]
    held_out = {style: texts[::2] for style, texts in pairs.plain.items()}
    verdict = train_adversarial(
        generator, discriminator, networks[1], pairs, held_out, networks[3], Rules(), config,
        process=Process(), curves=curves, log=lambda line: None, **more,
    )  # fmt: skip
    return generator, discriminator, verdict, curves


def share(generator: Generator, tokenizer: Any, opening: str) -> float:
    captioner = Captioner(generator, tokenizer, replace_decoding())
    captions = captioner.caption(
        [None] * 96, descriptions=["Watch for men."] * 96, seed=list(range(96))
    )
    return sum((c.text or "").lower().startswith(opening) for c in captions) / 96


def replace_decoding() -> Any:
    from stylegan.captioner import Decoding

    return Decoding(max_candidates=1)


def test_the_generator_learns_the_voice_from_plain_sentences(likelihood_model: Networks) -> None:
    """People open in one of four ways only; nothing but the discriminator says so."""
    voice = [text for text in SENTENCES * 10 if text.startswith(OPENINGS[0])]
    pairs = PseudoPairs(products(), {"colloquial": voice})
    config = replace(
        CONFIG, adversarial_steps=40, adversarial_batch=8, warmup_steps=30, adversarial_rate=1e-3,
        discriminator_rate=1e-3, kl_target=0.2, likelihood_weight=0.0, measure_every=10,
        diversity_weight=0.0, matching_weight=0.0,
    )  # fmt: skip
    before = share(likelihood_model[0], likelihood_model[1], OPENINGS[0])
    generator, _, verdict, _ = play(likelihood_model, config, pairs)
    after = share(generator, likelihood_model[1], OPENINGS[0])
    assert before < 0.45 and after > before + 0.25
    assert verdict["after"]["auc"] < verdict["before"]["auc"]


def play_rounds(networks: Networks, pairs: PseudoPairs, config: TrainingConfig, **more: Any) -> Any:
    generator = fresh(networks)[0]
    curves = Curves()

    def begin() -> Discriminator:
        torch.manual_seed(1)
        return Discriminator.beside(networks[0])

    verdict = train_rounds(
        generator, begin, networks[1], pairs, {"colloquial": pairs.plain["colloquial"][::2]},
        networks[3], Rules(), config, process=Process(), curves=curves, log=lambda line: None,
        **more,
    )  # fmt: skip
    return generator, verdict, curves


ROUNDS = replace(
    CONFIG, rounds=2, round_captions=192, round_discriminator_steps=30, round_steps=30,
    adversarial_steps=0, adversarial_rate=1e-3, discriminator_rate=1e-3, likelihood_weight=0.1,
)  # fmt: skip


def test_rounds_teach_the_voice_and_go_on_where_they_were(likelihood_model: Networks) -> None:
    """People open in one of four ways only; only the discriminators say so."""
    voice = [text for text in SENTENCES * 10 if text.startswith(OPENINGS[0])]
    pairs = PseudoPairs(products(), {"colloquial": voice})
    # what is likely by itself must not be learned from the pseudo-pairs
    config = replace(ROUNDS, likelihood_weight=0.0)
    states: list[dict[str, Any]] = []
    generator, verdict, curves = play_rounds(
        likelihood_model, pairs, config, save=lambda state: states.append(copy.deepcopy(state))
    )
    before = share(likelihood_model[0], likelihood_model[1], OPENINGS[0])
    after = share(generator, likelihood_model[1], OPENINGS[0])
    assert before < 0.45 and after > before + 0.2
    assert verdict["after"]["auc"] < verdict["before"]["auc"]
    assert [state["step"] for state in states] == [1, 2]
    assert [sample["step"] for sample in curves.samples] == [0, 1, 2]
    again, other, _ = play_rounds(likelihood_model, pairs, config, resume=states[0])
    assert other == verdict
    for one, same in zip(generator.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, same)


def test_weights_are_odds_bounded_and_of_mean_one_in_each_group() -> None:
    log_odds = torch.tensor([0.0, math.log(3), 9.0, -9.0, -9.0, -8.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    weights = weigh(log_odds, group, 3, Process())  # of the third there is none
    mean = (1 + 3 + HIGHEST_ODDS + math.exp(-9)) / 4
    torch.testing.assert_close(weights[:3], torch.tensor([1.0, 3.0, HIGHEST_ODDS]) / mean)
    assert weights[4:].mean().item() == pytest.approx(1.0)
    assert (weights[5] / weights[4]).item() == pytest.approx(math.e, rel=1e-4)


def test_the_first_round_is_played_with_what_a_teacher_wrote(likelihood_model: Networks) -> None:
    """Of written examples those are learned that people could have written, and stay beside."""
    voice = [text for text in SENTENCES * 10 if text.startswith(OPENINGS[0])]
    said = {kind: product.description for product in products() for kind in KINDS
            if kind in product.description.lower()}  # fmt: skip
    examples = [
        Example(text, "colloquial", said[kind])
        for text in SENTENCES for kind in KINDS if f" {kind} " in text
    ]  # fmt: skip
    false = [replace(example, description="Sock.") for example in examples[:9]]
    pairs = PseudoPairs(
        products(), {"colloquial": voice}, None, {"colloquial": [*examples, *false]}, 0.9
    )
    config = replace(ROUNDS, rounds=1, round_captions=48, likelihood_weight=1.0)
    generator, _, curves = play_rounds(likelihood_model, pairs, config)
    row = next(row for row in curves.rows if row["stage"] == "round")
    assert row["captions"] == len(examples) == len(pairs.written["colloquial"])
    assert float(row["effective_share"]) < 0.8
    drawn = [pairs.paired_example("colloquial", np.random.default_rng(i)) for i in range(200)]
    opened = [x.text.startswith(OPENINGS[0]) for x in drawn if x in examples]
    assert len(opened) > 150 and np.mean(opened) > 0.5  # a quarter of what was written
    before = share(likelihood_model[0], likelihood_model[1], OPENINGS[0])
    assert share(generator, likelihood_model[1], OPENINGS[0]) > before + 0.1


def test_what_a_proofreader_finds_unfit_is_unlearned(
    likelihood_model: Networks, tmp_path: Path
) -> None:
    """People open in four ways, of which who read the captions finds one unfit."""
    write_pretrained(tmp_path, "decoder")
    people = [text for text in SENTENCES if not text.startswith(OPENINGS[0])]
    judged = [(text, not text.startswith(OPENINGS[0])) for text in SENTENCES * 10]
    proofreader = Proofreader(tmp_path, people, judged=judged)
    pairs = PseudoPairs(products(), {"colloquial": SENTENCES * 3})
    generator, verdict, curves = play_rounds(
        likelihood_model, pairs, replace(ROUNDS, likelihood_weight=0.0, round_captions=640),
        proofreader=proofreader,
    )  # fmt: skip
    before = share(likelihood_model[0], likelihood_model[1], OPENINGS[0])
    assert share(generator, likelihood_model[1], OPENINGS[0]) < before / 2
    assert verdict["after"]["unfit"] < verdict["before"]["unfit"]
    assert all("unfit" in row for row in curves.rows if row["stage"] == "adversarial held-out")


def test_what_was_read_and_is_unfit_becomes_unlikelier(likelihood_model: Networks) -> None:
    """People open in four ways; of the captions that were read those of one are unfit."""
    unfit = [
        Example(text, "colloquial", f"{kind.capitalize()} for men.")
        for kind in KINDS for text in SENTENCES
        if f" {kind} " in text and text.startswith(OPENINGS[0])
    ]  # fmt: skip
    told = []
    for weight in (0.0, 3.0):
        states: list[dict[str, Any]] = []
        config = replace(ROUNDS, rounds=1, likelihood_weight=0.0, unfit_weight=weight)
        generator, _, _ = play_rounds(
            likelihood_model, likelihood_model[2], config, unfit=unfit,
            save=lambda state, states=states: states.append(copy.deepcopy(state)),
        )  # fmt: skip
        # the watch compares with people, who do say it: what a round has made is looked at
        assign([p for p in generator.parameters() if p.requires_grad], states[0]["trained"])
        told.append(share(generator, likelihood_model[1], OPENINGS[0]))
    assert told[0] > 0.1 and told[1] < told[0] / 2


def test_rounds_end_when_there_is_nothing_to_learn_from(likelihood_model: Networks) -> None:
    rounds = replace(ROUNDS, round_captions=32)
    generator, verdict, _ = play_rounds(likelihood_model, likelihood_model[2], rounds)
    assert verdict["before"] == verdict["after"]
    for one, same in zip(generator.parameters(), likelihood_model[0].parameters(), strict=True):
        assert torch.equal(one, same)


def test_worn_out_phrases_cost_and_forgotten_ones_pay() -> None:
    people = pair_counts([[5, 6]] * 8 + [[7, 8]] * 8)
    captions = pair_counts([[5, 6]] * 14 + [[7, 8]] * 2)
    worn, forgotten = matching([[5, 6], [7, 8]], people, captions).tolist()
    assert worn == pytest.approx(math.log((8 + SMOOTHING) / (14 + SMOOTHING)))
    assert forgotten == pytest.approx(math.log((8 + SMOOTHING) / (2 + SMOOTHING)))
    # numbers of sentences do not matter, and what neither says is worth nothing
    assert matching([[9, 9]], people, people).tolist() == [0.0]
    twice = pair_counts([[5, 6]] * 1600 + [[7, 8]] * 1600)
    assert matching([[5, 6]], people, twice).item() == pytest.approx(0.22, abs=0.01)


def test_micro_batches_add_up_to_the_same_step(likelihood_model: Networks) -> None:
    whole, _, _, _ = play(likelihood_model, replace(CONFIG, measure_every=99))
    parts, _, _, _ = play(likelihood_model, replace(CONFIG, measure_every=99, micro_batch=5))
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("loss", ["minimax", "non-saturating", "hinge"])
def test_every_loss_plays(loss: str, likelihood_model: Networks) -> None:
    _, _, verdict, curves = play(likelihood_model, replace(CONFIG, loss=loss, adversarial_steps=2))
    assert set(verdict) == {"before", "after"}
    assert curves.events[-1]["kind"] == "done"


def test_a_pretrained_discriminator_plays(likelihood_model: Networks, tmp_path: Path) -> None:
    """It reads by a tokeniser of its own, and its trunk learns more slowly than what is new."""
    write_pretrained(tmp_path, "encoder")
    generator, tokenizer, pairs, features = likelihood_model
    torch.manual_seed(1)
    discriminator = Discriminator.pretrained(tmp_path, generator.config.styles)
    before = {k: v.clone() for k, v in discriminator.state_dict().items()}
    verdict = train_adversarial(
        fresh(likelihood_model)[0], discriminator, tokenizer, pairs, {"colloquial": SENTENCES[::2]},
        features, Rules(), replace(CONFIG, adversarial_steps=2, warmup_steps=8), process=Process(),
        curves=(curves := Curves()), log=lambda line: None,
    )  # fmt: skip
    assert set(verdict) == {"before", "after"} and curves.events[-1]["kind"] == "done"
    moved = {k: (v - before[k]).abs().mean().item() for k, v in discriminator.state_dict().items()}
    layer, new = "trunk.encoder.layer.0.output.dense.weight", "features.2.weight"
    assert 0 < moved[layer] < moved[new] / 3


def test_two_voices_are_told_apart_and_reported_apart(likelihood_model: Networks) -> None:
    config = GeneratorConfig.preset("tiny", likelihood_model[0].config.text_config.vocab_size,
                                    ["formal", "colloquial", "humorous"])  # fmt: skip
    generator = Generator(config).eval()
    pairs = PseudoPairs(
        products(), {"colloquial": SENTENCES[:72], "humorous": SENTENCES[72:]}
    )
    curves = Curves()
    verdict = train_adversarial(
        generator, Discriminator.beside(generator), likelihood_model[1], pairs,
        {"colloquial": SENTENCES[:72:2], "humorous": SENTENCES[72::2]}, likelihood_model[3],
        Rules(), replace(CONFIG, adversarial_steps=4), process=Process(), curves=curves,
        log=lambda line: None,
    )  # fmt: skip
    assert {"auc/colloquial", "auc/humorous", "named/humorous"} <= set(verdict["after"])
    row = next(row for row in curves.rows if row["stage"] == "adversarial")
    assert any(name.startswith("d_real/") for name in row)


def test_a_game_that_runs_away_is_rolled_back_and_stopped(likelihood_model: Networks) -> None:
    """Far too high a rate: back to the likelihood model each time, and after three a clear stop."""
    config = replace(CONFIG, adversarial_rate=0.05, adversarial_steps=200, kl_target=0.01,
                     measure_every=2)  # fmt: skip
    lines: list[str] = []
    generator, discriminator = fresh(likelihood_model)
    curves = Curves()
    train_adversarial(
        generator, discriminator, *likelihood_model[1:3], {"colloquial": SENTENCES[::2]},
        likelihood_model[3], Rules(), config, process=Process(), curves=curves, log=lines.append,
    )  # fmt: skip
    kinds = [event["kind"] for event in curves.events]
    assert kinds.count("rollback") == 3 and kinds.count("stop") == 1
    stop = next(line for line in lines if "stop:" in line)
    assert "the best snapshot is kept" in stop
    rates = [row["rate"] for row in curves.rows if row["stage"] == "adversarial"]
    assert min(map(float, rates)) < 0.05 / 2
    if kinds.count("snapshot") == 1:  # nothing was better: the likelihood model is delivered
        kept = likelihood_model[0].parameters()
        for one, other in zip(generator.parameters(), kept, strict=True):
            assert torch.equal(one, other)


def test_seesaw() -> None:
    assert [seesaw(accuracy) for accuracy in (0.5, 0.65, 0.75, 0.85, 0.9)] == [3, 1, 1, 1, 0]


def test_beta_holds_the_kl_at_its_target() -> None:
    assert steer_beta(0.2, 0.3, 0.1) > 0.2 > steer_beta(0.2, 0.05, 0.1)
    assert steer_beta(0.2, 0.1, 0.1) == 0.2
    assert steer_beta(0.2, 0.3, 0.0) == 0.0  # no bound


def test_siblings_that_say_the_same_overlap() -> None:
    overlap = sibling_overlap([[1, 2, 3], [1, 2, 3], [4, 5, 6], [1, 2, 9], [7, 8], [5, 6]], 3)
    torch.testing.assert_close(overlap, torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0, 0.0]))


FIRST = {
    "auc": 0.7, "score": 0.0, "distinct_2": 1.1, "named": 0.8, "contradiction": 0.1,
    "invented": 0.02, "words": 7.0, "human_words": 9.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "controls", "why"),
    [
        ({}, {}, ""),
        ({"auc": 0.6, "score": 0.5, "words": 9.5}, {}, ""),
        ({}, {"high_steps": 50}, "pair accuracy was above .9"),
        ({}, {"kl": 0.35}, "KL is 0.35"),
        ({"distinct_2": 0.8}, {}, "distinct-2 fell to 0.80"),
        ({"contradiction": 0.15}, {}, "contradictions rose"),
        ({"words": 5.0}, {}, "5.0 words long"),
        ({"words": 11.0}, {}, "11.0 words long"),
        ({"score": 0.5, "auc": 0.78}, {}, "score rises while another detector"),
    ],
)
def test_trouble(change: dict[str, float], controls: dict[str, Any], why: str) -> None:
    found = trouble(FIRST | change, FIRST, FIRST, Controls(**controls))
    assert why in found and bool(found) == bool(why)


def test_quality_counts_lies_and_nonsense() -> None:
    assert quality(FIRST | {"auc": 0.6}) < quality(FIRST)
    assert quality(FIRST | {"contradiction": 0.3}) > quality(FIRST)
    assert quality(FIRST | {"distinct_2": 0.5}) > quality(FIRST)


def _rank(rank: int, size: int, port: int, directory: str, weights: Any, rounds: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    tokenizer = corpora.train_tokenizer(SENTENCES, 400)
    config = GeneratorConfig.preset("tiny", tokenizer.get_vocab_size(), ["formal", "colloquial"])
    generator = Generator(config)
    generator.load_state_dict(weights)
    torch.manual_seed(1)
    discriminator = Discriminator.beside(generator)
    seen: list[torch.Tensor] = []

    def save(state: dict[str, Any]) -> None:
        values = [*state["trained"], *state.get("discriminator", {}).values()]
        seen.append(torch.cat([v.flatten().double() for v in values]))

    examples = [Example(t, "colloquial", f"{k.capitalize()} for men.")
                for t in SENTENCES for k in KINDS if f" {k} " in t]  # fmt: skip
    written = {"colloquial": examples} if rounds else None
    pairs = PseudoPairs(products(), {"colloquial": SENTENCES}, None, written, 0.5)
    told: dict[str, Any] = {"process": Process.current(), "curves": Curves(), "save": save}
    data = {"colloquial": SENTENCES[::2]}, torch.zeros(1, config.image_length, 64), Rules()
    if rounds:
        few = replace(ROUNDS, rounds=rounds, round_captions=768, round_discriminator_steps=4,
                      round_steps=4, unfit_weight=0.1)  # fmt: skip

        def begin() -> Discriminator:
            return copy.deepcopy(discriminator)

        train_rounds(
            generator, begin, tokenizer, pairs, *data, few, log=lambda line: None,
            unfit=examples[:5], **told,
        )  # fmt: skip
    else:
        train_adversarial(
            generator, discriminator, tokenizer, pairs, *data,
            replace(CONFIG, save_adversarial=1, measure_every=2), log=lambda line: None, **told,
        )  # fmt: skip
    torch.save(seen, f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("rounds", "saves"), [(0, 4), pytest.param(2, 2, marks=pytest.mark.slow)],
    ids=["steps", "rounds"],
)  # fmt: skip
def test_ranks_agree_after_every_step(
    rounds: int, saves: int, likelihood_model: Networks, tmp_path: Path
) -> None:
    """Each rank samples captions of its own; parameters are the same to the last bit."""
    port = 29500 + os.getpid() % 2000
    weights = likelihood_model[0].state_dict()
    settings = 2, port, str(tmp_path), weights, rounds
    mp.spawn(_rank, settings, nprocs=2)  # type: ignore[no-untyped-call]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(one) == len(other) == saves
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(one[0], one[1])


# --- killed -------------------------------------------------------------------------------------


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    """A command that trains for about a minute on drawn products."""
    return [
        sys.executable, "-m", "jobs.train", "--catalog", "samples", "--colloquial", "embedded",
        "--output", str(tmp_path / "model"), "--preset", "tiny", "--backbone-epochs", "1",
        "--likelihood-steps", "60", "--adversarial-steps", "60", "--adversarial-batch", "4",
        "--critic-captions", "96",
        "--group-size", "3", "--warmup-steps", "4", "--watched", "32", "--measure-every", "20",
        "--report-adversarial", "2", "--save-adversarial", "10", "--report-every", "20",
    ]  # fmt: skip


def wait_for(log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.3)


def steps(model: Path) -> list[int]:
    rows = json.loads((model / "curves.json").read_text())["rows"]
    return [row["step"] for row in rows if row["stage"] == "adversarial"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_worker_is_replaced(line: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen([*line, "--workers", "2"], stdout=stream, stderr=stream)
    wait_for(log, "adversarial  step 24", process)
    lines = descendants(process.pid)
    os.kill(max(p for p in lines if re.match("ray::.*TrainWorker", lines[p])), signal.SIGKILL)
    assert process.wait(500) == 0, log.read_text()[-3000:]
    assert steps(tmp_path / "model") == list(range(2, 61, 2))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_driver_goes_on_by_the_same_command(line: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*line, "--workers", "1"], stdout=stream, stderr=stream, start_new_session=True
        )
    wait_for(log, "adversarial  step 24", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    again = subprocess.run([*line, "--workers", "1"], capture_output=True, text=True, timeout=500)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert "likelihood  step" not in again.stdout and "adversarial  step 2 " not in again.stdout
    assert steps(tmp_path / "model") == list(range(2, 61, 2))
    assert "auc" in again.stdout  # the verdict at the end

from __future__ import annotations

import io
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from stylegan.brand import BrandRules, spoken
from stylegan.captioner import (
    Caption,
    Captioner,
    Decoding,
    _cut,
    _draw,
    _Generated,
    _Limits,
    _Watch,
    model_revision,
    save_model,
)  # fmt: skip
from stylegan.generator import EOS
from stylegan.storage import resolve_filesystem


@pytest.fixture(scope="module")
def captioner(tiny_model: Path) -> Captioner:
    return Captioner.from_pretrained(tiny_model, device="cpu")


def noise_images(count: int, size: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(count)]


def test_a_caption_depends_on_its_row_alone(captioner: Captioner) -> None:
    images, seeds = noise_images(70, captioner.image_size), list(range(70))
    together = captioner.caption(images, seed=seeds)
    backwards = captioner.caption(images[::-1], seed=seeds[::-1])[::-1]
    alone = [captioner.caption([images[i]], seed=[seeds[i]])[0] for i in (0, 33, 69)]
    assert together == backwards
    assert [together[i] for i in (0, 33, 69)] == alone
    assert len({caption.text for caption in together}) > 60


def only_rows(captioner: Captioner, most: int) -> Callable[[], None]:
    """Each part of the networks runs out of memory for more rows than that; call it to undo."""

    def refuse(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        first = next(v for v in (*arguments, *named.values()) if isinstance(v, torch.Tensor))
        if len(first) > most:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(first)} rows")

    generator = captioner.generator
    networks = [generator.vision, generator.projector, generator.language]
    hooks = [n.register_forward_pre_hook(refuse, with_kwargs=True) for n in networks]
    return lambda: [hook.remove() for hook in hooks].clear()


def test_what_does_not_fit_into_memory_is_tried_again_in_smaller_tiles(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = Captioner.from_pretrained(tiny_model, device="cpu")
    images, seeds = noise_images(40, loaded.image_size), list(range(40))
    undo = only_rows(loaded, 8)
    halved = loaded.caption(images, seed=seeds, best_of=2)
    assert loaded.tile == 8
    assert re.findall(r"tiles of (\d+) rows", capsys.readouterr().err) == ["16", "8"]
    undo()
    assert loaded.caption(images, seed=seeds, best_of=2) == halved  # the smaller tile is kept

    small = Captioner.from_pretrained(tiny_model, device="cpu")
    small.tile = 8
    assert small.caption(images, seed=seeds, best_of=2) == halved

    # it runs out in the midst of a caption: what was drawn is drawn again
    encoding = loaded.encode(images)
    only_rows(loaded, 2)
    assert [c.text for c in loaded.write(encoding, seed=seeds)] == [
        c.text for c in small.write(encoding, seed=seeds)
    ]
    assert loaded.tile == 2


def test_where_not_even_one_row_fits_the_error_says_so(tiny_model: Path) -> None:
    loaded = Captioner.from_pretrained(tiny_model, device="cpu")
    only_rows(loaded, 0)
    with pytest.raises(torch.OutOfMemoryError, match="not even one row fits into"):
        loaded.caption([None], descriptions=["Watch"])


def test_what_the_cpu_cannot_allocate_is_out_of_memory_and_nothing_else_is(
    tiny_model: Path,
) -> None:
    loaded = Captioner.from_pretrained(tiny_model, device="cpu")

    def allocate(module: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        torch.empty(1 << 60 if len(arguments[0]) > 8 else 1, dtype=torch.uint8)

    hook = loaded.generator.projector.register_forward_pre_hook(allocate)
    assert loaded.caption(noise_images(1, loaded.image_size))[0].text and loaded.tile == 8
    hook.remove()
    loaded.generator.projector.register_forward_pre_hook(lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        loaded.caption(noise_images(1, loaded.image_size))
    assert loaded.tile == 8


def test_some_candidates_begin_with_the_product(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrained model hardly ever hits on it by itself."""
    descriptions = ["Black watch for men", "Blue shoes", "Levis Men Belt"] * 8
    nouns, openings = ["watch", "shoe", "belt"] * 8, ["This watch", "These shoes", "This belt"] * 8

    def caption() -> list[str]:
        captions = captioner.caption([None] * 24, descriptions=descriptions, seed=list(range(24)))
        return [caption.text or "" for caption in captions]

    texts = caption()
    monkeypatch.setattr("stylegan.captioner.OPENED", 0)
    before = sum(noun in text.lower() for noun, text in zip(nouns, caption(), strict=True))
    after = sum(noun in text.lower() for noun, text in zip(nouns, texts, strict=True))
    assert before < 6 and after >= 12
    opened = [text.startswith(start) for start, text in zip(openings, texts, strict=True)]
    assert sum(opened) >= 12 and any(opened[1::3])


def test_tokens_are_drawn_as_likely_as_they_are() -> None:
    wanted = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.1, 0.0])
    uniform = (torch.arange(1000) + 0.5) / 1000
    greedy = torch.zeros(1000, dtype=torch.bool)

    def shares(decoding: Decoding, probabilities: torch.Tensor = wanted) -> list[float]:
        drawn = _draw(probabilities.log().expand(1000, -1), uniform, greedy, decoding)
        return (drawn.bincount(minlength=6) / 1000).tolist()

    assert shares(Decoding()) == pytest.approx(wanted.tolist(), abs=0.002)
    assert shares(Decoding(top_k=2)) == pytest.approx([4 / 7, 0, 3 / 7, 0, 0, 0], abs=0.002)
    assert shares(Decoding(top_p=0.75)) == pytest.approx([4 / 9, 0, 3 / 9, 2 / 9, 0, 0], abs=0.002)
    assert shares(Decoding(temperature=0.5))[0] == pytest.approx(16 / 30, abs=0.002)
    # the third token is rarer here than elsewhere by more than a nat
    frequency = torch.tensor([0.1, 0.1, 0.9, 0.5, 0.2, 0.1]).log()
    bound = Decoding(max_surprise=1.0)
    drawn = _draw(wanted.log().expand(1000, -1), uniform, greedy, bound, frequency)
    kept = [4 / 7, 0, 0, 2 / 7, 1 / 7, 0]
    assert (drawn.bincount(minlength=6) / 1000).tolist() == pytest.approx(kept, abs=0.002)
    ends = torch.tensor([0.0, 1.0])
    assert _draw(wanted.log().expand(2, -1), ends, greedy[:2], Decoding()).tolist() == [0, 4]
    assert _draw(wanted.log()[None], ends[:1], ~greedy[:1], Decoding()).tolist() == [0]
    # of two that are equal but for the last bits, it does not matter which has more
    even = torch.full((6,), 1 / 6)
    odd = even + torch.tensor([1, -1, 1, -1, 1, -1]) * 1e-7
    assert shares(Decoding(), even) == shares(Decoding(), odd) == shares(Decoding(), odd.flip(0))


def test_the_number_of_threads_changes_nothing(captioner: Captioner) -> None:
    images, threads = noise_images(8, captioner.image_size), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = captioner.caption(images)
        torch.set_num_threads(2)
        assert captioner.caption(images) == one
    finally:
        torch.set_num_threads(threads)


def test_seeds_change_captions(captioner: Captioner) -> None:
    image = noise_images(1, captioner.image_size)
    captions = captioner.caption(image * 5, seed=[1, 2, 3, 4, 5])
    assert len({caption.text for caption in captions}) >= 4
    assert [caption.seed for caption in captions] == [1, 2, 3, 4, 5]


def test_every_kind_of_image_is_the_same_image(captioner: Captioner, tmp_path: Path) -> None:
    pixels = noise_images(1, captioner.image_size)[0]
    picture = Image.fromarray(pixels)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    path = tmp_path / "image.png"
    path.write_bytes(buffer.getvalue())
    captions = captioner.caption([pixels, picture, buffer.getvalue(), path, str(path)])
    assert len(set(captions)) == 1


def test_bad_images_are_rows(captioner: Captioner, tmp_path: Path) -> None:
    captions = captioner.caption([b"not an image", tmp_path / "none.jpg", None])
    assert [caption.error_class for caption in captions] == ["not an image", "gone", "gone"]
    assert [caption.text for caption in captions] == [None, None, None]


def test_a_description_is_kept_and_needs_no_picture(captioner: Captioner) -> None:
    [caption] = captioner.caption([None], descriptions=["Black watch for men"])
    assert caption.description == "Black watch for men"
    assert caption.text


def test_formal_style_is_the_description(captioner: Captioner) -> None:
    [caption] = captioner.caption([None], style="formal", descriptions=["black watch for men"])
    assert caption.text == "Black watch for men."


def test_an_untrained_model_is_marked_for_review(captioner: Captioner) -> None:
    assert all(c.needs_review for c in captioner.caption([None] * 3, descriptions=["Watch"] * 3))


def test_wrong_arguments_are_refused(captioner: Captioner) -> None:
    with pytest.raises(ValueError, match="unknown style 'rude': this model writes formal, coll"):
        captioner.caption([None], style="rude", descriptions=["Watch"])
    with pytest.raises(ValueError, match="1 images, 2 descriptions"):
        captioner.caption([None], descriptions=["Watch", "Belt"])
    with pytest.raises(ValueError, match=r"shape \[4, 4\]"):
        captioner.caption([np.zeros((4, 4), dtype=np.uint8)])
    for wrong in ("temperature", "max_surprise", "selectivity"):
        with pytest.raises(ValueError, match=f"{wrong} is -1"):
            Decoding(**{wrong: -1.0})


def test_a_missing_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model directory: config\.json"):
        Captioner.from_pretrained(tmp_path)


def test_the_revision_is_that_of_the_files(
    tiny_model: Path, captioner: Captioner, tmp_path: Path
) -> None:
    assert model_revision(tiny_model) == captioner.model_revision
    decoding = Decoding(temperature=0.7)
    save_model(tmp_path, Captioner(captioner.generator, captioner.tokenizer, decoding))
    captioner.generator.float()
    assert model_revision(tmp_path) != captioner.model_revision


def test_nothing_of_a_model_on_object_storage_stays_on_disk(
    tiny_model: Path, captioner: Captioner, s3: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    filesystem, root = resolve_filesystem(f"{s3}/{tmp_path.name}")
    for path in tiny_model.iterdir():
        with filesystem.open_output_stream(f"{root}/{path.name}") as stream:
            stream.write(path.read_bytes())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    remote = Captioner.from_pretrained(f"{s3}/{tmp_path.name}", device="cpu")
    assert not list(tmp_path.iterdir())
    assert remote.model_revision == captioner.model_revision
    images = noise_images(3, captioner.image_size)
    assert remote.caption(images) == captioner.caption(images)
    with pytest.raises(FileNotFoundError, match=r"no model directory: config\.json"):
        Captioner.from_pretrained(f"{s3}/{tmp_path.name}/nothing")
    assert not list(tmp_path.iterdir())


def test_transformers_reads_the_directory(tiny_model: Path) -> None:
    assert AutoConfig.from_pretrained(tiny_model).model_type == "stylegan_generator"
    assert AutoTokenizer.from_pretrained(tiny_model).eos_token == "<eos>"
    assert json.loads((tiny_model / "generation_config.json").read_text())["max_candidates"] == 2


def test_each_caption_has_a_score(captioner: Captioner) -> None:
    captions = captioner.caption(noise_images(40, captioner.image_size), seed=list(range(40)))
    assert all(c.score is not None and 0 <= c.score <= 1 for c in captions)
    assert len({c.score for c in captions}) > 30


def test_best_of_keeps_the_highest_score_that_obeys(captioner: Captioner) -> None:
    images, seeds = noise_images(33, captioner.image_size), list(range(33))
    one = captioner.caption(images, seed=seeds, best_of=1)
    four = captioner.caption(images, seed=seeds, best_of=4)
    assert four == captioner.caption(images[::-1], seed=seeds[::-1], best_of=4)[::-1]
    assert four[7] == captioner.caption(images[7:8], seed=seeds[7:8], best_of=4)[0]
    changed = [(a.score or 0, b.score or 0) for a, b in zip(one, four, strict=True) if a != b]
    assert changed and sum(b > a for a, b in changed) > sum(b < a for a, b in changed)


def test_a_seen_colour_is_said_only_when_the_model_is_sure(captioner: Captioner) -> None:
    ids = captioner.tokenizer.encode("red watch for men.").ids
    written = _Generated("red watch for men.", ids, [-0.01] * len(ids), True, 1.0)
    assert captioner._colour_probability(written) == pytest.approx(math.exp(-0.01), abs=0.02)
    unsure = replace(written, log_probabilities=[math.log(0.6), *[-0.01] * (len(ids) - 1)])
    assert captioner._colour_probability(unsure) < 0.61
    assert captioner._colour_probability(replace(written, text="watch for men.")) == 0


# --- brand rules, styles and numbers of one encoding --------------------------------------------


def test_a_style_more_encodes_nothing_more(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, seeds = noise_images(40, captioner.image_size), list(range(40))
    expected = {
        style: captioner.caption(images, style, seed=seeds) for style in ("formal", "colloquial")
    }
    tiles, features = [], captioner.generator.features

    def look(batch: torch.Tensor) -> torch.Tensor:
        tiles.append(len(batch))
        return features(batch)

    monkeypatch.setattr(captioner.generator, "features", look)
    encoding = captioner.encode(images)
    for style in ("formal", "colloquial", "formal"):
        assert captioner.write(encoding, style, seeds) == expected[style]
    assert tiles == [32, 32]


def several(captioner: Captioner, rows: list[int], count: int) -> list[list[Caption]]:
    """Captions of descriptions, each row drawing all its captions from one seed."""
    encoding = captioner.encode([None] * len(rows), [f"Men's blue shirt no. {i}" for i in rows])
    written: list[list[Caption]] = [[] for _ in rows]
    for _ in range(count):
        others = [[caption.text or "" for caption in captions] for captions in written]
        for row, caption in zip(
            written, captioner.write(encoding, seed=rows, others=others), strict=True
        ):
            row.append(caption)
    return written


def test_captions_of_an_image_differ_in_any_batch(captioner: Captioner) -> None:
    """One seed draws the same candidates again, so that only the rejection makes them differ."""
    together = several(captioner, list(range(40)), 2)
    for captions in together:
        texts = [caption.text for caption in captions]
        assert len(set(texts)) == 2
    assert several(captioner, [33], 2) == [together[33]]
    assert several(captioner, list(range(40))[::-1], 2) == together[::-1]


def test_where_there_is_no_other_caption_the_copy_needs_review(captioner: Captioner) -> None:
    encoding = captioner.encode([None], ["Black watch for men"])
    [first] = captioner.write(encoding, "formal")
    [second] = captioner.write(encoding, "formal", others=[["black watch, for men!"]])
    assert not first.needs_review and first.text == second.text
    assert second.needs_review and second.review_reasons == ("duplicate",)


def test_a_formal_caption_says_and_breaks_what_it_must(captioner: Captioner) -> None:
    encoding = captioner.encode([None], ["cheap blue shirt for men"])
    rules = BrandRules(required_columns=("brand",), max_words=6)
    [caption] = captioner.write(encoding, "formal", rules=rules, terms=[["Levi's"]])
    assert caption.text == "Cheap blue Levi's shirt for men." and not caption.needs_review
    for rules in (BrandRules(("cheap",)), BrandRules(max_words=5)):
        [caption] = captioner.write(encoding, "formal", rules=rules, terms=[["Levi's"]])
        assert caption.needs_review
        assert caption.review_reasons == (("forbidden",) if rules.forbidden else ("length",))


def test_no_token_completes_a_forbidden_phrase(captioner: Captioner) -> None:
    """Nothing of what an untrained model likes to say is said, and what is said is the row's."""
    images, seeds = noise_images(40, captioner.image_size), list(range(40))
    texts = [c.text or "" for c in captioner.caption(images, seed=seeds)]
    counts = Counter(word for text in texts for word in spoken(text).split() if len(word) > 2)
    common = [word for word, _ in counts.most_common(40)]
    rules = BrandRules(tuple(sorted(common)))
    written = captioner.caption(images, seed=seeds, rules=rules)
    assert all(rules.allows(c.text or "") for c in written)
    assert sum(a != c.text for a, c in zip(texts, written, strict=True)) > 10
    assert captioner.caption(images[5:6], seed=[5], rules=rules) == [written[5]]


def test_where_all_that_may_follow_is_forbidden_a_text_is_given_up(captioner: Captioner) -> None:
    cheap = captioner.tokenizer.encode("cheap", add_special_tokens=False).ids
    limits = [_Limits(BrandRules(("cheap",)), (), frozenset())] * 2
    watch = _Watch(captioner.tokenizer, limits)
    scores = torch.full((2, captioner.tokenizer.get_vocab_size()), -torch.inf)

    def draw(log_probs_BV: torch.Tensor) -> torch.Tensor:
        p_BV = log_probs_BV.softmax(-1)
        assert not p_BV.isnan().any()
        return p_BV.argmax(-1)

    for token in cheap:
        scores[0], scores[1] = -torch.inf, -1.0
        scores[0, token] = 0.0  # the only one that goes on with a word
        said = watch.choose(scores, draw)
    assert said[0] == EOS and watch.given_up == {0}


@pytest.mark.parametrize("before", [" such a", " such-", ' "', " /", ". "])
def test_every_spelling_of_a_forbidden_phrase_is_seen(captioner: Captioner, before: str) -> None:
    """A phrase is spelled by each division of it into tokens that the vocabulary has."""
    tokens = captioner.tokenizer.get_vocab()
    word = " so-cheap"

    def spellings(text: str) -> Iterator[list[int]]:
        if not text:
            yield []
        for end in range(1, len(text) + 1):
            token = tokens.get(text[:end].replace(" ", "Ġ"))
            if token is not None:
                for rest in spellings(text[end:]):
                    yield [token, *rest]

    start = captioner.tokenizer.encode(before, add_special_tokens=False).ids
    rules, count = BrandRules(("so cheap",)), 0
    for spelling in spellings(word):
        watch = _Watch(captioner.tokenizer, [_Limits(rules, (), frozenset())])
        liked, said = [*start, *spelling], []
        for step in range(len(liked) + 3):
            scores = torch.full((1, len(tokens)), -10.0)
            scores[0, liked[min(step, len(liked) - 1)]] = 0.0
            said += watch.choose(scores, lambda p: p.argmax(-1)).tolist()
        assert said[: len(liked) - 1] == liked[:-1] and said != liked
        assert rules.allows(captioner.tokenizer.decode([t for t in said if t > 2]))
        count += 1
    assert count > 15


def test_what_is_too_long_is_cut_to_whole_sentences_or_is_unfinished() -> None:
    def cut(text: str, finished: bool, rules: BrandRules, *terms: str) -> list[tuple[str, bool]]:
        written = _Generated(text, [], [], finished, 1.0)
        return list(_cut(written, _Limits(rules, terms, frozenset())))

    text, six = "so soft a shirt. it is nice! and", BrandRules(max_words=6)
    whole = [("so soft a shirt. it is nice!", True), ("so soft a shirt.", True)]
    assert cut(text, False, six) == [(text, False), *whole]
    assert cut("so soft a shirt.", True, six) == [("so soft a shirt.", True)]
    assert cut("so soft a shirt.", True, six, "three more words")[-1] == ("so soft a shirt.", True)
    assert cut(text, False, BrandRules(("cheap",))) == [(text, False)]


def test_a_low_score_needs_review(captioner: Captioner) -> None:
    images = noise_images(9, captioner.image_size)
    seeds = list(range(9))
    plain = captioner.caption(images, seed=seeds)
    scores = sorted(c.score or 0 for c in plain)
    for bound, count in ((0.0, 0), (scores[4], scores.index(scores[4])), (1.0, 9)):
        written = captioner.caption(images, seed=seeds, min_score=bound)
        assert [c.text for c in written] == [c.text for c in plain]
        assert sum("low score" in c.review_reasons for c in written) == count


def test_as_many_of_each(captioner: Captioner) -> None:
    with pytest.raises(ValueError, match="1 images, 2 lists of terms"):
        captioner.caption([None], descriptions=["Watch"], terms=[["a"], ["b"]])
    with pytest.raises(ValueError, match="1 images, 2 seeds"):
        captioner.caption([None], descriptions=["Watch"], seed=[1, 2])

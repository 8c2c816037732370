"""Make the text samples that are shipped: passages of public-domain books, cut by a fixed rule.

    python -m ctxprune.recipes.embedded.samples --data DIR --out DIR

DIR holds books-train, books-valid and books-test.jsonl.gz; the samples for tuning, calibration and
evaluation are taken from one each.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

# sample -> (split of the books, characters a passage, passages a book)
SAMPLES = {
    "tune": ("train", 20_000, 1),
    "calibrate": ("valid", 15_000, 2),
    "eval": ("test", 20_000, 2),
}


def passages(text: str, length: int, count: int) -> list[str]:
    """`count` passages spread evenly over a text, each beginning and ending with a paragraph."""
    chosen = []
    for number in range(count):
        start = text.find("\n\n", len(text) * (number + 1) // (count + 2)) + 2
        end = text.rfind("\n\n", start, start + length)
        if end > start:
            chosen.append(text[start:end])
    return chosen


def write(source: Path, target: Path, length: int, count: int) -> None:
    """Write one sample, the same bytes every time."""
    lines = []
    with gzip.open(source, "rt", encoding="utf-8") as books:
        for line in books:
            book = json.loads(line)
            for passage in passages(book["text"], length, count):
                about = {"author": book["author"], "title": book["title"], "text": passage}
                lines.append(json.dumps(about, ensure_ascii=False) + "\n")
    target.write_bytes(gzip.compress("".join(lines).encode("utf-8"), mtime=0))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of books-*.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder for the samples")
    options = parser.parse_args()
    for name, (split, length, count) in SAMPLES.items():
        source = options.data / f"books-{split}.jsonl.gz"
        write(source, options.out / f"{name}.jsonl.gz", length, count)


if __name__ == "__main__":
    main()

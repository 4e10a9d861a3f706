"""Seconds from a picture to a concept, of methods in turn: `python -m datencoder_jax.benchmark.seconds PICTURE`.

A machine has fast and slow minutes, so methods are compared by medians of runs that take turns: in every round the
first entry runs `_OFTEN` times before each of the others, which run once. Compiling is done before and not counted.
"""

import argparse
import statistics
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from datencoder_jax import api
from datencoder_jax.benchmark.entries import BASE, Row, make_rows, parse_entries
from datencoder_jax.data.reading import read_image
from datencoder_jax.errors import UserError
from datencoder_jax.loading import load
from datencoder_jax.methods import METHODS
from datencoder_jax.pipeline import Pipeline

_OFTEN = 3


def measure(pipeline: Pipeline, picture: np.ndarray, rows: Sequence[Row], word: str, rounds: int) -> list[list[float]]:
    """Seconds of every run of every row, in the order of the runs."""
    seconds: list[list[float]] = [[] for _ in rows]
    turns = [which for other in range(1, len(rows)) for which in (*[0] * _OFTEN, other)] or [0] * _OFTEN
    for row in rows:  # compiles
        run(pipeline, picture, row, word, 0)
    for seed in tqdm(range(rounds), unit="round"):
        for which in turns:
            seconds[which].append(run(pipeline, picture, rows[which], word, seed))
    return seconds


def run(pipeline: Pipeline, picture: np.ndarray, row: Row, word: str, seed: int) -> float:
    """Of one concept: what it starts from, and tuning."""
    method, options = row.entry.method, dict(row.entry.options)
    made = api.personalize(
        pipeline,
        [picture],
        method=method,
        steps=row.steps,
        word=None if METHODS[method].word is None else word,
        seed=seed,
        options=options,
        quiet=True,
    )
    return made.report["seconds"]["predict"] + made.report["seconds"].get("tune", 0.0)


def table(rows: Sequence[Row], seconds: Sequence[Sequence[float]]) -> str:
    """Markdown: medians, the fastest and slowest run, and medians as multiples of the first row's."""
    first = statistics.median(seconds[0])
    lines = ["| method, steps | runs | median seconds | fastest, slowest | times the first |", "|---|---|---|---|---|"]
    for row, own in zip(rows, seconds, strict=True):
        middle = statistics.median(own)
        name, span = f"{row.entry.label}, {row.steps}", f"{min(own):.2f}, {max(own):.2f}"
        lines.append(f"| {name} | {len(own)} | {middle:.2f} | {span} | {middle / first:.1f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures how long methods take from a picture to a concept."""
    parser = argparse.ArgumentParser(prog="python -m datencoder_jax.benchmark.seconds", description=main.__doc__)
    parser.add_argument("picture", help="a picture of one thing")
    parser.add_argument("--word", default="thing", help="what methods without an encoder start at (default: thing)")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["datencoder@12", "lora@300", "dreambooth@300"],
        metavar="METHOD[:OPTION=VALUE]@STEPS",
        help="at their default rates (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--model", default="toyworld", help="as for datencoder personalize (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        rows = make_rows(parse_entries(args.methods), (12,))
        for row in rows:
            if row.entry.method == BASE or row.entry.options.keys() - METHODS[row.entry.method].choices.keys():
                raise UserError(
                    f"{row.entry.label} cannot be timed here; name a method, with options of its own, such as lora@300"
                )
        if args.rounds < 1:
            raise UserError(f"--rounds must be 1 or more, not {args.rounds}")
        picture = read_image(args.picture)
        print(table(rows, measure(load(args.model), picture, rows, args.word, args.rounds)))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()

"""The toyworld benchmark of the method and its rivals: `python -m datencoder_jax.benchmark --out docs/benchmark`.

Every row is a start (encoder, or class word), a number of steps, learning rates and a blend; the same frozen model,
prompts, noise and pictures are used for all. `--sweep` chooses each row's learning rates on development instances by

    quality = identity - 5 max(0, 0.95 - prompt),     prompt = (scene + style) / 2              (1)

that is by identity among those that obey the prompt: tuned hard enough, every method copies its input picture. It
climbs from the same rates for all until no neighbour is better. The table itself is made on test instances only. `CLIP`
is the cosine between a picture and its prompt with the class word, in the space of the world's own CLIP.
"""

import argparse
import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax import api
from datencoder_jax import methods as product
from datencoder_jax.errors import UserError
from datencoder_jax.evaluation.clip_scores import text_similarity
from datencoder_jax.evaluation.judge import load_judge
from datencoder_jax.evaluation.scores import Interval
from datencoder_jax.evaluation.suite import (
    Bench,
    Extra,
    Row,
    evaluate,
    instances,
    make_bench,
    stranger,
    table,
    truth,
    write_rows,
)
from datencoder_jax.methods.words import from_words
from datencoder_jax.models.module import Model
from datencoder_jax.pipeline import Pipeline, attention_shapes
from datencoder_jax.typing import Concept, LearningRates, LowRank, Variables

TOKEN = "S*"
_START = LearningRates(embeddings=1e-3, offsets=1e-2)
_FACTORS = LearningRates(embeddings=10**0.5, offsets=10**0.25)
"""The learning rates that a sweep starts from, and by what it changes each: that of the offsets decides more."""
_DRAWS = 2
"""The stream of a seed's draws that a start is made from; `api` uses the two before."""


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: what the table calls it.
        start: "encoder", "class word", or "none" (the base model itself, under the class word).
        steps: of tuning.
        rates: learning rates.
        blend: weight of the soft path; None for the encoder's.
        offsets, embeddings: whether the part is on; an offset that is off is zero, a `v*` that is off is the hard word.
        fixed: the rates are not swept.
    """

    name: str
    start: str = "encoder"
    steps: int = 12
    rates: LearningRates = product.METHODS["datencoder"].rates
    blend: float | None = None
    offsets: bool = True
    embeddings: bool = True
    fixed: bool = False


METHODS = (
    Method("base model, class word", start="none", steps=0),
    Method("encoder only (0 steps)", steps=0),
    Method("encoder + 12 steps"),
    Method("12 steps without the encoder", start="class word"),
    Method("12 steps without the encoder, blend 1", start="class word", blend=1.0),
    Method(
        "12 steps without the encoder, offsets at 3e-2", start="class word", rates=LearningRates(1e-3, 3e-2), fixed=True
    ),
    Method("encoder + 12 steps, blend 1", blend=1.0),
    Method("encoder + 12 steps, offsets off", offsets=False),
    Method("encoder + 12 steps, v* off", embeddings=False),
)


class Producer:
    """Runs a method for the benchmark; see `evaluation.suite.Produce`."""

    def __init__(self, pipeline: Pipeline, method: Method, num: int):
        self.pipeline, self.method, self.num = pipeline, method, num

    def __call__(self, pictures: np.ndarray, prompts: Sequence[str], *, word: str, seed: int) -> np.ndarray:
        method, pipeline = self.method, self.pipeline
        if method.start == "none":
            return api.generate(pipeline, prompts, num=self.num, seed=seed, quiet=True).images
        concept = self.personalize(pictures, word, seed)
        return api.generate(pipeline, prompts, concept=concept, num=self.num, seed=seed, quiet=True).images

    def personalize(self, pictures: np.ndarray, word: str, seed: int) -> Concept:
        """The concept of pictures `[inputs, height, width, 3]` of something of the class `word`."""
        method = self.method
        start, hard_word = self._start(pictures, word, seed)
        rates = LearningRates(
            method.rates.embeddings if method.embeddings else 0.0, method.rates.offsets if method.offsets else 0.0
        )
        made = api.personalize(
            self.pipeline,
            list(pictures),
            steps=method.steps,
            token=TOKEN,
            blend=method.blend,
            seed=seed,
            learning_rates=rates,
            initial=start,
            hard_word=hard_word,
            quiet=True,
        )
        return made.concept

    def _start(self, pictures: np.ndarray, word: str, seed: int) -> tuple[Variables | None, str | None]:
        """Where tuning starts, and the hard path's word; None is what `personalize` does by itself."""
        method, base, tokenizer = self.method, self.pipeline.base, self.pipeline.tokenizer
        encoder = self.pipeline.encoder
        if encoder is None:
            raise UserError(f"there is no tuning-encoder for {self.pipeline.name}; name one with --encoder")
        if method.start == "class word":
            key = jax.random.fold_in(jax.random.key(seed), _DRAWS)
            shapes, rank = attention_shapes(base.unet), encoder.config.rank
            return from_words(base, [tokenizer.word_id(word)], shapes, rank, key), word
        if method.offsets and method.embeddings:
            return None, None
        predicted = api.personalize(self.pipeline, list(pictures), steps=0, token=TOKEN, seed=seed, quiet=True).concept
        embeddings, offsets, hard_word = jnp.asarray(predicted.embeddings), predicted.offsets, predicted.nearest_word
        if not method.offsets:
            offsets = {path: LowRank(o.down, jnp.zeros_like(o.up)) for path, o in offsets.items()}
        if not method.embeddings:
            embeddings = base.table[jnp.array([tokenizer.word_id(hard_word)])].astype(jnp.float32)
        return Variables(embeddings, jax.tree.map(jnp.asarray, offsets)), hard_word


def run(pipeline: Pipeline, method: Method, bench: Bench, num: int, extra: Mapping[str, Extra] | None = None) -> Row:
    """One row of the table."""
    subject = None if method.start == "none" else TOKEN
    settings = {"steps": method.steps, "blend": method.blend, **method.rates._asdict(), "num": num}
    produce = Producer(pipeline, method, num)
    return evaluate(method.name, produce, bench, subject=subject, settings=settings, extra=extra)


def quality(row: Row) -> float:
    """Equation (1)."""
    mean = {name: float(values.mean()) for name, values in row.values.items()}
    prompt = 0.5 * (mean["scene"] + mean["style"])
    return mean["identity"] - 5.0 * max(0.0, 0.95 - prompt)


def sweep(pipeline: Pipeline, method: Method, bench: Bench, num: int) -> tuple[Method, list[dict]]:
    """The method at learning rates without a better neighbour in `quality`, and every rate tried."""
    if method.fixed or not method.steps:
        return method, []
    tried: dict[tuple[int, int], dict] = {}

    def rates(place: tuple[int, int]) -> LearningRates:
        on = (method.embeddings, method.offsets)
        steps = zip(_START, _FACTORS, place, on, strict=True)
        return LearningRates(*(rate * factor**p if o else 0.0 for rate, factor, p, o in steps))

    def measure(place: tuple[int, int]) -> float:
        if place not in tried:
            row = run(pipeline, replace(method, rates=rates(place)), bench, num)
            means = {name: round(float(values.mean()), 4) for name, values in row.values.items()}
            tried[place] = {**rates(place)._asdict(), "quality": quality(row), **means}
            print(method.name, tried[place], flush=True)
        return tried[place]["quality"]

    moves = [(d, 0) for d in (-1, 1) if method.embeddings] + [(0, d) for d in (-1, 1) if method.offsets]
    best = (0, 0)
    while (better := max([best, *((best[0] + a, best[1] + b) for a, b in moves)], key=measure)) != best:
        best = better
    return replace(method, rates=rates(best)), list(tried.values())


def comparison(rows: Sequence[Row]) -> str:
    """The paired differences that the method stands or falls with, as Markdown; empty when a row is missing."""
    named = {row.name: row for row in rows}
    ours = named.get("encoder + 12 steps")
    lines = []
    for other in ("12 steps without the encoder", "12 steps without the encoder, blend 1", "base model, class word"):
        if ours and other in named:
            scores = (
                f"{name} {_signed(ours.minus(named[other], name))}" for name in ("identity", "CLIP", "scene", "style")
            )
            lines.append(f"- encoder + 12 steps minus {other}: " + ", ".join(scores))
    return "\n".join(lines)


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


@functools.cache
def _loaded(model: str, encoder: str | None) -> tuple[Pipeline, Model, Mapping[str, Extra]]:
    pipeline = api.load(model, encoder=encoder)
    return pipeline, load_judge(), {"CLIP": functools.partial(text_similarity, pipeline)}


def _measure(args: argparse.Namespace, method: Method) -> tuple[Method, list[dict], Row]:
    """Chooses a method's learning rates if asked to, and makes its row; in a process of its own with `--jobs`."""
    pipeline, judge, extra = _loaded(args.model, args.encoder)
    tried = []
    if args.sweep:
        method, tried = sweep(pipeline, method, make_bench(judge, instances("development", args.sweep)), 1)
    return method, tried, run(pipeline, method, make_bench(judge, instances("test", args.instances)), args.num, extra)


def _take_cores(share: int, taken) -> None:
    """Gives this process `share` of the machine's cores, before JAX counts them."""
    with taken.get_lock():
        first, taken.value = taken.value, taken.value + share
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[(first + k) % len(cores)] for k in range(share)})


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the table, with `--sweep` after choosing every row's learning rates."""
    parser = argparse.ArgumentParser(prog="python -m datencoder_jax.benchmark", description=main.__doc__)
    parser.add_argument("--model", default="toyworld")
    parser.add_argument("--encoder", default=None)
    parser.add_argument("--instances", type=int, default=64, help="test instances (default 64)")
    parser.add_argument("--num", type=int, default=2, help="pictures per prompt (default 2)")
    sweep_help = "choose learning rates on N development instances"
    parser.add_argument("--sweep", type=int, default=0, metavar="N", help=sweep_help)
    parser.add_argument("--rates", type=Path, help="learning rates chosen earlier (rates.json)")
    parser.add_argument("--only", nargs="*", help="rows whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=1, help="rows made at once, each on its share of the CPU's cores")
    parser.add_argument("--out", type=Path, required=True, help="folder for table.md, rows.json, rates.json")
    args = parser.parse_args(argv)
    try:
        _run(args)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


def _run(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    methods = [m for m in METHODS if not args.only or any(part in m.name for part in args.only)]
    if args.rates:
        chosen = json.loads(args.rates.read_text())["chosen"]
        methods = [replace(m, rates=LearningRates(*chosen[m.name])) if m.name in chosen else m for m in methods]
    measure = functools.partial(_measure, args)
    if args.jobs > 1:
        share = max(1, (os.cpu_count() or 1) // args.jobs)
        context = multiprocessing.get_context("spawn")
        shares = (share, context.Value("i", 0))
        with ProcessPoolExecutor(args.jobs, context, _take_cores, shares) as pool:
            made = list(pool.map(measure, methods))
    else:
        made = [measure(method) for method in methods]
    if args.sweep:
        record = {
            "chosen": {method.name: list(method.rates) for method, _, _ in made if method.steps},
            "tried": {method.name: tried for method, tried, _ in made if tried},
        }
        (args.out / "rates.json").write_text(json.dumps(record, indent=1) + "\n")
    _, judge, extra = _loaded(args.model, args.encoder)
    bench = make_bench(judge, instances("test", args.instances))
    rows = [truth(bench, extra=extra), stranger(bench, extra=extra), *(row for _, _, row in made)]
    command = " ".join(["python -m datencoder_jax.benchmark", *sys.argv[1:]])
    write_rows(args.out / "rows.json", rows, bench, command=command)
    report = f"{table(rows)}\n{comparison(rows)}\n"
    (args.out / "table.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()

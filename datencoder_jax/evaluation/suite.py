"""The benchmark of the embedded world: unseen individuals, prompts, true answers, and one table row per method.

```python
judge = load_judge()
bench = make_bench(judge, instances("test", 64))
rows = [truth(bench), stranger(bench), copycat(bench), evaluate("encoder + 12 steps", produce, bench)]
print(table(rows))
```
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from datencoder_jax.checkpoints.atomic import atomic_write
from datencoder_jax.evaluation import scores
from datencoder_jax.evaluation.judge import Reading, read
from datencoder_jax.evaluation.scores import Interval, bootstrap
from datencoder_jax.models.module import Model
from datencoder_jax.toyworld.captions import EVALUATION_CONTEXTS, prompt_for
from datencoder_jax.toyworld.dataset import render_batch
from datencoder_jax.toyworld.world import CLASSES, SCENES, SPLITS, Context, Draws, Instance

COLUMNS = {
    "identity": "identity",
    "attributes": "attributes",
    "class": "class",
    "scene": "scene",
    "style": "style",
    "accessory": "accessory",
    "copying": "copying",
}
"""Scores in the order of the table, and what it calls them."""

_RATES = frozenset(COLUMNS) - {"identity"}
_REFERENCE, _SECOND, _STRANGER, _INPUT = 1, 2, 3, 4  # which stream of seeds a render takes


class Produce(Protocol):
    """The method under test."""

    def __call__(self, pictures: np.ndarray, prompts: Sequence[str], *, word: str, seed: int) -> np.ndarray:
        """Generates pictures of one individual.

        Args:
            pictures: uint8 `[inputs, height, width, 3]`, all that the method sees of it.
            prompts: each with the placeholder `S*` (or `word` in its place, see `evaluate`).
            word: the class of the individual, as a person would tell it.
            seed: one per individual, the same for every method.

        Returns:
            uint8 `[prompts, num, height, width, 3]`.
        """
        ...


Extra = Callable[[np.ndarray, Sequence[str]], np.ndarray]
"""A further score: uint8 pictures `[n, h, w, 3]` and their prompts, with the class word -> values `[n]`."""


@dataclass(frozen=True)
class Bench:
    """What every method is measured on.

    Attributes:
        judge: reads the pictures.
        instances: the individuals.
        contexts: what the prompts ask for, the same for every individual.
        given: the context of each individual's input pictures; its scene is in no prompt.
        pictures: the input pictures, uint8 `[instances, inputs, size, size, 3]`.
        references: embeddings of true answers, `[instances, contexts, R, d]`.
        size: side of the pictures.
        seed: of every random choice.
    """

    judge: Model
    instances: tuple[Instance, ...]
    contexts: tuple[Context, ...]
    given: tuple[Context, ...]
    pictures: np.ndarray
    references: np.ndarray
    size: int
    seed: int


@dataclass(frozen=True)
class Row:
    """One method's scores.

    Attributes:
        name: what the table calls the method.
        values: by score, `[instances]`: means over the prompts and pictures of each individual.
        by_prompt: by score, the mean over individuals for each prompt, `[contexts]`.
        seconds: mean wall-clock time per individual; 0 for rows that generate nothing.
        settings: how the method was set (steps, learning rate ...), for the reader of the JSON file.
    """

    name: str
    values: dict[str, np.ndarray]
    by_prompt: dict[str, np.ndarray]
    seconds: float = 0.0
    settings: Mapping[str, Any] | None = None

    def interval(self, score: str) -> Interval:
        """Mean and 95 % bootstrap interval over individuals."""
        return bootstrap(self.values[score])

    def minus(self, other: "Row", score: str) -> Interval:
        """The paired difference to another method on the same individuals: mean and 95 % interval."""
        return bootstrap(self.values[score] - other.values[score])


def instances(split: str, count: int, classes: Sequence[str] = CLASSES) -> tuple[Instance, ...]:
    """`count` individuals of a split, spread over it, taking the classes in turn."""
    ids = SPLITS[split]
    kinds = [CLASSES.index(name) for name in classes]
    rounds = -(-count // len(kinds))
    stride = (len(ids) // len(CLASSES) - 1) // max(rounds, 1) * len(CLASSES)
    if stride < len(CLASSES):
        raise ValueError(f"the split {split!r} has no {count} individuals of these classes")
    first = ids.start + -ids.start % len(CLASSES)
    chosen = [first + stride * turn + kind for turn in range(rounds) for kind in kinds]
    return tuple(Instance.from_id(id) for id in chosen[:count])


def make_bench(
    judge: Model,
    instances: Sequence[Instance],
    contexts: Sequence[Context] = EVALUATION_CONTEXTS,
    *,
    inputs: int = 1,
    references: int = 4,
    size: int = 32,
    seed: int = 0,
) -> Bench:
    """Input pictures and true answers for `instances` x `contexts`.

    Input pictures are flat, without accessory, in a scene that no prompt asks for; several show the individual in the
    same scene with other positions and sides.

    Args:
        judge: what `evaluation.judge.load_judge` returns.
        instances: from `instances("test", 64)`, or `"development"` to choose settings.
        contexts: what the prompts ask for.
        inputs: pictures of an individual that a method is given.
        references: true answers per prompt, of different seeds.
        size: side of the pictures.
        seed: another one gives other input pictures and true answers.
    """
    free = [scene for scene in SCENES if scene not in {context.scene for context in contexts}]
    if not free:
        raise ValueError("the prompts ask for every scene; leave one out for the input pictures")
    given = tuple(Context(Draws(instance.id, _INPUT + (seed << 8)).choice(free)) for instance in instances)
    bench = Bench(judge, tuple(instances), tuple(contexts), given, np.empty(0), np.empty(0), size, seed)
    seeds = [_seed(bench, i, _INPUT, k) for i in bench.instances for k in range(inputs)]
    ids = np.repeat([i.id for i in bench.instances], inputs).tolist()
    pictures = render_batch(ids, [g for g in given for _ in range(inputs)], seeds, size)
    pictures = pictures.reshape(len(given), inputs, size, size, 3)
    answers = read(judge, _renders(bench, bench.instances, _REFERENCE, references)).embedding
    shape = (len(given), len(contexts), references, -1)
    return replace(bench, pictures=pictures, references=answers.reshape(shape))


def evaluate(
    name: str,
    produce: Produce,
    bench: Bench,
    *,
    subject: str | None = "S*",
    extra: Mapping[str, Extra] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Row:
    """Runs a method on every individual of the benchmark and scores its pictures.

    Args:
        name: what the table calls it.
        produce: the method.
        bench: what it is measured on.
        subject: how prompts name the individual; None says its class instead ("a photo of a robot on the beach").
        extra: further scores by name.
        settings: kept in the row.
        progress: show a progress bar.
    """
    pictures, started = [], time.perf_counter()
    for k in tqdm(range(len(bench.instances)), desc=name, unit="individual", disable=not progress):
        word = bench.instances[k].cls
        prompts = [prompt_for(context, subject or word) for context in bench.contexts]
        made = np.asarray(produce(bench.pictures[k], prompts, word=word, seed=_seed(bench, bench.instances[k], 0, 0)))
        side = (bench.size, bench.size, 3)
        if made.dtype != np.uint8 or made.ndim != 5 or made.shape[0] != len(prompts) or made.shape[2:] != side:
            wanted = f"uint8 [{len(prompts)}, num, {bench.size}, {bench.size}, 3]"
            raise ValueError(f"{name} gave {made.dtype} {list(made.shape)} instead of {wanted}")
        pictures.append(made)
    seconds = (time.perf_counter() - started) / len(bench.instances)
    return replace(score(name, np.stack(pictures), bench, extra=extra), seconds=seconds, settings=settings)


def score(name: str, pictures: np.ndarray, bench: Bench, *, extra: Mapping[str, Extra] | None = None) -> Row:
    """Scores pictures that exist already: uint8 `[instances, contexts, num, size, size, 3]`."""
    shape = pictures.shape[:3]
    if shape[:2] != (len(bench.instances), len(bench.contexts)):
        raise ValueError(f"pictures are {list(shape)}, the benchmark {len(bench.instances)} x {len(bench.contexts)}")
    reading: Reading = read(bench.judge, pictures)
    who, asked, given = _cells(bench, shape[2])
    embedding = reading.embedding.reshape(*shape, -1)
    cells = {
        "identity": scores.identity(embedding, bench.references[:, :, None]),
        "attributes": scores.attributes(reading.labels, who),
        **scores.prompt(reading.labels, who, asked),
        "copying": scores.copying(reading.labels, asked, given),
    }
    prompts = [prompt_for(context, instance.cls) for instance, context in zip(who, asked, strict=True)]
    for label, function in (extra or {}).items():
        cells[label] = np.asarray(function(pictures.reshape(-1, *pictures.shape[3:]), prompts))
    cells = {label: np.asarray(value, np.float64).reshape(shape) for label, value in cells.items()}
    values = {label: value.mean(axis=(1, 2)) for label, value in cells.items()}
    return Row(name, values, {label: value.mean(axis=(0, 2)) for label, value in cells.items()})


def truth(bench: Bench, name: str = "true picture, another seed", *, extra: Mapping[str, Extra] | None = None) -> Row:
    """The ceiling: true renders, of other seeds than the references."""
    return score(name, _renders(bench, bench.instances, _SECOND, 1), bench, extra=extra)


def stranger(bench: Bench, name: str = "another of its class", *, extra: Mapping[str, Extra] | None = None) -> Row:
    """The floor: true renders of a different individual of the class in the asked contexts."""
    span = len(CLASSES) * 1009  # a whole number of rounds through the classes: the class stays
    others = []
    for instance in bench.instances:
        split = next(ids for ids in SPLITS.values() if instance.id in ids)
        inside = instance.id + span in split
        others.append(Instance.from_id(instance.id + (span if inside else -span)))
    return score(name, _renders(bench, others, _STRANGER, 1), bench, extra=extra)


def copycat(bench: Bench, name: str = "the input picture itself") -> Row:
    """What copying the (first) input picture scores, whatever the prompt."""
    pictures = np.broadcast_to(
        bench.pictures[:, :1, None], (len(bench.instances), len(bench.contexts), 1, bench.size, bench.size, 3)
    )
    return score(name, pictures, bench)


def table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """The rows as a Markdown table: mean [95 % interval over individuals]; identity a cosine, the others per cent.

    Args:
        rows: what `evaluate` and the others return.
        columns: scores to show; all of the first row by default, those of `COLUMNS` first.
    """
    if not rows:
        raise ValueError("no rows to make a table of")
    known = rows[0].values
    columns = list(columns or [*(c for c in COLUMNS if c in known), *(c for c in known if c not in COLUMNS)])
    lines = [["", *(COLUMNS.get(column, column) for column in columns)], ["---"] + ["---:"] * len(columns)]
    for row in rows:
        cells = [_cell(row.interval(c), 100.0 if c in _RATES else 1.0) if c in row.values else "" for c in columns]
        lines.append([row.name, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_rows(path: str | Path, rows: Sequence[Row], bench: Bench, **about: Any) -> None:
    """Writes rows with every individual's values as JSON, whole or not at all; `about` is kept (command, seed ...)."""
    content = {
        **about,
        "seed": bench.seed,
        "instances": [instance.id for instance in bench.instances],
        "prompts": [prompt_for(context) for context in bench.contexts],
        "input_scenes": [context.scene for context in bench.given],
        "rows": [
            {
                "name": row.name,
                "settings": dict(row.settings or {}),
                "seconds": round(row.seconds, 3),
                "scores": {label: row.interval(label)._asdict() for label in row.values},
                "by_prompt": {label: _rounded(value) for label, value in row.by_prompt.items()},
                "values": {label: _rounded(value) for label, value in row.values.items()},
            }
            for row in rows
        ],
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a file that `write_rows` wrote, for example to compare methods later."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return [
        Row(
            row["name"],
            {label: np.array(value) for label, value in row["values"].items()},
            {label: np.array(value) for label, value in row["by_prompt"].items()},
            row["seconds"],
            row["settings"],
        )
        for row in content["rows"]
    ]


def _cell(interval: Interval, scale: float) -> str:
    digits = 1 if scale == 100.0 else 3
    mean, low, high = (f"{scale * value:.{digits}f}" for value in interval)
    return f"{mean} [{low}, {high}]"


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]


def _seed(bench: Bench, instance: Instance, stream: int, index: int) -> int:
    """A render seed below 2^31: a pure function of the benchmark's seed, the individual, the stream and the index."""
    return int(np.random.SeedSequence([bench.seed, instance.id, stream, index]).generate_state(1)[0] >> 1)


def _renders(bench: Bench, instances: Sequence[Instance], stream: int, count: int) -> np.ndarray:
    """`count` true pictures per cell: uint8 `[instances, contexts, count, size, size, 3]`."""
    cells = [(i, c, k) for i in instances for c in range(len(bench.contexts)) for k in range(count)]
    seeds = [_seed(bench, i, stream, c * count + k) for i, c, k in cells]
    contexts = [bench.contexts[c] for _, c, _ in cells]
    pictures = render_batch([i.id for i, _, _ in cells], contexts, seeds, bench.size)
    return pictures.reshape(len(instances), len(bench.contexts), count, *pictures.shape[1:])


def _cells(bench: Bench, num: int) -> tuple[list[Instance], list[Context], list[Context]]:
    """Whom each of the flattened pictures should show, what was asked, and what was given."""
    pairs = [(i, a, g) for i, g in zip(bench.instances, bench.given, strict=True) for a in bench.contexts]
    repeated = [pair for pair in pairs for _ in range(num)]
    return [p[0] for p in repeated], [p[1] for p in repeated], [p[2] for p in repeated]

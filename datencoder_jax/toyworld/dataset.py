"""Training pictures in bulk: rendered once, kept in memory as uint8, the same whatever the number of workers."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from datencoder_jax.toyworld.captions import caption
from datencoder_jax.toyworld.render import render
from datencoder_jax.toyworld.world import CLASSES, SPLITS, Context, Draws, Instance, sample_context

LABELS = ("class", "main", "second", "accent", "pattern", "trim", "scene", "style", "accessory")
"""Integer labels that come with every prerendered picture; see `Instance.labels` and `Context.labels`."""
_CHUNK = 500


@dataclass(frozen=True)
class Item:
    """What one picture shows: `render(Instance.from_id(instance_id), context, seed)`."""

    instance_id: int
    context: Context
    seed: int


def sample_item(split: str, index: int, seed: int, classes: Sequence[str] = CLASSES, flat: float = 0.7) -> Item:
    """The `index`-th training picture of a split: a pure function of its arguments."""
    ids = SPLITS[split]
    d = Draws(seed * len(SPLITS) + list(SPLITS).index(split), index, count=16)
    kind = CLASSES.index(d.choice(classes))
    first = ids.start + (kind - ids.start) % len(CLASSES)
    instance_id = first + len(CLASSES) * int(d.random() * ((ids.stop - 1 - first) // len(CLASSES) + 1))
    return Item(instance_id, sample_context(d, flat=flat), int(d.random() * 2**31))


def render_batch(ids: Sequence[int], contexts: Sequence[Context], seeds: Sequence[int], size: int = 32) -> np.ndarray:
    """Pictures of the instances `ids` in `contexts`; uint8 `[len(ids), size, size, 3]`."""
    out = np.empty((len(ids), size, size, 3), np.uint8)
    for k, (id, context, seed) in enumerate(zip(ids, contexts, seeds, strict=True)):
        out[k] = render(Instance.from_id(id), context, int(seed), size)
    return out


def render_many(
    ids: Sequence[int], contexts: Sequence[Context], seeds: Sequence[int], size: int = 32, workers: int | None = None
) -> np.ndarray:
    """`render_batch` over several processes, with a progress bar when it takes long; see `prerender` on `workers`."""
    parts = [slice(k, k + _CHUNK) for k in range(0, len(ids), _CHUNK)]
    jobs = [(ids[part], contexts[part], seeds[part], size) for part in parts]
    workers = min(workers or _cores(), len(jobs))
    bar = tqdm(total=len(ids), desc="rendering", unit="picture", disable=len(ids) < 4000)
    out = np.empty((len(ids), size, size, 3), np.uint8)

    def collect(chunks: Iterable[np.ndarray]) -> np.ndarray:
        with bar:
            for part, pictures in zip(parts, chunks, strict=True):
                out[part] = pictures
                bar.update(len(pictures))
        return out

    if workers <= 1:
        return collect(render_batch(*job) for job in jobs)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return collect(pool.imap(_render_job, jobs))


def _render_job(job: tuple[Sequence[int], Sequence[Context], Sequence[int], int]) -> np.ndarray:
    return render_batch(*job)


_Job = tuple[str, int, int, int, int, tuple[str, ...], float]
_Chunk = tuple[int, np.ndarray, list[str], np.ndarray, np.ndarray, np.ndarray]


def _chunk(job: _Job) -> _Chunk:
    split, start, stop, size, seed, classes, flat = job
    items = [sample_item(split, k, seed, classes, flat) for k in range(start, stop)]
    instances = [Instance.from_id(item.instance_id) for item in items]
    images = np.stack([render(i, item.context, item.seed, size) for i, item in zip(instances, items, strict=True)])
    captions = [caption(i, item.context, item.seed) for i, item in zip(instances, items, strict=True)]
    rows = [i.labels() | item.context.labels() for i, item in zip(instances, items, strict=True)]
    labels = np.array([[row[name] for name in LABELS] for row in rows], np.int32)
    ids = np.array([item.instance_id for item in items], np.int32)
    return start, images, captions, labels, ids, np.array([item.seed for item in items], np.int64)


def _cores() -> int:
    """Cores this process may use (a container often allows fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prerender(
    split: str,
    count: int,
    size: int = 32,
    seed: int = 0,
    workers: int | None = None,
    classes: Sequence[str] = CLASSES,
    flat: float = 0.7,
) -> dict[str, Any]:
    """Renders `count` captioned pictures of random instances of a split in random contexts.

    Args:
        split: a key of `SPLITS`.
        count: how many pictures; the first n of a larger count are the same n.
        size: side in pixels.
        seed: another seed gives other pictures.
        workers: processes (default: one per core); the result does not depend on it. With more than one, a script
            must call this under `if __name__ == "__main__":`, because workers start as fresh interpreters.
        classes: draw only from these classes.
        flat: fraction of pictures in the flat style.

    Returns:
        `images` uint8 `[count, size, size, 3]`, `captions` (a list), `instance_id` int32 `[count]`,
        `seed` int64 `[count]`, and one int32 `[count]` per name in `LABELS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    workers = workers or _cores()
    jobs: list[_Job] = [
        (split, start, min(start + _CHUNK, count), size, seed, tuple(classes), flat)
        for start in range(0, count, _CHUNK)
    ]
    images = np.empty((count, size, size, 3), np.uint8)
    captions: list[str] = [""] * count
    labels = np.empty((count, len(LABELS)), np.int32)
    ids, seeds = np.empty(count, np.int32), np.empty(count, np.int64)

    def collect(chunks: Iterable[_Chunk]) -> None:
        with tqdm(total=count, desc=f"rendering {split}", unit="picture", disable=count < 4000) as bar:
            for start, pictures, texts, rows, numbers, jitter in chunks:
                where = slice(start, start + len(pictures))
                images[where], captions[where], labels[where] = pictures, texts, rows
                ids[where], seeds[where] = numbers, jitter
                bar.update(len(pictures))

    if workers == 1 or len(jobs) == 1:
        collect(map(_chunk, jobs))
    else:
        # Fresh interpreters: forking a process in which JAX's threads run can deadlock.
        with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
            collect(pool.imap_unordered(_chunk, jobs))
    columns = {name: labels[:, k].copy() for k, name in enumerate(LABELS)}
    return {"images": images, "captions": captions, "instance_id": ids, "seed": seeds, **columns}

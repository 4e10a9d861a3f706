"""How many pictures a second one core prepares for training, and where the time goes.

`python -m datencoder_jax.data.throughput [PATH]` measures a folder of pictures or of tar shards or, without a path,
made-up photographs: noise with the spectrum of natural pictures, as JPEG.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.data.feed import Feed
from datencoder_jax.data.folder import Folder, files_under
from datencoder_jax.data.items import DamagedItem, Item, Source
from datencoder_jax.data.shards import Shards
from datencoder_jax.data.views import Crop, decode_item, draw_crop, least_side, show, square
from datencoder_jax.errors import UserError

_BATCH = 16


def open_source(path: str | Path) -> Source:
    """The source that a path names: tar shards if there are any, otherwise a folder of pictures."""
    root = expand_user(path)
    tars = root.is_file() or any(name.lower().endswith(".tar") for name, _ in files_under(root))
    return Shards(root) if tars else Folder(root)


def made_up(folder: Path, count: int, height: int, width: int) -> Source:
    """A shard of JPEGs of noise with an amplitude that falls as 1/f^1.2, in every colour."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for index in range(count):
            waves = rng.normal(size=(3, *frequency.shape, 2)).view(complex)[..., 0] / frequency**1.2
            noise = np.fft.irfft2(waves, (height, width)).transpose(1, 2, 0)
            pixels = np.clip(128 + 50 * noise / noise.std(), 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=90)
            member = tarfile.TarInfo(f"{index:09d}.jpg")
            member.size = file.tell()
            file.seek(0)
            tar.addfile(member, file)
    return Shards(folder, quiet=True)


class Times(NamedTuple):
    """Milliseconds per picture: by the clock, and those that a core was busy for this process."""

    clock: float
    busy: float


def measure_stages(feed: Feed, count: int, sizes: tuple[int, int], repeats: int) -> dict[str, Times]:
    """The time that each stage takes in one thread, the median of several repeats, for a feed of one source."""
    rng = np.random.default_rng(0)
    source = feed.sources[0]
    items = [(item, draw_crop(rng, 0.8, True)) for item in _good(source, count)]
    if not items:
        raise UserError(f"{source.name} holds no pictures that can be used.")
    indices = rng.integers(len(source), size=len(items)).tolist()

    def decoded(item: Item, crop: Crop) -> Image.Image:
        return decode_item(item, least_side(crop, sizes, 0))

    def read(index: int) -> None:
        with suppress(DamagedItem):
            source[index]

    pictures = [(item, crop, decoded(item, crop)) for item, crop in items]

    def views(item: Item, crop: Crop, picture: Image.Image) -> None:
        place = square(item, picture, crop, 0)
        show(picture, place, sizes, crop.mirrored)

    stages = {
        "shuffling": lambda: [feed.planned(number) for number in range(len(items))],
        "reading": lambda: [read(index) for index in indices],
        "decoding": lambda: [decoded(item, crop) for item, crop in items],
        "cropping and resizing": lambda: [views(*each) for each in pictures],
    }
    return {name: _times(stage, len(items), repeats) for name, stage in stages.items()}


def measure_feed(feed: Feed, count: int, threads: int, repeats: int) -> Times:
    """The time that batches take which several threads make, the median of several repeats."""
    steps = max(count // feed.batch_size, threads)
    with ThreadPoolExecutor(threads) as pool:
        return _times(lambda: list(pool.map(feed.batch, range(steps))), steps * feed.batch_size, repeats)


def _times(call: Callable[[], object], pictures: int, repeats: int) -> Times:
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter(), time.process_time()
        call()
        seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    clock, busy = (statistics.median(each) for each in zip(*seconds[1:], strict=True))
    return Times(1000 * clock / pictures, 1000 * busy / pictures)


def _good(source: Source, count: int) -> Iterator[Item]:
    """Up to `count` pictures that can be used, from all over the source."""
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist():
        try:
            item = source[index]
            if isinstance(item, Item):
                decode_item(item, 0)
                yield item
        except DamagedItem:
            continue


def main(arguments: list[str] | None = None) -> None:
    """Measures how many pictures a second are prepared for training."""
    parser = argparse.ArgumentParser(prog="python -m datencoder_jax.data.throughput", description=main.__doc__)
    parser.add_argument("path", nargs="?", help="a folder of pictures or shards (default: made-up photographs)")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 683), metavar=("H", "W"), help="of made-up ones")
    parser.add_argument("--resolution", type=int, default=512, help="of the VAE's view (default: 512)")
    parser.add_argument("--vision-size", type=int, default=224, help="of CLIP's view (default: 224)")
    parser.add_argument("--count", type=int, default=64, help="pictures a repeat (default: 64)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: 5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = (
                made_up(Path(folder), options.count, *options.size) if not options.path else open_source(options.path)
            )
            feed = Feed(
                [source],
                [1],
                batch_size=_BATCH,
                seed=0,
                resolution=options.resolution,
                vision_size=options.vision_size,
                min_side=0,
            )
            sizes = (options.resolution, options.vision_size)
            stages = measure_stages(feed, options.count, sizes, options.repeats)
            feeds = {n: measure_feed(feed, options.count, n, options.repeats) for n in sorted({1, *options.threads})}
    except UserError as error:
        sys.exit(f"error: {error}")
    whole = feeds[1]
    rest = (each - sum(parts) for each, parts in zip(whole, zip(*stages.values(), strict=True), strict=True))
    stages["assembling and the rest"] = Times(*rest)
    print(f"{options.path or 'made-up photographs of {} x {} pixels'.format(*options.size)}, {len(source)} pictures")
    print(f"{'per picture':24s} {'clock':>8s}    {'busy':>8s}")
    for name, times in {**stages, "all": whole}.items():
        print(f"{name:24s} {times.clock:8.2f} ms {times.busy:8.2f} ms  {100 * times.busy / whole.busy:5.1f} %")
    print(f"one core, always busy: {1000 / whole.busy:.1f} images/s")
    for threads, times in feeds.items():
        gain, cores = whole.clock / times.clock, times.busy / times.clock
        print(f"threads: {threads}  {1000 / times.clock:8.1f} images/s, {gain:.2f} times one; {cores:.2f} cores busy")


if __name__ == "__main__":
    main()

"""What the frozen networks see of a recipe's pictures, computed before training and once for all its passes.

For every view of every picture: the moments of the VAE's posterior, and the vision tower's states that the encoder
taps. Training reads them in the pictures' place and runs neither network; its crops are then a few fixed ones.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from datencoder_jax.base import Base
from datencoder_jax.data.feed import Damage
from datencoder_jax.data.images import to_float
from datencoder_jax.data.items import DamagedItem, Item, Prepared, Source, read_item
from datencoder_jax.data.records import Layout, Settings, weights_fingerprint, write_records
from datencoder_jax.data.views import draw_crop, make_views
from datencoder_jax.encoder.features import vision_features
from datencoder_jax.errors import UserError, raise_if_passing
from datencoder_jax.pipeline import Pipeline

_TYPE = "float16"


def see(base: Base, images: jax.Array, vision: jax.Array) -> dict[str, jax.Array]:
    """The arrays of a batch of records.

    Args:
        images: what the VAE sees, uint8 `[b, R, R, 3]`.
        vision: what the vision tower sees of the same, uint8 `[b, S, S, 3]`.

    Returns:
        `moments [b, h, w, 2c]`, mean and log variance; `classes [b, taps, d]` and `patches [b, P, d]`.
    """
    posterior = base.vae.bind().encode(to_float(images))
    states = vision_features(base.eyes, base.vision_input(to_float(vision)))
    arrays = {"moments": jnp.concatenate(posterior, axis=-1), "classes": states.classes, "patches": states.patches}
    return {name: x.astype(_TYPE) for name, x in arrays.items()}


class Precomputer:
    """Computes records of a source's pictures, on all devices of this process.

    Args:
        pipeline: the base model.
        source: the pictures.
        config: the recipe: `resolution`, `augment`, `seed`, `threads` that decode.
        views: of each picture.
        batch_size: pictures on a device at a time.
    """

    def __init__(self, pipeline: Pipeline, source: Source, config: Any, *, views: int, batch_size: int):
        self.source, self.config, self.views = source, config, views
        self.damage = Damage(source)
        devices = jax.local_devices()
        self.batch_size = batch_size * len(devices)
        mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
        self._rows = NamedSharding(mesh, PartitionSpec("data"))
        base = pipeline.base.only("vae", "vision")
        self._base = jax.device_put(base, NamedSharding(mesh, PartitionSpec()))
        self._see = jax.jit(see)
        self._sizes = (config.resolution, base.eyes.config.image_size)
        self.settings = Settings(
            base=pipeline.fingerprint,
            vae=weights_fingerprint(base.vae.params),
            vision=weights_fingerprint(base.eyes.params),
            resolution=config.resolution,
            crop=config.augment.crop,
            flip=config.augment.flip,
            seed=config.seed,
            views=views,
            source=source.identity,
        )

    def layout(self) -> Layout:
        """Types and shapes of a record's arrays."""
        shapes = [jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8) for size in self._sizes]
        found = jax.eval_shape(see, self._base, *shapes)
        return {name: (_TYPE, x.shape[1:]) for name, x in found.items()}

    def records(self, first: int, last: int) -> Iterator[Prepared]:
        """The records of the pictures from `first` to before `last`; none for those that cannot be used."""
        with ThreadPoolExecutor(max(self.config.threads, 1)) as pool:
            # A file's pictures are decoded while those before are computed, and wait as small views.
            shown = (view for found in pool.map(self._views, range(first, last)) for view in found)
            while part := list(islice(shown, self.batch_size)):
                yield from self._computed(part)

    def _computed(self, part: list[tuple[Item, list[np.ndarray]]]) -> Iterator[Prepared]:
        padded = [*part, *[part[-1]] * (self.batch_size - len(part))]  # one shape, one program
        views = (np.stack([each[k] for _, each in padded]) for k in range(2))
        arrays = jax.device_get(self._see(self._base, *(jax.device_put(x, self._rows) for x in views)))
        for row, (item, _) in enumerate(part):
            yield Prepared(item.key, {name: x[row] for name, x in arrays.items()}, item.caption)

    def _views(self, index: int) -> list[tuple[Item, list[np.ndarray]]]:
        """The views of a picture, each for both networks; none if it cannot be used."""
        augment, found = self.config.augment, []
        try:
            item = read_item(self.source, index)
            if isinstance(item, Prepared):
                raise UserError(f"{self.source.name} holds records already; name a source of pictures.")
            for view in range(self.views):
                rng = np.random.default_rng([self.config.seed, index, view])
                crop = draw_crop(rng, augment.crop, augment.flip)
                found.append((item._replace(picture=b""), make_views(item, crop, self._sizes, augment.min_side)))
        except DamagedItem as error:
            raise_if_passing(error, f"{self.source.name}: {error.key}")  # what is left out of records is so for good
            self.damage.add(index, error)
            return []
        return found


def precompute(
    pipeline: Pipeline, source: Source, config: Any, folder: Path, *, views: int, batch_size: int, per_file: int
) -> dict[str, int]:
    """Writes records of a source; what is there already stays, and several processes share the files.

    Returns:
        How many pictures this process left out, by reason; each is logged too.

    Raises:
        UserError: as `write_records` does; or the source holds records itself.
    """
    work = Precomputer(pipeline, source, config, views=views, batch_size=batch_size)
    part = jax.process_index(), jax.process_count()
    write_records(
        folder, work.settings, work.layout(), len(source), work.records, per_file=per_file, part=part, quiet=part[0] > 0
    )
    return work.damage.report()

"""The inference encoder out of a training run: the averaged weights of its newest checkpoint."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from datencoder_jax.checkpoints.encoder_folder import described_encoder, write_encoder
from datencoder_jax.checkpoints.weights import read_json
from datencoder_jax.errors import UserError
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.training.encoder_stage import DESCRIPTION


def newest_step(workdir: Path) -> int | None:
    """The step of the newest complete checkpoint in a work folder; None where there is none."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=None)


def export_encoder(workdir: Path, folder: str | Path) -> int:
    """Writes the encoder that `datencoder personalize --encoder` takes. For one process alone.

    Args:
        workdir: of a run of an encoder's recipe; neither its base model nor its data is read.
        folder: as for `write_encoder`.

    Returns:
        The step that its weights are of.

    Raises:
        UserError: there is no such run or checkpoint, it cannot be read, or the folder cannot be written.
    """
    step = newest_step(workdir)
    if step is None or not (workdir / DESCRIPTION).is_file():
        raise UserError(f"{workdir} holds no checkpoint of an encoder; train one there first.")
    values = read_json(workdir / DESCRIPTION)
    kind, config = described_encoder(workdir / DESCRIPTION, values)
    fingerprints = str(values["base_fingerprint"]), str(values.get("vision_fingerprint", ""))
    path = workdir.absolute() / "checkpoints" / str(step) / "state"
    params = _read_average(path, abstract_params(kind, config))
    write_encoder(folder, Model(kind, config, jax.device_put(params)), *fingerprints)
    return step


def _read_average(path: Path, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """The average alone, in this machine's memory, whatever devices wrote it."""
    wanted = {"ema": {name: np.empty(x.shape, x.dtype) for name, x in shapes.items()}}
    # Other processes, where there are some, take no part.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="export"
    )
    restore = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted),
        partial_restore=True,
    )
    try:
        with ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
        ) as reader:
            params = reader.restore(path, args=restore)["ema"]
    except Exception as error:  # whatever reading a damaged file leads to
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"The checkpoint {path.parent} cannot be read ({said}); rerun without --export-encoder."
        ) from error
    if wrong := [name for name, x in shapes.items() if params[name].shape != x.shape]:
        raise UserError(f"The checkpoint {path.parent} is of another encoder than {DESCRIPTION} says: {wrong[0]}.")
    return params

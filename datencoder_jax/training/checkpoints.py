"""Checkpoints of a training run: written beside the training, whole or not at all, and continued only by the same run.

A checkpoint `checkpoints/<step>/` holds the training state (parameters, average, optimiser, counters) and a description
of the run: its resolved recipe, what base model and data it reads, versions. The frozen base model is not in it. Orbax
writes under another name and renames at the end, so whatever has the name of a step is complete.

The step is also the position in the data, since every batch is a function of it. Arrays are stored by their place in
the whole, so any number of devices or processes can read them.
"""

import errno
import gc
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from datencoder_jax.checkpoints.atomic import CHECKPOINTS
from datencoder_jax.errors import PassingError, UserError, is_passing
from datencoder_jax.runtime.target import is_deterministic

SCHEMA = 1
FREE = (
    r"log_every|preview_every|previews|checkpoint_(every|minutes)|keep|best\..*|mesh\..*|threads|max_bad_steps|output"
)
"""Keys of a recipe that do not change what is computed: a run may go on under other values."""
_WORDS = re.compile(
    r"no space left on device|disk quota exceeded|permission denied|read-only|input/output error|file too large", re.I
)
_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG, errno.ENOTDIR}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def describe(config: Any, identity: Mapping[str, str]) -> dict[str, Any]:
    """What a checkpoint says of its run; JSON."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    recipe = json.loads(json.dumps(config.to_dict(), default=str))
    about = {"schema": SCHEMA, "config": recipe, "identity": dict(identity), "versions": versions}
    return about | {"deterministic": is_deterministic()}


def check_alike(run: Mapping[str, Any]) -> None:
    """Compares what `describe` says of the run on every process.

    Raises:
        UserError: one of them has another recipe, base model or data.
    """
    # Of what may change between runs, most decides when all have to do something together.
    recipe = {key: value for key, value in _flat(run["config"]).items() if key not in ("threads", "output")}
    for name, part in (("recipe", recipe), ("base model or data", run["identity"])):
        digest = hashlib.sha256(json.dumps(part, sort_keys=True).encode()).digest()
        if not _alike(np.frombuffer(digest, np.uint32)):
            raise UserError(f"not all processes have the same {name}; start them with the same options and files")


def _alike(values: Any) -> bool:
    """Whether all processes have the same numbers."""
    if jax.process_count() == 1:
        return True
    rows = np.asarray(multihost_utils.process_allgather(np.asarray(values)))
    return bool((rows == rows[:1]).all())


@contextmanager
def on_disk(workdir: Path) -> Iterator[None]:
    """Around all that writes into a work folder: failures of the disk become a sentence, others are left alone.

    Raises:
        UserError: the folder cannot be written; the sentence names the last good checkpoint.
    """
    try:
        with _orbax_quiet():
            yield
    except PassingError:
        raise
    except Exception as error:
        if (reason := _storage_reason(error, workdir)) is None:
            raise
        found = [int(path.name) for path in (workdir / CHECKPOINTS).glob("*") if path.name.isdecimal()]
        last = f"the last good checkpoint is step {max(found)}" if found else "there is no checkpoint yet"
        kind = PassingError if is_passing(error) or reason == os.strerror(errno.EIO).lower() else UserError
        raise kind(
            f"{workdir} cannot be written: {reason}; {last}; put that right and run the same command again"
        ) from error


@contextmanager
def _orbax_quiet() -> Iterator[None]:
    """Keeps Orbax from printing what nobody needs: the errors that it raises afterwards anyway, a page for each."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def ours(record: logging.LogRecord) -> bool:
        # That a checkpoint comes without a score is as it should be between previews.
        needless = record.levelno == logging.ERROR or "tracked_metric" in record.getMessage()
        return not (needless and "orbax" in record.pathname)

    def unraisable(args: Any) -> None:
        # Where one array could not be written, the others find nobody to report to.
        if not (isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == "Event loop is closed"):
            hook(args)

    logger.addFilter(ours)
    # Stays: what one failed write leaves of the others is collected later, at the end of the interpreter at the latest.
    logging.getLogger("asyncio").addFilter(_no_orphan)
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        logger.removeFilter(ours)
        sys.unraisablehook = hook


def _no_orphan(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return not ("never retrieved" in said and "orbax" in said)


def _storage_reason(error: Exception, workdir: Path) -> str | None:
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        elsewhere = error.filename and not Path(error.filename).absolute().is_relative_to(workdir.absolute())
        return None if elsewhere else os.strerror(error.errno).lower()
    found = _WORDS.search(str(error))  # of the library that writes arrays, in errors of its own
    return found[0].lower() if found and str(workdir.absolute()) in str(error) else None


def _collect_quietly() -> None:
    """Lets go of what a failed read leaves: coroutines that were never awaited, of which Python would warn later."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        gc.collect()


class Checkpoints:
    """The checkpoints in a work folder.

    Args:
        workdir: their folder is `checkpoints` in it.
        run: what `describe` says of the run that wants to write here.
        keep: how many of the latest stay.
        best: `metric` of the previews and `mode` ("max" or "min"): the best by it stays too. No metric: none does.
    """

    def __init__(self, workdir: Path, run: dict[str, Any], keep: int, best: Mapping[str, str] | None = None):
        self.folder, self.run = workdir.absolute() / CHECKPOINTS, run
        self._metric = metric = (best or {}).get("metric", "")
        self.seeks_best = bool(metric)
        policies: list[Any] = [LatestN(keep)]
        scored: dict[str, Any] = {}
        if metric:
            lowest = (best or {}).get("mode") == "min"

            def score(scores: Mapping[str, float]) -> float:
                return scores[metric]

            policies.append(BestN(get_metric_fn=score, reverse=lowest, n=1, keep_checkpoints_without_metrics=False))
            # Without it no score would be written, and a run that goes on would know none of those before.
            scored["best_fn"] = score
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies), cleanup_tmp_directories=True, **scored
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return max(self._manager.all_steps(read=True), default=None)

    def restore(self, shapes: Any, accept_changes: bool = False) -> tuple[Any, list[str]] | None:
        """The newest state that can be read, and a sentence on each that could not; None where there is none.

        Args:
            shapes: the state as `jax.ShapeDtypeStruct`s with the shardings it is wanted in.
            accept_changes: whether a changed recipe is fine.

        Raises:
            UserError: the run here had another recipe, base model or data; or no checkpoint can be read.
            PassingError: a checkpoint is there, or can be read, for some processes alone; or not for now.
        """
        damaged: dict[int, str] = {}
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not _alike(np.int32(steps[0] if steps else -1)):
            raise PassingError(
                f"not all processes see the same checkpoints in {self.folder}; the work folder has to be on storage "
                "that they share"
            )
        for step in steps:
            state = None
            try:
                run = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
                self._check(run, step, accept_changes)
                wanted = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
                state = self._manager.restore(step, args=wanted)["state"]
            except UserError:
                raise
            except Exception as error:  # whatever reading a damaged file leads to
                if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                    raise  # the file is well, and so may be those before it
                if is_passing(error):
                    said = " ".join(str(error).split())[:200]
                    raise PassingError(f"checkpoint {step} in {self.folder} cannot be read now: {said}") from error
                damaged[step] = " ".join(str(error).split())[:200] or type(error).__name__
            if not _alike(np.int32(step in damaged)):
                raise PassingError(f"checkpoint {step} in {self.folder} can be read by some of the processes alone")
            if step in damaged:
                _collect_quietly()
                continue
            self._set_aside(damaged)
            return state, [
                f"checkpoint {bad} cannot be read ({reason}): going on from {step}; it is now {bad}.unreadable"
                for bad, reason in damaged.items()
            ]
        if damaged:
            step, reason = next(iter(damaged.items()))
            raise UserError(
                f"no checkpoint in {self.folder} can be read (the newest, {step}: {reason}); use another --workdir"
            )
        return None

    def save(self, step: int, state: Any, scores: Mapping[str, float] | None = None) -> None:
        """Starts to write a checkpoint; `state` may be donated to the next step right away.

        Also raises what went wrong with the one before.
        """
        meta = {**self.run, "step": step, "data": {"position": step}}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        metrics = dict(scores) if self._metric and scores and self._metric in scores else None
        self._manager.save(step, args=items, metrics=metrics, force=True)

    def wait(self) -> None:
        """Waits until everything is written, and raises what went wrong with it."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def _check(self, before: dict[str, Any], step: int, accept_changes: bool) -> None:
        where = f"the run in {self.folder.parent}"
        if before["schema"] != SCHEMA:
            raise UserError(
                f"{where} has checkpoints of schema {before['schema']}, not {SCHEMA}; use another --workdir"
            )
        # Older checkpoints do not name all that is read.
        known = {name: value for name, value in self.run["identity"].items() if name in before["identity"]}
        if changed := _differences(before["identity"], known):
            raise UserError(f"{where} has read something else: {changed}; put that back or use another --workdir")
        changed = _differences(_flat(before["config"]), _flat(self.run["config"]), re.compile(FREE))
        if changed and not accept_changes:
            raise UserError(
                f"{where} has come to step {step} with another recipe: {changed}; "
                "set that back, use another --workdir, or accept the changes with --accept-changes"
            )

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        if not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                name = self.folder / f"{step}.unreadable"
                number = sum(1 for _ in self.folder.glob(f"{name.name}*"))
                (self.folder / str(step)).rename(name.with_name(f"{name.name}.{number}") if number else name)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self._manager.close()
        except Exception:
            if kind is None:
                raise


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in recipe.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], free: re.Pattern | None = None) -> str:
    """`key old -> new` of whatever differs, but for keys that may."""
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    said = [f"{key} {before.get(key, 'not set')} -> {now.get(key, 'not set')}" for key in keys]
    return ", ".join(line for key, line in zip(keys, said, strict=True) if not (free and free.fullmatch(key)))

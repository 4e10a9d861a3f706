"""What the tests of `datencoder evaluate` share: a tiny model on disk, and its command line."""

import json
from pathlib import Path

import jax
import pytest
from tiny import tiny_pipeline, write_tiny_base

from datencoder_jax.benchmark import making
from datencoder_jax.checkpoints.encoder_folder import write_encoder
from datencoder_jax.cli import main

MINI = Path(__file__).parent / "data" / "dreambench_mini"


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Options that name a tiny base model with random weights, and an encoder for it."""
    folder = tmp_path_factory.mktemp("evaluated")
    base = write_tiny_base(folder)
    pipeline = tiny_pipeline(base)
    write_encoder(folder / "encoder", pipeline.encoder, pipeline.fingerprint, pipeline.vision_fingerprint)
    return ["--model", str(base), "--encoder", str(folder / "encoder")]


@pytest.fixture(scope="session", autouse=True)
def forget():
    """Pipelines and suites are kept for the process; not beyond these tests."""
    yield
    for kept in (making.open_pipeline, making.open_base, making.open_suite):
        kept.cache_clear()


def evaluate(model, out, *argv):
    """Runs the command, with few sampling steps and draws; returns its exit status."""
    fast = ["--sampling-steps", "2", "--draws", "2"]
    with jax.numpy_rank_promotion("allow"):
        return main(["evaluate", *map(str, argv), *model, *fast, "--out", str(out)])


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text("utf-8"))


def row_of(content, label, steps=None):
    return next(row for row in content["rows"] if (row["label"], row.get("steps")) == (label, steps))

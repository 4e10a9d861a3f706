"""The reference that a device's concept is compared with: one of the embedded model, made on a CPU in float32.

    python -m datencoder_jax.check.reference

makes `reference.json` anew: the concept, and its deviations where the weights are stored and computed with in bfloat16,
as accelerators do. They are 0.025 of a loss and 0.061 of the cosine, and the tolerances are four times and two and a
half times these: other devices round otherwise, and in 12 steps of Adam, whose first updates depend on the gradient's
sign alone, differences grow. How near the concept of another instance comes is not measured.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from datencoder_jax import api
from datencoder_jax.pipeline import Pipeline
from datencoder_jax.toyworld.render import render
from datencoder_jax.toyworld.world import Context, Instance

PATH = Path(__file__).with_name("reference.json")
INSTANCE = 1_100_005
"""Number of an individual of the toy world that the embedded model has not seen in training."""
STEPS = 12
SEED = 0

TOLERANCES = {"losses": 0.1, "cosine": 0.15}
"""The largest relative deviation of a step's loss, and the largest difference from 1 of the embeddings' cosine."""


def draw_image() -> np.ndarray:
    """The image that the concept is learned from, uint8 `[32, 32, 3]`."""
    return render(Instance.from_id(INSTANCE), Context("studio", "flat", "none"), SEED)


def tune_concept(pipeline: Pipeline) -> dict[str, Any]:
    """What is compared of a concept: the nearest word, the loss of every step, and the embedding."""
    result = api.personalize(pipeline, [draw_image()], steps=STEPS, seed=SEED, quiet=True)
    return {
        "nearest_word": result.report["nearest_words"][0][0],
        "losses": [float(loss) for loss in result.report["losses"]],
        "embedding": np.asarray(result.concept.embeddings, np.float32).ravel().tolist(),
    }


def measure_deviations(concept: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """The deviations that `TOLERANCES` limits."""
    losses, expected = (np.asarray(x["losses"], np.float64) for x in (concept, reference))
    vector, direction = (np.asarray(x["embedding"], np.float64) for x in (concept, reference))
    cosine = vector @ direction / (np.linalg.norm(vector) * np.linalg.norm(direction))
    return {"losses": float((np.abs(losses - expected) / np.abs(expected)).max()), "cosine": float(1 - cosine)}


def make_reference() -> dict[str, Any]:
    """The content of `reference.json`."""
    reference = tune_concept(api.load(dtype="float32", compute_dtype="float32"))
    rounded = tune_concept(api.load(dtype="bfloat16", compute_dtype="bfloat16"))
    return {
        "instance": INSTANCE,
        "steps": STEPS,
        "seed": SEED,
        "jax": jax.__version__,
        **reference,
        "bfloat16": {"nearest_word": rounded["nearest_word"], **measure_deviations(rounded, reference)},
        "tolerances": TOLERANCES,
    }


def read_reference() -> dict[str, Any]:
    """The reference as it is shipped."""
    return json.loads(PATH.read_text("utf-8"))


if __name__ == "__main__":
    PATH.write_text(json.dumps(make_reference(), indent=1) + "\n", encoding="utf-8")

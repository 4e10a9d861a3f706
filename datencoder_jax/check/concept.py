"""A concept of the embedded model, against the shipped reference: what a person would get on this device."""

from datencoder_jax import api
from datencoder_jax.check.part import Comparison, Outcome, print_progress
from datencoder_jax.check.reference import measure_deviations, read_reference, tune_concept
from datencoder_jax.pipeline import Pipeline


def check_concept(pipeline: Pipeline | None = None) -> Outcome:
    """Compares the nearest word, the losses of all steps and the embedding's direction.

    Args:
        pipeline: instead of the embedded model as it is loaded for this device.
    """
    pipeline, reference = pipeline or api.load(), read_reference()
    print_progress("a concept of the embedded model, against the reference")
    concept = tune_concept(pipeline)
    deviations = measure_deviations(concept, reference)
    comparisons = [
        Comparison(f"concept {name}", deviations[name], reference["tolerances"][name]) for name in deviations
    ]
    is_other_word = float(concept["nearest_word"] != reference["nearest_word"])
    values = {
        "dtype": pipeline.base.unet.dtype,
        "nearest_word": concept["nearest_word"],
        "expected_word": reference["nearest_word"],
        "losses": concept["losses"],
    }
    return Outcome(values, [Comparison("concept nearest word", is_other_word, 0.0), *comparisons])

"""The corpus of bad input: what people hand to the program by mistake, and what it is to do with each."""

from corpus import (
    checkpoints,
    commands,
    concepts,
    embeddings,
    encoders,
    environments,
    loras,
    photographs,
    pictures,
    prompts,
    recipes,
    shards,
)
from corpus.case import Case

KINDS = {
    module.KIND.title: module.KIND
    for module in (
        pictures,
        loras,
        embeddings,
        checkpoints,
        encoders,
        concepts,
        shards,
        photographs,
        recipes,
        prompts,
        commands,
        environments,
    )
}
"""The kinds of input by their headings on the page, in its order."""


def all_cases() -> list[Case]:
    """Every case of every kind."""
    return [case for kind in KINDS.values() for case in kind.cases]

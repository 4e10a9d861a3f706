"""The suite of the embedded world: individuals that nothing was trained on, and true answers to every prompt."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np

from datencoder_jax.benchmark.suites import TOKEN, Reference, Score, Setup, Subject, means
from datencoder_jax.errors import UserError
from datencoder_jax.evaluation.clip_scores import can_score, text_similarity
from datencoder_jax.evaluation.judge import load_judge
from datencoder_jax.evaluation.suite import copycat, instances, make_bench, references, score, stranger, truth
from datencoder_jax.pipeline import Pipeline
from datencoder_jax.toyworld.captions import EVALUATION_CONTEXTS_8, prompt_for
from datencoder_jax.toyworld.world import HELD_OUT

_INSTANCES = 128
_JUDGE = "read by the judge, a small network trained on true renders alone"
_MEAN = "mean over a subject's pictures"


class Toyworld:
    """`suites.Suite`, of the individuals of a split."""

    axes: Mapping[str, str] = {"identity": "identity", "prompt": "prompt"}
    about: str = f"{TOKEN} stands where the class word would; methods that start at a word start at the class word"
    missing: Sequence[str] = ()

    def __init__(self, setup: Setup, pipeline: Pipeline):
        self.pipeline = pipeline
        try:
            individuals = instances(setup.split, setup.instances or _INSTANCES)
        except ValueError as error:
            raise UserError(
                f"--instances {setup.instances} is more than the embedded world has; ask for fewer"
            ) from error
        self.bench = make_bench(individuals, EVALUATION_CONTEXTS_8, size=pipeline.resolution)
        self.subjects = [Subject(f"{each.cls} {each.id}", each.cls) for each in self.bench.instances]
        known = {
            "in domain": [k for k, each in enumerate(self.subjects) if each.word not in HELD_OUT],
            "held out": [k for k, each in enumerate(self.subjects) if each.word in HELD_OUT],
        }
        self.groups = {name: indices for name, indices in known.items() if indices}
        scores = {
            "identity": Score(
                "identity",
                "cosine",
                "cosine between the judge's identity embedding of a picture and those of 4 true renders of this "
                f"individual as the prompt asks for it; {_MEAN}",
            ),
            "prompt": Score(
                "prompt",
                "share",
                f"pictures whose scene, style and accessory are all {_JUDGE}, as the prompt asks for them; a picture "
                f"that repeats its input scores 0; {_MEAN}",
            ),
            "attributes": Score(
                "attributes",
                "share",
                f"of main, second and accent colour, pattern and trim, those {_JUDGE}, as the individual has them; "
                f"{_MEAN}",
            ),
            **{
                name: Score(name, "share", f"pictures whose {name} is {_JUDGE}, as asked for; {_MEAN}")
                for name in ("class", "scene", "style", "accessory")
            },
            "copying": Score(
                "copying",
                "share",
                f"pictures whose scene, {_JUDGE}, is the input picture's, which no prompt asks for; {_MEAN}",
                "lower",
            ),
        }
        if can_score(pipeline):
            scores["clip_t"] = Score(
                "CLIP-T",
                "cosine",
                f"cosine between picture and prompt with the class word for {TOKEN}, in the space of {pipeline.name}'s "
                f"own CLIP; {_MEAN}",
            )
        self.scores = scores

    def given(self, subject: int) -> list[np.ndarray]:
        """See `suites.Suite`."""
        return list(self.bench.pictures[subject])

    def digests(self, subject: int) -> dict[str, str]:
        """See `suites.Suite`: none, since name, split and base model say all."""
        return {}

    def prompts(self, subject: int, name: str = TOKEN) -> list[str]:
        """See `suites.Suite`."""
        return [prompt_for(context, name) for context in self.bench.contexts]

    def score(self, who: Sequence[int], pictures: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        """See `suites.Suite`."""
        stacked = np.stack(list(pictures))
        judge, answers = self._judge
        cells = score(self.bench, judge, answers, who, stacked)
        if "clip_t" in self.scores:
            num = stacked.shape[2]
            texts = [text for k in who for text in self.prompts(k, self.subjects[k].word) for _ in range(num)]
            flat = stacked.reshape(-1, *stacked.shape[3:])
            cells["clip_t"] = text_similarity(self.pipeline, flat, texts).reshape(stacked.shape[:3])
        return cells

    def references(self) -> list[Reference]:
        """See `suites.Suite`: the ceiling, the floor, and what copying the input earns."""
        every = range(len(self.subjects))
        rows = []
        for label, made in (
            ("true picture, another seed", truth(self.bench)),
            ("another of its class", stranger(self.bench)),
            ("the input picture itself", copycat(self.bench)),
        ):
            cells = self.score(every, made)
            values = {name: means(every, value, len(every)) for name, value in cells.items()}
            by_prompt = {name: value.mean(axis=(0, 2)) for name, value in cells.items()}
            rows.append(Reference(label, values, by_prompt, made[:, :, 0]))
        return rows

    @cached_property
    def _judge(self):
        judge = load_judge()
        return judge, references(self.bench, judge)

"""What the tuning-encoder is to reach, held against a run's numbers."""

import copy

import numpy as np
import pytest

from datencoder_jax.benchmark.goals import goals
from datencoder_jax.benchmark.learning_rates import RateChoice
from datencoder_jax.evaluation.scores import MIN_SUBJECTS

COUNT = 40


def row(label, steps, identity, prompt, seconds, method="lora"):
    noise = np.random.default_rng(len(label) + steps).normal(0, 0.01, COUNT)
    values = {"identity": identity + noise, "prompt": np.full(COUNT, prompt)}
    values["product"] = values["identity"] * values["prompt"]
    return {
        "label": label,
        "method": method,
        "steps": steps,
        "seconds": {"predict": 0.1, "tune": seconds - 0.1, "draw": 50.0},
        "values": {name: value.tolist() for name, value in values.items()},
    }


@pytest.fixture
def content():
    base = row("base model, class word", 0, 0.05, 1.0, 0.1, method="base") | {"steps": None}
    rows = [
        {"kind": "reference", "label": "true picture", "values": {"identity": [0.9] * COUNT}},
        base,
        row("datencoder", 0, 0.55, 1.0, 0.1, "datencoder"),
        row("datencoder", 12, 0.60, 0.95, 1.0, "datencoder"),
        row("lora", 12, 0.40, 0.95, 0.9),
        row("datencoder:blend=1", 12, 0.70, 0.95, 1.0, "datencoder"),
        row("lora", 300, 0.58, 0.90, 21.0),
        row("dreambooth", 300, 0.58, 0.90, 19.0),
    ]
    return {"rows": rows, "groups": {"in domain": list(range(30)), "held out": list(range(30, 40))}}


def met(content):
    return {goal["text"]: goal["met"] for goal in goals(content)}


def found(content, *parts):
    return [value for text, value in met(content).items() if all(part in text for part in parts)]


def test_goals_are_met_by_the_numbers_alone(content):
    assert found(content, "lora at 300") == [True, True]
    assert found(content, "dreambooth at 300") == [True, False]  # 1/19 of the seconds
    assert found(content, "above that of") == [True]  # of lora, and not of a variant of its own
    assert found(content, "without tuning") == [True]
    assert found(content, "no encoder saw") == [True]


@pytest.mark.parametrize(
    ("index", "score", "shift", "text"),
    [
        (6, "identity", 0.05, "those of lora at 300"),
        (6, "prompt", 0.1, "those of lora at 300"),
        (4, "product", 0.2, "above that of lora"),
        (2, "identity", -0.1, "without tuning"),
    ],
)
def test_each_goal_can_be_missed(content, index, score, shift, text):
    values = content["rows"][index]["values"]
    values[score] = [value + shift for value in values[score]]
    assert found(content, text) == [False]


def test_a_difference_inside_its_interval_is_no_win(content):
    ours, other = (np.array(content["rows"][k]["values"]["product"]) for k in (3, 4))
    noise = np.random.default_rng(0).normal(0, 1.0, COUNT)
    content["rows"][4]["values"]["product"] = (ours - 0.01 + noise - noise.mean()).tolist()
    assert found(content, "above that of lora") == [False] and other.mean() < ours.mean()


def test_seconds_of_another_run_are_compared_with_nobodys(content):
    content["rows"][6]["joined"] = {"command": "datencoder evaluate", "device": "another"}
    assert found(content, "of lora at 300") == [True] and found(content, "seconds of lora at 300") == []
    content["rows"][3]["joined"] = content["rows"][6]["joined"]
    assert found(content, "seconds of lora at 300") == [True]


def test_seconds_of_another_device_are_compared_with_nobodys(content):
    content["rows"][3]["devices"], content["rows"][6]["devices"] = ["1 core of a CPU"], ["2 cores of a CPU"]
    assert found(content, "of lora at 300") == [True] and found(content, "seconds of lora at 300") == []
    content["rows"][6]["devices"] = ["1 core of a CPU"]
    assert found(content, "seconds of lora at 300") == [True]


def test_kinds_held_out_are_told_apart(content):
    values = content["rows"][3]["values"]["identity"]
    content["rows"][3]["values"]["identity"] = values[:30] + [0.3] * 10
    assert found(content, "no encoder saw") == [False]


def test_goals_without_their_rows_are_not_told(content):
    short = copy.deepcopy(content)
    short["rows"] = [row for row in short["rows"] if row.get("method") != "datencoder"]
    assert goals(short) == []
    content["rows"][6]["values"] = {name: [None] * COUNT for name in content["rows"][6]["values"]}
    assert found(content, "those of lora at 300") == []
    content["rows"] = [row for row in content["rows"] if row.get("method") != "base"]
    assert found(content, "without tuning") == found(content, "no encoder saw") == []


def test_how_hard_the_held_out_kinds_are_is_told_by_methods_without_an_encoder(content):
    values, base = content["rows"][4]["values"], content["rows"][1]["values"]["identity"]
    values["identity"] = [value + (0.2 if k < 30 else 0.1) for k, value in enumerate(base)]
    [told] = [goal["numbers"] for goal in goals(content) if "no encoder saw" in goal["text"]]
    assert told.endswith("; lora, without an encoder, 50.0%")


@pytest.mark.parametrize("lost", [0.0, 0.1])
def test_no_gain_is_no_goal_met(content, lost):
    base = content["rows"][1]["values"]["identity"]
    for index, share in ((2, 0.5), (3, 1.0)):  # datencoder after 0 and 12 steps
        content["rows"][index]["values"]["identity"] = [value - share * lost for value in base]
    assert found(content, "without tuning") == found(content, "no encoder saw") == [False]
    told = [goal["numbers"] for goal in goals(content) if "without tuning" in goal["text"]]
    assert told[0].endswith("nothing to keep")


def cut(content, count):
    """The same for the first subjects alone."""
    for one in content["rows"]:
        one["values"] = {name: values[:count] for name, values in one["values"].items()}
    return content | {"groups": {}}


@pytest.mark.parametrize("count", [1, 2, MIN_SUBJECTS - 1])
def test_few_subjects_have_no_verdict(content, count):
    told = goals(cut(content, count))
    assert len(told) == 6 and {goal["met"] for goal in told} == {None}
    assert all(goal["reason"] == f"fewer than {MIN_SUBJECTS} subjects" for goal in told)
    assert not any("[" in goal["numbers"] for goal in told)


def test_enough_subjects_have_one(content):
    told = goals(cut(content, MIN_SUBJECTS))
    assert all(goal["met"] is not None and not goal["reason"] for goal in told)


def test_a_group_of_few_subjects_has_no_verdict(content):
    content["groups"]["held out"] = [38, 39]
    assert found(content, "no encoder saw") == [None] and found(content, "without tuning") == [True]


def with_choices(content, **choices):
    for one in content["rows"]:
        if one.get("steps"):
            one["rate_choice"] = RateChoice(*choices.get(f"{one['label']}_{one['steps']}", ("chosen", 12, 6)))._asdict()
    return {goal["text"]: goal for goal in goals(content)}


def test_default_rates_have_no_verdict_but_on_seconds(content):
    told = with_choices(content, lora_12=("default",), lora_300=("default",))
    without = {text for text, goal in told.items() if goal["met"] is None}
    assert len(without) == 2 and all("of lora at" in text and "seconds" not in text for text in without)
    assert all("learning rates of lora@" in told[text]["reason"] for text in without)
    told = with_choices(content, datencoder_12=("default",))
    assert {text for text, goal in told.items() if goal["met"] is not None} == {
        text for text in told if "seconds" in text
    }


def test_rates_chosen_on_unequal_numbers_of_individuals_are_told(content):
    told = with_choices(content, lora_300=("chosen", 4, 4))
    [goal] = [goal for text, goal in told.items() if "those of lora at 300" in text]
    assert goal["met"] is True
    assert goal["effort"] == (
        "learning rates of datencoder@12 chosen on 12 individuals of 6 classes, "
        "of lora@300 chosen on 4 individuals of 4 classes"
    )
    assert [goal["effort"] for text, goal in told.items() if "dreambooth at 300" in text] == ["", ""]

"""Methods timed in turn."""

from typing import Any

import pytest

from datencoder_jax import api
from datencoder_jax.benchmark import seconds
from datencoder_jax.benchmark.entries import make_rows, parse_entries

NOTHING: Any = None


@pytest.fixture
def runs(monkeypatch):
    """What was run, in order; every run takes a second more than the one before."""
    ran = []

    def run(pipeline, picture, row, word, seed):
        ran.append((row.name, seed))
        return float(len(ran))

    monkeypatch.setattr(seconds, "run", run)
    return ran


def test_the_first_takes_turns_with_the_others(runs):
    rows = make_rows(parse_entries(["datencoder@12", "lora@30+300"]), (12,))
    found = seconds.measure(NOTHING, NOTHING, rows, "robot", 2)
    assert [name for name, _ in runs[:3]] == ["datencoder@12", "lora@30", "lora@300"]  # not counted
    one = ["datencoder@12"] * 3 + ["lora@30"] + ["datencoder@12"] * 3 + ["lora@300"]
    assert [name for name, _ in runs[3:]] == one * 2
    assert [seed for _, seed in runs[3:]] == [0] * 8 + [1] * 8
    assert found == [[4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18], [7, 15], [11, 19]]
    assert seconds.table(rows, found).splitlines()[2:] == [
        "| datencoder, 12 | 12 | 11.00 | 4.00, 18.00 | 1.0 |",
        "| lora, 30 | 2 | 11.00 | 7.00, 15.00 | 1.0 |",
        "| lora, 300 | 2 | 15.00 | 11.00, 19.00 | 1.4 |",
    ]


def test_one_method_alone(runs):
    rows = make_rows(parse_entries(["datencoder@0"]), (12,))
    assert seconds.measure(NOTHING, NOTHING, rows, "robot", 2) == [[2, 3, 4, 5, 6, 7]]


def test_what_is_timed_is_a_concept_made(capsys, monkeypatch):
    made, real = [], api.personalize
    monkeypatch.setattr(api, "personalize", lambda *args, **options: made.append(real(*args, **options)) or made[-1])
    seconds.main(
        ["examples/robot.png", "--methods", "datencoder:focus=0.2@1", "lora@2", "--word", "robot", "--rounds", "1"]
    )
    ours, other = (line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:])
    assert ours[:2] == ["| datencoder:focus=0.2, 1", "3"] and other[:2] == ["| lora, 2", "1"]
    assert float(ours[2]) > 0 and float(other[2]) > 0 and ours[4] == "1.0 |"
    about = [each.concept.metadata for each in made[:2]]
    assert [each["method"] for each in about] == ["datencoder", "lora"] and about[0]["option_focus"] == "0.2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "base"], "base cannot be timed here"),
        (["--methods", "lora:rank=8@3"], "lora:rank=8 cannot be timed here"),
        (["--rounds", "0"], "--rounds must be 1 or more, not 0"),
    ],
)
def test_misuse_is_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit):
        seconds.main(["examples/robot.png", *arguments])
    assert message in capsys.readouterr().err

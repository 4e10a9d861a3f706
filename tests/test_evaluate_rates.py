"""Learning rates chosen on development instances: the climb, what is kept, and what is left alone."""

import json
from types import MappingProxyType

import numpy as np
import pytest
from evaluate_helpers import evaluate, forget, metrics_of, model, row_of  # noqa: F401

from datencoder_jax.benchmark import rates
from datencoder_jax.benchmark.entries import make_rows, parse_entries
from datencoder_jax.benchmark.learning_rates import RateChoice
from datencoder_jax.benchmark.making import Made
from datencoder_jax.benchmark.rates import Climb, read_rates, sweep, with_rates
from datencoder_jax.benchmark.suites import Setup
from datencoder_jax.benchmark.units import Unit, rows_of, write_made
from datencoder_jax.errors import UserError

SETUP = Setup("toyworld", instances=2)
ENTRIES = ["datencoder", "lora", "textual_inversion", "lora:rates=0/1e-3", "base"]


class Work:
    """Does units by writing their rates where pictures would be; counts trials."""

    def __init__(self, broken=()):
        self.trials, self.broken = [], broken

    def __call__(self, setup, units, title):
        assert setup.split == "development" and setup.instances == 3
        for unit in units:
            self.trials.append((unit.row.name, tuple(unit.row.rates)))
            if unit.row.name not in self.broken:
                write_made(unit, Made(np.array(unit.row.rates), {}))


@pytest.fixture
def hill(monkeypatch, tmp_path):
    """A suite whose scores are best at 1e-3 for embeddings and 3.16e-3 for offsets."""
    best = np.log10([1e-3, 10**-2.5])

    class Suite:
        axes = MappingProxyType({"identity": "likeness", "prompt": "words"})

        def score(self, who, pictures):
            found = np.stack([np.log10(np.where(p > 0, p, 10.0**best)) for p in pictures])
            likeness = -np.abs(found - best).sum(axis=1).reshape(-1, 1, 1)
            return {"likeness": likeness, "words": np.ones_like(likeness)}

    def units(folder, rows, setup, seeds):
        return [Unit(folder, row, k, f"one-{k}", 0) for row in rows for k in range(2)]

    monkeypatch.setattr(rates, "open_suite", lambda setup: Suite())
    monkeypatch.setattr(rates, "make_units", units)
    monkeypatch.setattr(rates, "of_row", lambda setup, row: {"steps": row.steps})
    return tmp_path


def test_a_trial_is_worth_every_individuals_product(hill, monkeypatch):
    class Suite:
        axes = MappingProxyType({"identity": "likeness", "prompt": "words"})

        def score(self, who, pictures):
            first, second = np.array([[0.8, 0.6], [0.2, 0.0]]), np.array([[0.0, 1.0], [1.0, 1.0]])
            return {"likeness": first[..., None], "words": second[..., None]}

    monkeypatch.setattr(rates, "open_suite", lambda setup: Suite())
    sweep(hill, SETUP, make_rows(parse_entries(["lora"]), (12,)), 3, Work())
    [tried] = read_rates(hill / "rates.json")["tried"].values()
    found = [(trial["likeness"], trial["words"], trial["product"]) for trial in tried]
    assert found == [(0.4, 0.75, round((0.7 * 0.5 + 0.1 * 1.0) / 2, 4))] * len(tried)


def test_every_row_climbs_to_where_no_neighbour_is_better(hill):
    rows = make_rows(parse_entries(ENTRIES), (0, 12, 50))
    work = Work()
    sweep(hill, SETUP, rows, 3, work)
    content = read_rates(hill / "rates.json")
    assert set(content["chosen"]) == {
        f"{name}@{n}" for name in ("datencoder", "lora", "textual_inversion") for n in (12, 50)
    }
    for name, chosen in content["chosen"].items():
        start = next(row.rates for row in rows if row.name == name)
        for rate, first, best, reach in zip(chosen, start, (1e-3, 10**-2.5), (0.26, 0.13), strict=True):
            assert rate == 0 if not first else abs(np.log10(rate / best)) < reach
    assert len(work.trials) == 2 * len(set(work.trials)) == 2 * sum(len(tried) for tried in content["tried"].values())
    for name, tried in content["tried"].items():
        best = max(tried, key=lambda trial: trial["product"])
        assert [best["embeddings"], best["offsets"]] == pytest.approx(content["chosen"][name])


def test_what_was_chosen_is_not_tried_again(hill):
    rows = make_rows(parse_entries(["lora"]), (12,))
    sweep(hill, SETUP, rows, 3, Work())
    again = Work()
    sweep(hill, SETUP, rows, 3, again)
    assert not again.trials
    sweep(hill, SETUP, make_rows(parse_entries(["lora"]), (12, 50)), 3, again)
    assert {name for name, _ in again.trials} == {"lora@50"}
    assert set(read_rates(hill / "rates.json")["chosen"]) == {"lora@12", "lora@50"}


def test_trials_of_another_encoder_or_momentum_are_not_taken_over(hill, monkeypatch):
    rows = make_rows(parse_entries(["lora"]), (12,))
    sweep(hill, SETUP, rows, 3, Work())
    before = set(hill.glob("sweep/*"))
    (hill / "rates.json").unlink()
    sweep(hill, SETUP, rows, 3, Work())
    assert set(hill.glob("sweep/*")) == before
    (hill / "rates.json").unlink()
    monkeypatch.setattr(rates, "of_row", lambda setup, row: {"steps": row.steps, "encoder": "another"})
    sweep(hill, SETUP, rows, 3, Work())
    assert len(set(hill.glob("sweep/*"))) == 2 * len(before) > 0


def test_nothing_is_chosen_where_all_rates_fail(hill):
    [row] = make_rows(parse_entries(["lora"]), (12,))
    sweep(hill, SETUP, [row], 3, Work(broken=("lora@12",)))
    assert not (hill / "rates.json").exists()  # and the next run tries again
    again = Work()
    sweep(hill, SETUP, [row], 3, again)
    assert again.trials and read_rates(hill / "rates.json")["chosen"].keys() == {"lora@12"}


def test_smaller_steps_are_taken_when_larger_ones_do_not_help():
    climb = Climb(make_rows(parse_entries(["lora"]), (12,))[0])
    assert climb.neighbours() == [(0, 0), (0, -2), (0, 2)]
    climb.tried = {(0, 0): {"product": 1.0}, (0, -2): {"product": 0.0}, (0, 2): {"product": 0.5}}
    climb.move()
    assert climb.neighbours() == [(0, 0), (0, -1), (0, 1)] and not climb.done
    climb.tried |= {(0, -1): {"product": 0.0}, (0, 1): {"product": 2.0}}
    climb.move()
    assert climb.best == (0, 1) and not climb.done
    climb.move()
    assert climb.done and climb.rates(climb.best).offsets == pytest.approx(1e-3 * 10**0.25)


def test_a_gain_of_next_to_nothing_is_not_gone_after():
    climb = Climb(make_rows(parse_entries(["textual_inversion"]), (12,))[0])
    climb.tried = {(0, 0): {"product": 0.5}, (-1, 0): {"product": 0.501}, (1, 0): {"product": 0.4}}
    climb.move()
    assert climb.best == (0, 0) and climb.done
    climb.stride, climb.tried[-1, 0] = 2, {"product": 0.503}
    climb.move()
    assert climb.best == (-1, 0) and not climb.done


def test_rates_of_a_file_are_taken_where_they_are_chosen(tmp_path):
    file = tmp_path / "rates.json"
    chosen = {"lora@12": [0.0, 0.5], "lora:rates=0/1e-3@12": [0.0, 0.5]}
    file.write_text(json.dumps({"format": "datencoder-rates", "chosen": chosen, "tried": {}}))
    rows = make_rows(parse_entries(["lora", "lora:rates=0/1e-3", "base"]), (0, 12, 50))
    found, missing = with_rates(rows, file)
    expected = [row.rates._replace(offsets=0.5) if row.name == "lora@12" else row.rates for row in rows]
    assert [row.rates for row in found] == expected
    assert missing == ["lora@50"]


@pytest.mark.parametrize("text", ["{}", "[]", "not json", '{"format": "datencoder-rates", "chosen": {"lora@1": [1]}}'])
def test_other_files_are_refused(text, tmp_path):
    file = tmp_path / "rates.json"
    file.write_text(text)
    with pytest.raises(UserError, match="holds no learning rates"):
        read_rates(file)


def test_a_sweep_is_made_and_its_rates_are_used(model, tmp_path):  # noqa: F811
    asked = ["--suite", "toyworld", "--instances", "1", "--seeds", "1", "--methods", "lora:rank=2@2", "--sweep", "2"]
    assert evaluate(model, tmp_path, *asked) == 0
    content = read_rates(tmp_path / "rates.json")
    [chosen], [tried] = content["chosen"].values(), content["tried"].values()
    assert {"product", "identity", "offsets"} <= tried[0].keys() and len(tried) >= 5
    assert row_of(metrics_of(tmp_path), "lora:rank=2", 2)["rates"] == pytest.approx(chosen)
    assert {file.name for file in tmp_path.glob("sweep/**/*.npz")} == {"creature-1200000-0.npz", "robot-1200001-0.npz"}
    chosen_on = {"source": "chosen", "individuals": 2, "classes": 2}
    assert row_of(metrics_of(tmp_path), "lora:rank=2", 2)["rate_choice"] == chosen_on
    assert "chosen on 2 individuals of 2 classes" in (tmp_path / "report.md").read_text("utf-8")
    # Another command of the same folder keeps what is known of its rows.
    assert evaluate(model, tmp_path, *asked[:-3], "base", "--report-only") == 0
    assert row_of(metrics_of(tmp_path), "lora:rank=2", 2)["rate_choice"] == chosen_on


def test_rates_are_not_chosen_under_settings_that_the_folder_has_not(model, tmp_path, capsys):  # noqa: F811
    asked = ["--suite", "toyworld", "--instances", "1", "--seeds", "1", "--methods"]
    assert evaluate(model, tmp_path, *asked, "base") == 0
    assert evaluate(model, tmp_path, *asked, "lora:rank=2@2", "--sweep", "2", "--guidance", "5") == 2
    assert "guidance was 7.5 and is now 5.0" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists() and not (tmp_path / "rates.json").exists()
    assert evaluate(model, tmp_path, *asked, "base", "lora:rank=2@2", "--sweep", "2", "--report-only") == 0
    assert not (tmp_path / "sweep").exists() and not list(tmp_path.glob("units/lora*"))


def test_rates_are_chosen_for_rows_that_nothing_was_made_of(model, tmp_path, capsys):  # noqa: F811
    asked = ["--suite", "toyworld", "--instances", "1", "--seeds", "1", "--methods", "lora:rank=2@2"]
    assert evaluate(model, tmp_path, *asked, "--report-only") == 0
    assert evaluate(model, tmp_path, *asked, "--sweep", "2") == 0
    assert "lora:rank=2@2" in read_rates(tmp_path / "rates.json")["chosen"]
    # Those that have units keep the rates these were made at, and the sweep is not begun.
    other = tmp_path / "other"
    assert evaluate(model, other, *asked) == 0
    capsys.readouterr()
    assert evaluate(model, other, *asked, "--sweep", "2") == 0
    assert "no rates are chosen for lora:rank=2@2, begun without" in capsys.readouterr().out
    assert not (other / "sweep").exists() and not (other / "rates.json").exists()


def test_rows_say_where_their_rates_come_from(tmp_path):
    file = tmp_path / "rates.json"
    content = {"format": "datencoder-rates", "chosen": {"lora@12": [0.0, 0.5], "lora@50": [0.0, 0.5]}, "tried": {}}
    file.write_text(json.dumps(content | {"chosen_on": {"lora@12": {"individuals": 12, "classes": 6}}}))
    rows, _ = with_rates(make_rows(parse_entries(["lora", "lora:rates=0/1e-3", "base"]), (12, 50, 300)), file)
    assert [row.choice for row in rows if row.entry.label == "lora"] == [
        RateChoice("chosen", 12, 6),
        RateChoice("chosen"),
        RateChoice("default"),
    ]
    assert {row.choice for row in rows if row.entry.options} == {RateChoice("named")}
    told = {row.name: {"steps": row.steps, "rates": list(row.rates)} for row in rows if row.entry.method != "base"}
    back = rows_of(told, {"lora@12": ["chosen", 12, 6]})  # of a folder that says it of one row alone
    assert [row.choice for row in back[:3]] == [row.choice for row in rows[:3]]


def test_a_file_that_says_nonsense_of_its_choices_is_refused(tmp_path):
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"format": "datencoder-rates", "chosen": {}, "chosen_on": {"lora@1": 12}}))
    with pytest.raises(UserError, match="holds no learning rates"):
        read_rates(file)

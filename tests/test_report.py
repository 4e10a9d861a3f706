"""The report of an evaluation, made from a synthetic one of realistic size whose numbers are computed here again."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image
from report_helpers import METHODS, SCORES, SHOWN, SIDE, STEPS, Page, synthetic, texts

from datencoder_jax.benchmark.report import write_report
from datencoder_jax.benchmark.report.results import Score, verdict
from datencoder_jax.evaluation.scores import Interval


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "out"
    folder.mkdir()
    synthetic(folder)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def content(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def markdown(folder):
    return (folder / "report.md").read_text("utf-8")


def resampled(values):
    """Mean and ends of the 95 % percentile bootstrap of 2000 resamples."""
    values = np.array([np.nan if v is None else v for v in values], np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    means = np.array(
        [values[draw].mean() for draw in np.random.default_rng(0).integers(len(values), size=(2000, len(values)))]
    )
    return values.mean(), *np.quantile(means, [0.025, 0.975])


def written(name, value, sign=""):
    scaled = value * (100 if SCORES[name]["unit"] == "share" else 1)
    return f"{scaled:{sign}.{1 if SCORES[name]['unit'] == 'share' else 3}f}"


def shown(name, found, sign=""):
    """What a table says of a score."""
    return (
        ["–"]
        if found is None
        else [written(name, found[0], sign), "[" + ", ".join(written(name, v, sign) for v in found[1:]) + "]"]
    )


def methods(content):
    return {(r["label"], r["steps"]): r for r in content["rows"] if r["kind"] == "method"}


def test_the_tables_numbers_are_means_and_intervals_over_subjects(content, page, markdown):
    table = page.table("scores")
    lines = markdown.split("## Scores")[1].split("\n## ")[0].splitlines()
    assert len(table) == len(METHODS) * len(STEPS) + 2
    some = [key for key in methods(content) if key[0] in ("datencoder", "disendiff") or key == ("lora", 50)]
    for label, steps in some:
        values = methods(content)[label, steps]["values"]
        expected = [shown(name, resampled(values[name])) for name in SCORES]
        assert [texts(cell) for cell in table[label, steps][: len(SCORES)]] == expected
        (line,) = [line for line in lines if re.match(rf"\| \**{label}\** \| {steps} \|", line)]
        plain = [
            cell.replace("*", "").replace("≈", "").split(maxsplit=1) for cell in line.split("|")[3 : 3 + len(SCORES)]
        ]
        assert [[cell.strip() for cell in cells] for cells in plain] == expected
    floor = next(r for r in content["rows"] if r["label"] == "another of its class")
    assert texts(table["another of its class", None][0]) == shown("identity", resampled(floor["values"]["identity"]))


def test_groups_have_tables_of_their_subjects(content, page):
    for number, indices in enumerate(content["groups"].values()):
        row = methods(content)["perfusion", 12]
        expected = [shown(name, resampled([row["values"][name][k] for k in indices])) for name in list(SCORES)[:3]]
        assert [texts(cell) for cell in page.table(f"group-{number}")["perfusion", 12]] == expected


def test_the_best_and_what_ties_with_it_are_marked(content, page):
    for column, (name, about) in enumerate(SCORES.items()):
        found = {key: resampled(row["values"][name]) for key, row in methods(content).items()}
        found = {key: value for key, value in found.items() if value}
        best = (max if about["better"] == "higher" else min)(found, key=lambda key: found[key][0])
        overlapping = {key for key, v in found.items() if v[2] >= found[best][1] and v[1] <= found[best][2]}
        marks = {key: cells[column]["class"].split()[:1] for key, cells in page.table("scores").items()}
        assert marks[best] == ["best"]
        assert {key for key, mark in marks.items() if mark in (["best"], ["tie"])} == overlapping
        assert 1 < len(overlapping) < len(found)


def test_verdicts_are_those_of_a_paired_bootstrap(content, page, markdown):
    main = methods(content)["datencoder", 12]["values"]
    table, seen = page.table("differences"), set()
    assert ("datencoder", 12) not in table and len(table) == len(METHODS) * len(STEPS) - 1 + 2
    for key, row in methods(content).items():
        if key == ("datencoder", 12):
            continue
        for cell, name in zip(table[key], list(SCORES)[:3], strict=True):
            pairs = zip(main[name], row["values"][name], strict=True)
            found = resampled([None if b is None else a - b for a, b in pairs])
            said = texts(cell)
            if found is None:
                assert said == ["–"]
                continue
            expected = "better" if found[1] > 0 else "worse" if found[2] < 0 else "undecided"
            seen.add(expected)
            assert said[2] == expected
            np.testing.assert_allclose(numbers(said), [float(written(name, v)) for v in found], atol=1e-9)
    assert seen == {"better", "worse", "undecided"}
    line = next(
        line for line in markdown.split("## Paired differences")[1].splitlines() if line.startswith("| e4t | 0 |")
    )
    assert [re.findall("better|worse|undecided", cell) for cell in line.split("|")[3:6]] == [
        [texts(cell)[2]] for cell in table["e4t", 0]
    ]


def numbers(said):
    return [float(number) for text in said[:2] for number in re.findall(r"[-+]?\d+\.\d+", text)]


def test_a_lower_score_is_better_where_that_is_what_the_score_says():
    lower = Score("copying", "copying", higher=False)
    said = [verdict(Interval(mean, mean - 1, mean + 1), lower) for mean in (-2.0, 0.0, 2.0)]
    assert said == ["better", "undecided", "worse"]


def curves(root):
    """Of a drawing: the number of points and the colour of each method's line, and every text."""
    found, said = {}, []
    for element in root.iter():
        tag = element.tag.rsplit("}", 1)[-1]
        if tag == "text":
            said.append("".join(element.itertext()))
        if tag == "g" and "line " in element.get("id", "").replace("line-", "line "):
            label = re.sub(r"^(.*-)?line[ -]", "", element.get("id"))
            path = next(part for part in element.iter() if part.tag.rsplit("}", 1)[-1] == "path")
            colour = re.search(r"stroke: ([^;]+)", path.get("style"))[1]
            found[label] = (len(re.findall("[ML]", path.get("d"))), colour)
    return found, said


def test_every_method_is_in_every_plot_with_all_its_points_in_its_colour(folder, content):
    files = sorted((folder / "plots").glob("*.svg"))
    names = [
        "pareto",
        "pareto-methods",
        *(f"{kind}-{name}" for kind in ("seconds", "steps") for name in ("identity", "product", "prompt")),
    ]
    assert sorted(file.stem for file in files) == names
    points = {label: len(STEPS) - (label == "disendiff") for label in METHODS}
    colours = {}
    for file in files:
        found, said = curves(ElementTree.parse(file).getroot())
        assert {label: count for label, (count, _) in found.items()} == points
        assert set(METHODS) <= set(said)
        assert "true picture" in said or file.stem == "pareto-methods"
        for label, (_, colour) in found.items():
            assert colours.setdefault(label, colour) == colour
    assert len(set(colours.values())) == len(METHODS)
    drawn = re.findall(r"<svg.*?</svg>", (folder / "report.html").read_text("utf-8"), re.DOTALL)
    assert len(drawn) == len(files)
    for svg in drawn:
        found, _ = curves(ElementTree.fromstring(svg.replace("xlink:href", "href")))
        assert {label: count for label, (count, _) in found.items()} == points
        assert {colour for _, colour in found.values()} == {f"var(--c{k})" for k in range(len(METHODS))}


def test_points_stand_where_the_numbers_are(folder, content):
    """The Pareto plot's points, read back through its ticks."""
    root = ElementTree.parse(folder / "plots" / "pareto.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    ticks = {"x": [], "y": []}
    for group in root.iter(f"{space}g"):
        if found := re.match(r"([xy])tick_", group.get("id", "")):
            use = next(group.iter(f"{space}use"))
            text = next(group.iter(f"{space}text")).text
            ticks[found[1]].append((float(use.get(found[1])), float(text.replace("−", "-"))))
    scale = {axis: np.polyfit(*np.array(pairs).T, 1) for axis, pairs in ticks.items()}
    group = next(g for g in root.iter(f"{space}g") if g.get("id") == "line lora")
    drawn = np.array(re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", next(group.iter(f"{space}path")).get("d")), np.float64)
    rows = [methods(content)["lora", steps]["values"] for steps in STEPS]
    expected = [[100 * resampled(row["prompt"])[0], resampled(row["identity"])[0]] for row in rows]
    read = np.stack([np.polyval(scale["x"], drawn[:, 0]), np.polyval(scale["y"], drawn[:, 1])], axis=1)
    np.testing.assert_allclose(read, expected, atol=1e-3)


def test_the_page_needs_nothing_beside_it(folder, page):
    text = (folder / "report.html").read_text("utf-8")
    assert all(address.startswith(("#", "data:image/")) for address in page.addresses) and page.addresses
    assert not re.search(r"https?:|@import|<link|<iframe", text)
    assert len(page.ids) == len(set(page.ids))
    inside = {address[1:] for address in page.addresses if address.startswith("#")}
    assert inside <= set(page.ids)
    assert "<here>" in page.text and "<here>" not in text


def test_pictures_are_the_sheets_tiles(folder, content, page):
    row = methods(content)["e4t", 12]
    pixels = np.asarray(Image.open(folder / row["pictures"]))
    column = 2
    prompt = content["settings"]["prompts"][SHOWN["prompts"][column]]
    found = page.pictures[f"e4t: {prompt}"]
    assert len(found) == 3 * len(SHOWN["subjects"])  # at 12, 0 and 300 steps
    for k in range(len(SHOWN["subjects"])):
        tile = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[k].split(",")[1]))))
        np.testing.assert_array_equal(tile, pixels[SIDE * k : SIDE * (k + 1), SIDE * column : SIDE * (column + 1)])
    assert len(page.pictures["input picture of creature 1100005"]) == 3
    assert f"disendiff: {prompt}" in page.pictures and len(page.pictures[f"disendiff: {prompt}"]) == 2 * 3
    assert sorted(file.name for file in (folder / "plots").glob("*.png")) == [
        "pictures-0.png",
        "pictures-12.png",
        "pictures-300.png",
    ]


def test_failures_goals_definitions_and_settings_are_told(page, markdown):
    table = page.table("failures")
    assert texts(table["lora", 50][1]) == ["the loss <is> not | finite"]
    assert texts(table["lora", 50][2]) == ["creature 1100003, creature 1100064 (seed 1)"]
    assert texts(table["disendiff", 300][2]) == ["all 128 (seed 0)"]
    assert page.table("costs")["disendiff", 300][-1]["text"] == ["128"]
    for said in (page.text, markdown.replace("\\", "")):
        assert "✗ missed" in said and "✓ met" in said and "at most 1/20 of the seconds" in said
        assert "mean cosine, judge <v3>; higher is better." in said
        assert "a photo of a S* in a snowy forest" in said and "1f2e3d4c" in said
    assert "the loss \\<is\\> not \\| finite" in markdown
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(counts) == 1
    links = re.findall(r"\]\((plots/[^)]+)\)", markdown)
    assert len(links) == 8 + 3


def test_costs(page):
    cells = [texts(cell) for cell in page.table("costs")["datencoder", 12]]
    assert page.table("costs")["lora", 50][-1]["text"] == ["2"]
    assert cells == [["0.001 / 0.01"], ["0.02"], ["0.13"], ["0.15"], ["1.30"], ["99.8 kB"], ["24,960"], ["0"]]


def test_the_same_input_gives_the_same_bytes(folder):
    def files():
        names = ["report.html", "report.md", *(f"plots/{path.name}" for path in sorted((folder / "plots").iterdir()))]
        return {name: (folder / name).read_bytes() for name in names}

    before = files()
    write_report(folder)
    assert files() == before

"""What the documentation says: its commands parse, the messages it explains exist, its links and numbers hold."""

import ast
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest

import datencoder_jax
from datencoder_jax.benchmark.entries import make_rows, parse_entries, parse_steps
from datencoder_jax.benchmark.rates import with_rates
from datencoder_jax.cli import build_parser
from datencoder_jax.memory import PRESETS
from datencoder_jax.methods import METHODS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page):
    """The contents of a page's fenced blocks."""
    return re.findall(r"^```\w*\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(page):
    lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("datencoder ")]


def rows(page, heading):
    """The cells of the first table under a heading, without its two first lines."""
    table = page.read_text("utf-8").split(f"\n{heading}\n", 1)[1].split("\n|", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.fixture(scope="module")
def texts():
    """Every text in the package's code, with … for what is filled in."""

    def text(node):
        if isinstance(node, ast.JoinedStr):
            return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""

    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "datencoder_jax").rglob("*.py")]
    return "\n".join(text(node) for tree in trees for node in ast.walk(tree))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_parses(page):
    for command in commands(page):
        build_parser().parse_args(shlex.split(command, comments=True)[1:])


def test_there_are_commands():
    found = [line.split()[1] for page in PAGES for line in commands(page)]
    assert len(found) > 15 and set(found) >= {"personalize", "generate", "export", "pretrain", "toyworld", "info"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_call_in_python_fits(page):
    for code in (block for block in blocks(page) if block.startswith(("from ", "import "))):
        for node in ast.walk(ast.parse(code)):
            name = getattr(getattr(node, "func", None), "id", None)
            if name in datencoder_jax.__all__:
                named = {keyword.arg: None for keyword in node.keywords}
                inspect.signature(getattr(datencoder_jax, name)).bind(*node.args, **named)


def test_every_explained_message_exists(texts):
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 80 and len(set(messages)) == len(messages)
    assert not [message for message in messages if message.removesuffix(" …") not in texts]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_table_of_memory_is_that_of_the_code():
    table = rows(ROOT / "docs" / "memory.md", "## `--memory`")
    found = [row for row in table if row[0].isdigit()]
    yes = {True: "yes", False: "no"}
    assert found == [
        [str(size), str(each.draws), yes[each.remat], yes[each.in_parts], str(each.batch)]
        for size, each in PRESETS.items()
    ]


def test_the_table_of_methods_is_that_of_the_code():
    table = rows(ROOT / "docs" / "stable_diffusion.md", "## The methods")
    found = {row[0].strip("`"): (int(row[3]), tuple(float(rate) for rate in row[4].split(","))) for row in table}
    assert found == {name: (method.steps, tuple(method.rates)) for name, method in METHODS.items()}


def expand_braces(word):
    """The words that bash makes of one with `{a,b}` in it."""
    parts = re.fullmatch(r"(.*)\{([^}]*)\}(.*)", word)
    return [word] if parts is None else [parts[1] + middle + parts[3] for middle in parts[2].split(",")]


def evaluations(page):
    """The arguments of a page's `datencoder evaluate` commands, without those that leave something out."""
    found = [shlex.split(line, comments=True)[1:] for line in commands(page) if line.startswith("datencoder evaluate")]
    words = [[part for word in line for part in expand_braces(word)] for line in found]
    return [build_parser().parse_args(line) for line in words]


def asked_rows(args):
    """The rows of a command at the rates it takes, and those that its file of rates says nothing of."""
    rows = make_rows(parse_entries(args.methods), parse_steps(args.steps))
    return with_rates(rows, ROOT / args.rates) if args.rates else (rows, [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_method_that_is_measured_is_one(page):
    for args in evaluations(page):
        assert asked_rows(args)[1] == []


@pytest.mark.parametrize("name", ["README.md", "docs/benchmark/README.md"])
def test_one_command_makes_the_table_at_the_rates_it_was_made_at(name):
    [args] = [args for args in evaluations(ROOT / name) if args.rates]
    asked, missing = asked_rows(args)
    made = json.loads((ROOT / "docs" / "benchmark" / "metrics.json").read_text("utf-8"))
    assert missing == [] and args.instances is None and args.seeds is None  # all of them, as the table has
    expected = {(row["label"], row["steps"]): row for row in made["rows"] if row["kind"] == "method"}
    rows_asked = {(row.entry.label, row.steps): row for row in asked if row.entry.method != "base"}
    for key, row in rows_asked.items():
        if row.steps:
            assert list(row.rates) == pytest.approx(expected[key]["rates"])
            assert row.choice._asdict() == expected[key]["rate_choice"]
    if name == "README.md":
        table = {line[0].strip("*"): line[1:6] for line in rows(ROOT / name, "### Does it work?")}
        filled = {
            (label, n)
            for label, cells in table.items()
            for n, cell in zip((0, 4, 12, 50, 300), cells, strict=True)
            if cell
        }
        filled = {(label, n) for label, n in filled if not label.startswith("rates")}
        assert {(label.split(":")[0], n) for label, n in rows_asked} == filled
    else:
        assert rows_asked.keys() == expected.keys()


def test_make_table_measures_the_methods_of_the_readme():
    [args] = [args for args in evaluations(ROOT / "README.md") if args.rates]
    text = (ROOT / "Makefile").read_text("utf-8").replace("\\\n", " ")
    assert re.search(r"^TABLE = (.*)$", text, re.MULTILINE)[1].split() == args.methods
    assert f"--rates {args.rates} --steps {args.steps}" in text


def test_the_tables_rates_are_those_of_the_shipped_file():
    shipped = json.loads((ROOT / "docs" / "benchmark" / "rates.json").read_text("utf-8"))
    assert shipped["chosen"].keys() == shipped["chosen_on"].keys()
    counts = {name.rpartition("@")[2]: about["individuals"] for name, about in shipped["chosen_on"].items()}
    assert counts == {"4": 12, "12": 12, "50": 6, "300": 4}

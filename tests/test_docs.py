"""What the documentation says: its commands parse, the messages it explains exist, its links and numbers hold."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest

import datencoder_jax
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

"""docs/performance.md says what was measured."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "performance_text", raising=False)
    import performance_text

    return performance_text


def test_the_page_is_made_of_the_measurements(page):
    content = json.loads((ROOT / "docs" / "performance.json").read_text("utf-8"))
    assert page.render_page(content) == (ROOT / "docs" / "performance.md").read_text("utf-8")


def test_tables_of_compiled_programs_are_read(page, tmp_path):
    first, second = tmp_path / "gpu.md", tmp_path / "tpu.md"
    header = "| device | program | memory, GB |\n| --- | --- | --- |\n"
    first.write_text(header + "| H100 | 1.5: tuning | 11.19 |\n| H100 | scores: judge |  |\n", encoding="utf-8")
    second.write_text(header + "| v5e:1x1 | 1.5: tuning | 5.9 |\n", encoding="utf-8")
    rows = page.read_compiled([first, second])
    assert rows == [
        {"device": "H100", "program": "1.5: tuning", "memory, GB": "11.19"},
        {"device": "H100", "program": "scores: judge", "memory, GB": ""},
        {"device": "v5e:1x1", "program": "1.5: tuning", "memory, GB": "5.9"},
    ]
    text = page.render_page({"compiled": rows, "made": {"compiled": "jax"}})
    assert "| v5e:1x1 | 1.5: tuning | 5.9 |" in text.splitlines()


def test_plans_are_tables_or_stand_as_they_are(page):
    rows = [{"command": "a", "text": "a machine\n| x |\n|---|\n"}, {"command": "b", "text": "a recipe\n  chips  8\n"}]
    lines = page.render_page({"plans": rows, "made": {"plans": "jax"}}).splitlines()
    assert lines[lines.index("a machine") + 1 :][:2] == ["", "| x |"]
    assert lines[lines.index("a recipe") - 1] == "```" and lines[lines.index("  chips  8") + 1] == "```"

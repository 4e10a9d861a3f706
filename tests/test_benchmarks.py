"""The benchmark scripts run, at a small size, and what they compare is the same function."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "cpu_against_torch.py"

pytestmark = [
    # Importing torch and its friends warns about Python's own future.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cpu_against_torch_times_equal_results(script, tmp_path, capsys):
    file = tmp_path / "out" / "seconds.json"
    measurements = script.main(["--tiny", "--resolution", "64", "--repeats", "2", "--json", str(file)])
    assert [measurement.name for measurement in measurements] == ["forward", "step"]
    report = json.loads(file.read_text())
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4
    for measurement, entry, row in zip(measurements, report["measurements"], table[2:], strict=True):
        assert len(measurement.ours) == len(measurement.torch) == 2
        assert 0 < measurement.difference <= script.TOLERANCE
        assert entry["ratio"] == measurement.ratio > 0
        assert entry["ours"] == [timing._asdict() for timing in measurement.ours]
        assert f"| {measurement.ratio:.2f} |" in row


def test_cpu_against_torch_refuses_results_that_differ(script):
    script.check_difference("predictions", script.TOLERANCE)
    for difference in (2 * script.TOLERANCE, float("nan")):
        with pytest.raises(SystemExit, match="differ"):
            script.check_difference("predictions", difference)


@pytest.mark.parametrize("option", [["--repeats", "0"], ["--resolution", "100"], ["--resolution", "0"]])
def test_cpu_against_torch_refuses_odd_options(script, option, capsys):
    with pytest.raises(SystemExit):
        script.main(option)
    assert option[0] in capsys.readouterr().err

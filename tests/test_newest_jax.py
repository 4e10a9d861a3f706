"""The script that runs the tests with the newest JAX: linted, and its options; it installs nothing here."""

import configparser
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tools" / "newest_jax.sh"
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers")


def run_script(*arguments):
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True)


def test_script_passes_shellcheck():
    assert os.access(SCRIPT, os.X_OK)
    command = [Path(sys.executable).parent / "shellcheck", "--enable=all", "--exclude=SC2250,SC2310,SC2312,SC2249"]
    done = subprocess.run([*command, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_help_names_every_option():
    text = run_script("--help").stdout
    assert text.startswith("usage: tools/newest_jax.sh") and max(map(len, text.splitlines())) <= 120
    options = set(re.findall(r"--[a-z-]+(?=[ |)])", SCRIPT.read_text().split("while")[1].split("esac")[0]))
    assert options and all(f"\n  {option}" in text for option in options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense"], "the option --nonsense is not known"),
        (["--venv"], "--venv needs a value"),
        (["--python", "/bin/false"], "/bin/false is no Python 3.12 or newer"),
    ],
)
def test_mistaken_options_are_refused(arguments, message):
    done = run_script(*arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and not done.stdout


def test_requirements_are_ranges():
    """A library that pins JAX exactly would downgrade it for its users."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = settings["options.extras_require"]
    lines = "\n".join([settings["options"]["install_requires"], *(extras[name] for name in extras if name != "test")])
    for library in LIBRARIES:
        (requirement, *others) = re.findall(rf"^{library}(?:\[[\w-]+\])? (.*)$", lines, re.M)
        assert re.fullmatch(r">= [\d.]+, < [\d.]+", requirement), f"{library} {requirement}"
        assert all(other == requirement for other in others)  # jax's extras allow the releases that jax itself may be
        assert _is_between(version(library), *re.findall(r"[\d.]+", requirement))


def test_workflow_covers_both_ends_of_the_supported_pythons():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    supported = re.findall(r"Python :: (3\.\d+)", settings["metadata"]["classifiers"])
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    tested = {step["with"]["python-version"] for job in jobs.values() for step in job["steps"] if "with" in step}
    tested |= set(jobs["newest"]["strategy"]["matrix"]["python"])
    assert {supported[0], supported[-1]} < tested
    (command,) = (step["run"] for step in jobs["newest"]["steps"] if "run" in step)
    assert (ROOT / command.split()[0]).samefile(SCRIPT)


def _is_between(release, lowest, end):
    lowest, release, end = (tuple(map(int, text.split("."))) for text in (lowest, release, end))
    return lowest <= release < end

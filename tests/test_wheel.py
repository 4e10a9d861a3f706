"""The built wheel: recipes and example images come with it, and are found by name outside a clone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from datencoder_jax.checkpoints import paths
from datencoder_jax.commands.examples import EXAMPLES
from datencoder_jax.data.reading import read_image
from datencoder_jax.training.recipes import load_recipe, recipe_names

ROOT = Path(__file__).parents[1]
NAMES = {path.stem for path in (ROOT / "configs").glob("*.py")}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The content of a wheel that was built from the clone's files, in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    # Of a copy: a build leaves files in its folder.
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if files.returncode:
        pytest.skip("the tests do not run in a git clone")
    for name in files.stdout.splitlines():
        if not name.startswith(("tests/", "docs/")) and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(folder / "source")], check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_has_recipes_and_examples(installed):
    assets = installed / "datencoder_jax" / "assets"
    assert {path.stem for path in (assets / "configs").glob("*.py")} == NAMES
    assert (assets / "examples" / "robot.png").read_bytes() == (ROOT / "examples" / "robot.png").read_bytes()
    assert (assets / "toyworld").is_dir()


def test_commands_find_recipes_and_examples_of_a_wheel(installed, tmp_path):
    code = (
        "import datencoder_jax, sys; from datencoder_jax.cli import main; from datencoder_jax.data.reading import "
        "read_image; print(datencoder_jax.__file__, read_image('examples/robot.png').shape); "
        "sys.exit(main(['pretrain', '--config', 'toyworld_encoder', '--variant', 'smoke', '--print-config']))"
    )
    environment = {"PYTHONPATH": str(installed), "PATH": "", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, rest = done.stdout.split("\n", 1)
    assert first == f"{installed / 'datencoder_jax' / '__init__.py'} (256, 256, 3)"
    assert '"stage": "encoder"' in rest


@pytest.mark.parametrize("name", ["sd15_laion", "sd15_laion.py", "configs/sd15_laion.py", "configs/sd15_laion"])
def test_recipes_are_found_by_name_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name).architecture == "1.5"
    (tmp_path / "sd15_laion.py").write_text(
        "from ml_collections import ConfigDict\nget_config = lambda _: ConfigDict()"
    )
    own = load_recipe("sd15_laion.py")
    assert not own  # a file that is there comes first


def test_example_images_are_found_by_name_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_image("examples/robot.png").shape == (256, 256, 3)
    other = Path("elsewhere/robot.png")
    assert paths.find_shipped(other, "examples") == other


def test_the_help_lists_every_recipe():
    assert set(recipe_names()) == NAMES
    assert all(name in EXAMPLES["pretrain"] for name in NAMES)

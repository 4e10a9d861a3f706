"""The notebook: run from top to bottom as it is, and its second half on a tiny Stable Diffusion as if in Colab."""

import os
import re
import shlex
import zipfile
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from tiny import SIDE, write_tiny_base

from datencoder_jax.cli import build_parser
from datencoder_jax.data.reading import read_image

ROOT = Path(__file__).parent.parent
EXPORTED = {"README.md", "concept.safetensors", "learned_embeds.safetensors", "pipeline.py", "samples.png"}
EXPORTED |= {"pytorch_lora_weights.safetensors"}
COLAB = """
from pathlib import Path

class files:
    def upload():
        content = Path("robot.png").read_bytes()
        Path("my robot.png").write_bytes(content)
        return {"my robot.png": content}

    def download(path):
        print("downloading", path)

class drive:
    def mount(path):
        print("mounting", path)
"""


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "colab" / "personalize.ipynb", as_version=4)


def code_cells(notebook):
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def run(notebook, folder):
    """Executes all cells in `folder`; returns what each printed and which of them showed a picture, by their ids."""
    # One device, and none of the user's caches, as without the tests.
    theirs = ("XLA_FLAGS", "DATENCODER_CACHE", "HF_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in theirs}
    environment |= {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "IPYTHONDIR": str(folder / "ipython"),
        "PYTHONPATH": str(folder),
    }
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute(env=environment)
    outputs = {name: cell.outputs for name, cell in code_cells(notebook).items()}
    printed = {name: "".join(output.get("text", "") for output in each) for name, each in outputs.items()}
    # A command that fails does not stop a notebook.
    assert not [text for text in printed.values() if "error:" in text or "Traceback" in text], printed
    shown = {name for name, each in outputs.items() if any("image/png" in output.get("data", {}) for output in each)}
    return printed, shown


def with_values(notebook, **values):
    """Sets variables where the notebook sets them, and checks that it does so once."""
    for name, value in values.items():
        pattern = re.compile(rf"^{name} = .*$", re.MULTILINE)
        found = [cell for cell in code_cells(notebook).values() if pattern.search(cell.source)]
        assert len(found) == 1, name
        found[0].source = pattern.sub(lambda _, line=f"{name} = {value!r}": line, found[0].source)


def commands(notebook):
    """The notebook's `datencoder` commands, their variables filled in."""
    values = {"PICTURE": "my robot.png"}
    for cell in code_cells(notebook).values():
        values |= {name: eval(value) for name, value in re.findall(r"^([A-Z]+) = (\"[^\"]*\"|\d+)", cell.source, re.M)}
    values["SETTINGS"] = "--dtype {DTYPE} --memory {MEMORY}".format(**values)
    for cell in code_cells(notebook).values():
        for line in re.sub(r"\\\n", " ", cell.source).splitlines():
            if "!datencoder" in line:
                yield line.partition("!datencoder ")[2].format(**values)


def test_it_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.outputs or cell.execution_count for cell in code_cells(notebook).values())


def test_every_cell_is_python_and_every_command_one_of_ours(notebook):
    for name, cell in code_cells(notebook).items():
        compile(TransformerManager().transform_cell(cell.source), name, "exec")
    found = list(commands(notebook))
    assert len(found) == 11
    for command in found:
        build_parser().parse_args(shlex.split(command))


def test_it_runs_on_the_embedded_model(notebook, tmp_path):
    printed, shown = run(notebook, tmp_path)
    assert shown == {"draw", "personalize", "generate", "both"}
    assert "no GPU or TPU here" in printed["settings"] and printed["stable-diffusion-personalize"] == ""
    for name, count in {"robot": 16, "prompts": 16, "fish": 16, "both": 12}.items():
        pictures = sorted((tmp_path / "out" / name).glob("0*.png"))
        assert len(pictures) == count and {read_image(path).shape for path in pictures} == {(32, 32, 3)}
        assert (tmp_path / "out" / name / "samples.png").is_file()
    with zipfile.ZipFile(tmp_path / "out" / "my-robot.zip") as archive:
        assert set(archive.namelist()) == EXPORTED | {"my-robot.safetensors", "my-robot_emb.safetensors"}


def test_it_runs_on_stable_diffusion_in_colab(notebook, tmp_path):
    (tmp_path / "google" / "colab").mkdir(parents=True)
    (tmp_path / "google" / "colab" / "__init__.py").write_text(COLAB)
    model = str(write_tiny_base(tmp_path / "model"))
    with_values(notebook, RUN_STABLE_DIFFUSION=True, MODEL=model, STEPS=2, DRIVE=True)
    names = list(code_cells(notebook))
    wanted = {"repository", "install", "cache", "draw", *names[names.index("settings") :]}
    notebook.cells = [cell for cell in notebook.cells if cell.id in wanted]
    for cell in notebook.cells:
        cell.source = cell.source.replace("/content/drive", str(tmp_path / "drive"))

    printed, shown = run(notebook, tmp_path)
    drive = tmp_path / "drive"
    assert f"mounting {drive}" in printed["cache"] and f"{drive}/MyDrive/datencoder/huggingface" in printed["cache"]
    assert shown == {"draw", "upload", "stable-diffusion-personalize", "stable-diffusion-generate"}
    assert f"downloading {tmp_path}/out/mine.zip" in printed["stable-diffusion-download"]
    with zipfile.ZipFile(tmp_path / "out" / "mine.zip") as archive:
        assert set(archive.namelist()) >= EXPORTED | {"my-thing.safetensors", "my-thing_emb.safetensors"}
    for name, count in {"mine": 8, "mine-again": 4}.items():
        pictures = sorted((tmp_path / "out" / name).glob("0*.png"))
        assert len(pictures) == count and {read_image(path).shape for path in pictures} == {(SIDE, SIDE, 3)}

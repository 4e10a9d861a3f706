"""Commands that need no model, help, and output that cannot be written."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_helpers import PATH, concept
from cli_helpers import fails

from datencoder_jax.checkpoints.concept_file import save_concept
from datencoder_jax.cli import main
from datencoder_jax.data.reading import fit_square, read_image
from datencoder_jax.toyworld.render import render
from datencoder_jax.toyworld.world import SPLITS, Context, Instance
from datencoder_jax.typing import Dense, Removed

pytest_plugins = ("cli_fixtures",)


def test_toyworld_draws_what_was_asked_for(tmp_path, capsys):
    id = SPLITS["test"][5]
    argv = ["toyworld", "--instance", str(id), "--scene", "beach", "--style", "sketch", "--accessory", "hat"]
    assert main([*argv, "--seed", "4", "--out", str(tmp_path / "a.png")]) == 0
    drawn = read_image(tmp_path / "a.png")
    expected = render(Instance.from_id(id), Context("beach", "sketch", "hat"), 4)
    assert drawn.shape == (256, 256, 3)
    np.testing.assert_array_equal(fit_square(drawn, 32), expected)
    assert f"instance {id}" in capsys.readouterr().out


def test_toyworld_chooses_among_the_unseen(tmp_path, capsys):
    def ids(*argv):
        assert main(["toyworld", *argv, "--out", str(tmp_path / "a.png")]) == 0
        return int(capsys.readouterr().out.split(":")[0].removeprefix("instance "))

    chosen = [ids("--class", "fish", "--seed", str(seed)) for seed in range(4)]
    assert len(set(chosen)) == 4 and ids("--class", "fish") == chosen[0]
    assert all(id in SPLITS["test"] and Instance.from_id(id).cls == "fish" for id in chosen)
    assert ids() in SPLITS["test"]


def test_toyworld_refuses(tmp_path, capsys):
    out = ["--out", tmp_path / "a.png"]
    fails(capsys, "invalid choice: 'dog'", "toyworld", "--class", "dog", *out)
    fails(capsys, "is a house, not a fish", "toyworld", "--instance", "3", "--class", "fish", *out)
    fails(capsys, "even", "toyworld", "--size", "33", *out)
    fails(capsys, "too large", "toyworld", "--size", "1024", "--scale", "64", *out)
    fails(capsys, "--instance", "toyworld", "--instance", "-1", *out)
    fails(capsys, "must end in .png", "toyworld", "--out", tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_info(capsys, concept_file):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("datencoder ", "jax ", "flax ", "device ", "compiled programs", "huggingface"))
    assert main(["info", concept_file]) == 0
    out = capsys.readouterr().out
    base = "toyworld (fingerprint ffffffff)"
    for expected in ("S*", "gömböc", base, "2 of 12", "1 projection of rank 2", "a b.png"):
        assert expected in out
    product = concept().offsets[PATH].down @ concept().offsets[PATH].up
    assert f"{np.linalg.norm(product):.3g} on average" in out


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (Dense(np.full((8, 6), 0.5, np.float32)), ["1 projection, whole", "3.46 on average"]),
        (Removed(np.eye(6, 2, dtype=np.float32)), ["1 projection, directions removed"]),
    ],
)
def test_info_says_what_kind_of_change_a_concept_is(tmp_path, capsys, edit, said):
    save_concept(tmp_path / "c.safetensors", concept(offsets={PATH: edit}))
    assert main(["info", str(tmp_path / "c.safetensors")]) == 0
    found = capsys.readouterr().out
    assert all(words in found for words in said) and "rank" not in found


@pytest.mark.parametrize("command", ["", "personalize", "generate", "toyworld", "info"])
def test_help_has_examples(capsys, command):
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out and f"datencoder {command}" in out


def test_help_comes_at_once_and_as_a_module():
    """No heavy import before a command runs, which is what would make the help slow."""
    code = (
        "import runpy, sys; sys.argv = ['datencoder', '--help']\n"
        "try: runpy.run_module('datencoder_jax', run_name='__main__')\n"
        "finally: print(sorted({'jax', 'flax', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]" and not result.stderr


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from datencoder_jax.cli import main; sys.exit(main(['--version']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full, a disk that is always full")
def test_output_to_a_full_device():
    code = "import sys; from datencoder_jax.cli import main; sys.exit(main(['--version']))"
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2 and result.stderr == "error: No space left on device.\n"


def run_command(*argv, closed=(), **environ):
    """The command in a process of its own, with some of the standard streams closed."""
    shell = " ".join(f"{descriptor}>&-" for descriptor in closed)
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-m", "datencoder_jax", *argv]
    return subprocess.run(command, capture_output=True, env=os.environ | environ)


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_without_standard_streams(tmp_path, closed):
    out = tmp_path / "a.png"
    result = run_command("toyworld", "--out", out, closed=closed)
    assert result.returncode == 0 and not result.stderr and read_image(out).shape == (256, 256, 3)
    assert bool(result.stdout) == (1 not in closed)
    assert run_command("toyworld", "--size", "33", "--out", out, closed=closed).returncode == 2


def test_a_file_that_is_opened_does_not_take_the_place_of_a_missing_stream(tmp_path):
    code = (
        "import os, sys\nfrom datencoder_jax.cli import main\nmain(['--version'])\n"
        "assert open(sys.argv[1], 'w').fileno() > 2 and os.get_inheritable(1) and os.get_inheritable(2)\n"
        "print('lost'); print('lost', file=sys.stderr)"
    )
    shell = 'exec "$@" 0>&- 1>&- 2>&-'
    assert subprocess.run(["sh", "-c", shell, "sh", sys.executable, "-c", code, tmp_path / "a"]).returncode == 0
    assert (tmp_path / "a").read_bytes() == b""


@pytest.mark.parametrize(
    ("encoding", "name", "printed"),
    [
        ("cp1252", "猫.png", rb"\u732b.png"),
        ("ascii:surrogateescape", "猫.png", rb"\u732b.png"),
        ("utf-8:strict", "\udcff.png", rb"\udcff.png"),
        ("utf-8:surrogateescape", "\udcff.png", b"\xff.png"),
        ("utf-8", "猫.png", "猫.png".encode()),
    ],
)
def test_what_a_console_cannot_print_is_escaped(tmp_path, encoding, name, printed):
    result = run_command("toyworld", "--out", str(tmp_path / name), PYTHONIOENCODING=encoding)
    assert result.returncode == 0 and printed in result.stdout and (tmp_path / name).exists()
    result = run_command("toyworld", "--size", "33", "--class", name, "--out", "a.png", PYTHONIOENCODING=encoding)
    assert result.returncode == 2 and b"Traceback" not in result.stderr


INTERRUPT = """
import os, runpy, signal, sys

target = sys.argv.pop(1)
# Tests that run in the background of a shell ignore Ctrl-C, and child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Finder:
    def find_spec(self, name, *_):
        if name == target:
            os.kill(os.getpid(), signal.SIGINT)
            sys.meta_path.remove(self)

sys.meta_path.insert(0, Finder())
{before}
runpy.run_module("datencoder_jax", run_name="__main__")
"""


def interrupt(module, *argv, before=""):
    """The command, which is interrupted as it imports a module."""
    command = [sys.executable, "-c", INTERRUPT.format(before=before), module, *argv]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "module",
    [
        "datencoder_jax.cli",
        "argparse",
        "datencoder_jax.commands.options",
        "datencoder_jax.commands.info",
        "jax",
        "numpy",
    ],
)
def test_an_interruption_at_the_start_is_one_word(module):
    result = interrupt(module, "info")
    assert (result.returncode, result.stderr.strip(), result.stdout) == (130, "interrupted", "")


def test_an_interruption_of_an_import_leaves_no_folder(tmp_path):
    result = interrupt("jax", "generate", "--prompt", "a", "--out", str(tmp_path / "a" / "b"))
    assert (result.returncode, result.stderr.strip()) == (130, "interrupted") and not list(tmp_path.iterdir())


def test_an_interruption_that_a_library_turns_into_an_error(tmp_path):
    code = (
        "import datencoder_jax.cli as cli\n"
        "def _run(argv):\n"
        "    try: raise KeyboardInterrupt\n"
        "    except KeyboardInterrupt as error: raise ImportError('half of it is missing') from error\n"
        "cli._run = _run; cli.run_and_exit()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr.strip()) == (130, "interrupted")


def test_an_interruption_in_a_callback(tmp_path):
    code = (
        "import weakref, datencoder_jax.cli as cli\n"
        "class Thing: pass\n"
        "def stop(_): raise KeyboardInterrupt\n"
        "def _run(argv):\n"
        "    thing = Thing(); kept = weakref.ref(thing, stop); del thing; print('went on', flush=True)\n"
        "cli._run = _run; cli.run_and_exit()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr.strip(), result.stdout) == (130, "interrupted", "")


def test_an_ignored_interruption_stays_ignored():
    before = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    assert interrupt("datencoder_jax.cli", "--version", before=before).returncode == 0


@pytest.mark.parametrize(
    "command", ["info", "info FILE", "export FILE --out out", "precompute --out out --config RECIPE"]
)
def test_a_device_that_is_not_there_is_told(tmp_path, concept_file, command):
    recipe = str(Path(__file__).parent.parent / "configs" / "sd15_laion.py")
    words = (
        command.replace("out out", f"out {tmp_path / 'out'}").replace("FILE", concept_file).replace("RECIPE", recipe)
    )
    result = run_command(*words.split(), JAX_PLATFORMS="nonesuch")
    assert result.returncode == 2 and result.stderr.startswith(b"error: No device can be used: ")
    assert result.stderr.count(b"\n") == 1 and not (tmp_path / "out").exists()

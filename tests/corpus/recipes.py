"""Bad recipes, and bad changes of their values."""

from pathlib import Path

from corpus import files
from corpus.case import Kind
from corpus.files import content, nothing
from datencoder_jax.training.recipes import load_recipe

KIND = Kind(
    "Recipes",
    "The recipe of `datencoder pretrain --config` and the changes of `--set`, read by `load_recipe`.",
    lambda *arguments: load_recipe(*arguments),
)

_GOOD = """
from ml_collections import ConfigDict

def get_config(variant="full"):
    return ConfigDict({
        "stage": "line", "steps": 10, "remat": True, "output": "", "initial": None,
        "optim": {"lr": 1e-3, "warmup": 300, "decay": "cosine"}, "widths": (8, 16), "names": ("Down",), "empty": (),
        "data": ({"kind": "shards", "path": "a", "weight": 1.0},), "pairs": ((1, 2), (3, 4)),
    })
"""


def recipe(text: str | bytes, variant: str = "full") -> files.Maker:
    """A recipe of this text."""
    return lambda where: (content("recipe.py", text)(where), variant)


def changed(*changes: str) -> files.Maker:
    """A good recipe with changes."""
    return lambda where: (content("recipe.py", _GOOD)(where), "full", changes)


def returned(text: str) -> files.Maker:
    """A recipe that returns a value."""
    return recipe(f"from ml_collections import ConfigDict\ndef get_config(variant):\n    return {text}\n")


for _name, _make in {
    "no file": nothing("recipe.py"),
    "an empty name": nothing(""),
    "a name that no recipe of the package has": nothing("sd16_laion"),
    "a folder": files.folder("recipe.py"),
    "a pipe": files.fifo("recipe.py"),
    "a link to nothing": files.link("recipe.py", "gone.py"),
    "a link to itself": files.link("recipe.py", "recipe.py"),
    "a name of 300 letters": nothing("n" * 300),
    "a name of 254 letters, too long with its ending": nothing("n" * 254),
    "a path of 5,000 letters": nothing("n/" * 2500 + "recipe.py"),
    "a name with a zero byte": nothing("a\0b.py"),
    "a name with an escape sequence": nothing("a\x1b[2Jb.py"),
    "a home folder of nobody": nothing("~nosuchuser/recipe.py"),
    "a name of dots alone": nothing(".."),
    "an empty file": recipe(""),
    "a syntax error": recipe("def get_config(:\n"),
    "an indentation error": recipe("def get_config(variant):\nreturn 1\n"),
    "a recipe in YAML": recipe("steps: 10\nstage: line\n  lr: 1\n"),
    "a recipe in JSON": recipe('{"steps": null}'),
    "zero bytes": recipe(b"\0" * 20),
    "a text that is not UTF-8": recipe(b"name = '\xff\xfe'\n"),
    "a coding that does not exist": recipe("# -*- coding: klingon -*-\nx = 1\n"),
    "an error page of a web server": recipe(files.HTML),
    "a nesting of 10,000 parentheses": recipe("x = " + "(" * 10_000),
    "no get_config": recipe("steps = 3\n"),
    "a get_config that is a number": recipe("get_config = 3\n"),
    "a get_config without a variant": recipe("def get_config():\n    pass\n"),
    "a module that is not installed": recipe("import nowhere_to_be_found\n"),
    "an exception": recipe("def get_config(variant):\n    raise ValueError('a\\nb')\n"),
    "an exception with an escape sequence": recipe("def get_config(variant):\n    raise ValueError('\\x1b[2J')\n"),
    "an exception of its own kind": recipe(
        "class E(Exception):\n    def __str__(self):\n        return 3\ndef get_config(variant):\n    raise E\n"
    ),
    "an end of the program": recipe("raise SystemExit(3)\n"),
    "an endless recursion": recipe("def get_config(variant):\n    return get_config(variant)\n"),
    "a variant that is not there": recipe(_GOOD, "smoky"),
    "a recipe that returns None": returned("None"),
    "a recipe that returns a dict": returned("{}"),
    "a recipe that returns a class": returned("ConfigDict"),
}.items():
    KIND.refused(_name, _make)
for _change in (
    "steps",
    "=3",
    "",
    "=",
    "steps=",
    "steps=many",
    "steps=2.5",
    "steps=inf",
    "steps=nan",
    "steps=None",
    "steps=1e400",
    f"steps={'9' * 5000}",
    "steps=0x10",
    "steps=[1]",
    "steps =3",
    "stepz=3",
    "STEPS=3",
    "lr=3",
    "optim=3",
    "optim.lr=nan",
    "optim.lr=fast",
    "optim.lr=1,5",
    "optim.lr.x=3",
    "optim..lr=3",
    ".optim.lr=3",
    "remat=maybe",
    "remat=2",
    "data=3",
    "data=[]",
    "data=[3]",
    'data={"kind": "folder"}',
    'data=[{"kind": "folder"',
    f"data={'[' * 100_000}",
    "data.1.path=b",
    "data.-1.path=b",
    "data.²=b",
    f"data.{'9' * 5000}.path=b",
    "pairs=1,2",
    "widths=8,many",
    "widths=8,,9",
    "widths.2=3",
    "get=3",
    "to_dict=3",
    "__class__=3",
    "steps\n=3",
):
    _shown = _change if len(_change) < 40 else f"{_change[:8]}... of {len(_change):,} letters"
    KIND.refused(f"the change `{_shown}`".replace("\n", "\\n"), changed(_change))
for _change in (
    "steps=1e3",
    "steps=-5",
    "optim.lr=1",
    "optim.lr=inf",
    "optim.decay=a=b",
    "output=",
    "output=\U0001f408",
    "initial=None",
    "remat=FALSE",
    "widths=(32,)",
    "widths=()",
    "empty=1,2.5,word",
    'data=[{"kind": "folder", "path": "b"}]',
):
    KIND.used(f"the change `{_change}`", changed(_change))
KIND.used("a recipe by its name in the package", nothing("sd15_laion"))
KIND.used("a recipe by a path that is not there", nothing("configs/sd15_laion.py"))
KIND.used("a recipe with a line break in its name", lambda where: content("a\nb.py", _GOOD)(where))
KIND.used("a recipe with a byte order mark", recipe(b"\xef\xbb\xbf" + _GOOD.encode()))
KIND.used("a recipe with line ends of Windows", recipe(_GOOD.replace("\n", "\r\n").encode()))
KIND.used("a link to a recipe", files.linked(content("recipe.py", _GOOD), "link"))
KIND.used("a path in the form of an object", lambda where: Path(content("recipe.py", _GOOD)(where)))

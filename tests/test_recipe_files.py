"""Recipes: what is read from a file, what may be changed in it, and what is said of mistakes."""

import json
import shlex
from pathlib import Path

import pytest

from datencoder_jax.cli import build_parser
from datencoder_jax.errors import UserError
from datencoder_jax.training.recipes import VARIANTS, load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))

RECIPE = """
from ml_collections import ConfigDict
from neighbour import RATE

def get_config(variant="full"):
    return ConfigDict({
        "stage": "line", "steps": 10 if variant == "full" else 2, "remat": True, "output": "", "initial": None,
        "optim": {"lr": RATE, "warmup": 300, "decay": "cosine"},
        "widths": (8, 16), "rates": [0.5], "names": ("Down", "Mid"), "empty": (), "pairs": ((1, 2), (3, 4)),
        "data": ({"kind": "shards", "path": "a", "weight": 1.0}, {"kind": "folder", "path": "b", "weight": 2.0}),
    })
"""


CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "neighbour.py").write_text("RATE = 1e-3\n")
    (tmp_path / "line.py").write_text(RECIPE)
    return tmp_path / "line.py"


def test_a_recipe_has_variants_and_may_import_its_neighbours(recipe):
    assert load_recipe(recipe).steps == 10 and load_recipe(recipe, "smoke").steps == 2
    assert load_recipe(str(recipe)).optim.lr == 1e-3


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("steps=100", "steps", 100),
        ("steps=1e3", "steps", 1000),
        ("steps=1_000", "steps", 1000),
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.lr=2e-4", "optim.lr", 2e-4),
        ("optim.decay=a=b", "optim.decay", "a=b"),
        ("optim.decay=None", "optim.decay", "None"),
        ("output=7", "output", "7"),
        ("remat=false", "remat", False),
        ("remat=True", "remat", True),
        ("remat=0", "remat", False),
        ("initial=None", "initial", None),
        ("initial=runs/a", "initial", "runs/a"),
        ("initial=3", "initial", 3),
        ("initial=false", "initial", False),
        ("widths=32", "widths", (32,)),
        ("widths=32,64,128", "widths", (32, 64, 128)),
        ("widths=(32, 64)", "widths", (32, 64)),
        ("widths=(32,)", "widths", (32,)),
        ("widths=()", "widths", ()),
        ("widths.1=5", "widths", (8, 5)),
        ("rates=[1, 2.5]", "rates", [1.0, 2.5]),
        ("names=('Up', 'Down')", "names", ("Up", "Down")),
        ("names=Up,Down", "names", ("Up", "Down")),
        ("empty=1,2.5,word", "empty", (1, 2.5, "word")),
        ("pairs.1.0=7", "pairs", ((1, 2), (7, 4))),
    ],
)
def test_a_value_is_read_as_the_type_that_stands_there(recipe, setting, key, value):
    config = load_recipe(recipe, overrides=[setting])
    for name in key.split("."):
        config = config[name]
    assert config == value and type(config) is type(value)
    if isinstance(value, tuple | list):
        assert [type(item) for item in config] == [type(item) for item in value]


def test_items_of_tuples_of_sections_and_several_changes(recipe):
    changes = ["data.1.path=gs://c/d", "data.0.weight=3", "steps=1", "steps=7"]
    before, config = load_recipe(recipe).to_dict(), load_recipe(recipe, overrides=changes).to_dict()
    expected = ({"kind": "shards", "path": "a", "weight": 3.0}, {"kind": "folder", "path": "gs://c/d", "weight": 2.0})
    assert config == before | {"data": expected, "steps": 7}
    assert json.loads(load_recipe(recipe, overrides=changes).to_json())["data"] == list(expected)


def test_sections_can_be_replaced_by_others():
    """Another kind of source has other options than the one that stands in the recipe."""
    other = '[{"kind": "records", "path": "r"}]'
    config = load_recipe(CONFIGS / "sd15_paper.py", overrides=[f"data={other}", "data.0.path=s"])
    assert config.data == ({"kind": "records", "path": "s"},)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stepz=3", "has no value 'stepz'; did you mean steps"),
        ("lr=3", "has no value 'lr'; did you mean optim.lr"),
        ("optim.warmpu=3", "did you mean optim.warmup"),
        ("optim.lr.x=3", "has no value 'optim.lr.x'"),
        ("data.2.path=c", "has no value 'data.2.path'; did you mean data.1.path or data.0.path"),
        ("data.-1.path=c", "has no value 'data.-1.path'"),
        ("data.first.path=c", "has no value 'data.first.path'"),
        ("widths.2=3", "has no value 'widths.2'"),
        ("qqqqqq=3", "has no value 'qqqqqq'; it has data, empty,"),
        ("to_dict=3", "has no value 'to_dict'"),
        ("steps=many", "'steps=many' does not fit: it has to be a whole number, as 10 is."),
        ("steps=2.5", "whole number"),
        ("steps=inf", "whole number"),
        ("steps=", "whole number"),
        ("steps=None", "whole number"),
        ("optim.lr=nan", "a number, as 0.001 is"),
        ("remat=maybe", "true or false, as true is"),
        ("optim=3", "it is a section; set one of its values, decay, lr, warmup"),
        ("data=3", "set its values one by one, such as data.0.kind, or all as JSON"),
        ("data=[]", "or all as JSON"),
        ("data=[3]", "or all as JSON"),
        ("pairs=1,2", "set its values one by one, such as pairs.0"),
        ("widths=8,many", "whole number, as 8 is"),
        ("widths=8,,9", "whole number, as 8 is"),
        ("steps", "'steps' is not KEY=VALUE"),
        ("=3", "is not KEY=VALUE"),
        ("steps =3", "has no value 'steps '; did you mean steps"),
    ],
)
def test_what_does_not_fit_is_one_sentence(recipe, setting, message):
    with pytest.raises(UserError) as info:
        load_recipe(recipe, overrides=[setting])
    assert message in str(info.value) and "\n" not in str(info.value) and str(info.value).endswith(".")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "There is no recipe"),
        ("def get_config(:\n", "is not Python: invalid syntax, line 1."),
        ("x = '\0'\n", "is not Python"),
        ("steps = 3\n", "defines no get_config(variant)"),
        ("import nowhere_to_be_found\n", "fails with ModuleNotFoundError: No module named 'nowhere_to_be_found'."),
        ("def get_config():\n    pass\n", "fails with TypeError: get_config() takes 0 positional arguments but 1"),
        ("def get_config(variant):\n    return {}[variant]\n", "fails with KeyError: 'smoke'."),
        ("def get_config(variant):\n    raise ValueError('a\\nb')\n", "fails with ValueError: a b."),
        ("def get_config(variant):\n    return {}\n", "returns a dict instead of a ConfigDict"),
        ("raise SystemExit(3)\n", "fails with SystemExit: 3."),
    ],
)
def test_a_broken_recipe_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as info:
        load_recipe(path, "smoke")
    assert message in str(info.value) and str(path) in str(info.value) and "\n" not in str(info.value)


def test_a_variant_that_is_none(recipe):
    with pytest.raises(UserError, match="no variant 'smoky' of a recipe; choose one of full, smoke"):
        load_recipe(recipe, "smoky")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_both_variants(path):
    full, smoke = (load_recipe(path, variant) for variant in VARIANTS)
    assert full.keys() == smoke.keys() and smoke.steps < full.steps
    assert full.batch_size % 8 == 0 and smoke.batch_size % 8 == 0
    for place in ("base", "output"):  # a try leaves the results of the full recipe alone
        assert not full.get(place) or full[place] != smoke[place]
    with pytest.raises(UserError, match="has no value"):
        load_recipe(path, "smoke", ["no_such_key=1"])


@pytest.mark.parametrize(
    "change",
    ["data.0.path={}", "data.path={}", 'data=[{{"kind": "folder", "path": "{}"}}]', "data={}"],
)
@pytest.mark.parametrize("name", ["toyworld_encoder", "toyworld_e4t"])
def test_pictures_for_a_recipe_that_draws_its_own(name, change):
    """The command that is told is one, and takes the folder."""
    folder = "my pictures/of cats"
    with pytest.raises(UserError, match="draws its own pictures of the embedded world") as error:
        load_recipe(CONFIGS / f"{name}.py", "full", [change.format(folder)])
    command = str(error.value).split("run: ")[1].split(" (--variant smoke")[0]
    args = build_parser().parse_args(shlex.split(command)[1:])
    config = load_recipe(args.config, args.variant, args.set)
    assert [dict(section) for section in config.data] == [{"kind": "folder", "path": folder}]
    assert config.model == "toyworld" and config.stage == {"toyworld_encoder": "encoder"}.get(name, "e4t")


@pytest.mark.parametrize("text", ["data.kind=folder", "data.0.kind=folder"])
def test_the_kind_of_a_source_is_asked_for_too(text):
    with pytest.raises(UserError, match=r"sd15_laion\.py.*PICTURES"):
        load_recipe(CONFIGS / "toyworld_encoder.py", "full", [text])


def test_other_mistakes_are_told_as_before():
    with pytest.raises(UserError, match=r"did you mean data\.concepts"):
        load_recipe(CONFIGS / "toyworld_encoder.py", "full", ["data.concept=5"])
    assert load_recipe(CONFIGS / "toyworld_encoder.py", "full", ["data.concepts=5"]).data.concepts == 5

"""Bad command lines."""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from corpus import files, models
from corpus.case import Kind
from corpus.files import picture
from datencoder_jax import cli
from datencoder_jax.checkpoints.concept_file import save_concept
from datencoder_jax.errors import UserError
from datencoder_jax.printable import is_printable

KIND = Kind(
    "Command lines",
    "The options of `datencoder COMMAND`, with a good picture `cat.png` and a good concept `concept.safetensors` "
    "beside them. A refusal ends with status 2.",
    lambda *arguments: run(*arguments),
)


def run(*argv: str) -> None:
    """Runs a command whose programs are not computed; its error is raised as the `UserError` that it prints.

    Raises:
        AssertionError: it ends with another status, or prints something else than sentences.
    """
    out, err, errors = io.StringIO(), io.StringIO(), []
    exit_status = cli.exit_status

    def recorded_status(error: BaseException) -> int:
        errors.append(error)
        return exit_status(error)

    with (
        redirect_stdout(out),
        redirect_stderr(err),
        models.without_computing(),
        mock.patch.object(cli, "exit_status", recorded_status),
    ):
        status = cli.main(list(argv))
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("warning: ")]
    warned = [line for line in err.getvalue().splitlines() if line.startswith("warning: ")]
    assert all(map(is_printable, lines)), lines
    if status == 0:
        assert not lines, lines
        import warnings

        for line in warned:
            warnings.warn(line.removeprefix("warning: "), stacklevel=1)
        return
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), (status, lines)
    raise UserError(lines[0].removeprefix("error: ")) from (errors[0].__cause__ if errors else None)


def argv(*words: str) -> files.Maker:
    """A command line beside a picture and a concept."""

    def make(where: Path) -> tuple[str, ...]:
        picture("cat.png")(where)
        save_concept("concept.safetensors", models.toyworld_concept())
        return words

    return make


def _line(text: str) -> tuple[str, ...]:
    return tuple(text.split(" "))


_PERSONALIZE, _GENERATE = "personalize cat.png --out out", "generate --prompt robot --num 1 --out out"
_DRAW_CONCEPT = "generate --prompt S* --num 1 --out out --concept concept.safetensors"
REFUSED = [
    "",
    "draw",
    "Generate --prompt robot --out out",
    "personalize",
    "personalize cat.png",
    "personalize --out out",
    "personalize dog.png --out out",
    "personalize cat.png dog.png --out out",
    "personalize . --out out",
    "personalize concept.safetensors --out out",
    f"{_PERSONALIZE} --num 0",
    f"{_PERSONALIZE} --num -1",
    f"{_PERSONALIZE} --num 2.5",
    f"{_PERSONALIZE} --num many",
    f"{_PERSONALIZE} --num 1e3",
    f"{_PERSONALIZE} --num nan",
    f"{_PERSONALIZE} --seed -1",
    f"{_PERSONALIZE} --seed 4294967296",
    f"{_PERSONALIZE} --steps -1",
    f"{_PERSONALIZE} --steps inf",
    f"{_PERSONALIZE} --blend 1.5",
    f"{_PERSONALIZE} --blend -0.1",
    f"{_PERSONALIZE} --blend nan",
    f"{_PERSONALIZE} --guidance -1",
    f"{_PERSONALIZE} --guidance nan",
    f"{_PERSONALIZE} --guidance inf",
    f"{_PERSONALIZE} --sampling-steps 0",
    f"{_PERSONALIZE} --sampling-steps 1000000",
    f"{_PERSONALIZE} --resolution 0",
    f"{_PERSONALIZE} --resolution 33",
    f"{_PERSONALIZE} --learning-rates 1",
    f"{_PERSONALIZE} --learning-rates 1 nan",
    f"{_PERSONALIZE} --learning-rates -1 1",
    f"{_PERSONALIZE} --rank 0 --method lora",
    f"{_PERSONALIZE} --rank 4",
    f"{_PERSONALIZE} --prior-pictures 4",
    f"{_PERSONALIZE} --prior",
    f"{_PERSONALIZE} --prior -1 --method lora",
    f"{_PERSONALIZE} --token",
    f"{_PERSONALIZE} --token photo --prompt photo",
    f"{_PERSONALIZE} --option",
    f"{_PERSONALIZE} --option lock",
    f"{_PERSONALIZE} --option lock=off",
    f"{_PERSONALIZE} --option lowest=high",
    f"{_PERSONALIZE} --option lowest=0.9 highest=0.1",
    f"{_PERSONALIZE} --prompt robot",
    f"{_PERSONALIZE} --prompt cat.png",
    f"{_PERSONALIZE} --prompt S* cat.png",
    f"{_PERSONALIZE} --encoder nowhere",
    f"{_PERSONALIZE} --vision nowhere",
    f"{_PERSONALIZE} --model nowhere --method lora",
    f"{_PERSONALIZE} --model nowhere",
    f"{_PERSONALIZE} --encoder nowhere --method lora",
    f"{_PERSONALIZE} --method e4t",
    f"{_PERSONALIZE} --name ../other --export",
    f"{_PERSONALIZE} --name a/b --export",
    f"{_PERSONALIZE} --dtype f16 --compute f16",
    f"{_PERSONALIZE} --output out",
    f"{_PERSONALIZE} --overwrite=yes",
    "personalize cat.png --out cat.png",
    "personalize cat.png --out cat.png/deep",
    "personalize cat.png --out ~nosuchuser/out",
    "generate --out out",
    "generate --prompt --out out",
    "generate --prompt robot",
    f"{_GENERATE} --concept",
    f"{_GENERATE} --concept nowhere.safetensors",
    f"{_GENERATE} --concept cat.png",
    f"{_GENERATE} --concept concept.safetensors",
    f"{_GENERATE} --concept concept.safetensors heavy",
    f"{_GENERATE} --concept concept.safetensors nan",
    f"{_GENERATE} --concept concept.safetensors 1 2",
    f"{_GENERATE} --concept .",
    f"{_DRAW_CONCEPT} --concept concept.safetensors",
    f"{_DRAW_CONCEPT} 1e40",
    f"{_DRAW_CONCEPT} --gate 1 1",
    f"{_DRAW_CONCEPT} --embedding concept.safetensors",
    f"{_GENERATE} --lora",
    f"{_GENERATE} --lora nowhere.safetensors",
    f"{_GENERATE} --lora cat.png",
    f"{_GENERATE} --lora concept.safetensors",
    f"{_GENERATE} --lora concept.safetensors inf",
    f"{_GENERATE} --embedding nowhere.safetensors",
    f"{_GENERATE} --embedding cat.png <cat>",
    f"{_GENERATE} --embedding concept.safetensors a b",
    f"{_GENERATE} --blend 0.5",
    f"{_GENERATE} --gate 0.7 0.15",
    f"{_GENERATE} --gate 0.7",
    f"{_GENERATE} --resolution 7",
    f"{_GENERATE} --resolution 40001",
    f"{_GENERATE} --prediction-type epsilon --model nowhere",
    "generate --prompt robot --out concept.safetensors",
    "export",
    "export concept.safetensors",
    "export nowhere.safetensors --out out",
    "export cat.png --out out",
    "export . --out out",
    "export concept.safetensors --out out --base nowhere",
    "export concept.safetensors --out out --samples nowhere.png",
    "export concept.safetensors --out out --samples concept.safetensors",
    "export concept.safetensors --out out --name ..",
    "export concept.safetensors --out cat.png",
    "info nowhere.safetensors",
    "info cat.png",
    "info .",
    "info concept.safetensors cat.png",
    "toyworld --out cat.jpg",
    "toyworld --out .png/deep/..",
    "toyworld --out cat.png",
    "toyworld --out dog.png --size 33",
    "toyworld --out dog.png --size 1024 --scale 64",
    "toyworld --out dog.png --instance -1",
    "toyworld --out dog.png --instance 9999999999999999999",
    "toyworld --out dog.png --instance 1 --class fish",
    "pretrain",
    "pretrain --config nowhere --workdir work",
    "pretrain --config toyworld_encoder",
    "pretrain --config toyworld_encoder --workdir cat.png",
    "pretrain --config toyworld_encoder --workdir work --set stepz=3",
    "pretrain --config toyworld_unet --workdir work --export-encoder encoder",
    "pretrain --config toyworld_encoder --workdir work --processes 0",
    "pretrain --config toyworld_encoder --workdir work --processes 2",
    "pretrain --config toyworld_encoder --workdir work --cpu-devices 0",
    "precompute --config nowhere --out out",
    "evaluate --out out --methods lora",
    "evaluate --suite nowhere --out out --methods lora",
    "evaluate --suite cat.png --out out --methods lora",
    "evaluate --suite dreambench --out out --methods lora",
    "evaluate --suite toyworld --out out --methods nowhere",
    "evaluate --suite toyworld --out out --methods lora@many",
    "evaluate --suite toyworld --out out --methods lora --steps many",
    "evaluate --suite toyworld --out out --methods lora --rates nowhere.json",
    "evaluate --suite toyworld --out out --methods lora --rates cat.png",
    "evaluate --suite toyworld --out out --methods lora --join cat.png",
    "evaluate --suite toyworld --out out --methods lora --sweep 0",
    "evaluate --suite . --out out --methods base --clip nowhere",
    "evaluate --suite . --out out --methods base --dino nowhere",
    "evaluate --suite . --out out --methods base --model nowhere",
    "evaluate --suite toyworld --out out --methods base --model nowhere --report-only",
    "evaluate --suite toyworld --out out --methods datencoder --encoder nowhere --report-only",
    "evaluate --suite toyworld --data . --out out --methods lora",
    "plan --config nowhere",
    "plan",
    "plan --models 1.5 --topology nowhere",
    "plan --models 1.5 --cpu-devices 0",
    "check --minutes -1",
    "check --minutes nan",
]
for _text in REFUSED:
    KIND.refused(f"`{f'datencoder {_text}'.strip()}`", argv(*(_line(_text) if _text else ())))
for _name, _words in {
    "a picture whose name has 300 letters": ("personalize", "n" * 300, "--out", "out"),
    "an output folder whose name has 300 letters": ("generate", "--prompt", "robot", "--out", "n" * 300),
    "an output folder whose name has 5,000 letters": ("generate", "--prompt", "robot", "--out", "n/" * 2500),
    "an output folder with a zero byte in its name": ("generate", "--prompt", "robot", "--out", "a\0b"),
    "an unknown argument with a line break and an escape sequence": (*_GENERATE.split(), "a\nb\x1b[2J"),
    "an unknown option with a line break": (*_GENERATE.split(), "--a\nb"),
    "a prompt of 300 letters that is no file": (*_PERSONALIZE.split(), "--prompt", "n" * 300),
    "a prompt of 300 letters for no file, with the placeholder, and a bad seed": (
        *_PERSONALIZE.split(),
        "--prompt",
        f"S* {'n' * 300}",
        "--seed",
        "-1",
    ),
    "a prompt with a zero byte": (*_PERSONALIZE.split(), "--prompt", "a\0b"),
    "a prompt that the shell could not decode": ("generate", "--prompt", "a \udcff", "--out", "out"),
    "an empty prompt": ("generate", "--prompt", "", "--out", "out"),
    "a negative prompt that the shell could not decode": (*_GENERATE.split(), "--negative", "\udcff"),
    "a word that the shell could not decode": (*_PERSONALIZE.split(), "--method", "lora", "--word", "\udcff"),
    "a model that the shell could not decode": (*_PERSONALIZE.split(), "--method", "lora", "--model", "\udcff"),
    "a LoRA whose name has 300 letters": (*_GENERATE.split(), "--lora", "n" * 300),
    "a LoRA with a zero byte in its name": (*_GENERATE.split(), "--lora", "a\0b"),
    "an embedding whose name has 5,000 letters": (*_GENERATE.split(), "--embedding", "n/" * 2500),
    "a concept whose name has 300 letters": (*_GENERATE.split(), "--concept", "n" * 300),
    "a model whose name has 300 letters": (*_GENERATE.split(), "--model", "n" * 300),
    "an encoder whose name has 300 letters": (*_PERSONALIZE.split(), "--encoder", "n" * 300),
    "a vision tower whose name has 300 letters": (*_PERSONALIZE.split(), "--vision", "n" * 300),
    "a recipe whose name has 300 letters": ("pretrain", "--config", "n" * 300, "--workdir", "work"),
    "a work folder whose name has 300 letters": ("pretrain", "--config", "toyworld_encoder", "--workdir", "n" * 300),
    "an encoder to write whose name has 300 letters": (
        "pretrain",
        "--config",
        "toyworld_encoder",
        "--workdir",
        "work",
        "--export-encoder",
        "n" * 300,
    ),
    "a suite whose name has 300 letters": ("evaluate", "--suite", "n" * 300, "--out", "out", "--methods", "lora"),
    "a suite with a zero byte in its name": ("evaluate", "--suite", "a\0b", "--out", "out", "--methods", "lora"),
    "photographs whose name has 300 letters": (
        "evaluate",
        "--suite",
        "dreambench",
        "--data",
        "n" * 300,
        "--out",
        "out",
        "--methods",
        "lora",
    ),
    "learning rates whose name has 300 letters": (
        "evaluate",
        "--suite",
        "toyworld",
        "--out",
        "out",
        "--methods",
        "lora",
        "--rates",
        "n" * 300,
    ),
    "a run to join whose name has 300 letters": (
        "evaluate",
        "--suite",
        "toyworld",
        "--out",
        "out",
        "--methods",
        "lora",
        "--join",
        "n" * 300,
    ),
    "a scorer whose name has 300 letters": (
        "evaluate",
        "--suite",
        ".",
        "--out",
        "out",
        "--methods",
        "lora",
        "--clip",
        "n" * 300,
    ),
    "a picture of the toy world whose name has 300 letters": ("toyworld", "--out", "n" * 300 + ".png"),
    "a picture of the toy world with a zero byte in its name": ("toyworld", "--out", "a\0.png"),
    "a concept to describe whose name has 300 letters": ("info", "n" * 300),
    "a concept to describe with a zero byte in its name": ("info", "a\0b"),
    "a concept to export whose name has 300 letters": ("export", "n" * 300, "--out", "out"),
    "samples whose name has 300 letters": ("export", "concept.safetensors", "--out", "out", "--samples", "n" * 300),
    "a name of exported files of 300 letters": ("export", "concept.safetensors", "--out", "out", "--name", "n" * 300),
    "a name of exported files with a line break": ("export", "concept.safetensors", "--out", "out", "--name", "a\nb"),
    "an empty name of exported files": ("export", "concept.safetensors", "--out", "out", "--name", ""),
}.items():
    KIND.refused(_name, argv(*_words))
for _name, _words in {
    "`datencoder generate`, drawn": (*_GENERATE.split(),),
    "`--guidance 0` with a negative prompt": (*_GENERATE.split(), "--guidance", "0", "--negative", "blur"),
    "a placeholder without a concept": ("generate", "--prompt", "a S*", "--num", "1", "--out", "out"),
    "a weight of a concept that is negative": (
        "generate",
        "--prompt",
        "a S*",
        "--num",
        "1",
        "--out",
        "out",
        "--concept",
        "concept.safetensors",
        "-1",
    ),
    "`datencoder export`, all that the concept allows": ("export", "concept.safetensors", "--out", "out"),
    "`datencoder export` to the folder of the concept": ("export", "concept.safetensors", "--out", "."),
    "`datencoder personalize`, drawn": (*_PERSONALIZE.split(), "--num", "1"),
    "a prompt that is too long": ("generate", "--prompt", "red " * 40, "--num", "1", "--out", "out"),
    "a prompt of a path": ("generate", "--prompt", "../../etc/passwd", "--num", "1", "--out", "out"),
    "a prompt of 5,000 letters": ("generate", "--prompt", "n" * 5000, "--num", "1", "--out", "out"),
    "a prompt with a line break": ("generate", "--prompt", "a robot\non the beach", "--num", "1", "--out", "out"),
    "weights in float16 on a CPU, which computes in float32": (*_PERSONALIZE.split(), "--dtype", "f16", "--num", "1"),
    "an empty output folder, which is the working folder": ("generate", "--prompt", "robot", "--num", "1", "--out", ""),
    "an output folder whose name has 255 letters": ("generate", "--prompt", "robot", "--num", "1", "--out", "n" * 255),
    "a picture of the toy world whose name has 250 letters": ("toyworld", "--out", "n" * 246 + ".png"),
    "an output folder in Chinese": ("generate", "--prompt", "robot", "--num", "1", "--out", "猫"),
    "an output folder that the shell could not decode": (
        "generate",
        "--prompt",
        "robot",
        "--num",
        "1",
        "--out",
        "\udcff",
    ),
    "an output folder with a line break in its name": ("generate", "--prompt", "robot", "--num", "1", "--out", "a\nb"),
    "an output folder that is a link": ("generate", "--prompt", "robot", "--num", "1", "--out", "."),
    "the same prompt twice": ("generate", "--prompt", "robot", "robot", "--num", "1", "--out", "out"),
    "`datencoder info`": ("info", "concept.safetensors"),
    "`datencoder toyworld`": ("toyworld", "--out", "deep/er/fish.png"),
    "`datencoder pretrain --print-config`": ("pretrain", "--config", "sd15_laion", "--print-config"),
}.items():
    KIND.used(_name, argv(*_words))

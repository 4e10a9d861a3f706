"""`datencoder toyworld`: a PNG of one inhabitant of the embedded world."""

from argparse import Namespace
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from datencoder_jax.checkpoints.atomic import write_all
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.commands.output_folder import check_replaceable
from datencoder_jax.commands.shared import LARGEST_SIDE, say
from datencoder_jax.data.reading import enlarge
from datencoder_jax.errors import UserError
from datencoder_jax.toyworld.captions import prompt_for
from datencoder_jax.toyworld.render import render
from datencoder_jax.toyworld.world import CLASSES, SPLITS, Context, Draws, Instance

_KEY, _SOFTWARE = "Software", "datencoder toyworld"
"""The text in a PNG by which a picture of this command is known."""


def run(args: Namespace) -> None:
    """Draws it."""
    args.out = expand_user(args.out, to_write=True)
    if args.out.suffix.lower() != ".png":
        raise UserError(f"{args.out} must end in .png: the picture is written as PNG.")
    if args.size % 2:
        raise UserError(f"--size must be even, and {args.size} is not.")
    if args.size * args.scale > LARGEST_SIDE:
        raise UserError(f"A picture of {args.size * args.scale} pixels a side is too large; lower --size or --scale.")
    if args.instance is not None:
        instance = Instance.from_id(args.instance)
        if args.class_name not in (None, instance.cls):
            raise UserError(
                f"Instance {args.instance} is a {instance.cls}, not a {args.class_name}: its number leaves "
                f"{CLASSES.index(args.class_name)} when divided by {len(CLASSES)} if it is one; leave --class out."
            )
    else:
        draws, ids = Draws(args.seed, 0x9C), SPLITS["test"]
        index = CLASSES.index(args.class_name) if args.class_name else CLASSES.index(draws.choice(CLASSES))
        instance = Instance.from_id(draws.choice([i for i in ids if i % len(CLASSES) == index]))
    context = Context(args.scene, args.style, args.accessory)
    picture = render(instance, context, args.seed, args.size)
    folder, name = args.out.parent, args.out.name
    check_replaceable(folder, "toyworld", [name], lambda _: _is_own(args.out), overwrite=args.overwrite)
    image = Image.fromarray(enlarge(picture, args.scale))
    write_all(folder, {name: lambda path: image.save(path, format="PNG", pnginfo=_mark())})
    pattern = (
        instance.main if instance.pattern == "plain" else f"{instance.main} with {instance.second} {instance.pattern}"
    )
    say(f"instance {instance.id}: a {instance.cls}, {pattern}; {prompt_for(context, instance.cls)}")
    say(f"wrote {args.out}")


def _mark() -> PngInfo:
    info = PngInfo()
    info.add_text(_KEY, _SOFTWARE)
    return info


def _is_own(path: Path) -> bool:
    """Whether this command has drawn the picture in a file."""
    try:
        with Image.open(path) as image:
            return image.info.get(_KEY) == _SOFTWARE
    except (OSError, ValueError, Image.DecompressionBombError):
        return False

"""`datencoder toyworld`: a PNG of one inhabitant of the embedded world."""

from argparse import Namespace

from datencoder_jax.commands.shared import say
from datencoder_jax.data.writing import write_files
from datencoder_jax.errors import UserError
from datencoder_jax.toyworld.captions import prompt_for
from datencoder_jax.toyworld.render import render
from datencoder_jax.toyworld.world import CLASSES, SPLITS, Context, Draws, Instance


def run(args: Namespace) -> None:
    """Draws it."""
    if args.out.suffix.lower() != ".png":
        raise UserError(f"{args.out} must end in .png: the picture is written as PNG.")
    if args.size % 2:
        raise UserError(f"--size must be even, and {args.size} is not.")
    if args.size * args.scale > 8192:
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
    write_files(args.out.parent, {args.out.name: picture.repeat(args.scale, 0).repeat(args.scale, 1)})
    pattern = (
        instance.main if instance.pattern == "plain" else f"{instance.main} with {instance.second} {instance.pattern}"
    )
    say(f"instance {instance.id}: a {instance.cls}, {pattern}; {prompt_for(context, instance.cls)}")
    say(f"wrote {args.out}")

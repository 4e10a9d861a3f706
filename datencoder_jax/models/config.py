"""Reading the configurations that Hugging Face folders carry into frozen dataclasses."""

from dataclasses import asdict, dataclass, fields
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from datencoder_jax.errors import UserError


def per_block(value, blocks: int) -> tuple:
    """One value per resolution level from a scalar or a sequence."""
    return tuple(value) if isinstance(value, tuple | list) else (value,) * blocks


@dataclass(frozen=True)
class ConfigMixin:
    """`from_dict` and `to_dict` for a frozen dataclass whose fields are the options that matter.

    `_required` names options this code implements for some values only; `_choices` the allowed entries of list options.
    Every other key of the file (sizes that repeat what the weights say, training hints) is ignored.
    """

    _required: ClassVar[dict[str, tuple]] = {}
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From the content of a `config.json`.

        Raises:
            UserError: an option has a value this code does not implement.
            TypeError: the content is damaged: an option is of the wrong type or missing.
        """
        for option, allowed in cls._required.items():
            if option in values and _frozen(values[option]) not in allowed:
                raise UserError(
                    f"{cls.__name__}: option {option}={values[option]!r} is not supported; supported: {allowed}"
                )
        for option, allowed in cls._choices.items():
            odd = sorted(set(values.get(option, ())) - set(allowed))
            if odd:
                raise UserError(f"{cls.__name__}: {option} holds {odd[0]!r}; supported: {', '.join(allowed)}")
        kinds = get_type_hints(cls)
        given = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        # null is how diffusers writes an option that was left out (`sample_size` of a bare UNet).
        given = {name: value for name, value in given.items() if value is not None or _fits(None, kinds[name])}
        for name, value in given.items():
            if not _fits(value, kinds[name]):
                raise TypeError(f"{name} cannot be {value!r}")
        return cls(**{name: _frozen(value) for name, value in given.items()})

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def _fits(value, kind) -> bool:
    """Whether a JSON value is of the type that a field is annotated with."""
    options = get_args(kind)
    if get_origin(kind) is UnionType:
        return any(_fits(value, option) for option in options)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple | list):
            return False
        kinds = options[:1] * len(value) if options[-1] is Ellipsis else options
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    return type(value) is kind or (kind is float and type(value) is int)  # not isinstance: True is no number here


def _frozen(value):
    return tuple(value) if isinstance(value, list) else value

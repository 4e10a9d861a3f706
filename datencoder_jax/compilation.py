"""Compiling visibly and once: a line before, what was done and its seconds after, and a cache on disk."""

import functools
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax

from datencoder_jax.runtime.target import current_target, is_deterministic


def cache_folder() -> Path | None:
    """Where compiled programs are kept: `$DATENCODER_CACHE`, or `datencoder_jax` in the user's cache folder.

    None for a user who has neither of them, nor a home.
    """
    if ours := os.environ.get("DATENCODER_CACHE"):
        return Path(ours)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "datencoder_jax"
    except RuntimeError:  # no home
        return None


@functools.cache
def enable_cache() -> None:
    """Turns on JAX's persistent compilation cache, in the folder that the user has set up for JAX, or else in ours.

    Where the folder cannot be used it warns, once, and there is no cache.
    """
    with suppress(ImportError, AttributeError):  # no public part of JAX, which works without
        _replace_damaged_entries()
        _stop_after_failed_write()
    if chosen := jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        if "://" not in chosen and not _can_keep_programs(Path(chosen)):
            jax.config.update("jax_compilation_cache_dir", None)
        return
    if (cache := cache_folder()) is None:
        logging.warning("there is no home to keep compiled programs in; name a folder for them with DATENCODER_CACHE")
        return
    folder = cache / "compiled"
    if _can_keep_programs(folder):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def is_cached() -> bool:
    """Whether programs that are compiled are kept for later runs."""
    enable_cache()
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    return bool(folder) and folder not in _unwritable


def _can_keep_programs(folder: Path) -> bool:
    """Whether a folder is there, or can be made, and can be written; warns where not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        reason = "it is not a folder"
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    else:
        if os.access(folder, os.W_OK | os.X_OK):
            return True
        reason = "permission denied"
    _warn_of_folder(folder, reason)
    return False


def _warn_of_folder(folder: Path, reason: str) -> None:
    cache = cache_folder()
    is_ours = cache is not None and folder == cache / "compiled"
    variable = "DATENCODER_CACHE" if is_ours else "JAX_COMPILATION_CACHE_DIR"
    logging.warning(
        "compiled programs cannot be kept in %s (%s), so every run compiles them anew; name another folder with %s",
        folder,
        reason,
        variable,
    )


_unwritable: set[str] = set()
"""Folders of JAX's cache in which an entry could not be written."""


@functools.cache
def _stop_after_failed_write() -> None:
    """Has JAX write no further entry into a folder where one could not be written, such as on a full disk.

    JAX itself warns of every program, in words of its own, and leaves the part of an entry that it has written.
    """
    from jax._src import compilation_cache, compiler

    write = compilation_cache.put_executable_and_time

    def write_or_stop(cache_key: str, *args: Any, **kwargs: Any) -> None:
        folder = str(jax.config.jax_compilation_cache_dir)  # pyright: ignore[reportAttributeAccessIssue]
        if folder in _unwritable:
            return
        try:
            write(cache_key, *args, **kwargs)
        except OSError as error:
            if compiler._should_raise_persistent_cache_error(error):
                raise
            _remove_entry(cache_key)
            _unwritable.add(folder)
            _warn_of_folder(Path(folder), (error.strerror or str(error)).lower())

    compilation_cache.put_executable_and_time = write_or_stop


@functools.cache
def _replace_damaged_entries() -> None:
    """Has JAX remove an entry of its cache that cannot be read, such as one that a full disk has cut short.

    JAX itself warns, compiles, and leaves the entry as it is, since it writes none over another: it would do so in
    every run. Without the entry the program is one that is not cached yet.
    """
    from jax._src import compilation_cache, compiler

    read = compilation_cache.get_executable_and_time

    def read_or_remove(cache_key: str, *args: Any, **kwargs: Any) -> tuple[Any, int | None]:
        try:
            return read(cache_key, *args, **kwargs)
        except Exception as error:
            if compiler._should_raise_persistent_cache_error(error) or not _remove_entry(cache_key):
                raise
            return None, None

    compilation_cache.get_executable_and_time = read_or_remove


def _remove_entry(cache_key: str) -> bool:
    """Whether the entry was there, in a folder of this machine, and is gone."""
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    try:
        Path(folder, f"{cache_key}-cache").unlink()
    except (OSError, TypeError):
        return False
    return True


@contextmanager
def without_cache() -> Iterator[None]:
    """Within it programs are compiled whether or not JAX's persistent cache holds them, and are not put into it."""
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks for the setting once, when it first compiles
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


Recorder = Callable[["Program", tuple, dict[str, Any]], Any]
"""`record(program, args, kwargs) -> results`: what `dry_run` calls in place of a program."""

_dry_run: Recorder | None = None


@contextmanager
def dry_run(record: Recorder) -> Iterator[None]:
    """Within it no program is compiled or run: `record` is called in its place, and returns its results."""
    global _dry_run
    before, _dry_run = _dry_run, record
    try:
        yield
    finally:
        _dry_run = before


def put_on_device(tree: Any) -> Any:
    """`jax.device_put`, but for a dry run, whose arrays have no memory."""
    return jax.device_put(tree) if _dry_run is None else tree


_programs: "weakref.WeakSet[Program]" = weakref.WeakSet()


def forget_compiled() -> None:
    """Has every `Program` compile anew when it is called next."""
    for program in _programs:
        program._compiled.clear()
    jax.clear_caches()  # which hold what was compiled too


class Compilation(NamedTuple):
    """A compiled program, and whether JAX's persistent cache held it."""

    program: jax.stages.Compiled
    from_cache: bool


_cache_hits = threading.local()
"""`count` of the programs that this thread read from the persistent cache."""


@functools.cache
def _count_cache_hits() -> None:
    def count(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            _cache_hits.count = getattr(_cache_hits, "count", 0) + 1

    jax.monitoring.register_event_listener(count)


def compile_lowered(lowered: jax.stages.Lowered, options: dict[str, str | bool]) -> Compilation:
    """Compiles with these options of XLA's, or reads the persistent cache."""
    enable_cache()
    _count_cache_hits()
    before = getattr(_cache_hits, "count", 0)
    program = lowered.compile(options)
    return Compilation(program, getattr(_cache_hits, "count", 0) > before)


def announce(doing: str, prepare: Callable[[], Compilation], quiet: bool = False) -> jax.stages.Compiled:
    """The program that `prepare` returns, under a printed line that says whether it was compiled, and the seconds.

    Args:
        doing: how the line begins, such as "preparing the training step".
        quiet: print nothing.
    """
    if quiet:
        return prepare().program
    print(f"{doing} ...", end=" ", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        found = prepare()
    except BaseException:  # whatever is said of the failure gets a line of its own
        print(file=sys.stderr, flush=True)
        raise
    seconds = time.perf_counter() - start
    if found.from_cache:
        print(f"loaded from the cache in {seconds:.1f} s", file=sys.stderr, flush=True)
    else:
        kept = ", cached for later runs" if is_cached() else ""
        print(f"compiled in {seconds:.1f} s{kept}", file=sys.stderr, flush=True)
    return found.program


_under_way: "weakref.WeakSet[Future]" = weakref.WeakSet()


def is_compiling() -> bool:
    """Whether a program is being compiled in the background."""
    return any(future.running() for future in _under_way)


class Program:
    """A jitted function that is compiled ahead of its first call, under a printed line.

    Args:
        name: what the line says is prepared.
        function: as for `jax.jit`; further keyword arguments are `jax.jit`'s.

    Attributes:
        function: what was given.
        seconds: calls spent compiling, reading the cache, or waiting for either so far.
        compilations: how many programs were compiled; one per combination of shapes and static arguments.
    """

    def __init__(self, name: str, function, **options):
        functools.update_wrapper(self, function)
        self.function = function
        self.name, self.seconds, self.compilations = name, 0.0, 0
        self._jitted = jax.jit(function, **options)
        self._static = tuple(options.get("static_argnames", ()))
        self._compiled: dict = {}
        _programs.add(self)

    def __call__(self, *args, quiet: bool = False, **kwargs):
        if _dry_run is not None:
            return _dry_run(self, args, kwargs)
        key, dynamic = self._key(args, kwargs)
        compiled = self._compiled.get(key)
        if compiled is None or (isinstance(compiled, Future) and compiled.cancelled()):
            compiled = self._compiled[key] = self._wait(functools.partial(self._compile, args, kwargs), quiet)
        elif isinstance(compiled, Future):
            del self._compiled[key]  # of one that fails, so that the next call tries again
            compiled = self._compiled[key] = self._wait(compiled, quiet)
        return compiled(*args, **dynamic)

    def _key(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """What a call has in common with others that run the same compiled program, and its dynamic keywords."""
        static = {k: v for k, v in kwargs.items() if k in self._static}
        dynamic = {k: v for k, v in kwargs.items() if k not in self._static}
        leaves, structure = jax.tree.flatten((args, dynamic))
        types = tuple((jax.numpy.shape(x), jax.numpy.result_type(x)) for x in leaves)
        return (structure, tuple(sorted(static.items())), types, is_deterministic()), dynamic

    def trace(self, *args, **kwargs) -> jax.stages.Traced:
        """The program for these arguments, or for `jax.ShapeDtypeStruct`s in their place, before it is lowered."""
        return self._jitted.trace(*args, **kwargs)

    def compile_in_background(self, executor: Executor, *args, **kwargs) -> jax.stages.Traced:
        """Starts compiling for arguments of these shapes; a call with such arguments waits until that is done.

        What goes wrong as it compiles is raised by that call.
        """
        key, traced = self._key(args, kwargs)[0], self.trace(*args, **kwargs)
        if key not in self._compiled:
            future = executor.submit(compile_lowered, traced.lower(), current_target().compiler_options())
            self._compiled[key] = future
            _under_way.add(future)
        return traced

    def _compile(self, args: tuple, kwargs: dict[str, Any]) -> Compilation:
        return compile_lowered(self.trace(*args, **kwargs).lower(), current_target().compiler_options())

    def _wait(self, started: Future | Callable[[], Compilation], quiet: bool) -> jax.stages.Compiled:
        """What is compiled in the background, or what the function compiles now, under a printed line."""
        start = time.perf_counter()
        if isinstance(started, Future):
            compiled = announce(f"waiting for {self.name}", started.result, quiet or started.done())
        else:
            compiled = announce(f"preparing {self.name}", started, quiet)
        self.seconds += time.perf_counter() - start
        self.compilations += 1
        return compiled

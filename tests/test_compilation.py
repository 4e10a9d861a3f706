"""Programs: compiled once per kind of arguments, visibly, into a folder of the user's choice."""

import errno
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datencoder_jax import compilation
from datencoder_jax.compilation import Program, cache_folder, enable_cache


def scaled(x, by=1.0, *, times=1, shift=0):
    """Scales and shifts."""
    return times * x * by + shift


@pytest.fixture
def program():
    return Program("scaling", scaled, static_argnames=("times", "shift"))


def test_compiles_once_per_shape_type_and_static_argument(program):
    for x in (jnp.ones(3), np.ones(3, np.float32), 2 * jnp.ones(3)):
        np.testing.assert_allclose(program(x, quiet=True), x)
    assert program.compilations == 1
    for count, (arguments, options) in enumerate(
        [
            ((jnp.ones(4),), {}),
            ((jnp.ones(3, jnp.bfloat16),), {}),
            ((jnp.ones((3, 1)),), {}),
            ((jnp.ones(3), jnp.float32(2)), {}),
            ((jnp.ones(3),), {"by": jnp.float32(2)}),
            ((jnp.ones(3),), {"times": 2, "shift": 3}),
            ((jnp.ones(3),), {"times": 3, "shift": 2}),
        ],
        start=2,
    ):
        program(*arguments, **options, quiet=True)
        program(*arguments, **dict(reversed(options.items())), quiet=True)
        assert program.compilations == count
    np.testing.assert_allclose(program(jnp.ones(3), jnp.float32(5), times=2, shift=1, quiet=True), 11)
    assert program.seconds > 0


def test_says_so_unless_it_is_to_be_quiet(program, capsys):
    program(jnp.ones(3), quiet=True)
    assert capsys.readouterr() == ("", "")
    program(jnp.ones(4))
    program(jnp.ones(4))
    out, err = capsys.readouterr()
    assert out == "" and err.count("preparing scaling") == 1
    assert re.search(
        r"preparing scaling \.\.\. (compiled|loaded from the cache) in \d+\.\d s(, cached for later runs)?\n$", err
    )


def test_a_failure_to_compile_starts_a_new_line(capsys):
    def broken(x):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        Program("nothing", broken)(jnp.ones(3))
    assert capsys.readouterr().err.endswith("...\x20\n")
    with pytest.raises(ValueError, match="broken"):
        Program("nothing", broken)(jnp.ones(3), quiet=True)
    assert capsys.readouterr().err == ""


def test_is_called_like_the_function_it_compiles(program):
    assert program.__doc__ == "Scales and shifts." and program.__name__ == "scaled"


def test_donates(program):
    adding = Program("adding", lambda x, y: x + y, donate_argnums=0)
    x, y = jnp.ones(3), jnp.ones(3)
    adding(x, y, quiet=True)
    assert x.is_deleted() and not y.is_deleted()


def test_the_cache_is_where_the_user_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("DATENCODER_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("DATENCODER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "datencoder_jax"


def test_variables_that_are_empty_are_not_set(monkeypatch, tmp_path):
    monkeypatch.setenv("DATENCODER_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "datencoder_jax"


@pytest.fixture
def homeless(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("DATENCODER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def test_without_a_home_the_variables_do(monkeypatch, tmp_path, homeless):
    assert cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "datencoder_jax"
    monkeypatch.setenv("DATENCODER_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


@pytest.fixture
def no_cache_yet():
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", None)
    enable_cache.cache_clear()
    yield
    enable_cache.cache_clear()
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def test_the_cache_is_turned_on(monkeypatch, tmp_path, no_cache_yet):
    monkeypatch.setattr(compilation, "cache_folder", lambda: tmp_path)
    enable_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    assert (tmp_path / "compiled").is_dir()


def test_a_cache_set_up_before_stays(monkeypatch, tmp_path, no_cache_yet):
    monkeypatch.setattr(compilation, "cache_folder", lambda: tmp_path)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    enable_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")


def test_without_a_place_for_it_there_is_no_cache(monkeypatch, tmp_path, no_cache_yet):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compilation, "cache_folder", lambda: tmp_path / "file")
    enable_cache()
    assert jax.config.jax_compilation_cache_dir is None


def test_without_a_home_there_is_no_cache(homeless, no_cache_yet):
    enable_cache()
    assert jax.config.jax_compilation_cache_dir is None


def test_the_line_says_what_was_compiled_and_what_the_cache_held(tmp_path, no_cache_yet, capsys):
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    try:
        for how in ("compiled", "loaded from the cache"):
            jax.clear_caches()
            x = jnp.ones(7)
            capsys.readouterr()
            Program("tripling", lambda x: 3 * x + 5)(x)
            assert capsys.readouterr().err.startswith(f"preparing tripling ... {how} in ")
            with ThreadPoolExecutor(1) as executor:
                jax.clear_caches()
                program = Program("tripling", lambda x: 3 * x + 5)
                program.compile_in_background(executor, x)
            assert next(iter(program._compiled.values())).result().from_cache
    finally:
        compilation_cache.reset_cache()


def test_an_entry_that_was_cut_short_is_replaced_once(tmp_path, no_cache_yet):
    """Warnings are errors here: JAX's own of an entry that it cannot read would fail the test."""
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()

    def compiled():
        jax.clear_caches()
        np.testing.assert_allclose(Program("doubling", lambda x: 2 * x + 3)(jnp.ones(7), quiet=True), 5.0)
        return {path.name: path.read_bytes() for path in tmp_path.glob("*lambda*-cache")}

    try:
        whole = compiled()
        assert len(whole) == 1 and compiled() == whole
        (path,) = tmp_path.glob("*lambda*-cache")
        for size in (2000, 1, 0):
            path.write_bytes(path.read_bytes()[:size])
            sizes = {name: len(content) for name, content in compiled().items()}
            assert sizes == pytest.approx({name: len(content) for name, content in whole.items()}, rel=0.1)
            again = compiled()
            assert compiled() == again
    finally:
        compilation_cache.reset_cache()


SENTENCE = "so every run compiles them anew; name another folder with {}"


def unusable(kind, tmp_path, monkeypatch):
    """A cache folder that cannot be used, and the reason that is told."""
    cache = tmp_path / "cache"
    if kind == "file":
        cache.touch()
        return cache, "it is not a folder"
    if kind == "inner file":
        cache.mkdir()
        (cache / "compiled").touch()
        return cache, "it is not a folder"
    monkeypatch.setattr(compilation.os, "access", lambda path, mode: False)
    return cache, "permission denied"


@pytest.mark.parametrize("kind", ["file", "inner file", "permission"])
def test_a_folder_that_cannot_be_used_is_told_once(kind, monkeypatch, tmp_path, no_cache_yet, caplog, capsys, program):
    cache, reason = unusable(kind, tmp_path, monkeypatch)
    monkeypatch.setenv("DATENCODER_CACHE", str(cache))
    assert float(program(jnp.float32(3))) == float(program(jnp.ones(()))) * 3 == 3
    (record,) = caplog.records
    expected = f"compiled programs cannot be kept in {cache / 'compiled'} ({reason}), "
    assert record.getMessage() == expected + SENTENCE.format("DATENCODER_CACHE")
    assert jax.config.jax_compilation_cache_dir is None and "cached for later runs" not in capsys.readouterr().err


def test_jaxs_own_folder_that_cannot_be_used_is_told(tmp_path, no_cache_yet, caplog):
    (tmp_path / "file").touch()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file" / "theirs"))
    enable_cache()
    assert SENTENCE.format("JAX_COMPILATION_CACHE_DIR") in caplog.text and str(tmp_path / "file") in caplog.text
    assert jax.config.jax_compilation_cache_dir is None


def test_without_a_home_it_is_told(homeless, no_cache_yet, caplog):
    enable_cache()
    assert "name a folder for them with DATENCODER_CACHE" in caplog.text


def test_a_full_disk_is_told_once_and_leaves_no_part_of_an_entry(tmp_path, no_cache_yet, monkeypatch, caplog, capsys):
    from jax._src import lru_cache
    from jax.experimental.compilation_cache import compilation_cache

    monkeypatch.setenv("DATENCODER_CACHE", str(tmp_path))
    enable_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    tries = []

    def fill_disk(self, key, value):
        tries.append(key)
        (tmp_path / "compiled" / f"{key}-cache").write_bytes(value[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lru_cache.LRUCache, "put", fill_disk)
    program = Program("doubling", lambda x: 2 * x)
    try:
        assert program(np.ones(5, np.float32)).tolist() == [2] * 5
        assert program(np.ones(7, np.float32)).tolist() == [2] * 7
    finally:
        compilation_cache.reset_cache()
    assert len(tries) == 1 and list((tmp_path / "compiled").glob("*-cache")) == []
    (record,) = caplog.records
    assert f"{tmp_path / 'compiled'} (no space left on device)" in record.getMessage()
    assert "cached for later runs" not in capsys.readouterr().err

"""Concept files, and the atomic writing beneath them: whole and right, or refused in one sentence."""

import json
import resource

import numpy as np
import pytest
from checkpoint_helpers import PATH, concept, equal, nothing_left, refuses
from safetensors.numpy import load_file, save_file

from datencoder_jax.checkpoints.atomic import atomic_write, save_tensors
from datencoder_jax.checkpoints.concept_file import concept_size, load_concept, save_concept
from datencoder_jax.data.reading import read_image
from datencoder_jax.errors import UserError
from datencoder_jax.printable import escape_hidden

# --- atomic writing


def test_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "er" / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        assert not path.exists() and temporary.suffix == ".txt"
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("two")
        raise KeyboardInterrupt
    assert path.read_text() == "one" and nothing_left(tmp_path)


def test_folder_is_replaced_only_when_it_is_ours(tmp_path):
    folder = tmp_path / "f"
    for content in ("one", "two"):
        with atomic_write(folder, replaces="mark") as temporary:
            temporary.mkdir()
            (temporary / "mark").write_text(content)
    assert (folder / "mark").read_text() == "two" and len(list(tmp_path.iterdir())) == 1
    (folder / "checkpoints").mkdir()
    with pytest.raises(UserError, match="work folder of a training run"), atomic_write(folder, replaces="mark"):
        pass
    (folder / "checkpoints").rmdir()
    (folder / "mark").unlink()
    (folder / "thesis.tex").write_text("dear to somebody")
    with pytest.raises(UserError, match="not ours to replace"), atomic_write(folder, replaces="mark"):
        pass
    with pytest.raises(UserError, match="in the way"), atomic_write(folder):
        pass
    assert (folder / "thesis.tex").exists()


def test_the_size_is_told_without_writing(tmp_path):
    save_concept(tmp_path / "c.safetensors", concept())
    assert concept_size(concept()) == (tmp_path / "c.safetensors").stat().st_size


def test_an_unknown_home_is_one_sentence():
    refuses("home folder that is not known", save_concept, "~nosuchuser/x", concept())
    refuses("home folder that is not known", load_concept, "~nosuchuser/x")
    refuses("home folder that is not known", read_image, "~nosuchuser/x.png")


def test_unwritable_places_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    refuses("Cannot write .*file/x.*(not a directory|file exists)", save_concept, tmp_path / "file" / "x", concept())
    refuses("Cannot write .*too long", save_concept, tmp_path / ("x" * 300), concept())
    assert nothing_left(tmp_path)


def test_full_disk_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(UserError, match=r"Cannot write .*too large"):
            save_concept(tmp_path / "c", concept())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_saved_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    save_tensors(tmp_path / "a.safetensors", {"x": np.zeros(2, np.float32), "scalar": np.float32(1)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert load_file(tmp_path / "a.safetensors")["scalar"].shape == ()


# --- concept files


def test_concept_round_trip(tmp_path):
    wanted, path = concept(), tmp_path / "concept.safetensors"
    save_concept(path, wanted)
    found = load_concept(path, "f" * 32, {PATH: (8, 6)}, width=12)
    np.testing.assert_array_equal(found.embeddings, wanted.embeddings)
    equal(found.offsets[PATH]._asdict(), wanted.offsets[PATH]._asdict())
    for name in ("token", "blend", "base", "fingerprint", "nearest_word", "metadata"):
        assert getattr(found, name) == getattr(wanted, name)
    assert set(load_file(path)) == {"embeddings", f"offsets.{PATH}.down", f"offsets.{PATH}.up"}
    save_concept(path, concept(offsets={}))
    assert load_concept(path).offsets == {}


def test_concept_of_another_base(tmp_path):
    save_concept(tmp_path / "c", concept())
    message = refuses("another base model", load_concept, tmp_path / "c", "0" * 32, base="sd15")
    assert "toyworld" in message and "sd15" in message


def test_concept_that_does_not_fit(tmp_path):
    save_concept(tmp_path / "c", concept())
    refuses("which the model does not have", load_concept, tmp_path / "c", None, {})
    refuses(r"\[8, 6\] and the model's is \[8, 7\]", load_concept, tmp_path / "c", None, {PATH: (8, 7)})
    refuses("vectors of 12 and the model's are of 768", load_concept, tmp_path / "c", width=768)


def test_files_that_are_no_concept(tmp_path):
    path = tmp_path / "c"
    save_concept(path, concept())
    whole = path.read_bytes()
    refuses("There is no file .*none", load_concept, tmp_path / "none")
    refuses("is a folder", load_concept, tmp_path)
    for content in (whole[:-4], whole[:30], b"", b"hello, I am a text file and no tensors"):
        path.write_bytes(content)
        refuses("cut short|empty", load_concept, path)
    lora = {"unet.x.lora_A.weight": np.zeros((2, 3), np.float32)}
    save_file(lora, path, {"format": "pt"})
    refuses("not a concept file", load_concept, path)
    save_file(lora, path)
    refuses("not a concept file", load_concept, path)
    save_file(lora, path, {"format": "datencoder-concept", "format_version": "99"})
    refuses("format version 99", load_concept, path)
    save_file(lora, path, {"format": "datencoder-concept", "format_version": "1"})
    refuses("metadata lacks token", load_concept, path)


def test_concepts_with_odd_content(tmp_path):
    path = tmp_path / "c"
    meta = {"format": "datencoder-concept", "format_version": "1", "token": "S*", "blend": "1"}
    meta |= {"base": "b", "fingerprint": "f", "nearest_word": "w"}
    good = {"embeddings": np.ones((1, 4), np.float32), "offsets.p.down": np.ones((3, 2), np.float16)}
    good |= {"offsets.p.up": np.ones((2, 5), np.float32)}
    save_file(good, path, meta)
    assert load_concept(path).offsets["p"].down.dtype == np.float32
    for change, match in [
        ({"embeddings": np.ones(4, np.float32)}, r"\[n, d\] and has \[4\]"),
        ({"embeddings": np.full((1, 4), np.nan, np.float32)}, "not finite .* in embeddings"),
        ({"embeddings": np.ones((1, 4), np.int32)}, "type I32"),
        ({"offsets.p.up": np.ones((3, 5), np.float32)}, r"\[3, 2\] and \[3, 5\]"),
        ({"offsets.q.up": np.ones((3, 5), np.float32)}, "only one of the two factors of q"),
        ({"stranger": np.ones(1, np.float32)}, "stranger, which is no part"),
    ]:
        save_file(good | change, path, meta)
        refuses(match, load_concept, path)
    save_file({"offsets.p.up": good["offsets.p.up"]}, path, meta)
    refuses("has none", load_concept, path)
    for change in ({"token": " "}, {"token": "A* B*"}, {"token": "A* B*", "nearest_word": "cat dog"}):
        save_file(good, path, meta | change)
        refuses("placeholders, vectors and nearest words do not fit", load_concept, path)
    for change in ({"blend": "much"}, {"details": "{"}, {"details": "[1]"}, {"details": "[" * 10**5}):
        save_file(good, path, meta | change)
        refuses("metadata cannot be read", load_concept, path)
    path.unlink()
    refuses("not finite", save_concept, path, concept(blend=float("nan")))
    refuses("not finite", save_concept, path, concept(embeddings=np.full((1, 4), np.inf, np.float32)))
    assert list(tmp_path.iterdir()) == []


HIDDEN = ["\x1b]0;owned\x07", "a\nb", "a\tb", "a\x85b", "a\u2028b", "\u202etac", "a\u200bb", "\x00", "\udce9"]
"""Escape sequences, line breaks, and characters that nobody sees."""


@pytest.mark.parametrize("text", HIDDEN[:-1])  # half of a surrogate pair cannot be stored
@pytest.mark.parametrize("key", ["token", "base", "fingerprint", "nearest_word", "value", "key", "tensor"])
def test_text_that_is_not_one_printable_line_is_refused(tmp_path, key, text):
    meta = {"format": "datencoder-concept", "format_version": "1", "token": "S*", "blend": "1"}
    meta |= {"base": "b", "fingerprint": "f", "nearest_word": "w"}
    tensors = {"embeddings": np.ones((1, 4), np.float32)}
    if key == "tensor":
        tensors |= {f"offsets.{text}.{part}": np.ones((2, 2), np.float32) for part in ("down", "up")}
    elif key in ("key", "value"):
        meta["details"] = json.dumps({text: "1"} if key == "key" else {"steps": text})
    else:
        meta[key] = f"S{text}*"
    save_file(tensors, tmp_path / "c", meta)
    message = refuses("text that is not one line of printable characters", load_concept, tmp_path / "c", "0" * 32)
    assert message.isprintable()


def test_a_half_of_a_surrogate_pair_is_refused(tmp_path):
    meta = {"format": "datencoder-concept", "format_version": "1", "token": "S*", "blend": "1"}
    meta |= {"base": "b", "fingerprint": "f", "nearest_word": "w", "details": json.dumps({"steps": HIDDEN[-1]})}
    save_file({"embeddings": np.ones((1, 4), np.float32)}, tmp_path / "c", meta)
    refuses("printable characters, in steps", load_concept, tmp_path / "c")


def test_words_of_all_scripts_are_printable(tmp_path):
    """Blanks of all widths, and the joiners that scripts and emoji are written with, are no hidden text."""
    values = {
        "token": "<gömb-猫>",
        "nearest_word": "👩\u200d🎤 نمی\u200cخواهم",
        "base": "C:\\models\\été 1\u202f2\u3000x",
    }
    save_concept(tmp_path / "c", concept(**values, metadata={"ключ": "“值”"}))
    found = load_concept(tmp_path / "c")
    assert {name: getattr(found, name) for name in values} == values and found.metadata == {"ключ": "“值”"}


@pytest.mark.parametrize("text", HIDDEN)
def test_what_is_saved_can_be_loaded(tmp_path, text):
    save_concept(tmp_path / "c", concept(base=f"b{text}", nearest_word=f"w{text}", metadata={f"k{text}": text}))
    found = load_concept(tmp_path / "c")
    assert found.base == f"b{escape_hidden(text)}" and found.base.isprintable()
    if text.split() == [text]:
        refuses("printable characters, in token", save_concept, tmp_path / "d", concept(token=text))
        assert not (tmp_path / "d").exists()


def test_errors_show_hidden_characters_as_escapes():
    assert str(UserError("There is no file a\x1b[2J\nb\udce9.")) == r"There is no file a\x1b[2J\nb\udce9."
    assert str(UserError("猫 été 🎤")) == "猫 été 🎤"

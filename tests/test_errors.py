"""What an error says of trying again: the exit status that launchers go by."""

import errno

import pytest

from datencoder_jax.checkpoints import atomic
from datencoder_jax.data.items import DamagedItem
from datencoder_jax.errors import PassingError, UserError, exit_status, is_passing, raise_if_passing


def test_a_mistake_stays_and_what_may_pass_is_tried_again():
    assert exit_status(UserError("no such option")) == exit_status(OSError(errno.ENOSPC, "full")) == 2
    assert exit_status(PassingError("late")) == exit_status(OSError(errno.ESTALE, "stale")) == 1
    assert exit_status(RuntimeError("a mistake of ours")) == 1 and exit_status(KeyboardInterrupt()) == 130
    assert not is_passing(ValueError(f"[os_error_code='{errno.ENOENT}']"))
    assert is_passing(ValueError(f"Failed to open [os_error_code='{errno.EIO}']"))


def test_storage_that_is_away_is_said_with_its_reason():
    damaged = DamagedItem("7", "cannot be read")
    damaged.__cause__ = OSError(errno.ESTALE, "Stale file handle")
    with pytest.raises(PassingError, match=r"^the shards cannot be read now: stale file handle\.$"):
        raise_if_passing(damaged, "the shards")
    raise_if_passing(OSError(errno.EACCES, "Permission denied"), "the shards")


@pytest.mark.parametrize(("number", "status"), [(errno.EIO, 1), (errno.ETIMEDOUT, 1), (errno.ENOSPC, 2)])
def test_an_error_is_what_led_to_it(tmp_path, monkeypatch, number, status):
    """Writing a file says what went wrong in a sentence of its own."""

    def flush(path):
        raise OSError(number, "storage")

    monkeypatch.setattr(atomic, "flush", flush)
    with pytest.raises(UserError, match="Cannot write") as info, atomic.atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("one")
    assert exit_status(info.value) == status

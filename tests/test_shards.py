"""Tar shards: everything in them is found where it lies, whatever is wrong with them is counted."""

import errno
import os
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from checkpoint_helpers import nothing_left, refuses
from data_helpers import CAPTION_REPORT, INDEX_REPORT, READ_REPORT, damaged_folder, encoded, triple, write_tar

from datencoder_jax.data import shards as shards_module
from datencoder_jax.data import tar_index
from datencoder_jax.data.items import DamagedItem
from datencoder_jax.data.reading import decode
from datencoder_jax.data.shards import Shards, main
from datencoder_jax.errors import PassingError, exit_status


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DATENCODER_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path):
    """Three shards of three pictures, one of them in a folder of its own."""
    for shard, name in enumerate(("00000.tar", "00001.tar", "more/00002.tar")):
        keys = range(3 * shard, 3 * shard + 3)
        write_tar(tmp_path / "data" / name, [member for key in keys for member in triple(f"{key:09d}", key)])
    return tmp_path / "data"


def shown(source, index):
    """The colour of a picture, as a number."""
    pixel = np.asarray(decode(source[index].picture, "it")).astype(float)[8, 8]
    return int(np.round(pixel / 36) @ np.array([1, 8, 64]))


def count_scans(monkeypatch):
    scanned = []
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda path: scanned.append(path.name) or scan(path))
    return scanned


def test_every_picture_with_its_caption_in_the_order_of_names(folder):
    source = Shards(folder)
    assert len(source) == 9 and source.report == {}
    assert [shown(source, index) for index in range(9)] == list(range(9))
    assert [source[index].caption for index in (0, 4, 8)] == ["picture 0", "picture 4", "picture 8"]
    assert source[4].key == "00001.tar:000000004" and source[8].key == "more/00002.tar:000000008"


def test_one_file(folder):
    source = Shards(folder / "00001.tar")
    assert [shown(source, index) for index in range(3)] == [3, 4, 5]


def test_captions_from_json_or_none(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [
            ("1.jpg", encoded(1)),
            ("1.json", b'{"caption": "from json"}'),
            ("2.txt", b"before its picture \n"),
            ("2.jpg", encoded(2)),
            ("3.jpg", encoded(3)),
            ("3.json", b'{"url": "elsewhere"}'),
            ("4.jpg", encoded(4)),
        ],
    )
    source = Shards(tmp_path)
    assert [item.caption for item in source] == ["from json", "before its picture", None, None]
    assert [item.caption for item in Shards(tmp_path, captions=False)] == [None] * 4


def test_the_index_is_kept_and_only_what_is_new_is_read(folder, monkeypatch):
    scanned = count_scans(monkeypatch)
    first = Shards(folder)
    assert scanned == ["00000.tar", "00001.tar", "00002.tar"] and nothing_left(folder)
    assert Shards(folder).identity == first.identity and len(scanned) == 3

    write_tar(folder / "00000b.tar", triple("new", 100))
    grown = Shards(folder)
    assert scanned[3:] == ["00000b.tar"] and grown.identity != first.identity
    assert [shown(grown, index) for index in (2, 3, 4)] == [2, 100, 3]

    os.utime(folder / "00001.tar", ns=(1, 1))
    write_tar(folder / "more" / "00002.tar", triple("other", 7))
    changed = Shards(folder)
    assert scanned[4:] == ["00001.tar", "00002.tar"] and len(changed) == 8 and shown(changed, 7) == 7

    (folder / "00000.tar").unlink()
    assert len(Shards(folder)) == 5 and len(scanned) == 6


def test_a_damaged_index_is_made_again(folder):
    Shards(folder)
    (index,) = folder.glob("*.safetensors")
    for content in (b"", b"nonsense", index.read_bytes()[:-8]):
        index.write_bytes(content)
        assert len(Shards(folder)) == 9
    assert len(index.read_bytes()) > 200


def test_the_index_of_a_folder_that_cannot_be_written_is_kept_elsewhere(folder, cache, monkeypatch):
    (folder / "datencoder_index.safetensors").mkdir()  # root may write anywhere: something is in the way instead
    (folder / "datencoder_index.safetensors" / "x").touch()
    scanned = count_scans(monkeypatch)
    assert len(Shards(folder)) == 9 and len(Shards(folder)) == 9
    assert len(scanned) == 3 and len(list((cache / "indexes").iterdir())) == 1


def test_an_interrupted_index_goes_on(folder, monkeypatch):
    scan = tar_index.scan

    def interrupted(path):
        if path.name == "00001.tar":
            raise KeyboardInterrupt
        return scan(path)

    monkeypatch.setattr(tar_index, "scan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Shards(folder)
    monkeypatch.setattr(tar_index, "scan", scan)
    scanned = count_scans(monkeypatch)
    assert len(Shards(folder)) == 9 and scanned == ["00001.tar", "00002.tar"]


def test_storage_that_is_away_leaves_nothing_out_of_an_index(folder, monkeypatch):
    members = tar_index._members

    def away(path, report):
        if path.name == "00001.tar":
            raise OSError(errno.ESTALE, "Stale file handle")
        return members(path, report)

    monkeypatch.setattr(tar_index, "_members", away)
    with pytest.raises(PassingError, match=r"00001.tar cannot be read now: stale file handle"):
        Shards(folder)
    monkeypatch.setattr(tar_index, "_members", members)
    scanned = count_scans(monkeypatch)
    assert len(Shards(folder)) == 9 and scanned == ["00001.tar", "00002.tar"]


def test_a_shard_that_storage_does_not_tell_of_is_not_gone(folder, monkeypatch):
    stat = os.stat

    def away(path, *args, **options):
        if str(path).endswith("00001.tar"):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(tar_index.os, "stat", away)
    with pytest.raises(OSError, match="Stale") as info:
        Shards(folder)
    assert exit_status(info.value) == 1


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_no_member_leaves_its_place(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(encoded(77))
    inside = tmp_path / "data" / "deep"
    write_tar(
        inside / "a.tar",
        [
            ("../../evil.jpg", encoded(1)),
            ("/tmp/absolute.jpg", encoded(2)),
            special("link.jpg", tarfile.SYMTYPE, str(secret)),
            special("hard.jpg", tarfile.LNKTYPE, "../../secret.jpg"),
            special("device.jpg", tarfile.CHRTYPE),
            special("pipe.jpg", tarfile.FIFOTYPE),
            special("folder.jpg", tarfile.DIRTYPE),
            ("\udcff\n.jpg", encoded(3)),
        ],
    )
    before = {path for path in tmp_path.rglob("*") if path.suffix != ".safetensors"}
    source = Shards(inside)
    assert source.report == {"not a file": 4}
    assert [shown(source, index) for index in range(3)] == [1, 2, 3]
    assert source[0].key == "a.tar:../../evil" and source[2].key.isprintable()
    assert {path for path in tmp_path.rglob("*") if path.suffix != ".safetensors"} == before


def read_all(source):
    """How many pictures can be used, and why the others cannot."""
    good, reasons = 0, {}
    for index in range(len(source)):
        try:
            item = source[index]
            decode(item.picture, item.key)
            good += 1
        except Exception as error:
            reasons[error.reason] = reasons.get(error.reason, 0) + 1
    return good, reasons


def test_everything_wrong_is_counted_and_nothing_else(tmp_path):
    wanted = damaged_folder(tmp_path)
    source = Shards(tmp_path)
    assert source.report == INDEX_REPORT
    assert read_all(source) == (wanted, READ_REPORT)
    assert read_all(source) == (wanted, READ_REPORT)  # a second pass counts nothing twice
    assert source.report == INDEX_REPORT | CAPTION_REPORT
    captions = {item.key: item.caption for item in source}
    assert captions["odd.tar:latin"] == "caf\N{REPLACEMENT CHARACTER}" and captions["odd.tar:json"] is None
    assert Shards(tmp_path).report == INDEX_REPORT  # from the index kept


def test_nothing_but_damage_is_an_error(tmp_path):
    refuses("There is no folder", Shards, tmp_path / "missing")
    refuses(r"no .tar files in .*", Shards, tmp_path)
    (tmp_path / "a.tar").touch()
    (tmp_path / "b.tar").write_bytes(b"x" * 2000)
    refuses(r"holds no pictures that can be used \(1 empty tar, 1 not a tar\)", Shards, tmp_path)


@pytest.mark.parametrize("size", [-512, -(2**40), 2**62])
def test_sizes_that_lie_do_not_lead_astray(tmp_path, size):
    info = tarfile.TarInfo("b.jpg")
    info.size = size
    header = info.tobuf(tarfile.GNU_FORMAT)
    tar = write_tar(tmp_path / "a.tar", [("a.jpg", encoded(1))])
    content = tar.read_bytes()
    tar.write_bytes(content[: 512 + -(-len(encoded(1)) // 512) * 512] + header + bytes(2048))
    source = Shards(tmp_path)
    assert len(source) == 1 and source.report == {"tar cut short": 1}


def test_a_tar_that_ends_without_its_end_is_cut_short(tmp_path):
    tar = write_tar(tmp_path / "a.tar", triple("1", 1))
    with tarfile.open(tar) as file:
        end = file.getmembers()[-1].offset_data + 512
    os.truncate(tar, end)
    source = Shards(tmp_path)
    assert source.report == {"tar cut short": 1} and source[0].caption == "picture 1"


def test_long_names_and_other_formats(tmp_path):
    name = "folder/" * 30 + "picture"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        key = name if form != tarfile.USTAR_FORMAT else "a/" * 60 + "b"
        with tarfile.open(tmp_path / f"{form}.tar", "w", format=form) as tar:
            for ending, content in (("jpg", encoded(form)), ("txt", b"long")):
                (tmp_path / "member").write_bytes(content)
                tar.add(tmp_path / "member", f"{key}.{ending}")
    source = Shards(tmp_path)
    assert [shown(source, index) for index in range(3)] == [0, 1, 2]
    assert [item.caption for item in source] == ["long"] * 3
    assert source[0].key == "0.tar:" + "a/" * 60 + "b"


def test_shards_that_change_under_the_reader_are_damage(folder):
    source = Shards(folder)
    os.truncate(folder / "00001.tar", 700)
    (folder / "00000.tar").unlink()
    for index, reason in ((0, "cannot be read"), (3, "cut short")):
        with pytest.raises(DamagedItem) as info:
            source[index]
        assert info.value.reason == reason and info.value.key.startswith(f"0000{index // 3}.tar:")


def test_many_threads_and_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_OPEN_FILES", 4)
    for shard in range(40):
        write_tar(tmp_path / f"{shard:02d}.tar", [(f"{shard}.png", encoded(shard, "PNG"))])
    source = Shards(tmp_path)
    most, lock = [], threading.Lock()

    def read(index):
        found = shown(source, index)
        with lock:
            most.append(len(source._files._open))
        return found

    wanted = np.random.default_rng(0).integers(40, size=400).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, wanted)) == wanted
    assert max(most) <= 4 + 8  # those in use stay open


def test_the_index_is_compact(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{key}.jpg", b"x") for key in range(2000)])
    source = Shards(tmp_path)
    assert source._items.nbytes == 16 * 2000
    assert (tmp_path / "datencoder_index.safetensors").stat().st_size < 16 * 2000 + 1000


def test_the_command_that_makes_an_index(folder, capsys):
    main([str(folder), "--processes", "1"])
    assert f"{folder}: 9 pictures" in capsys.readouterr().out
    assert (folder / "datencoder_index.safetensors").exists()
    with pytest.raises(SystemExit, match="no folder"):
        main([str(folder / "missing")])


def test_several_processes_make_the_same_index(folder):
    one = Shards(folder)
    (folder / "datencoder_index.safetensors").unlink()
    two = Shards(folder, processes=2)
    assert two.identity == one.identity and (two._items == one._items).all()


# several tars in one file


def joined(path, *parts):
    """A file of several tars, as `cat` makes it."""
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


@pytest.fixture
def pair(tmp_path):
    parts = tmp_path / "parts"
    return [
        write_tar(parts / f"{n}.part", [m for k in range(3) for m in triple(f"{k:03d}", 3 * n + k)]) for n in range(2)
    ]


def test_all_of_several_joined_tars_are_read(tmp_path, pair):
    joined(tmp_path / "shards.tar", *pair)
    source = Shards(tmp_path / "shards.tar", quiet=True)
    assert source.report == {} and [item.caption for item in source] == [f"picture {k}" for k in range(6)]
    assert [source[k].picture for k in range(6)] == [encoded(k) for k in range(6)]
    long = joined(tmp_path / "long.tar", pair[0])
    with long.open("ab") as file:  # zeros that are no whole record, and more than are looked at together
        file.write(bytes(512 * 5000) + pair[1].read_bytes())
    assert len(Shards(long, quiet=True)) == 6


def test_damage_behind_a_tar_is_counted(tmp_path, pair):
    file = tmp_path / "a.tar"
    file.write_bytes(pair[0].read_bytes() + b"something else " * 99)
    assert (len(Shards(file, quiet=True)), Shards(file, quiet=True).report) == (3, {"tar cut short": 1})
    cut = tmp_path / "b.tar"
    cut.write_bytes(pair[0].read_bytes() + pair[1].read_bytes()[:2000])
    found = Shards(cut, quiet=True)
    assert len(found) >= 3 and found.report == {"tar cut short": 1}
    first = tmp_path / "c.tar"  # nobody can tell where the second begins
    first.write_bytes(pair[0].read_bytes()[:2000] + pair[1].read_bytes())
    assert "tar cut short" in Shards(first, quiet=True).report


def test_zeros_behind_a_tar_are_no_damage(tmp_path, pair):
    file = tmp_path / "a.tar"
    file.write_bytes(pair[0].read_bytes() + bytes(100_000))
    assert Shards(file, quiet=True).report == {}


def test_an_index_of_the_first_tar_alone_is_made_anew(tmp_path, pair, monkeypatch):
    joined(tmp_path / "a.tar", *pair)
    with monkeypatch.context() as before:
        before.setattr(tar_index, "_SCHEMA", "1")
        before.setattr(tar_index, "_behind", lambda file, position: None)
        assert len(Shards(tmp_path, quiet=True)) == 3
    assert len(Shards(tmp_path, quiet=True)) == 6


def test_names_that_start_with_a_dot_are_no_pictures(tmp_path):
    members = [(".jpg", encoded(1)), ("._000.jpg", b"resource fork"), ("a/.jpg", encoded(2)), ("./000.jpg", encoded(3))]
    source = Shards(write_tar(tmp_path / "a.tar", members), quiet=True)
    assert [item.picture for item in source] == [encoded(3)] and source.report == {"unknown ending": 3}

"""Folders of pictures, and the two views that are made of one."""

import errno
import os

import numpy as np
import pytest
from checkpoint_helpers import refuses
from data_helpers import bomb, encoded
from PIL import Image

from datencoder_jax.data import folder, views
from datencoder_jax.data.folder import Folder, printable
from datencoder_jax.data.items import DamagedItem, Item
from datencoder_jax.data.reading import decode
from datencoder_jax.data.views import Crop, draw_crop, make_views
from datencoder_jax.errors import PassingError

WHOLE = Crop(1.0, 0.5, 0.5, False)


def fill(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_the_pictures_of_a_folder_in_the_order_of_their_names(tmp_path):
    fill(
        tmp_path,
        {
            "b.jpg": encoded(1),
            "b.txt": "a bär\n".encode(),
            "a/deep/c.PNG": encoded(2, "PNG"),
            "a/x.webp": encoded(3, "WEBP"),
            "a/x.json": b"{}",
            "README.md": b"text",
            "film.mp4": b"film",
            ".hidden.jpg": encoded(4),
            ".cache/d.jpg": encoded(4),
        },
    )
    source = Folder(tmp_path)
    assert [item.key for item in source] == ["a/deep/c.PNG", "a/x.webp", "b.jpg"]
    assert source[2] == Item("b.jpg", encoded(1), "a bär")
    assert source[0].caption is None and Folder(tmp_path, captions=False)[2].caption is None
    assert source.report == {"unknown ending": 2} and source.name == str(tmp_path)
    assert Folder(tmp_path).identity == source.identity
    (tmp_path / "c.jpg").write_bytes(encoded(1))
    assert Folder(tmp_path).identity != source.identity


def test_a_folder_that_storage_does_not_list_now_is_not_left_out(tmp_path, monkeypatch):
    fill(tmp_path, {"a.jpg": encoded(1), "deep/b.jpg": encoded(2)})
    scandir = os.scandir

    def away(path):
        if str(path).endswith("deep"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return scandir(path)

    monkeypatch.setattr(folder.os, "scandir", away)
    with pytest.raises(PassingError, match="deep cannot be read now: stale file handle"):
        Folder(tmp_path)


def test_a_folder_with_everything_in_the_way(tmp_path):
    fill(tmp_path / "data", {"a.jpg": encoded(1), "empty.jpg": b"", "gone.jpg": b"x"})
    data = tmp_path / "data"
    (data / "folder.jpg").mkdir()
    (data / "loop").symlink_to(data, target_is_directory=True)
    (data / "broken.jpg").symlink_to(tmp_path / "nowhere")
    (data / "itself").symlink_to(data / "itself")
    os.mkfifo(data / "pipe.jpg")
    fill(tmp_path / "elsewhere", {"z.jpg": encoded(2)})
    (data / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (data / "\udcff.jpg").write_bytes(encoded(3))
    source = Folder(data)
    assert source.report == {"not a file": 3} and len(source) == 5
    (data / "gone.jpg").unlink()
    reasons = {}
    for index in range(5):
        try:
            reasons[source[index].key] = None
        except DamagedItem as error:
            reasons[error.key] = error.reason
    assert reasons == {
        "a.jpg": None,
        "empty.jpg": "empty",
        "gone.jpg": "cannot be read",
        "linked/z.jpg": None,
        "\N{REPLACEMENT CHARACTER}.jpg": None,
    }


def test_what_is_no_folder_of_pictures_is_refused(tmp_path):
    refuses("There is no folder", Folder, tmp_path / "missing")
    fill(tmp_path, {"a.txt": b"", "b.mp4": b""})
    refuses("is not a folder", Folder, tmp_path / "a.txt")
    refuses(r"holds no pictures \(1 unknown ending\)", Folder, tmp_path)
    refuses("home folder that is not known", Folder, "~nobody-of-that-name/x")


def test_keys_can_be_printed():
    assert printable("a\n\x1b[31m\udcffé") == "a??[31m?é".replace("?", "\N{REPLACEMENT CHARACTER}")


def gradient(height=60, width=90):
    """Red is the row and green the column, as shares."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * (y + 0.5) / height, 255 * (x + 0.5) / width, 0 * x], -1).round().astype(np.uint8)


def span(view):
    """First and last row and column that a view of a gradient shows, as shares."""
    inner = view.astype(float) / 255
    size = len(view)
    slopes = [(inner[-2, size // 2, 0] - inner[1, size // 2, 0]), (inner[size // 2, -2, 1] - inner[size // 2, 1, 1])]
    middle = [inner[..., 0].mean(), inner[..., 1].mean()]
    halves = [slope * size / (size - 3) / 2 for slope in slopes]
    return [edge for m, h in zip(middle, halves, strict=True) for edge in (m - h, m + h)]


def test_both_views_show_the_same_square():
    item = Item("x", gradient())
    crop = Crop(0.5, 0.25, 0.75, False)  # 30 pixels of 60 x 90, at 7.5 and 45
    for view in make_views(item, crop, (32, 16), 8):
        np.testing.assert_allclose(span(view), [7.5 / 60, 37.5 / 60, 45 / 90, 75 / 90], atol=0.02)


def test_mirroring_is_of_left_and_right():
    item = Item("x", gradient())
    straight, mirrored = (make_views(item, WHOLE._replace(mirrored=each), (32,), 8)[0] for each in (False, True))
    np.testing.assert_array_equal(mirrored, straight[:, ::-1])
    assert (mirrored != straight).any()


def test_an_item_shows_its_box_alone():
    item = Item("x", gradient(), box=(0.25, 1 / 3, 0.75, 2 / 3))  # 30 x 30 pixels
    np.testing.assert_allclose(span(make_views(item, WHOLE, (24,), 8)[0]), [0.25, 0.75, 1 / 3, 2 / 3], atol=0.02)
    rng = np.random.default_rng(0)
    for _ in range(20):
        edges = span(make_views(item, draw_crop(rng, 0.5, False), (24,), 8)[0])
        assert edges[0] > 0.23 and edges[1] < 0.77 and edges[2] > 0.31 and edges[3] < 0.69


def test_draws_cover_what_they_may():
    rng = np.random.default_rng(0)
    crops = np.array([draw_crop(rng, 0.6, True) for _ in range(2000)], float)
    assert (crops[:, 0] >= 0.6).all() and (crops[:, 0] <= 1).all()
    np.testing.assert_allclose(crops.mean(0), [0.8, 0.5, 0.5, 0.5], atol=0.04)
    assert not any(draw_crop(rng, 1.0, False).mirrored for _ in range(50))
    assert draw_crop(rng, 1.0, False).side == 1


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(monkeypatch):
    content = encoded(Image.fromarray(gradient(1200, 1600)))
    sizes = []
    monkeypatch.setattr(views, "decode", lambda *args, **options: sizes.append(decode(*args, **options)) or sizes[-1])
    item = Item("x", content)
    decoded = Item("x", np.asarray(Image.fromarray(gradient(1200, 1600))))
    crop = Crop(0.7, 0.3, 0.6, True)
    for small, full in zip(make_views(item, crop, (64, 32), 8), make_views(decoded, crop, (64, 32), 8), strict=True):
        assert np.abs(small.astype(int) - full).max() <= 3
    assert [picture.size for picture in sizes] == [(200, 150)]  # 92 pixels are needed: 64 / 0.7


@pytest.mark.parametrize(
    "picture, box, reason",
    [
        (b"", None, "empty"),
        (b"text", None, "no picture"),
        (encoded(1)[:300], None, "damaged"),
        (bomb(30_000), None, "too large"),
        (encoded(Image.new("RGB", (40, 19))), None, "too small"),
        (encoded(Image.new("RGB", (5, 5))), None, "too small"),
        (encoded(Image.new("RGB", (40, 40))), (0, 0, 0.4, 1), "too small"),
        (encoded(Image.new("RGB", (400, 400))), (0, 0, 0.04, 1), "too small"),
        (encoded(1), (0.5, 0, 0.5, 1), "empty box"),
        (encoded(1), (0, float("nan"), 1, 1), "empty box"),
        (np.zeros((30, 30), np.uint8), None, "no picture"),
        (np.zeros((30, 30, 3), np.float32), None, "no picture"),
        (np.zeros((30, 5, 3), np.uint8), None, "too small"),
    ],
)
def test_what_cannot_be_shown_is_damaged(picture, box, reason):
    with pytest.raises(DamagedItem) as info:
        make_views(Item("key", picture, box=box), WHOLE, (16, 8), 20)
    assert (info.value.key, info.value.reason) == ("key", reason)


def test_a_large_picture_is_never_too_small_for_being_decoded_small():
    content = encoded(Image.new("RGB", (1000, 800)))
    assert len(make_views(Item("x", content), WHOLE, (16, 8), 700)) == 2
    assert len(make_views(Item("x", content, box=(0.1, 0.1, 0.6, 0.5)), WHOLE, (16, 8), 400)) == 2


def test_boxes_beyond_the_edge_end_at_it():
    inside, beyond = (make_views(Item("x", gradient(), box=box), WHOLE, (16,), 8)[0] for box in (None, (-1, 0, 2, 1.5)))
    np.testing.assert_array_equal(inside, beyond)

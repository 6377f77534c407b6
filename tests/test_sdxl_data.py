"""Pictures with captions: folders, buckets, crops and time ids, flips, and the batches of an epoch."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sdxl import TEXTS, write_pictures

from engine import demo_sdxl
from engine.text_to_image import Picture, buckets, fit_buckets, plan, read_folder, split


def picture(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Picture(pixels, f"caption {seed}", (height, width))


@pytest.mark.parametrize("form", ["jsonl", "csv", "txt"])
def test_captions_come_from_metadata_or_a_text_beside_the_picture(form, tmp_path):
    write_pictures(tmp_path, form=form)
    found = read_folder(tmp_path)
    assert [p.caption for p in found[:3]] == TEXTS
    assert [p.size for p in found[:3]] == [(30, 40), (40, 30), (64, 64)]  # height, width
    assert [p.source for p in read_folder(tmp_path, limit=2)] == [p.source for p in found[:2]]


def test_pictures_without_caption_and_broken_ones_are_named(tmp_path, capsys):
    names = write_pictures(tmp_path, form="txt")
    (tmp_path / "0.txt").unlink()
    (tmp_path / "1.txt").write_text(" \n")
    (tmp_path / "2.png").write_bytes(b"nothing")
    assert len(read_folder(tmp_path)) == len(names) - 3
    said = capsys.readouterr().out
    assert "2 left out, no caption: 0.png, 1.png\n" in said
    assert re.search(
        r"1 left out, no readable picture: .*2\.png: cannot be read \(not an image\)", said
    )
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    with pytest.raises(
        ValueError, match="expected pictures with captions, found none; put metadata"
    ):
        read_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"--data-dir .*: no such folder"):
        read_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"file_name": "0.png", "caption": "x"}',
            "line 2: expected file_name and text, found file_name, ",
        ),
        ('{"file_name": "zero.png", "text": "x"}', "line 2: zero.png: no such file in "),
        ('{"file_name": "0.png"', "line 2: expected JSON"),
        ("7", "line 2: expected file_name and text, found 7"),
    ],
)
def test_wrong_metadata_is_named_by_its_line(line, message, tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "x"}\n' + line)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_folder(tmp_path)


def test_a_picture_without_a_row_is_named(tmp_path, capsys):
    names = write_pictures(tmp_path, count=3)
    write_pictures(tmp_path / "more", form="txt", count=1)
    assert len(read_folder(tmp_path)) == len(names)
    assert "1 left out, no caption: more" in capsys.readouterr().out


def test_texts_that_cannot_be_read_are_named(tmp_path):
    write_pictures(tmp_path, form="txt")
    (tmp_path / "1.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"1\.txt: expected UTF-8 .*; save it anew"):
        read_folder(tmp_path)
    (tmp_path / "metadata.csv").write_text('file_name,text\n0.png,"a bird\n1.png,a cat\n')
    with pytest.raises(ValueError, match=r"metadata\.csv: .*; is a quote open\?"):
        read_folder(tmp_path)


def test_a_picture_is_upright_and_on_white(tmp_path):
    pixels = np.zeros((8, 16, 4), dtype=np.uint8)
    pixels[:, :8] = 255, 0, 0, 255  # red on the left, transparent on the right
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: the left is on top
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("half red")
    (found,) = read_folder(tmp_path)
    assert found.size == (16, 8)
    fit_buckets([found], 8)
    found.resized = found.bucket = 16, 8
    shown = found.pixels(False)
    assert shown[:, 0, 0].tolist() == [1, -1, -1] and shown[:, -1, -1].tolist() == [1, 1, 1]


def test_buckets_of_sdxl():
    """Those of the paper's appendix I, as far as their sides are between 1:4 and 4:1."""
    found = buckets(1024)
    paper = "1024x1024 960x1088 896x1152 832x1216 768x1344 704x1472 640x1600 576x1792 512x2048"
    for name in paper.split():
        height, width = map(int, name.split("x"))
        assert (height, width) in found and (width, height) in found, name
    assert all(h % 64 == w % 64 == 0 and h * w <= 1024**2 for h, w in found)
    assert {(w, h) for h, w in found} == {*found}
    assert all(h * w >= 0.85 * 1024**2 for h, w in found)


def test_a_picture_gets_the_bucket_of_its_shape(capsys):
    sizes = [(1024, 1024), (3000, 2000), (2000, 3000), (500, 500), (100, 5000)]
    pictures = [Picture("a.jpg", "a", size) for size in sizes]
    fit_buckets(pictures, 1024)
    assert [p.bucket for p in pictures] == [
        (1024, 1024), (1216, 832), (832, 1216), (1024, 1024), (512, 2048)
    ]  # fmt: skip
    for p in pictures:
        assert p.resized[0] >= p.bucket[0] and p.resized[1] >= p.bucket[1], "it covers the bucket"
        assert p.resized[0] == p.bucket[0] or p.resized[1] == p.bucket[1], "and no more"
        assert p.resized[0] / p.resized[1] == pytest.approx(p.size[0] / p.size[1], rel=2e-3)
    assert "2 of 5 pictures are smaller than --image-size 1024" in capsys.readouterr().out


def test_time_ids_say_where_the_crop_is_in_the_picture_and_in_its_mirror_image():
    """The pixels are those of the resized picture, mirrored or not, from the corner that the ids name."""
    p = picture(30, 61)
    fit_buckets([p], 32)
    assert (p.resized, p.bucket) == ((24, 49), (24, 40)), "an odd rest: the two sides differ"
    whole = np.asarray(Image.fromarray(p.source).resize((49, 24), Image.Resampling.BILINEAR))
    for flipped in (False, True):
        height, width, top, left, *target = p.time_ids(flipped)
        assert (height, width, top, tuple(target)) == (30, 61, 0, p.bucket)
        assert left == (5 if flipped else 4)
        seen = whole[:, ::-1] if flipped else whole
        cropped = seen[top : top + 24, left : left + 40].transpose(2, 0, 1) / 127.5 - 1
        assert np.allclose(p.pixels(flipped), cropped, atol=1e-6)
    tall = picture(61, 30)
    fit_buckets([tall], 32)
    assert tall.time_ids(True) == [61, 30, 4, 0, 40, 24]


def test_each_picture_comes_once_in_an_epoch_and_batches_have_one_bucket():
    pictures = [picture(*size, seed) for seed, size in enumerate(7 * [(32, 32)] + 5 * [(60, 30)])]
    fit_buckets(pictures, 32)
    epochs = [plan(pictures, 3, 2, seed=1, epoch=epoch) for epoch in (0, 1, 0)]
    for steps in epochs:
        batches = [batch for step in steps for batch in step]
        assert Counter(np.concatenate(batches).tolist()) == dict.fromkeys(range(12), 1)
        assert all(len({pictures[row].bucket for row in batch}) == 1 for batch in batches)
        assert sorted(map(len, batches)) == [1, 2, 3, 3, 3] and list(map(len, steps)) == [2, 2, 1]
    flat = [[batch.tolist() for step in steps for batch in step] for steps in epochs]
    assert flat[0] == flat[2] and flat[0] != flat[1]


def test_held_out_pictures_do_not_train():
    names = ["twice.png", "twice.png", *map(str, range(18))]
    pictures = [Picture(name, f"caption {i}", (32, 32)) for i, name in enumerate(names)]
    train, held = split(pictures, 0.3, seed=0)
    assert len(train) + len(held) == 20 and len(held) in (6, 7)
    assert ("twice.png" in [p.source for p in held]) != ("twice.png" in [p.source for p in train])
    assert len(split(pictures, 0.0, seed=0)[1]) == 0
    assert len(split(pictures[:1], 0.5, seed=0)[0]) == 1, "one picture trains"
    assert {p.caption for p in split(pictures, 0.3, seed=1)[1]} != {p.caption for p in held}


def test_the_demo_s_digits_have_their_captions():
    digits = demo_sdxl.pictures(limit=20)
    assert Counter(p.caption for p in digits) == dict.fromkeys(demo_sdxl.CAPTIONS, 2)
    fit_buckets(digits, demo_sdxl.SIDE)
    assert digits[0].time_ids(False) == [24, 24, 0, 0, 24, 24]
    pixels = torch.stack([p.pixels(False) for p in digits])
    assert pixels.shape == (20, 3, 24, 24) and pixels.min() == -1 and pixels.max() > 0.9
    assert json.dumps(digits[0].time_ids(False))  # plain numbers

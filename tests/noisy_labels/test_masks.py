"""Wrong masks, the U-Net, and the segmentation command on a made-up scene."""

import io
import json

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from benchmarks.noisy_labels import masks, segmentation

VOID = segmentation.VOID


def scene(height=32, width=48):
    """A road below, sky above, a car, a line of void."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 2 :] = 3
    mask[10:22, 10:26] = 8
    mask[:, 40] = VOID
    return mask


def damaged(kind, seed=0, rate=1.0):
    old, masks.KINDS = masks.KINDS, (kind,)
    try:
        return masks.wrong_mask(scene(), rate, VOID, np.random.default_rng(seed))
    finally:
        masks.KINDS = old


@pytest.mark.parametrize("kind", masks.KINDS)
def test_void_stays_and_labels_stay_labels(kind):
    for seed in range(5):
        noisy = damaged(kind, seed)
        assert ((noisy == VOID) == (scene() == VOID)).all() and noisy.dtype == np.uint8
        assert (noisy != scene()).any()
        assert np.array_equal(noisy, damaged(kind, seed))


def alone(kind, seed=0):
    """One object of class 5 on class 0, and how the damage to it alone looks."""
    mask = np.zeros((40, 40), np.uint8)
    mask[12:28, 12:28] = 5
    noisy = mask.copy()
    masks.damage(noisy, mask == 5, 5, kind, 4, VOID, np.random.default_rng(seed))
    return mask == 5, noisy


def test_each_kind_does_what_its_name_says():
    for seed in range(5):
        where, noisy = alone("dilate", seed)
        assert (noisy[where] == 5).all() and (noisy == 5).sum() > where.sum()
        where, noisy = alone("erode", seed)
        assert (noisy[~where] == 0).all() and 0 < (noisy == 5).sum() < where.sum()
        where, noisy = alone("shift", seed)
        assert (noisy == 5).sum() == where.sum() and not np.array_equal(noisy == 5, where)
        where, noisy = alone("swap", seed)
        assert (noisy[~where] == 0).all() and len(set(noisy[where])) == 1 and noisy[where][0] not in (5, VOID)


def test_the_rate_is_the_share_of_objects_and_seeds_differ():
    assert np.array_equal(masks.wrong_masks(scene()[None], 0.0, VOID, 0)[0], scene())
    many = np.zeros((160, 160), np.uint8)
    for row in range(4, 160, 16):
        for column in range(4, 160, 16):
            many[row : row + 6, column : column + 6] = 8
    old, masks.KINDS = masks.KINDS, ("swap",)
    try:
        hit = masks.wrong_mask(many, 0.5, VOID, np.random.default_rng(1))[many == 8] != 8
    finally:
        masks.KINDS = old
    assert 0.3 < hit.mean() < 0.7
    one, two = masks.wrong_masks(np.stack([scene(), scene()]), 1.0, VOID, 0)
    assert not np.array_equal(one, two)


def test_unet_gives_a_logit_a_pixel_and_iou_counts_what_is_not_void():
    model = segmentation.UNet(width=4)
    data = segmentation.scenes(np.zeros((2, 30, 44, 3), np.uint8), np.full((2, 30, 44), 3, np.uint8), "cpu")
    assert data.images.shape == (2, 3, 32, 48) and (data.masks == VOID).sum() == 2 * (32 * 48 - 30 * 44)
    assert model(segmentation.pixels(data.images)).shape == (2, VOID, 32, 48)
    for parameter in model.head.parameters():
        torch.nn.init.zeros_(parameter)
    model.head.bias.data[3] = 1.0
    each = segmentation.ious(model, data)
    assert each[3] == 100.0 and np.isnan(each[0]) and segmentation.mean_iou(each) == 100.0
    data.masks[0, :15, :44] = 1  # half of one image of two
    each = segmentation.ious(model, data)
    assert each[1] == 0.0 and each[3] == pytest.approx(75.0)


@pytest.fixture
def camvid(tmp_path):
    image = pytest.importorskip("PIL.Image")
    colours = np.random.default_rng(0).integers(0, 256, (VOID + 1, 3), np.uint8)
    arrays = {}
    for split, count in (("train", 8), ("test", 2)):
        content = []
        for _ in range(count):
            stream = io.BytesIO()
            image.fromarray(colours[scene()]).save(stream, "JPEG", quality=95)
            content.append(stream.getvalue())
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(content), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, content)])
        arrays[f"{split}_masks"] = np.stack([scene()] * count)
    np.savez(tmp_path / "camvid_240x180.npz", **arrays)
    return tmp_path


def test_the_command_on_a_made_up_scene(camvid, tmp_path, capsys):
    arguments = ["--data", str(camvid), "--losses", "CE,ANL-CE+entropy", "--rates", "0,1", "--epochs", "2"]
    arguments += ["--width", "4", "--shrink", "1", "--seeds", "1", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert segmentation.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "clean masks" in printed and "100 % of objects" in printed
    content = json.loads((tmp_path / "out" / "segmentation.json").read_text())
    assert len(content["runs"]) == 4 and content["runs"][2]["wrong_pixels"] > 1 > content["runs"][0]["wrong_pixels"]
    assert (tmp_path / "out" / "noisy_camvid_iou.svg").exists()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "runs").iterdir()}
    assert segmentation.main(arguments) == 0
    assert kept == {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "runs").iterdir()}


def test_where_camvid_is_absent_the_command_says_so(tmp_path):
    with pytest.raises(SystemExit, match="CamVid is not in"):
        segmentation.main(["--data", str(tmp_path)])

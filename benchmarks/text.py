"""Labelled texts as numbers of words.

A word is what GloVe's authors take for one: letters and digits in lower case; a mark by
itself; and what follows ``do`` in "don't" or ``it`` in "it's". Hyphens part words. Of
the words in IMDB's training texts, 99.7 % have a vector then.
"""

import re
import reprlib
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import pyarrow as pa

from benchmarks import hub
from benchmarks.data import PADDING

UNKNOWN, FIRST = PADDING + 1, PADDING + 2  # no word's own number, and the first that is
BREAK = "<br />"
WORD = re.compile(r"\w+(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|\w+|[^\w\s]")

Numbers = dict[str, int]


def examples(
    table: pa.Table, where: str, name: str, classes: int
) -> tuple[list[str], np.ndarray]:
    """The texts and labels of a table.

    Args:
      table: One row an example, as the Hugging Face hub stores them.
      where: What errors call the table.
      name: The column of texts; that of labels is ``"label"``.
      classes: Number of classes.

    Raises:
      ValueError: There are no rows, a column is missing, or a row is not a text with a
        word in it and a label of that many classes.
    """
    column, labels = hub.columns(table, where, name, classes)
    texts = column.to_pylist()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise ValueError(
            f"{where}, row 0: {name} is {reprlib.repr(texts[0])}, since the column is "
            f"of type {column.type}; expected texts, of type string."
        )
    for row, text in enumerate(texts):
        if text is None or not WORD.search(text.replace(BREAK, " ")):
            raise ValueError(
                f"{where}, row {row}: {name} is {reprlib.repr(text)}; expected a text "
                "with a word in it."
            )
    return texts, labels


def words(text: str) -> list[str]:
    """The words of a text, which may have line breaks of HTML.

    Example:
      >>> words("It's odd.<br />I don't know 50 well-made ones!")
      ['it', "'s", 'odd', '.', 'i', 'do', "n't", 'know', '50', 'well', '-', 'made',
       'ones', '!']
    """
    return WORD.findall(text.lower().replace(BREAK, " "))


def vocabulary(counts: Mapping[str, int], known: Collection[str], most: int) -> Numbers:
    """The numbers of the most frequent words that are known, in that order.

    Words that are equally frequent are in the alphabet's order, so that files of
    vectors in another order, or with fewer needless words, give the same numbers.

    Raises:
      ValueError: No word is known.

    Example:
      >>> vocabulary({"b": 2, "a": 2, "odd": 9, "c": 3, "d": 1}, set("abcd"), 3)
      {'c': 2, 'a': 3, 'b': 4}
    """
    ranked = sorted(set(counts) & set(known), key=lambda word: (-counts[word], word))
    if not ranked:
        raise ValueError(
            "no word of the training texts has a vector: expected those of English "
            "words in lower case, such as GloVe's."
        )
    return {word: FIRST + place for place, word in enumerate(ranked[:most])}


def numbered(texts: Iterable[list[str]], numbers: Numbers, length: int) -> np.ndarray:
    """Words as the numbers of the last ones, of shape (examples, length), int32.

    The last words, since a review ends with its verdict. Shorter texts are padded at
    their end, so that a recurrent network starts with a word.

    Example:
      >>> numbered([["see", "me", "feel", "me"], ["me"]], {"me": 2, "feel": 3}, 3)
      array([[2, 3, 2],
             [2, 0, 0]], dtype=int32)
    """
    rows = []
    for text in texts:
        last = [numbers.get(word, UNKNOWN) for word in text[-length:]]
        rows.append(np.array(last + [PADDING] * (length - len(last)), np.int32))
    return np.stack(rows)


def table(numbers: Numbers, vectors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The vector of every number, of shape (numbers, dimensions), float32.

    Padding's is zero, and that of words without a number the mean of all words', which
    GloVe's authors advise.

    Example:
      >>> table({"a": 2, "b": 3}, {"b": np.array([2.0, 4.0]), "a": np.zeros(2)})
      array([[0., 0.],
             [1., 2.],
             [0., 0.],
             [2., 4.]], dtype=float32)
    """
    known = np.stack([vectors[word] for word in numbers]).astype(np.float32)
    mean = known.mean(0, dtype=np.float64, keepdims=True).astype(np.float32)
    return np.concatenate([np.zeros_like(mean), mean, known])

"""The corpus is the same for everyone, cannot be changed, and is never too short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data import BUILTIN_BYTES, MOCK_BYTES, ByteCorpus, load_corpus


def text(path: Path | str, seq_length: int = 4) -> ByteCorpus:
    return load_corpus("text", str(path), seq_length=seq_length)


def content(corpus: ByteCorpus) -> bytes:
    return corpus.window(0, len(corpus)).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "b.txt").write_bytes(b"second\xff")
    (tmp_path / "a.txt").write_bytes(b"first ")
    (tmp_path / "inner" / "c.md").write_bytes(b" third")
    return tmp_path


def test_builtin_text_is_real_text_and_repeatable() -> None:
    corpus = load_corpus("builtin_text", None, seq_length=64)
    assert 500_000 < len(corpus) <= BUILTIN_BYTES
    assert content(corpus) == content(load_corpus("builtin_text", None, seq_length=64, seed=9))
    assert b"import" in content(corpus)


def test_text_reads_a_file_a_directory_and_a_glob_in_sorted_order(folder: Path) -> None:
    assert content(text(folder / "b.txt")) == b"second\xff"
    assert content(text(folder)) == b"first second\xff third"
    assert content(text(f"{folder}/*.txt")) == b"first second\xff"
    assert content(text(f"{folder}/**/*.md")) == b" third"


def test_a_name_with_glob_characters_is_taken_literally_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_bytes(b"literal")
    assert content(text(tmp_path / "a[1].txt")) == b"literal"


def test_mock_depends_on_the_seed_alone() -> None:
    first = load_corpus("mock", None, seq_length=8, seed=1)
    assert content(first) == content(load_corpus("mock", None, seq_length=8, seed=1))
    assert content(first) != content(load_corpus("mock", None, seq_length=8, seed=2))
    assert len(first) == MOCK_BYTES
    assert np.bincount(first.window(0, MOCK_BYTES), minlength=256).min() > 3500
    assert len(load_corpus("mock", None, seq_length=MOCK_BYTES)) == MOCK_BYTES + 1


def test_window_is_a_read_only_view(folder: Path) -> None:
    corpus = text(folder)
    window: Any = corpus.window(6, 6)
    assert window.dtype == np.uint8
    assert window.tobytes() == b"second"
    assert np.shares_memory(window, corpus.data)
    with pytest.raises(ValueError, match="read-only"):
        window[0] = 0


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, 8), (7, 1), (2, -1)])
def test_window_outside_the_corpus_is_refused(folder: Path, offset: int, length: int) -> None:
    corpus = text(folder / "b.txt")
    assert len(corpus.window(0, 7)) == 7
    with pytest.raises(ValueError, match="outside the corpus of 7 bytes"):
        corpus.window(offset, length)


def test_missing_empty_and_short_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no file"):
        text(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="names no file"):
        text(tmp_path)
    (tmp_path / "short.txt").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"has 4 bytes, but one sample needs seq_length \+ 1 = 5"):
        text(tmp_path / "short.txt")
    (tmp_path / "short.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 bytes"):
        text(tmp_path / "short.txt")
    (tmp_path / "short.txt").write_bytes(b"12345")
    assert len(text(tmp_path / "short.txt")) == 5
    with pytest.raises(ValueError, match="required"):
        load_corpus("text", None, seq_length=4)

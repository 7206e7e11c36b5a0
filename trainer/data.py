"""The corpus: one contiguous array of bytes, the same on every rank.

Theory of operation. Tokens are bytes, so there is no tokenizer, no cache and no index: a corpus is
an array, and a sample is a window of it. Each worker reads the corpus once, at its start, and
`trainer.batch` says which windows a step uses. Whatever decides the content (which files, in which
order, how much of them) is fixed, so that all workers of a run hold the same bytes.

The built-in corpus is the source code of Python's own standard library: a few megabytes of real
text that are on every machine. It differs between versions of Python; a run's workers share one.
"""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

BUILTIN_PACKAGES: Final = (
    "asyncio",
    "collections",
    "concurrent",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
)
BUILTIN_BYTES: Final = 4_000_000
"""Largest size of the built-in corpus in bytes; small enough for every worker to hold a copy."""
MOCK_BYTES: Final = 1 << 20
"""Size of the mock corpus in bytes, unless one sample needs more."""
EXCLUDED_FOLDERS: Final = frozenset({"test", "tests", "site-packages", "__pycache__"})


@dataclass(frozen=True, slots=True, eq=False)
class ByteCorpus:
    """Bytes to train on, as one contiguous, read-only array."""

    data: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        """Size in bytes."""
        return int(self.data.size)

    @property
    def fingerprint(self) -> str:
        """Size and digest of the corpus; every worker of a job must have the same."""
        return f"{len(self)} bytes, {hashlib.blake2b(self.data.data, digest_size=8).hexdigest()}"

    def window(self, offset: int, length: int) -> npt.NDArray[np.uint8]:
        """View of `length` bytes from byte `offset` on.

        Raises:
            ValueError: the window does not lie within the corpus.
        """
        if offset < 0 or length < 0 or offset + length > len(self):
            raise ValueError(
                f"window {offset}..{offset + length} is outside the corpus of {len(self)} bytes"
            )
        return self.data[offset : offset + length]


def load_corpus(
    kind: Literal["builtin_text", "text", "mock"],
    path: str | None,
    *,
    seq_length: int,
    seed: int = 0,
) -> ByteCorpus:
    """Load the bytes to train on.

    Args:
        kind: where they come from, as in the data section of the configuration.
        path: file, directory (all files in it) or glob; only for kind text.
        seq_length: tokens of a sample; the corpus holds at least one more byte than this.
        seed: decides the bytes of kind mock, and nothing else.

    Raises:
        ValueError: the files are missing, unreadable, empty or too short for one sample.
    """
    match kind:
        case "builtin_text":
            content = _builtin()
            source = "the built-in text"
        case "text":
            if not path:
                raise ValueError("data.path is required when data.kind is text")
            content = _joined(_user_files(path))
            source = f"data.path {path!r}"
        case "mock":
            content = _mock(seed, max(MOCK_BYTES, seq_length + 1))
            source = "the mock data"
    if len(content) < seq_length + 1:
        raise ValueError(
            f"{source} has {len(content)} bytes, but one sample needs seq_length + 1 ="
            f" {seq_length + 1}; use more data, or lower train.seq_length"
        )
    # An array over bytes is read-only: nobody can change the corpus under another's feet.
    return ByteCorpus(np.frombuffer(content, dtype=np.uint8))


def _builtin() -> bytes:
    library = Path(sysconfig.get_path("stdlib"))
    files = [file for name in BUILTIN_PACKAGES for file in _sources(library / name)]
    content = _joined(files)[:BUILTIN_BYTES]
    if not content:
        raise ValueError(
            f"Python's standard library at {library} has no source files; set data.kind to text"
            " and data.path to your own files"
        )
    return content


def _sources(package: Path) -> list[Path]:
    """Python files of a package, sorted by their path within it."""
    return sorted(
        (
            file
            for file in package.rglob("*.py")
            if not EXCLUDED_FOLDERS.intersection(file.relative_to(package).parts)
        ),
        key=lambda file: file.relative_to(package).parts,
    )


def _user_files(path: str) -> list[Path]:
    """The files that a path names, in sorted order; a directory names all below it."""
    place = Path(path).expanduser()
    found: Iterable[Path]
    if place.is_dir():
        found = place.rglob("*")
    elif place.exists():
        found = (place,)
    else:
        found = (Path(name) for name in glob.glob(str(place), recursive=True))
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise ValueError(
            f"data.path {path!r} names no file (seen from {Path.cwd()}); set it to an existing"
            " file, a directory with files, or a glob that matches some"
        )
    return files


def _joined(files: Iterable[Path]) -> bytes:
    parts: list[bytes] = []
    for file in files:
        try:
            parts.append(file.read_bytes())
        except OSError as error:
            raise ValueError(f"data file {file} cannot be read: {error}") from None
    return b"".join(parts)


def _mock(seed: int, size: int) -> bytes:
    # Raw words, written little-endian: the same bytes on every machine and numpy version.
    words = np.random.Philox(key=seed).random_raw(-(-size // 8))
    return words.astype("<u8").tobytes()[:size]

"""Bytes from Python's standard library, by kind: source code, names of characters, tables, and two spoilt kinds.

Everything is read from the interpreter that runs, so nothing is downloaded; another version of Python holds another
text, and results name theirs. Windows of a fixed number of bytes, drawn with a seed.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import html.entities
import locale
import sys
import sysconfig
import unicodedata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# The kinds of a pool. Shuffled windows have the bytes of source code, noisy ones most of its order.
DOMAINS = ("code", "names", "tables", "shuffled", "noisy")
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "encodings", "pydoc_data", "lib2to3"}
# Share of a noisy window's bytes that are replaced.
NOISE = 0.3


@functools.lru_cache(maxsize=2)
def source_files(part: str) -> bytes:
    """Source code of the standard library's modules: ``pool``, or ``held out``, a quarter of them, by a hash."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not _LEFT_OUT & set(path.relative_to(root).parts)
    )
    held = [name for name in names if hashlib.blake2b(name.encode()).digest()[0] < 64]
    chosen = held if part == "held out" else sorted(set(names) - set(held))
    return b"\n".join((root / name).read_bytes() for name in chosen)


@functools.lru_cache(maxsize=1)
def names() -> bytes:
    """Characters of all scripts in UTF-8, each with its name."""
    lines = [f"{chr(c)} {unicodedata.name(chr(c))}" for c in range(0xA0, 0x1F000) if unicodedata.name(chr(c), "")]
    # 40 thousand ideographs and syllables are named by a number or a rule.
    lines = [line for line in lines if "IDEOGRAPH" not in line and "HANGUL SYLLABLE" not in line]
    return "\n".join(lines).encode()


@functools.lru_cache(maxsize=1)
def tables() -> bytes:
    """Locales, HTML entities and code pages as rows."""
    rows = [f"{alias}\t{name}" for alias, name in sorted(locale.locale_alias.items())]
    rows += [f"&{entity}\t{text}" for entity, text in sorted(html.entities.html5.items())]
    for page in ("cp037", "cp437", "cp866", "iso8859_5", "iso8859_7", "koi8_r", "mac_greek", "cp1256"):
        decode = codecs.lookup(page).decode
        rows += [f"{page} 0x{b:02x} {decode(bytes([b]), 'replace')[0]}" for b in range(32, 256)]
    return "\n".join(rows).encode("utf-8", "surrogatepass")


def windows(text: bytes, count: int, length: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """``count`` windows of ``length`` bytes at random places: [count, length]."""
    array = np.frombuffer(text, dtype=np.uint8)
    return array[rng.integers(0, len(array) - length, count)[:, None] + np.arange(length)]


def domain(name: str, count: int, length: int, rng: np.random.Generator, part: str = "pool") -> NDArray[np.uint8]:
    """Windows of one of ``DOMAINS``: [count, length]."""
    if name in ("names", "tables"):
        return windows((names() if name == "names" else tables()), count, length, rng)
    drawn = windows(source_files(part), count, length, rng)
    if name == "shuffled":
        return rng.permuted(drawn, axis=1)
    if name == "noisy":
        replaced = rng.random(drawn.shape) < NOISE
        return np.where(replaced, rng.integers(0, 256, drawn.shape, dtype=np.uint8), drawn)
    if name != "code":
        raise ValueError(f"name must be one of {', '.join(DOMAINS)}, got {name!r}")
    return drawn


def version() -> str:
    """What the text depends on: the interpreter's version and a digest of its sources."""
    digest = hashlib.blake2b(source_files("pool"), digest_size=6).hexdigest()
    return f"Python {sys.version.split()[0]}, {digest}"

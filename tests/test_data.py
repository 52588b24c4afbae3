"""What ships, and how text files are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from m2dexport.data import calibration_texts, read_texts, read_utf8
from m2dexport.errors import UsageError


def test_the_calibration_texts_are_a_thousand_lines() -> None:
    texts = calibration_texts()
    assert len(texts) == len(set(texts)) >= 1000


def test_texts_are_lines_without_empty_ones_line_ends_or_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("one\r\n\ntwo\u2028lines\n".encode("utf-8-sig"))
    assert read_texts(path) == ("one", "two\u2028lines")


def test_files_that_are_not_text_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(b"one\n\xfftwo\n")
    with pytest.raises(UsageError, match=r"texts\.txt is not UTF-8 text \(byte 4 is 0xff\)"):
        read_texts(path)
    path.write_bytes(b"\n \n")
    with pytest.raises(UsageError, match="holds no text; it needs one text per line"):
        read_texts(path)
    with pytest.raises(UsageError, match="does not exist"):
        read_utf8(tmp_path / "missing")
    with pytest.raises(UsageError, match="is not a regular file"):
        read_utf8(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is not a regular file"):
        read_texts(tmp_path / "pipe")

"""Test JSON and JSON-lines files in the encodings that people's tools write."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest

from imagewam_cli.data.lerobot.json_text import read_json, read_json_lines
from imagewam_cli.errors import DatasetError

SENTENCES = ["öffne die Schublade", "put the cup\u2028on the tray", "first\u0085then", "push\x0bit\x0c \x1c"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_sentences_survive_encodings_and_line_ends(tmp_path: Path, encoding: str, end: str) -> None:
    path = tmp_path / "tasks.jsonl"
    lines = [json.dumps({"task": sentence}, ensure_ascii=False) for sentence in SENTENCES[:3]]
    lines.append(json.dumps({"task": SENTENCES[3]}))
    path.write_bytes((end.join(lines) + end + end).encode(encoding))
    assert [(number, line["task"]) for number, line in read_json_lines(path)] == list(enumerate(SENTENCES, start=1))


def test_utf16_without_the_platforms_order_is_read(tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    path.write_bytes(codecs.BOM_UTF16_BE + '{"a": "ü"}'.encode("utf-16-be"))
    assert read_json(path) == {"a": "ü"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": 2,}\n', r"a\.jsonl, line 2: not valid JSON: .*"),
        (b'{"a": 1}\n{"a": "\xe9"}\n', r"a\.jsonl, line 2: byte 16 is not utf-8 text"),
        (b'{"a": 1, "a": 2}\n', r"line 1: the key 'a' is given twice, with different values"),
        (b"<html>", "is a web page"),
    ],
)
def test_a_line_that_is_no_json_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        list(read_json_lines(path))


def test_a_key_repeated_with_the_same_value_is_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1, "a": 1}')
    assert read_json(path) == {"a": 1}


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is a folder, not a file"):
        read_json(tmp_path)

"""Commands print safely on any terminal."""

import io
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sail_align.align.cli import main as align
from sail_align.evaluate.cli import main as evaluate
from sail_align.extract.cli import main as extract
from sail_align.extract.errors import UserError, printable
from sail_align.extract.system.command_line import run_command


@given(st.text())
def test_no_control_characters_are_printed(text):
    assert not any(unicodedata.category(each) == "Cc" for each in printable(text) if each not in "\n\t")


def test_escape_codes_in_an_error_become_visible(capsys):
    def fail():
        raise UserError("'\x1b[2Jred\u202e' is invalid.")

    with pytest.raises(SystemExit):
        run_command(fail)
    assert capsys.readouterr().err == "error: '\\x1b[2Jred\\u202e' is invalid.\n"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
@pytest.mark.parametrize(
    ("main", "words"),
    [
        (extract, ["run", "--help"]),
        (extract, ["check"]),
        (align, ["fit", "--help"]),
        (align, ["ladder", "--help"]),
        (evaluate, ["--help"]),
        (evaluate, ["retrieval", "--help"]),
    ],
)
def test_terminals_of_other_encodings_get_question_marks(monkeypatch, encoding, main, words):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["sail", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    stdout.seek(0)
    assert len(stdout.read()) > 200

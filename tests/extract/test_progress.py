"""Progress on a terminal, in a notebook and in a log."""

import io
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from sail_align.extract.system.progress import in_notebook, note, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_log_has_lines_and_no_control_characters(capfd):
    with progress(3, "encode") as bar:
        bar.update(3)
    out, err = capfd.readouterr()
    assert out == ""
    assert "\r" not in err
    assert err.splitlines()[-1].startswith("encode: 100%|##########| 3/3 [")


def test_terminal_has_one_line_that_changes(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress(3, "encode") as bar:
        bar.update(3)
        note("a note")
    assert terminal.getvalue().count("\rencode") >= 2
    assert "a note\n" in terminal.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_shows_nothing(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", shown := stream())
    with progress(3, "encode", quiet=True) as bar:
        bar.update(3)
    assert shown.getvalue() == ""


def test_tests_do_not_run_in_a_notebook():
    assert not in_notebook()


@pytest.mark.slow
def test_notebook_shows_a_bar_and_notes():
    code = """
from sail_align.extract.system.progress import note, progress
with progress(3, "encode") as bar:
    note("a note")
    bar.update(3)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=60).execute()
    streams = {"stdout": "", "stderr": ""}
    for output in notebook.cells[0].outputs:
        assert output.output_type in ("stream", "display_data"), output
        if output.output_type == "stream":
            streams[output.name] += output.text
        else:  # with ipywidgets
            streams["stderr"] += f"\r{output.data['text/plain']}"
    assert streams["stdout"].strip() == "a note"
    assert "\rencode: 100%|" in streams["stderr"].replace("█", "|").replace("#", "|").replace("\x1b[A", "")

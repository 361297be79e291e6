"""Commands print safely on any terminal."""

import io
import sys
import unicodedata
from importlib.metadata import version

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from sail_align.align.cli import main as align
from sail_align.evaluate.cli import main as evaluate
from sail_align.extract.cli import main as extract
from sail_align.extract.errors import UserError, printable
from sail_align.extract.system import usage
from sail_align.extract.system.command_line import run_command


@given(st.text())
def test_no_control_characters_are_printed(text):
    assert not any(unicodedata.category(each) == "Cc" for each in printable(text) if each not in "\n\t")


def test_escape_codes_in_an_error_become_visible(capsys):
    def fail(**_):
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


PROGRAMS = {"sail-extract": extract, "sail-align": align, "sail-eval": evaluate}


@pytest.fixture
def type_words(monkeypatch, capsys):
    """A function that types a whole command line and returns exit code, stdout and stderr."""

    def run(line: str) -> tuple[int, str, str]:
        program, *words = line.split()
        monkeypatch.setattr(sys, "argv", [program, *words])
        with pytest.raises(SystemExit) as end:
            PROGRAMS[program]()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return run


@pytest.mark.parametrize("program", PROGRAMS)
def test_version_and_help_of_each_program(type_words, program, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert type_words(f"{program} --version") == (0, f"{program} {version('sail-align')}\n", "")
    code, out, err = type_words(program)
    assert (code, err) == (0, "")
    assert "Commands:" in out
    assert type_words(f"{program} -h") == (0, out, "")
    listed = out[out.index("Commands:") :]
    assert not [line for line in listed.splitlines() if line.endswith("...")]  # each summary fits


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "sail-align train",
            "Command 'train' of sail-align is unknown. Did you mean `sail-align fit`? Its commands are: ",
        ),
        ("sail-align fti", "Did you mean `sail-align fit`?"),
        ("sail-align evaluate", "Did you mean `sail-eval all`?"),
        ("sail-extract fit", "Did you mean `sail-align fit`?"),
        ("sail-eval overlap", "Did you mean `sail-extract overlap`?"),
        ("sail-eval zzzz", "Command 'zzzz' of sail-eval is unknown. Its commands are: all, "),
        (
            "sail-align fit --learning-rate 1",
            "Option --learning-rate of `sail-align fit` is unknown. Did you mean '--lr'?",
        ),
        ("sail-align fit --learning_rat 1", "Did you mean '--lr'?"),
        ("sail-align fit --batch_size 1", "Did you mean '--batch-size'?"),
        ("sail-align fit --output x", "Did you mean '--out'?"),
        ("sail-align fit --resume", "is unknown. Rerun the same command to resume."),
        ("sail-align fit --zzzz", "Option --zzzz of `sail-align fit` is unknown. See `sail-align fit --help`."),
        ("sail-align --lr 3", "It belongs after a command: `sail-align fit --lr`."),
        ("sail-extract run demo --num-workers 3", "Did you mean '--workers'?"),
        ("sail-align fit", "--features is missing (Feature store)."),
        ("sail-align fit demo.zarr", "--features is missing. Did you mean `--features demo.zarr`?"),
        ("sail-align fit --lr", "--lr has no value."),
        ("sail-align fit --quiet=yes", "--quiet takes no value."),
        ("sail-extract status", "STORE is missing (A feature store)."),
        ("sail-extract run demo --json=yes", "--json takes no value."),
        ("sail-extract status a b", "`sail-extract status` does not take 'b'."),
        (
            "sail-extract download cc3m --processes abc",
            "--processes is invalid: got 'abc', expected a whole number, 1 or ",
        ),
        ("sail-align measure a --rows 3", "--rows is invalid: got '3', expected a whole number from 100 to 100,000."),
        ("sail-align measure a --held-out x", "--held-out is invalid: got 'x', expected a number from 0.01 to 0.5."),
    ],
)
def test_mistakes_take_one_line_in_our_words(type_words, line, message):
    code, out, err = type_words(line)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err


def test_synonyms_stand_for_what_exists():
    commands, options = set(), set()
    for program in (extract, align, evaluate):
        module = sys.modules[program.__module__]
        commands |= {f"{program_name(module)} {each.name}" for each in module.app.registered_commands}
        group = typer.main.get_command(module.app)
        options |= {name[2:] for each in group.commands.values() for one in each.params for name in one.opts}
    assert set(usage.COMMANDS) <= commands
    assert set(usage.OPTIONS) <= options
    for words in (usage.COMMANDS, usage.OPTIONS):
        synonyms = [word for each in words.values() for word in each.split()]
        assert not {each.split()[-1] for each in words} & set(synonyms)


def program_name(module) -> str:
    return module.__doc__.split(":")[0]

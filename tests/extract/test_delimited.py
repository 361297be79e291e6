"""Quotation marks, delimiters and encodings of CSV and TSV, compared with the standard library."""

import csv
import io

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sail_align.extract.errors import UserError
from sail_align.extract.sources import delimited
from sail_align.extract.sources.delimited import DELIMITERS
from sail_align.extract.sources.table import Split, TableConfig
from sail_align.extract.sources.table_files import TextFormat, read_batches

MARKS = st.text(st.sampled_from('ab"\n,\t\\'), max_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "BLOCK", 100)
        yield


def read(path, columns=("image", "caption"), **options):
    return [tuple(row.values()) for batch in read_batches(path, columns, **options) for row in batch.to_pylist()]


def strict_rows(text, **dialect):
    """Return the rows that Python's strict reader returns, None if it raises."""
    try:
        return [tuple(row) for row in csv.reader(io.StringIO(text, newline=""), strict=True, **dialect) if row]
    except csv.Error:
        return None


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(lines=st.lists(MARKS.map(lambda text: text.replace("\\", "/")), max_size=12))
@example(lines=['a,"b', 'c,d"'])
@example(lines=['a,"b', 'c,"d"'])
@example(lines=['a,"b""'])
@example(lines=['a,"b"c'])
@example(lines=["a,", '"b",""""', '"",""'])
def test_csv_is_read_as_by_a_strict_reader_or_rejected(folder, lines):
    """No byte may be lost: what Python's strict reader rejects is rejected, with its line."""
    text = "\n".join(["image,caption", *lines])
    (folder / "t.csv").write_text(text, newline="")
    expected = strict_rows(text)
    if expected is not None and all(len(row) == 2 for row in expected):
        try:
            assert read(folder / "t.csv") == expected[1:]
        except UserError as mistake:
            if "each of which could be a row" not in str(mistake):
                raise
    else:
        with pytest.raises(UserError, match=r"t\.csv .* line \d+"):
            read(folder / "t.csv")


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(captions=st.lists(st.text(st.sampled_from('ab" '), min_size=1, max_size=6), max_size=30))
@example(captions=['"Stop," he said', '"open, never closed', 'a sign that says "go"', '5" pipe', '"a" and "b"'])
def test_tsv_field_not_wholly_in_quotes_is_text(folder, captions):
    rows = [(f"{number}.jpg", caption) for number, caption in enumerate(captions)]
    (folder / "t.tsv").write_text("image\tcaption\n" + "".join(f"{image}\t{text}\n" for image, text in rows))

    def text_of(field):
        inside = field[1:-1]
        whole = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inside.replace('""', "")
        return inside.replace('""', '"') if whole else field

    literal = [text for text in captions if '"' in text and text_of(text) == text]
    assume(not (any(text[0] == '"' for text in literal) and any(text[-1] == '"' for text in captions)))
    assert read(folder / "t.tsv") == [(image, text_of(text)) for image, text in rows]


@pytest.mark.parametrize("quick", [True, False])
def test_stray_marks_never_join_rows_silently(folder, caplog, monkeypatch, quick):
    """Two of them enclose rows as a field of several lines would be."""
    if not quick:
        monkeypatch.setattr(delimited._Table, "_parse_quickly", lambda self, data, used: None)
    (folder / "t.tsv").write_text('image\tcaption\na\t"open\nb\tof 24"\nc\td\n')
    assert read(folder / "t.tsv") == [("a", "open\nb\tof 24"), ("c", "d")]
    (folder / "t.csv").write_text("image,caption\n" + 'a,"two\nlines"\nb,c\n' * 9 + 'c,"open\nd,of 24"\n')
    assert read(folder / "t.csv")[-1] == ("c", "open\nd,of 24")
    assert "t.csv: the row in line 29 has several lines" in caplog.text
    assert (
        "t.tsv: the row in line 2 has several lines in quotation marks, each of which could be a row. Check it."
        in caplog.text
    )
    (folder / "t.tsv").write_text('image\tcaption\na\t"open\nb\tof 24"\n' + "c\td\n" * 40 + 'e\tof 24" width\n')
    with pytest.raises(
        UserError, match=r"marks in line 2 enclose several lines, .*, and those in line 44 are text\. Write"
    ):
        read(folder / "t.tsv")


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.text("ab", min_size=1), MARKS), max_size=20), quoting=st.sampled_from([0, 1]))
@example(rows=[("a", 'a sign, "go"'), ("b", '5" pipe'), ("c", "C:\\dir")], quoting=0)
def test_escaped_quotation_marks_are_read(folder, rows, quoting):
    rows = [(image, text) for image, text in rows if text]
    with (folder / "t.csv").open("w", newline="") as file:
        table = csv.writer(file, doublequote=False, escapechar="\\", quoting=quoting, lineterminator="\n")
        table.writerows([("image", "caption"), *rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "BLOCK", 1 << 20)  # in one block, because all that was read before must be the same
        found = read(folder / "t.csv")
    if any('"' in caption for _, caption in rows):
        assert found == rows
    else:  # nothing shows that backslashes are escaped
        assert [caption.replace("\\\\", "\\") for _, caption in found] == [caption for _, caption in rows]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['a,"b', "c,d"], "got the quotation mark of the field '\"b' in line 2, which is not closed"),
        (
            ["a,b", 'a,"b" c'],
            "text after the closing quotation mark of the field '\"b\" c' in line 3. Write a quotation",
        ),
        (['a,"b', 'c,"d"'], "text after the closing quotation mark of the field '\"b' from line 2 to 3"),
        (['a,"b \\"c\\""', 'a,"b ""c"""'], r"text after the closing quotation mark of the field '\"b .* in line 2"),
        (["a,b"] * 90 + ['a,"b'] + ["c,d"] * 90, "the field '\"b' in line 92, which is not closed"),
        (["a,C:\\\\dir"] * 20 + ['a,5\\" pipe'] * 20, "backslashes escape quotation marks only from line"),
        (["a,b"] * 90 + ["a,b,c"], "line 92: expected 2 columns, got 3"),
    ],
)
def test_message_names_the_line(folder, lines, message):
    (folder / "t.csv").write_text("\n".join(["image,caption", *lines]))
    with pytest.raises(UserError, match=message):
        read(folder / "t.csv")


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.text("ab", min_size=1), st.text('aé"\n,;\t|', max_size=9)), max_size=20),
    delimiter=st.sampled_from(DELIMITERS),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "utf-16-le", "cp1252"]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_delimiters_encodings_and_line_ends(folder, rows, delimiter, encoding, end):
    with (folder / "t.csv").open("w", newline="", encoding=encoding) as file:
        quoting = csv.QUOTE_ALL if end == "\r" else csv.QUOTE_MINIMAL
        csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(
            [("image", "caption"), *rows]
        )
    options = {} if encoding in {"utf-8", "utf-8-sig", "utf-16", "utf-32"} else {"encoding": encoding}
    assert read(folder / "t.csv", **options) == rows
    assert read(folder / "t.csv", delimiter=delimiter, **options) == rows


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.text("ab", min_size=1), st.text('ab",\n\r', max_size=30)), max_size=30))
def test_both_parsers_return_the_same(folder, rows):
    with (folder / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    quick = read(folder / "t.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited._Table, "_parse_quickly", lambda self, data, used: None)
        assert read(folder / "t.csv") == quick == rows


def test_null_characters_name_the_remedy(folder):
    (folder / "t.csv").write_bytes("image,caption\na,b\n".encode("utf-16-le"))
    with pytest.raises(
        UserError, match=r"t\.csv cannot be read: .* null characters; set `encoding:`, for example utf-16-le"
    ):
        read(folder / "t.csv")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("encoding", "latin-99", "unknown encoding: latin-99. Use one"), ("encoding", "rot13", "not a text encoding")]
    + [("delimiter", value, "delimiter") for value in ("", ";;", '"', "\n")],
)
def test_rejects_unknown_formats(field, value, message):
    with pytest.raises(ValidationError, match=message):
        TextFormat(**{field: value})


def test_defaults_are_left_out_of_a_store():
    """Stores that were made before the fields existed can be resumed."""
    split = Split(column="part", keep="train", delimiter=";")
    table = TableConfig(kind="table", files="a.csv", captions="c", encoding="latin-1", split=split)
    written = table.model_dump(mode="json")
    assert (written["encoding"], "delimiter" in written, written["split"]) == (
        "latin-1",
        False,
        {"column": "part", "keep": "train", "file": None, "delimiter": ";"},
    )
    assert TableConfig.model_validate(written) == table

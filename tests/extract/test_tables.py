"""Tables in batches, compared with a second reader of the same file."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sail_align.extract.errors import UserError
from sail_align.extract.sources import delimited, table_files
from sail_align.extract.sources.table import Split, TableConfig
from sail_align.extract.sources.table_files import find_tables, read_batches

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('\n",\t'), max_size=40)


def rows_of(path, columns):
    batches = list(read_batches(path, columns))
    assert all(0 < len(batch) <= table_files.BATCH_ROWS for batch in batches)
    return [row for batch in batches for row in batch.to_pylist()]


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_files, "BATCH_ROWS", 7)
        patch.setattr(delimited, "BLOCK", 2_000)
        yield


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.tuples(st.text("abc", min_size=1), TEXTS, TEXTS), min_size=1, max_size=60), tab=st.booleans())
def test_csv_matches_standard_library(tmp_path_factory, rows, tab):
    path = tmp_path_factory.mktemp("csv") / ("t.tsv" if tab else "t.csv")
    delimiter = "\t" if tab else ","
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["image", "unwanted", "caption"])
        writer.writerows(rows)
    expected = [
        {"caption": row["caption"], "image": row["image"]}
        for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), delimiter=delimiter)
    ]
    assert rows_of(path, ["caption", "image"]) == expected


BAD = [b"good", b"caf\xe9 \xff", b"", "né".encode()]
READ = ["good", "caf\ufffd \ufffd", "", "né"]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "lists.parquet"])
def test_replaces_bytes_that_are_not_utf8(tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    if ending.endswith("parquet"):
        raw = pa.array(BAD, pa.binary())
        text = pa.StringArray.from_buffers(len(BAD), raw.buffers()[1], raw.buffers()[2])
        column = pa.ListArray.from_arrays(range(len(BAD) + 1), text) if "lists" in ending else text
        pq.write_table(pa.table({"image": ["x"] * len(BAD), "caption": column}), path)
    elif ending == "jsonl":
        path.write_bytes(b"".join(b'{"image": "x", "caption": "%s"}\n' % text for text in BAD))
    else:
        delimiter = b"," if ending == "csv" else b"\t"
        path.write_bytes(
            b"\n".join([delimiter.join([b"image", b"caption"]), *(b"x" + delimiter + t for t in BAD), b""])
        )
    expected = [[text] for text in READ] if "lists" in ending else READ
    assert [row["caption"] for row in rows_of(path, ["image", "caption"])] == expected


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_ignores_byte_order_mark(tmp_path, name):
    row = '{"image": "a.jpg"}' if name == "a.jsonl" else "image\na.jpg"
    (tmp_path / name).write_text(f"{row}\n", encoding="utf-8-sig")
    assert [table["image"].to_pylist() for table in read_batches(tmp_path / name, ["image"])] == [["a.jpg"]]


def test_replaces_half_surrogate_pairs(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"c": "a \\ud83d b"}\n{"c": ["\\ud83d\\ude00", "\\ude00"]}\n')
    expected = [["a \ufffd b"], ["\U0001f600", "\ufffd"]]
    assert [row["c"] for row in rows_of(tmp_path / "t.jsonl", ["c"])] == expected


def test_jsonl_key_of_a_late_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"image": i} | ({"long": "late"} if i == 40 else {})) for i in range(50)))
    rows = rows_of(path, ["image", "long"])
    assert [row["image"] for row in rows] == [str(i) for i in range(50)]
    assert [i for i, row in enumerate(rows) if row["long"]] == [40]
    with pytest.raises(UserError, match=r"no column 'short'\. Its columns are image, long"):
        rows_of(path, ["short"])


NUMBERS = st.floats(width=32) | st.integers(-9, 9)


@settings(max_examples=50, deadline=None)
@given(
    words=st.lists(st.none() | st.text("nan ", max_size=4) | st.just(float("nan")), max_size=30),
    values=st.lists(st.none() | NUMBERS, max_size=30),
    listed=st.booleans(),
)
def test_nan_is_null(tmp_path_factory, words, values, listed):
    folder = tmp_path_factory.mktemp("nan")
    rows = [{"c": [value, "x"] if listed else value} for value in [*words, "nan"]]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [None if value is None or value != value else str(value) for value in [*words, "nan"]]
    read = [row["c"] for row in rows_of(folder / "t.jsonl", ["c"])]
    assert texts == ([value for value, _ in read] if listed else read)
    floats = values
    column = pa.array(
        [[value] if listed else value for value in floats], pa.list_(pa.float64()) if listed else pa.float64()
    )
    pq.write_table(pa.table({"c": column}), folder / "t.parquet")
    read = [row["c"][0] if listed else row["c"] for row in rows_of(folder / "t.parquet", ["c"])]
    assert [value is None for value in read] == [value is None or value != value for value in floats]


def test_texts_and_lists_of_texts_in_one_column(tmp_path):
    rows = [None, "a", ["b", None], "3", "c", ["4", "d"], *["e"] * 20, ["f"]]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"c": row}) + "\n" for row in rows))
    read = [row["c"] for row in rows_of(tmp_path / "t.jsonl", ["c"])]
    assert read[:7] == [None, ["a"], ["b", None], ["3"], ["c"], ["4", "d"], ["e"]]
    assert read[-1] == ["f"]


def test_column_of_numbers_is_read_as_texts(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"c": 1}\n{"c": null}\n{"c": 0.50}\n{"c": NaN}\n{"c": Infinity}\n')
    assert [row["c"] for row in rows_of(tmp_path / "t.jsonl", ["c"])] == ["1", None, "0.50", None, "Infinity"]


@pytest.mark.parametrize("line", [1, 9_000])
def test_number_in_a_list_of_texts_is_an_error(tmp_path, line):
    rows = [["a"]] * (line - 1) + [["a", 5]]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"c": row}) + "\n" for row in rows))
    with pytest.raises(UserError, match=rf"got a list with a number in line {line}, expected texts"):
        rows_of(tmp_path / "t.jsonl", ["c"])


VALUES = {"text": ["a"], "number": [1, 0.5], "boolean": [True, False], "mapping": [{}, {"a": 1}], "list": [["a"], []]}


@pytest.mark.slow
@given(data=st.data(), before=st.integers(0, 10))
def test_rejects_types_that_do_not_fit(tmp_path_factory, data, before):
    first, other = data.draw(st.permutations(list(VALUES)).map(lambda names: names[:2]))
    if {first, other} == {"text", "list"}:
        return
    path = tmp_path_factory.mktemp("types") / "t.jsonl"
    rows = [None] * before + [data.draw(st.sampled_from(VALUES[name])) for name in (first, first, other)]
    path.write_text("".join(json.dumps({"c": row}) + "\n" for row in rows))
    with pytest.raises(UserError) as mistake:
        rows_of(path, ["c"])
    if first == "mapping" and before % 7 >= 5:  # the table of an earlier batch is a mistake by itself
        assert "got values of type struct" in str(mistake.value)
    else:
        assert f"got a {other} in line {before + 3} and a {first} in line {before + 1}" in str(mistake.value)


def test_rejects_lists_with_other_values(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"c": ["a"]}\n{"c": ["a", {}, true]}\n')
    with pytest.raises(UserError, match="got a list with a boolean and a mapping in line 2, expected texts or lists"):
        rows_of(tmp_path / "t.jsonl", ["c"])


@pytest.mark.parametrize("column", ["image", "link"])
def test_rejects_lists_outside_captions(pictures, column):
    row = {"image": "1.png", "link": "http://x/1", "caption": "a"}
    (pictures / "l.jsonl").write_text(json.dumps(row | {column: [row[column]]}))
    with pytest.raises(UserError, match=f"Column '{column}' of .*l.jsonl contains lists"):
        source(pictures, files="l.jsonl", captions="caption", url="link")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_nan_is_an_absent_caption_or_url(pictures, ending):
    nan = float("nan")
    rows = [{"image": "1.png", "link": nan, "caption": nan}, {"image": "2.png", "link": nan, "caption": nan}]
    if ending == "jsonl":
        rows.append({"image": "3.png", "link": "http://x/3", "caption": "nan"})
        (pictures / "n.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), pictures / "n.parquet")
    expected = [("", {}), ("", {}), ("http://x/3", {"raw": "nan"})][: len(rows)]
    named = source(pictures, files=f"n.{ending}", captions={"raw": "caption"}, url="link")
    assert [(s.url, dict(s.captions)) for s in named.samples()] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "image,caption\na,b\nc\n", "Table .*t.csv cannot be read: .*[Ee]xpected 2 columns, got 1"),
        ("t.csv", "", "Table .*t.csv cannot be read: .*[Ee]mpty"),
        ("t.csv", "image,image,caption\n", "more than one column 'image'"),
        ("t.jsonl", '{"image": 1, "caption": 2}\n{"image"\n', "Table .*t.jsonl cannot be read: line 2: "),
        ("t.jsonl", "[1]\n", "Table .*t.jsonl cannot be read: line 1 is not a JSON object"),
        (
            "t.jsonl",
            '{"image": 1, "caption": {"a": 1}}\n',
            "Column 'caption' of .* is invalid: got values of type struct",
        ),
        ("t.parquet", "not parquet", "Table .*t.parquet cannot be read: "),
        ("t.txt", "", "got the ending '.txt', expected .csv"),
    ],
)
def test_rejects_malformed_table(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as mistake:
        rows_of(tmp_path / name, ["image", "caption"])
    assert "\n" not in str(mistake.value)


def test_find_tables(tmp_path):
    for name in ("b.csv", "a.csv", "[x].csv"):
        (tmp_path / name).write_text("")
    found = find_tables(tmp_path, ["[x].csv", "?.csv", str(tmp_path / "a.csv")])
    assert [path.name for path in found] == ["[x].csv", "a.csv", "b.csv"]
    with pytest.raises(UserError, match=r"No file matches /.*/none\.csv\. Correct"):
        find_tables(tmp_path, ["none.csv", "/none"])


def source(root, **fields):
    return TableConfig(kind="table", images="images", **fields).open(root)


def test_rejects_row_without_image(pictures):
    lines = [f"{i}.png,words" for i in range(200)]
    lines[150] = ",words"
    (pictures / "gap.csv").write_text("\n".join(["image,caption", *lines]))
    with pytest.raises(UserError, match=r"Column 'image' of .*gap.csv is empty in row 151"):
        list(source(pictures, files="gap.csv", captions={"raw": "caption"}).samples())


def test_blank_captions_are_left_out(pictures):
    (pictures / "b.csv").write_text('image,caption\n1.png,a\n2.png,"  "\n1.png," "\n1.png, b\n')
    grouped = source(pictures, files="b.csv", captions="caption")
    assert [dict(s.captions) for s in grouped.samples()] == [{"c0": "a", "c1": " b"}, {}]
    named = source(pictures, files="b.csv", captions={"raw": "caption"})
    assert [dict(s.captions) for s in named.samples()] == [{"raw": "a"}, {}, {}, {"raw": " b"}]


def test_url_column(pictures):
    (pictures / "u.csv").write_text("image,caption,link\n1.png,a,http://x/1\n2.png,b,\n1.png,c,http://x/other\n")
    named = source(pictures, files="u.csv", captions={"raw": "caption"}, url="link")
    grouped = source(pictures, files="u.csv", captions="caption", url="link")
    assert [sample.url for sample in named.samples()] == ["http://x/1", "", "http://x/other"]
    assert [(s.url, dict(s.captions)) for s in grouped.samples()] == [
        ("http://x/1", {"c0": "a", "c1": "c"}),
        ("", {"c0": "b"}),
    ]


def test_split_file_applies_to_all_batches(pictures):
    (pictures / "split.csv").write_text("image,part\n" + "".join(f"{i}.png,{i % 3}\n" for i in range(600)))
    kept = source(
        pictures,
        files="captions.csv",
        captions={"raw": "caption"},
        split=Split(column="part", keep="2", file="split.csv"),
    )
    assert [sample.key for sample in kept.samples()] == [f"{i}.png" for i in range(2, 600, 3)]

"""Tables are read in batches, and say the same as a second reader of the same file."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sail_align.extract.errors import UserError
from sail_align.extract.schema import Split
from sail_align.extract.schema import TableSource as Table
from sail_align.extract.sources import tabular as tables
from sail_align.extract.sources.table import TableSource
from sail_align.extract.sources.tabular import find_tables, read_batches

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('\n",\t'), max_size=40)


def rows_of(path, columns):
    batches = list(read_batches(path, columns))
    assert all(0 < len(batch) <= tables.BATCH_ROWS for batch in batches)
    return [row for batch in batches for row in batch.to_pylist()]


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "BATCH_ROWS", 7)
        patch.setattr(tables, "CSV_BLOCK", 2_000)
        yield


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.tuples(st.text("abc", min_size=1), TEXTS, TEXTS), min_size=1, max_size=60), tab=st.booleans())
def test_a_csv_in_blocks_is_what_the_standard_library_reads(tmp_path_factory, rows, tab):
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
SAID = ["good", "caf\ufffd \ufffd", "", "né"]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "lists.parquet"])
def test_bytes_that_are_no_utf8_are_replaced_and_the_rest_is_kept(tmp_path, ending):
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
    said = [[text] for text in SAID] if "lists" in ending else SAID
    assert [row["caption"] for row in rows_of(path, ["image", "caption"])] == said


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, name):
    row = '{"image": "a.jpg"}' if name == "a.jsonl" else "image\na.jpg"
    (tmp_path / name).write_text(f"{row}\n", encoding="utf-8-sig")
    assert [table["image"].to_pylist() for table in read_batches(tmp_path / name, ["image"])] == [["a.jpg"]]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"c": "a \\ud83d b"}\n{"c": ["\\ud83d\\ude00", "\\ude00"]}\n')
    batch = [tables._well_formed(row["c"]) for row in tables._lines(tmp_path / "t.jsonl")]
    assert batch == ["a \ufffd b", ["\U0001f600", "\ufffd"]]


def test_a_key_that_only_a_late_line_has_is_a_column(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"image": i} | ({"long": "late"} if i == 40 else {})) for i in range(50)))
    rows = rows_of(path, ["image", "long"])
    assert [row["image"] for row in rows] == [str(i) for i in range(50)]
    assert [i for i, row in enumerate(rows) if row["long"]] == [40]
    with pytest.raises(UserError, match="no column 'short'; its columns are image, long"):
        rows_of(path, ["short"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "image,caption\na,b\nc\n", "Table .*t.csv cannot be read: .*[Ee]xpected 2 columns, got 1"),
        ("t.csv", "", "Table .*t.csv cannot be read: .*[Ee]mpty"),
        ("t.csv", "image,image,caption\n", "more than one column 'image'"),
        ("t.jsonl", '{"image": 1, "caption": 2}\n{"image"\n', "Table .*t.jsonl cannot be read: line 2: "),
        ("t.jsonl", "[1]\n", "Table .*t.jsonl cannot be read: line 1 is no JSON object"),
        ("t.jsonl", '{"image": 1, "caption": {"a": 1}}\n', "Column 'caption' of .* holds struct"),
        ("t.parquet", "not parquet", "Table .*t.parquet cannot be read: "),
        ("t.txt", "", "ends in '.txt'; tables end in"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_sentence(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said) as mistake:
        rows_of(tmp_path / name, ["image", "caption"])
    assert "\n" not in str(mistake.value)


def test_files_are_found_by_pattern_path_or_a_name_with_a_bracket_each_once(tmp_path):
    for name in ("b.csv", "a.csv", "[x].csv"):
        (tmp_path / name).write_text("")
    found = find_tables(tmp_path, ["[x].csv", "?.csv", str(tmp_path / "a.csv")])
    assert [path.name for path in found] == ["[x].csv", "a.csv", "b.csv"]
    with pytest.raises(UserError, match=r"No table none\.csv, /none in "):
        find_tables(tmp_path, ["none.csv", "/none"])


def source(root, **fields):
    return TableSource(Table(kind="table", images="images", **fields), root)


def test_a_row_without_image_is_named(pictures):
    lines = [f"{i}.png,words" for i in range(200)]
    lines[150] = ",words"
    (pictures / "gap.csv").write_text("\n".join(["image,caption", *lines]))
    with pytest.raises(UserError, match=r"Column 'image' of .*gap.csv is empty in row 151"):
        list(source(pictures, files="gap.csv", captions={"raw": "caption"}).samples())


def test_a_caption_of_blanks_is_none(pictures):
    (pictures / "b.csv").write_text('image,caption\n1.png,a\n2.png,"  "\n1.png," "\n1.png, b\n')
    grouped = source(pictures, files="b.csv", captions="caption")
    assert [dict(s.captions) for s in grouped.samples()] == [{"c0": "a", "c1": " b"}, {}]
    named = source(pictures, files="b.csv", captions={"raw": "caption"})
    assert [dict(s.captions) for s in named.samples()] == [{"raw": "a"}, {}, {}, {"raw": " b"}]


def test_urls_come_from_their_column_whatever_the_form(pictures):
    (pictures / "u.csv").write_text("image,caption,link\n1.png,a,http://x/1\n2.png,b,\n1.png,c,http://x/other\n")
    named = source(pictures, files="u.csv", captions={"raw": "caption"}, url="link")
    grouped = source(pictures, files="u.csv", captions="caption", url="link")
    assert [sample.url for sample in named.samples()] == ["http://x/1", "", "http://x/other"]
    assert [(s.url, dict(s.captions)) for s in grouped.samples()] == [
        ("http://x/1", {"c0": "a", "c1": "c"}),
        ("", {"c0": "b"}),
    ]


def test_a_split_of_another_file_goes_with_every_batch(pictures):
    (pictures / "split.csv").write_text("image,part\n" + "".join(f"{i}.png,{i % 3}\n" for i in range(600)))
    kept = source(
        pictures,
        files="captions.csv",
        captions={"raw": "caption"},
        split=Split(column="part", keep="2", file="split.csv"),
    )
    assert [sample.key for sample in kept.samples()] == [f"{i}.png" for i in range(2, 600, 3)]

"""Import of features that were computed elsewhere: every format, joined by key or by position."""

import json
import pickle
import re
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from sail_align.align.data.pairs import open_pairs
from sail_align.extract.cli import app
from sail_align.extract.data import Status
from sail_align.extract.errors import UserError
from sail_align.extract.exchange import features, vector_files
from sail_align.extract.exchange.import_features import import_features
from sail_align.extract.store.store import Store

ROWS, IMAGE_DIM, TEXT_DIM = 300, 12, 8
KEYS = [f"photo/{row}.jpg" for row in range(ROWS)]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def vectors():
    """Vectors of images and texts that share factors, as float64."""
    random = np.random.default_rng(0)
    factors = random.normal(size=(ROWS, 4))
    return tuple(
        factors @ random.normal(size=(4, dim)) + 0.2 * random.normal(size=(ROWS, dim)) for dim in (IMAGE_DIM, TEXT_DIM)
    )


def invoke(*words):
    return CliRunner().invoke(app, ["import", *map(str, words), "--quiet"])


def imported(*words):
    result = invoke(*words, "--out", "x.zarr")
    assert result.exit_code == 0, result.output + repr(result.exception)
    return Store.open("x.zarr"), result.output


def refused(*words) -> str:
    result = invoke(*words, "--out", "refused.zarr")
    assert result.exit_code == 1, result.output
    assert type(result.exception).__name__ == "UserError", repr(result.exception)
    assert not Path("refused.zarr").exists()
    return str(result.exception)


def half_bits(array, start=0, stop=None):
    return array.read(start, stop)[0].view(np.uint16).tolist()


def as_lists(values, kind):
    return pa.array([None if row is None else list(row) for row in values], kind)


def parquet(path, values, kind, **columns):
    pq.write_table(pa.table({**columns, "emb": as_lists(values, kind)}), path, row_group_size=70)


def write(form: str, x: np.ndarray) -> tuple[str, list[str], np.ndarray]:
    """Write vectors in a form; return the file, more options, and the features that are expected."""
    single, half = x.astype(np.float32), x.astype(np.float16)
    brain = torch.from_numpy(single).bfloat16()
    by_position, by_key = ["--by-position"], []
    match form:
        case "npy float16" | "npy float32" | "npy float64" | "npy big-endian":
            x = {"float16": half, "float32": single, "float64": x, "big-endian": single.astype(">f4")}[form.split()[1]]
            np.save("v.npy", x)
            return "v.npy", by_position, x.astype(np.float16)
        case "npy fortran":
            np.save("v.npy", np.asfortranarray(single))
            return "v.npy", by_position, half
        case "npy bfloat16":
            np.save("v.npy", brain.view(torch.uint16).numpy().view("V2"))
            return "v.npy", by_position, brain.float().numpy().astype(np.float16)
        case "parquet list" | "parquet large" | "parquet fixed" | "parquet half":
            kind = {
                "list": pa.list_(pa.float32()),
                "large": pa.large_list(pa.float64()),
                "fixed": pa.list_(pa.float32(), x.shape[1]),
                "half": pa.list_(pa.float16()),
            }[form.split()[1]]
            parquet("v.parquet", half if "half" in form else single if "large" not in form else x, kind, id=KEYS)
            return "v.parquet", by_key, x.astype(np.float16) if "large" in form else half
        case "pt tensor":
            torch.save(brain, "v.pt")
            return "v.pt", by_position, brain.float().numpy().astype(np.float16)
        case "pt legacy":
            torch.save(torch.from_numpy(single), "v.pt", _use_new_zipfile_serialization=False)
            return "v.pt", by_position, half
        case "pt rows":
            torch.save(list(torch.from_numpy(single)), "v.pt")
            return "v.pt", by_position, half
        case "pt batches":
            torch.save(list(torch.from_numpy(x).split(77)), "v.pt")
            return "v.pt", by_position, x.astype(np.float16)
        case "pt by key":
            torch.save(dict(zip(KEYS, torch.from_numpy(half), strict=True)), "v.pth")
            return "v.pth", by_key, half
        case "pt with keys":
            torch.save({"embeddings": torch.from_numpy(single), "id": KEYS}, "v.pt")
            return "v.pt", by_key, half
        case "safetensors matrix":
            save_file({"emb": brain}, "v.safetensors")
            return "v.safetensors", by_position, brain.float().numpy().astype(np.float16)
        case "safetensors by key":
            save_file(dict(zip(KEYS, torch.from_numpy(single), strict=True)), "v.safetensors")
            return "v.safetensors", by_key, half
        case "hdf5 matrix":
            with h5py.File("v.h5", "w") as file:
                file["group/emb"] = x
                file["id"] = KEYS
            return "v.h5", by_key, x.astype(np.float16)
        case "hdf5 by key":
            with h5py.File("v.hdf5", "w") as file:
                for key, row in zip(KEYS, single, strict=True):
                    file[key] = row
            return "v.hdf5", by_key, half
    raise ValueError(form)


FORMS = """npy float16, npy float32, npy float64, npy big-endian, npy fortran, npy bfloat16, parquet list,
parquet large, parquet fixed, parquet half, pt tensor, pt legacy, pt rows, pt batches, pt by key, pt with keys,
safetensors matrix, safetensors by key, hdf5 matrix, hdf5 by key""".replace("\n", " ").split(", ")


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_features_of_numpy(form, vectors):
    images, texts = vectors
    file, how, expected = write(form, images)
    parquet("texts.parquet", texts, pa.list_(pa.float64()), id=KEYS, caption=KEYS)
    store, _ = imported("--image-features", file, "--text-features", "texts.parquet", *how)
    order = [KEYS.index(key) for key in store.index(["key"])["key"].to_pylist()] if not how else range(ROWS)
    assert sorted(order) == list(range(ROWS))
    assert half_bits(store.image()) == expected[list(order)].view(np.uint16).tolist()
    assert half_bits(store.text("raw")) == texts.astype(np.float16)[list(order)].view(np.uint16).tolist()
    assert store.samples(7, 8)[0].captions == {"raw": KEYS[order[7]]}


def test_rows_are_joined_by_key_in_any_order(vectors):
    images, texts = vectors
    order = np.random.default_rng(1).permutation(ROWS)[: ROWS - 20].tolist()
    np.save("images.npy", images[10:])
    Path("keys.txt").write_text("\n".join(KEYS[10:]))
    table = {"id": [KEYS[row] for row in order], "caption": [f"text {row}" for row in order]}
    parquet("texts.parquet", texts[order], pa.list_(pa.float64()), **table)
    store, output = imported(
        "--image-features", "images.npy", "--image-keys", "keys.txt", "--text-features", "texts.parquet"
    )
    keys = store.index(["key"])["key"].to_pylist()
    extra = [KEYS[row] for row in order if row < 10]
    assert keys == KEYS[10:] + extra
    rows = [KEYS.index(key) for key in keys]
    has_image, has_text = np.arange(len(keys)) < ROWS - 10, np.isin(rows, order)
    for array, x, has in ((store.image(), images, has_image), (store.text("raw"), texts, has_text)):
        features, status = array.read()
        assert status.tolist() == np.where(has, Status.OK, Status.MISSING).tolist()
        assert np.array_equal(features[has], x.astype(np.float16)[rows][has])
        assert np.isnan(features[~has]).all()
    both = int((has_image & has_text).sum())
    assert f"{both} of {len(keys)} rows have image features and text features 'raw', joined by 'id'." in output
    assert f"{int((~has_text).sum())} rows have no text features 'raw'; the first is " in output
    assert f"{len(extra)} rows have no image features; the first is {extra[0]!r}." in output
    assert "pairing check: good" in output
    assert output.splitlines()[-1] == "Next: sail-align fit --features x.zarr"
    result = CliRunner().invoke(app, ["verify", "x.zarr"])
    assert result.exit_code == 0
    assert result.output.endswith("x.zarr: no problems found.\n")


def test_shifted_captions_are_found(vectors):
    np.save("a.npy", vectors[0])
    np.save("b.npy", np.roll(vectors[1], 1, axis=0))
    output = imported("--image-features", "a.npy", "--text-features", "b.npy", "--by-position")[1]
    assert "warning: pairing check: the pairing is broken: " in output
    assert "the captions fit at least as well shifted by +1" in output
    assert output.endswith("Next: sail-extract doctor x.zarr\n")


def test_parts_of_clip_retrieval_are_read_in_the_order_of_their_numbers(vectors):
    images, texts = vectors
    for name in ("img_emb", "text_emb", "metadata"):
        Path("out", name).mkdir(parents=True)
    for part in range(12):
        rows = slice(25 * part, 25 * part + 25)
        np.save(f"out/img_emb/img_emb_{part}.npy", images[rows].astype(np.float16))
        np.save(f"out/text_emb/text_emb_{part}.npy", texts[rows].astype(np.float16))
        table = {"image_path": KEYS[rows], "caption": [f"about {key}" for key in KEYS[rows]]}
        pq.write_table(pa.table(table), f"out/metadata/metadata_{part}.parquet")
    store, output = imported("--image-features", "out", "--text-features", "out")
    assert half_bits(store.image()) == images.astype(np.float16).view(np.uint16).tolist()
    assert [(each.key, each.image, each.captions["raw"]) for each in store.samples(0, ROWS)] == [
        (key, key, f"about {key}") for key in KEYS
    ]
    assert store.dataset == "out"
    assert "joined by 'image_path'" in output
    Path("out/metadata/metadata_3.parquet").unlink()
    assert "has 11 tables, expected 12" in refused("--image-features", "out", "--text-features", "out")


def test_several_captions_in_one_file(vectors):
    images, texts = vectors
    columns = {"image_embedding": images, "text_embedding_raw": texts, "text_embedding_long": -texts}
    table = {name: as_lists(values, pa.list_(pa.float64())) for name, values in columns.items()}
    names = {"key": KEYS, "caption_raw": KEYS, "caption_long": KEYS[::-1]}
    pq.write_table(pa.table({**names, **table}), "all.parquet")
    store, _ = imported(
        "--image-features", "all.parquet", "--text-features", "raw=all.parquet", "--text-features", "long=all.parquet"
    )
    assert store.captions == ("raw", "long")
    assert np.array_equal(store.text("long").read()[0], -store.text("raw").read()[0])
    assert store.samples(0, 1)[0].captions == {"raw": KEYS[0], "long": KEYS[-1]}
    words = ("--image-features", "all.parquet", "--text-features", "other=all.parquet")
    expected = "all.parquet has several vectors: image_embedding, text_embedding_raw, text_embedding_long. Choose one"
    assert expected in refused(*words)
    assert "--text-vector 'nothing' is invalid" in refused(*words, "--text-vector", "other=nothing")
    assert "--captions short=…" in refused(*words, "--captions", "short=caption_raw")


def test_rows_without_numbers_get_a_status(vectors):
    images = [list(row) for row in vectors[0].astype(np.float32)]
    images[3], images[5][2], images[8][1], images[9][0] = None, float("nan"), 1e6, None
    images[11] = [0.0] * IMAGE_DIM
    parquet("images.parquet", images, pa.list_(pa.float32()), key=KEYS)
    store, output = imported("--image-features", "images.parquet")
    status = store.image().read()[1]
    found = {row: Status(int(status[row])).label for row in np.flatnonzero(status).tolist()}
    assert found == {3: "missing", 5: "non-finite", 8: "non-finite", 9: "non-finite"}
    assert "warning: 1 rows of image features exceed float16's 65,504" in output
    assert "warning: 1 rows of image features are all zeros" in output
    assert output.endswith("Next: sail-extract status x.zarr\n")
    with pytest.raises(UserError, match=r"x\.zarr has image features only, .* Import them again with --text-features "):
        open_pairs([Path("x.zarr")])


def test_rows_far_apart_are_read_in_one_pass(vectors, monkeypatch):
    monkeypatch.setattr(vector_files, "BATCH_ROWS", 10)
    monkeypatch.setattr(features, "GAP", 2)
    monkeypatch.setattr(features, "BATCH_ROWS", 10)
    parquet("v.parquet", vectors[0], pa.list_(pa.float64()))
    decoded = []
    iterate = pq.ParquetFile.iter_batches

    def count(file, *args, **kwargs):
        for batch in iterate(file, *args, **kwargs):
            decoded.append(len(batch))
            yield batch

    found = features.Features(Path("v.parquet"), "image")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", count)
    for rows in (np.arange(0, ROWS, 25), np.array([ROWS - 1, 0, 150, 75])):
        decoded.clear()
        assert (found.take(rows).values == vectors[0][rows]).all()
        assert sum(decoded) <= ROWS
    assert (found.read(80, 90).values == vectors[0][80:90]).all()  # back, to the second row group


def test_positions_need_equal_lengths_and_consent(vectors):
    np.save("a.npy", vectors[0])
    np.save("b.npy", vectors[1][:-1])
    both = ("--image-features", "a.npy", "--text-features", "b.npy")
    assert "the image features have no keys, the text features 'raw' have no keys" in refused(*both)
    assert "got 300 image features and 299 text features 'raw'" in refused(*both, "--by-position")


def test_keys_that_disagree_with_positions_are_reported(vectors):
    parquet("a.parquet", vectors[0], pa.list_(pa.float64()), key=KEYS)
    parquet("b.parquet", vectors[1], pa.list_(pa.float64()), key=[*KEYS[:200], *KEYS[:199:-1]])
    output = imported("--image-features", "a.parquet", "--text-features", "b.parquet", "--by-position")[1]
    assert "warning: the keys of 100 rows differ." in output


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([*KEYS[:-1], KEYS[0]], r"'photo/0.jpg' occurs more than once in"),
        ([*KEYS[:-1], None], "row 300 of b.parquet has none"),
        ([f"x{key}" for key in KEYS], "No key of the text features 'raw' is one of the images': got 'xphoto/0.jpg'"),
    ],
)
def test_keys_must_be_unique_and_shared(keys, message, vectors):
    parquet("a.parquet", vectors[0], pa.list_(pa.float64()), key=KEYS)
    parquet("b.parquet", vectors[1], pa.list_(pa.float64()), key=keys)
    assert message in refused("--image-features", "a.parquet", "--text-features", "b.parquet")


def test_same_command_finishes_and_a_changed_file_is_named(vectors):
    np.save("a.npy", vectors[0])
    np.save("b.npy", vectors[1])
    words = ("--image-features", "a.npy", "--text-features", "b.npy", "--by-position")
    store, _ = imported(*words)
    files = {path: path.read_bytes() for path in Path("x.zarr").rglob("*") if path.is_file()}
    for array in store.arrays():
        array.discard(0)
    again, _ = imported(*words)
    assert all(array.complete for array in again.arrays())
    assert {path: path.read_bytes() for path in Path("x.zarr").rglob("*") if path.is_file()} == files
    np.save("b.npy", vectors[1] + 1)
    result = invoke(*words, "--out", "x.zarr")
    assert str(result.exception).startswith("b.npy has changed since x.zarr was made: its SHA-256 was ")
    np.save("b.npy", vectors[1])
    result = invoke(*words[:4], "--image-keys", "k.txt", "--by-position", "--out", "x.zarr")
    assert "--image-keys k.txt is invalid" in str(result.exception)
    assert "imported in another way" in str(invoke(*words, "--name", "other", "--out", "x.zarr").exception)


class _Evil:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_files_that_run_code_or_lead_elsewhere_are_refused(vectors):
    torch.save({"x": _Evil()}, "evil.pt")
    assert "contains more than tensors" in refused("--image-features", "evil.pt")
    Path("pickled.npy").write_bytes(pickle.dumps(_Evil()))
    assert "pickled.npy cannot be read" in refused("--image-features", "pickled.npy")
    np.save("objects.npy", np.array([[_Evil()]], dtype=object), allow_pickle=True)
    assert "objects.npy cannot be read" in refused("--image-features", "objects.npy")
    with h5py.File("other.h5", "w") as file:
        file["emb"] = vectors[0]
    with h5py.File("link.h5", "w") as file:
        file["emb"] = h5py.ExternalLink("other.h5", "emb")
    assert "link.h5 cannot be read" in refused("--image-features", "link.h5")
    with h5py.File("virtual.h5", "w") as file:
        layout = h5py.VirtualLayout(vectors[0].shape, float)
        layout[:] = h5py.VirtualSource("other.h5", "emb", vectors[0].shape)
        file.create_virtual_dataset("emb", layout)
    assert "'emb' is stored in other files" in refused("--image-features", "virtual.h5")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros(5), r"got the shape \(5,\), expected \(rows, dimensions\)"),
        (np.zeros((3, 4, 5)), r"got the shape \(3, 4, 5\)"),
        (np.zeros((0, 4)), r"got the shape \(0, 4\), expected at least one vector"),
        (np.zeros((3, 4), np.int8), "got int8, expected float16, float32, float64, bfloat16. Convert it."),
    ],
)
def test_arrays_that_are_no_features_are_refused(content, message):
    np.save("v.npy", content)
    assert re.search(message, refused("--image-features", "v.npy"))


def test_lists_of_different_lengths_are_refused(vectors):
    rows = [list(row) for row in vectors[0]]
    rows[150].pop()
    parquet("v.parquet", rows, pa.list_(pa.float64()), key=KEYS)
    result = invoke("--image-features", "v.parquet", "--out", "x.zarr")
    assert "got 11 numbers in row 151, expected 12 as in the first" in str(result.exception)


def test_record_names_files_and_digests(vectors):
    np.save("a.npy", vectors[0].astype(np.float32))
    store, _ = imported("--image-features", "a.npy")
    source = json.loads(Path("x.zarr/zarr.json").read_text())["attributes"]["sail"]["manifest"]["source"]
    assert source["kind"] == "imported"
    ((name, digest),) = source["features"]["image"]["files"]
    assert (name, len(digest)) == ("a.npy", 64)
    spec = store.image().identity.spec
    assert (spec.source, spec.precision, spec.dim) == ({"loader": "imported"}, "float32", IMAGE_DIM)
    assert store.image().identity.golden == []


def test_damaged_record_is_named(vectors):
    np.save("a.npy", vectors[0])
    imported("--image-features", "a.npy")
    root = json.loads(Path("x.zarr/zarr.json").read_text())
    root["attributes"]["sail"]["manifest"]["source"]["features"] = {"image": {"files": 3}}
    Path("x.zarr/zarr.json").write_text(json.dumps(root))
    message = str(invoke("--image-features", "a.npy", "--out", "x.zarr").exception)
    assert message.startswith("x.zarr/zarr.json is damaged: ")


def test_json_has_the_numbers_of_the_text(vectors):
    images = vectors[0].copy()
    images[3] = 1e6
    np.save("a.npy", images)
    parquet("b.parquet", vectors[1][:-7], pa.list_(pa.float64()), key=KEYS[:-7])
    Path("keys.txt").write_text("\n".join(KEYS))
    words = ("--image-features", "a.npy", "--image-keys", "keys.txt", "--text-features", "b.parquet", "--json")
    result = CliRunner().invoke(app, ["import", *words, "--out", "x.zarr", "--quiet"])
    record = json.loads(result.stdout)
    missing = {"image features": 0, "text features 'raw'": 7}
    assert record["joined"] == {"by": "key", "missing": missing, "differing_keys": 0}
    assert record["converted"]["image features"] == {"overflown": 1, "zero": 0}
    assert record["pairing"]["verdict"] == "good"
    assert record["next"] == "sail-align fit --features x.zarr"


def test_declared_rows_that_are_not_stored_are_refused():
    torch.save(torch.ones(1, 1).expand(10**12, 4), "expanded.pt")
    with h5py.File("unwritten.h5", "w") as file:
        file.create_dataset("m", (10**12, 1000), "f4", chunks=(1, 1000))
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**15, 10**6)}
    with open("huge.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    for name in ("expanded.pt", "unwritten.h5"):
        assert "in which it cannot be stored" in refused("--image-features", name)
    assert "huge.npy cannot be read as .npy" in refused("--image-features", "huge.npy")


def test_parameters_are_read_and_tensors_without_values_are_refused(vectors):
    torch.save(torch.nn.Parameter(torch.tensor(vectors[0])), "parameter.pt")
    store, _ = imported("--image-features", "parameter.pt")
    assert half_bits(store.image()) == vectors[0].astype(np.float16).view(np.uint16).tolist()
    torch.save(torch.ones(4, 3).to_sparse(), "sparse.pt")
    torch.save(torch.ones(4, 3, device="meta"), "meta.pt")
    torch.save({1: torch.ones(3), "1": torch.zeros(3)}, "twice.pt")
    assert "sparse" in refused("--image-features", "sparse.pt")
    assert "without values" in refused("--image-features", "meta.pt")
    assert "the same text" in refused("--image-features", "twice.pt")


@pytest.mark.parametrize("content", ["", "[1, 2]\n", "null\n"])
def test_tables_of_keys_without_columns_are_refused(content, vectors):
    np.save("image.npy", vectors[0])
    Path("keys.jsonl").write_text(content)
    assert "keys.jsonl cannot be read" in refused("--image-features", "image.npy", "--image-keys", "keys.jsonl")


def test_keys_end_only_at_line_breaks_and_are_not_empty(vectors):
    np.save("image.npy", vectors[0][:3])
    Path("keys.txt").write_text("a\u2028b\r\nc\x0bd\ne\n", newline="")
    store, _ = imported("--image-features", "image.npy", "--image-keys", "keys.txt")
    assert store.index(["key"])["key"].to_pylist() == ["a\u2028b", "c\x0bd", "e"]
    Path("keys.txt").write_text("a\n\nb\n")
    assert "row 2 of keys.txt has none" in refused("--image-features", "image.npy", "--image-keys", "keys.txt")


@pytest.mark.parametrize("name", ["../../elsewhere", "/elsewhere", "..", "a/b"])
def test_names_are_no_paths(name, vectors):
    np.save("image.npy", vectors[0])
    with pytest.raises(UserError, match=r"--name .* is invalid"):
        import_features("image.npy", name=name)

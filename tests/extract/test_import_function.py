"""`sail_align.import_features`: the function of `sail-extract import`."""

import numpy as np
import pytest

import sail_align
from sail_align.extract.errors import UserError


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda _: None)
    random = np.random.default_rng(0)
    np.save("images.npy", random.normal(size=(40, 6)).astype(np.float16))
    np.save("raw.npy", random.normal(size=(40, 4)).astype(np.float16))
    np.save("long.npy", random.normal(size=(40, 4)).astype(np.float16))


def test_store_has_the_features(tmp_path, capsys):
    store = sail_align.import_features(
        "images.npy", {"raw": tmp_path / "raw.npy", "long": "long.npy"}, by_position=True, out="here.zarr", quiet=True
    )
    assert capsys.readouterr() == ("", "")
    assert (str(store.path), len(store), store.captions) == ("here.zarr", 40, ("raw", "long"))
    np.testing.assert_array_equal(store.image().read()[0], np.load("images.npy"))
    for caption in ("raw", "long"):
        np.testing.assert_array_equal(store.text(caption).read()[0], np.load(f"{caption}.npy"))


def test_one_path_is_the_caption_raw_and_is_reported(typed, capsys):
    store = sail_align.import_features("images.npy", "raw.npy", by_position=True)
    printed = capsys.readouterr().err.splitlines()[0]
    code, out, _ = typed("import", "--image-features", "images.npy", "--text-features", "raw.npy", "--by-position")
    assert code == 0
    assert printed == out.splitlines()[0]
    assert (str(store.path), store.captions) == ("features/images.zarr", ("raw",))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ("images.npy", "raw.npy"),
            {"text_keys": {"long": "k.csv"}},
            "`text_keys` long=… is invalid",
        ),
        (
            ("images.npy", {"a/b": "raw.npy"}),
            {},
            "Caption name 'a/b' is invalid: expected letters",
        ),
        (("images.npy",), {"text_encoder": "minilm-l6"}, "`text_encoder` has no effect without `text_features`."),
        (("images.npy", 3), {}, "text_features is invalid: got 3, expected a path or several."),
        (("images.npy", "raw.npy"), {"images": "nowhere"}, "`images` nowhere is invalid: there is no such folder."),
    ],
)
def test_mistakes_name_the_argument(arguments, options, message):
    with pytest.raises(UserError) as raised:
        sail_align.import_features(*arguments, **options)
    assert str(raised.value).startswith(message)

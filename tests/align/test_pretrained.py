"""The model object: inputs of all types, casts and copies, classification, segmentation, and other programs' calls."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from released_file import save_encoders
from small_world import SHADES, draw, save_run

from sail_align.align import pretrained
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig

TEXTS = ["a red cat", "the dog sleeps on the green bench", "a"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    image, text = save_encoders(folder)
    encoders = (
        ImageEncoderConfig(f"hf:{image}", pooling="cls+mean").load(),
        TextEncoderConfig(f"hf:{text}", pooling="mean").load(),
    )
    return save_run(folder / "runs" / "photos-glu", *(encoder.identity for encoder in encoders))


@pytest.fixture(scope="module")
def model(run):
    return pretrained.load(run, device="cpu")


@pytest.fixture(scope="module")
def pictures():
    return [draw(seed, colour) for seed, colour in enumerate(SHADES.values())]


def embeddings(model, pictures):
    return torch.cat([model.encode_image(pictures), model.encode_text(TEXTS)])


def test_images_of_all_types_give_the_same_embedding(model, pictures, tmp_path):
    picture = pictures[0]
    picture.save(tmp_path / "picture.png")
    array = np.array(picture)
    tensor_CHW = torch.from_numpy(array).permute(2, 0, 1)
    forms = [
        picture,
        tmp_path / "picture.png",
        str(tmp_path / "picture.png"),
        array,
        array / 255,
        (array / 255).astype(np.float32),
        tensor_CHW,
        tensor_CHW / 255,
        tensor_CHW.permute(1, 2, 0),
        model.preprocess(picture),
        picture.convert("RGBA"),
    ]
    expected = model.encode_image(picture)
    assert expected.shape == (1, 16)
    for form in (*forms, *([form] for form in forms), (form for form in [picture])):
        torch.testing.assert_close(model.encode_image(form), expected, rtol=1e-5, atol=1e-5)
    mixed = model.encode_image(forms, batch_size=3)
    torch.testing.assert_close(mixed, expected.expand(len(forms), -1), rtol=1e-4, atol=1e-4)
    for batch in (np.stack([array] * 2), torch.stack([tensor_CHW] * 2), torch.stack([model.preprocess(picture)] * 2)):
        torch.testing.assert_close(model.encode_image(batch), expected.expand(2, -1), rtol=1e-4, atol=1e-4)


def test_grey_images_and_arrays_agree(model):
    grey = draw(0, (90, 90, 90)).convert("L")
    expected = model.encode_image(grey)
    for array in (np.array(grey), np.array(grey)[:, :, None], np.array(grey)[None]):
        assert torch.equal(model.encode_image(array), expected)


def test_invalid_images_are_named(model, pictures, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    content = io.BytesIO()
    pictures[0].save(content, "png")
    truncated = Image.open(io.BytesIO(content.getvalue()[:200]))
    good = pictures[0]
    cases = [
        ([], ValueError, "nothing to embed. Pass at least one image"),
        (torch.empty(0, 3), ValueError, "nothing to embed"),
        (np.empty((0, 4, 4, 3), np.uint8), ValueError, "nothing to embed"),
        (tmp_path / "absent.jpg", ValueError, "Image 0 is invalid: got .*absent.jpg.* There is no such file"),
        ([good, "absent.jpg"], ValueError, "Image 1 is invalid: got 'absent.jpg'"),
        ([good, "a\0b"], ValueError, "Image 1 is invalid"),
        ("https://example.org/a.jpg", ValueError, "got the URL .* Download it first"),
        (tmp_path, ValueError, "It is a folder. Pass its files"),
        ([good, tmp_path / "broken.jpg"], ValueError, "Image 1 cannot be used: .*broken.jpg"),
        (truncated, ValueError, "Image 0 cannot be used"),
        (Image.new("I", (9, 9)), ValueError, "Image 0 cannot be used: .*no defined black and white"),
        (7, TypeError, "Images are invalid: got 7 of type int"),
        (None, TypeError, "got None of type NoneType"),
        (b"abc", TypeError, "of type bytes"),
        ({"image": good}, TypeError, "of type dict"),
        ([good, 7], TypeError, "Image 1 is invalid: got 7 of type int"),
        ([[good]], TypeError, "Image 0 is invalid: got .* of type list"),
        ([good, Image.new("RGB", (0, 4))], ValueError, "Image 1 is invalid: got 0 × 4 pixels"),
        (np.zeros((8, 8, 3), np.int64), TypeError, "dtype int64, expected uint8, or floats"),
        (np.zeros((8, 8, 5), np.uint8), ValueError, r"shape \(8, 8, 5\)"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, "nothing to embed"),
        (np.zeros((8, 0, 3), np.uint8), ValueError, r"shape \(8, 0, 3\)"),
        (np.array(7, np.uint8), ValueError, r"shape \(\)"),
        (torch.zeros(3, 8, 3), ValueError, r"may be \(H, W, 3\) or \(3, H, W\)"),
        (torch.randn(3, 8, 8), ValueError, r"floats range from .* expected \[0, 1\]"),
        (np.full((8, 8, 3), np.nan), ValueError, r"floats range from nan"),
    ]
    for given, error, message in cases:
        with pytest.raises(error, match=message):
            model.encode_image(given)
    for size in (0, -1, 1.5, "2", True):
        with pytest.raises(ValueError, match="batch_size is invalid"):
            model.encode_image(good, batch_size=size)


def test_invalid_texts_are_named(model):
    cases = [
        ([], ValueError, "nothing to embed. Pass at least one text"),
        (torch.empty(0, 3), ValueError, "nothing to embed"),
        (["a", 7], TypeError, "Text 1 is invalid: got 7 of type int"),
        (7, TypeError, "Texts are invalid: got 7 of type int"),
        (np.array("a"), TypeError, "Texts are invalid: got array"),
        (["a", "\ud800"], ValueError, "Text 1 is invalid: got half of a surrogate pair"),
        (b"a", TypeError, "of type bytes"),
        (torch.zeros(2, 3), TypeError, "Tokens are invalid: got dtype torch.float32"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"Tokens are invalid: got shape \(2,\)"),
    ]
    for given, error, message in cases:
        with pytest.raises(error, match=message):
            model.encode_text(given)
    with pytest.raises(ValueError, match="batch_size is invalid"):
        model.encode_text("a", batch_size=0)


def test_batches_and_progress_do_not_change_embeddings(model, pictures, capsys):
    expected = embeddings(model, pictures)
    images = model.encode_image(pictures, batch_size=2, progress=True)
    texts = model.encode_text(TEXTS, batch_size=2, progress=True)
    torch.testing.assert_close(torch.cat([images, texts]), expected, rtol=1e-4, atol=1e-4)
    shown = capsys.readouterr().err
    assert "images: 100%" in shown
    assert "texts: 100%" in shown
    assert "3/3" in shown
    model.encode_text(model.tokenizer(TEXTS))
    assert capsys.readouterr().err == ""


def test_embeddings_that_are_not_normalised_have_the_same_direction(model, pictures):
    raw = model.encode_image(pictures, normalize=False)
    assert (raw.norm(dim=-1) - 1).abs().min() > 0.01
    assert torch.equal(F.normalize(raw, dim=-1), model.encode_image(pictures))
    raw = model.encode_text(TEXTS, normalize=False)
    assert torch.equal(F.normalize(raw, dim=-1), model.encode_text(TEXTS))


def test_similarity_is_the_cosine(model, pictures):
    expected = model.encode_image(pictures).double().numpy() @ model.encode_text(TEXTS).double().numpy().T
    np.testing.assert_allclose(model.similarity(pictures, TEXTS).numpy(), expected, atol=1e-6)


def test_heads_embed_frozen_features(model, pictures):
    pixels_BHWC = torch.stack([model.preprocess(picture) for picture in pictures])
    image_BD, text_BD = model.image_encoder.encode(pixels_BHWC), model.text_encoder.encode(TEXTS)
    for form in (image_BD, image_BD.half(), image_BD.half().numpy()):
        torch.testing.assert_close(model.heads(image=form), model.encode_image(pictures), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.heads(text=text_BD), model.encode_text(TEXTS))
    assert torch.equal(model.heads(text=text_BD, normalize=False), model.encode_text(TEXTS, normalize=False))
    assert torch.equal(model.heads(image=image_BD[None, :, None])[0, :, 0], model.heads(image=image_BD))
    assert model.heads(image=image_BD[0]).shape == (16,)
    image_BD[1] = torch.nan
    assert model.heads(image=image_BD).isnan().any(dim=1).tolist() == [False, True, False, False, False]
    for given, error, message in (
        ({}, TypeError, "takes either image=… or text=…"),
        ({"image": image_BD, "text": text_BD}, TypeError, "takes either"),
        ({"image": image_BD[:, 1:]}, ValueError, r"expected \(…, \d+\)"),
        ({"text": [1.0]}, TypeError, "Features are invalid: got .* of type list"),
        ({"text": text_BD.long()}, TypeError, "expected floats"),
        ({"text": text_BD[:0]}, ValueError, "nothing to embed"),
    ):
        with pytest.raises(error, match=message):
            model.heads(**given)


def test_classify_is_the_softmax_of_scaled_cosines(model, pictures):
    names, templates = ["red", "green", "cat"], ["a {}", "the {} on the bench"]
    prompts = model.encode_text([t.replace("{}", n) for n in names for t in templates]).double().numpy()
    means = prompts.reshape(3, 2, -1).mean(1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    logits = model.logit_scale.item() * model.encode_image(pictures).double().numpy() @ means.T
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model.classify(pictures, names, templates).numpy(), expected, atol=1e-5)
    with torch.autocast("cpu"):
        np.testing.assert_allclose(model.classify(pictures, names, templates).numpy(), expected, atol=1e-5)
    assert model.classify(pictures[0], names).shape == (1, 3)
    assert torch.equal(model.classify(pictures, names), model.classify(pictures, names, "{}"))
    assert torch.equal(model.classify(pictures, names, "a {}"), model.classify(pictures, names, ["a {}"]))
    published = model.classify(pictures, names, "open_clip:imagenet-7")
    assert published.shape == (5, 3)
    for labels, given, error, message in (
        ("red", None, TypeError, "labels is invalid: got the string 'red'"),
        ([], None, ValueError, "at least one label"),
        (["red", 7], None, TypeError, "Label 1 is invalid"),
        (names, "a photo", ValueError, "Template 'a photo' is invalid: expected {}"),
        (names, ["a {}", 7], TypeError, "Template 1 is invalid"),
        (names, [], ValueError, "at least one template"),
    ):
        with pytest.raises(error, match=message):
            model.classify(pictures, labels, given)


def test_train_and_repr(model):
    assert not any(module.training for module in model.train().modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert repr(model).startswith("PretrainedModel('")
    assert "to 16 dimensions" in repr(model)
    assert len(repr(model)) < 300


def test_copies_and_state_dicts_hold_the_whole_model(run, model, pictures, tmp_path):
    expected = embeddings(model, pictures)
    clone = copy.deepcopy(model)
    assert torch.equal(embeddings(clone, pictures), expected)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert torch.equal(embeddings(model, pictures), expected)
    clone.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(embeddings(clone, pictures), expected)
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {"image_encoder", "text_encoder", "alignment"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_change_embeddings_by_rounding(model, pictures, dtype):
    expected = embeddings(model, pictures)
    cast = copy.deepcopy(model).to(dtype)
    assert {parameter.dtype for parameter in cast.parameters()} == {dtype}
    assert cast.dtype == cast.image_encoder.dtype == cast.text_encoder.dtype == dtype
    found = embeddings(cast, pictures)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() > 0
    assert F.cosine_similarity(found, expected).min() > (0.9999 if dtype == torch.float16 else 0.999)
    again = embeddings(cast.float(), pictures)
    assert F.cosine_similarity(again, expected).min() > 0.999
    exact = embeddings(copy.deepcopy(model).double(), pictures)
    torch.testing.assert_close(exact, expected, rtol=1e-2, atol=1e-2)


def test_rotary_frequencies_stay_exact(tmp_path):
    from tiny_models import save_randomised, save_tokenizer
    from transformers import ModernBertConfig, ModernBertModel

    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, pad_token_id=0
    )
    save_randomised(ModernBertModel(config), tmp_path)
    save_tokenizer(tmp_path, limit=512)
    encoder = TextEncoderConfig(f"hf:{tmp_path}", pooling="mean").load()
    frequencies = {name: buffer.clone() for name, buffer in encoder.named_buffers() if "inv_freq" in name}
    assert frequencies
    text = "the dog runs on the green grass " * 60
    expected = encoder.encode([text])
    encoder.bfloat16()
    found = dict(encoder.named_buffers())
    for name, buffer in frequencies.items():
        assert torch.equal(found[name], buffer)
    assert F.cosine_similarity(encoder.encode([text]), expected).item() > 0.995
    assert {p.dtype for p in encoder.half().float().parameters()} == {torch.float32}
    reloaded = TextEncoderConfig(f"hf:{tmp_path}", pooling="mean", precision="bfloat16").load()
    assert torch.equal(reloaded.encode([text]), encoder.bfloat16().encode([text]))


def test_moving_to_a_device_moves_everything(model):
    moved = copy.deepcopy(model).to("meta")
    assert {tensor.device.type for tensor in (*moved.parameters(), *moved.buffers())} == {"meta"}
    assert moved.device == moved.image_encoder.device == moved.text_encoder.device == torch.device("meta")

"""Frozen encoders and trained heads as one module that embeds, compares, classifies and segments."""

import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, repeat
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sail_align.align.inputs import (
    Features,
    ImageInput,
    SingleImage,
    Templates,
    TextInput,
    check_batch_size,
    list_features,
    list_images,
    list_labels,
    list_templates,
    list_texts,
    list_tokens,
    load_pixels,
    read_picture,
)
from sail_align.align.model.correction import Side
from sail_align.align.model.heads import Head
from sail_align.align.runs.checkpoint import Run
from sail_align.align.segmentation import VARIANTS, ImageSegmenter, Segmentation
from sail_align.align.vision_tower import VisionTower
from sail_align.extract.encoders.runtime import tf32_products
from sail_align.extract.encoders.text import TextEncoder
from sail_align.extract.encoders.vision import VisionEncoder
from sail_align.extract.sources.images import upright_rgb
from sail_align.extract.system.progress import progress as progress_bar

_HEAD_BATCH = 4_096
"""Rows that a head maps at once."""


class PretrainedModel(nn.Module):
    """Frozen encoders and trained heads as one module, with CLIP's usual interface.

    `encode_image` and `encode_text` embed images and texts, or the tensors that `preprocess` and `tokenizer` make of
    them. By default, embeddings equal those of `sail-eval`: features are rounded to float16, as in stores, and autocast
    around a call has no effect, since the precision is part of an encoder's identity.

    `to`, `half`, `float`, `state_dict` and `copy.deepcopy` cover the encoders and the heads. The model is frozen:
    `train` has no effect, and no call gives gradients.

    Attributes:
        run: The run it was loaded from, with its settings and the identities of both encoders.
        image_encoder: The image encoder.
        text_encoder: The text encoder.
        alignment: The trained heads, temperature and bias.
    """

    def __init__(self, run: Run, image: VisionEncoder, text: TextEncoder):
        super().__init__()
        self.run = run
        self.image_encoder, self.text_encoder = image, text
        self.alignment = run.model.to(image.device).requires_grad_(False)
        self.eval()

    def __repr__(self) -> str:
        image, text = (encoder.identity.spec for encoder in (self.image_encoder, self.text_encoder))
        parameters = sum(parameter.numel() for parameter in self.alignment.parameters())
        return (
            f"PretrainedModel({str(self.run.path)!r}: {image.id} ({image.dim}) and {text.id} ({text.dim}) to "
            f"{self.dim} dimensions, {parameters / 1e6:.1f} M parameters in the heads, {self.device}, "
            f"{str(self.dtype).removeprefix('torch.')})"
        )

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: the model is frozen."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Device of encoders and heads."""
        return self.alignment.log_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the heads."""
        return self.alignment.log_scale.dtype

    @property
    def dim(self) -> int:
        """Number of dimensions E of the embeddings."""
        return self.alignment.image_head.out.out_features

    @property
    def logit_scale(self) -> Tensor:
        """Temperature t. σ(t x·y + b) is the probability of the sigmoid loss that x and y are a positive pair.

        OpenCLIP's attribute with this name is the logarithm of t.
        """
        return self.alignment.log_scale.exp()

    @property
    def logit_bias(self) -> Tensor:
        """Bias b; see `logit_scale`."""
        return self.alignment.bias

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return the pixels (size, size, 3) uint8 of one image, to be stacked to a batch for `encode_image`.

        Raises:
            TypeError: The argument is not a PIL image, but, for instance, a path.
            ValueError: The image's values have no defined black and white, such as integers of 32 bits.
        """
        if not isinstance(image, Image.Image):
            raise TypeError(f"Expected a PIL image, got {image!r}. Open a file with PIL.Image.open.")
        return self.image_encoder.preprocess(upright_rgb(image))

    def tokenizer(self, texts: str | Sequence[str]) -> Tensor:
        """Return the tokens (B, T) int64 of texts, for `encode_text` only."""
        return self.text_encoder.tokenize(list_texts(texts))

    def encode_image(
        self,
        images: ImageInput,
        *,
        batch_size: int | None = None,
        normalize: bool = True,
        corrected: bool = False,
        progress: bool = False,
    ) -> Tensor:
        """Embed one or many images.

        Args:
            images: One image or a list of images: PIL images, paths of files, NumPy arrays (H, W, 3), tensors
                (3, H, W), or any mix of them. Arrays hold uint8, or floats in [0, 1]. A tensor (B, 3, H, W) is a batch.
                Pixels (B, size, size, 3) uint8 from `preprocess` are not resized again.
            batch_size: Images that are encoded at once. None takes what suits the device.
            normalize: Scale embeddings to unit length. OpenCLIP's default is False; cosines do not depend on it.
            corrected: Return vectors whose dot products with those of `encode_text(…, corrected=True)` are similarities
                corrected for hubs, for retrieval. `normalize` has no effect then.
            progress: Show a progress bar.

        Returns:
            Embeddings (B, E), or (B, E + 2) if corrected, float32 on `device`. One image gives one row.

        Raises:
            TypeError: An item is not an image.
            ValueError: There are no images, a file does not exist or cannot be read, or an array has another shape.
            UserError: `corrected` is set and the model has no correction.
        """
        self._check_corrected(corrected)
        size = check_batch_size(batch_size) or self.image_encoder.batch_size
        listed = list_images(images)
        embeddings = []
        with (
            self.exact(),
            ThreadPoolExecutor(min(os.cpu_count() or 1, size, len(listed))) as readers,
            progress_bar(len(listed), "images", unit="image", quiet=not progress) as bar,
        ):
            for start in range(0, len(listed), size):
                batch = listed[start : start + size]
                pixels = readers.map(load_pixels, batch, count(start), repeat(self.image_encoder))
                features_BD = self.image_encoder(self.image_encoder.normalise(torch.stack(list(pixels))))
                embeddings.append(self._embed("image", features_BD.half(), normalize, corrected))
                bar.update(len(batch))
        return torch.cat(embeddings)

    def encode_text(
        self,
        texts: TextInput,
        *,
        batch_size: int | None = None,
        normalize: bool = True,
        corrected: bool = False,
        progress: bool = False,
    ) -> Tensor:
        """Embed one or many texts.

        Args:
            texts: A string, a list of strings, or tokens (B, T) from `tokenizer`.
            batch_size: Maximum number of texts that are encoded at once. None packs them by their length into batches
                that suit the device.
            normalize: Scale embeddings to unit length. OpenCLIP's default is False; cosines do not depend on it.
            corrected: See `encode_image`.
            progress: Show a progress bar.

        Returns:
            Embeddings (B, E), or (B, E + 2) if corrected, float32 on `device`. One text gives one row.

        Raises:
            TypeError: An item is not a string.
            ValueError: There are no texts.
            UserError: `corrected` is set and the model has no correction.
        """
        self._check_corrected(corrected)
        size = check_batch_size(batch_size) or _HEAD_BATCH
        listed: Any
        encode: Any
        if isinstance(texts, Tensor):
            listed, encode = list_tokens(texts), self.text_encoder.encode_tokens
        else:
            listed, encode = list_texts(texts), self.text_encoder.encode
        embeddings = []
        with self.exact(), progress_bar(len(listed), "texts", unit="text", quiet=not progress) as bar:
            for start in range(0, len(listed), size):
                batch = listed[start : start + size]
                features_BD = encode(batch, bar.update)
                embeddings.append(self._embed("text", features_BD.half(), normalize, corrected))
        return torch.cat(embeddings)

    def heads(
        self,
        *,
        image: Features | None = None,
        text: Features | None = None,
        normalize: bool = True,
        corrected: bool = False,
    ) -> Tensor:
        """Embed frozen features, such as those of a store.

        Args:
            image: Features (…, D) of the image encoder, of any float type. They are rounded to float16, as in stores.
            text: Features (…, D) of the text encoder, instead of `image`.
            normalize: Scale embeddings to unit length.
            corrected: See `encode_image`.

        Returns:
            Embeddings (…, E), or (…, E + 2) if corrected, float32 on `device`. Features that are NaN, as of missing
            images, give NaN.

        Raises:
            TypeError: Not exactly one of `image` and `text` is given, or it holds no floats.
            ValueError: The features have another number of dimensions than the encoder.
            UserError: `corrected` is set and the model has no correction.
        """
        self._check_corrected(corrected)
        if (image is None) == (text is None):
            raise TypeError("heads takes either image=… or text=…. Pass the features of one encoder.")
        features: Any = image if text is None else text
        side: Side = "image" if text is None else "text"
        rows_ND = list_features(features, self._head(side).norm.normalized_shape[0])
        chunks = (rows_ND[start : start + _HEAD_BATCH] for start in range(0, len(rows_ND), _HEAD_BATCH))
        with self.exact():
            halves = (torch.as_tensor(chunk_BD).half() for chunk_BD in chunks)
            embedded = [self._embed(side, half_BD, normalize, corrected) for half_BD in halves]
        return torch.cat(embedded).reshape(*features.shape[:-1], -1)

    def forward(self, image: Any = None, text: Any = None) -> dict[str, Tensor | None]:
        """Embed images and texts, as OpenCLIP's models do with `output_dict=True`.

        Args:
            image: See `encode_image`. None gives no image features.
            text: See `encode_text`. None gives no text features.

        Returns:
            `image_features` and `text_features`, unit-norm, the temperature `logit_scale` and the bias `logit_bias`.
        """
        return {
            "image_features": None if image is None else self.encode_image(image),
            "text_features": None if text is None else self.encode_text(text),
            "logit_scale": self.logit_scale,
            "logit_bias": self.logit_bias,
        }

    def similarity(self, images: ImageInput, texts: TextInput, *, corrected: bool = False) -> Tensor:
        """Return the cosine of each image with each text, (I, T) float32, or the corrected similarity.

        See `encode_image` for the arguments.
        """
        texts_TE = self.encode_text(texts, corrected=corrected)
        with self.exact():
            return self.encode_image(images, corrected=corrected) @ texts_TE.T

    def encode_labels(self, labels: Sequence[str], templates: Templates = None) -> Tensor:
        """Embed class names by prompts: the mean of the unit embeddings of a class's prompts, of unit length.

        Args:
            labels: Names of the classes.
            templates: Prompts with `{}` for the class name: one, a list, or the name of a published list such as
                `open_clip:imagenet-80`. None takes the labels themselves.

        Returns:
            Embeddings (C, E) float32, as `sail-eval` computes them.

        Raises:
            TypeError: The labels are not a list of strings.
            ValueError: A template has no `{}`.
            UserError: The published list does not exist, or its library is not installed.
        """
        names, prompts = list_labels(labels), list_templates(templates)
        embeddings_PE = self.encode_text([prompt.replace("{}", name) for name in names for prompt in prompts])
        return F.normalize(embeddings_PE.reshape(len(names), len(prompts), -1).mean(dim=1), dim=-1)

    def classify(self, images: ImageInput, labels: Sequence[str], templates: Templates = None) -> Tensor:
        """Return the probability of each label for each image.

        They are the softmax over the labels of t · cosine, with the temperature t of the loss. They sum to 1 over
        these labels, so they say which label fits best, not whether any fits.

        Args:
            images: One image or many; see `encode_image`.
            labels: Names of the classes.
            templates: See `encode_labels`.

        Returns:
            Probabilities (I, C) float32. One image gives one row.
        """
        labels_CE = self.encode_labels(labels, templates)
        with self.exact():
            return (self.logit_scale.float() * self.encode_image(images) @ labels_CE.T).softmax(dim=-1)

    def segment(
        self,
        image: SingleImage,
        labels: Sequence[str],
        templates: Templates = None,
        *,
        background: float | None = None,
        variants: Collection[str] = (),
    ) -> Segmentation:
        """Label each pixel of an image, by the protocol of `sail-eval segmentation`.

        Args:
            image: One image; see `encode_image`.
            labels: Names of the classes.
            templates: See `encode_labels`.
            background: Pixels where no other label has this softmax probability get the label `background`, which has
                to be one of `labels`. None compares all labels with all pixels.
            variants: Departures from the protocol: `whole-image`, `maskclip`, `authors-normalisation`.

        Returns:
            Label of each pixel (H, W), and the names of the labels.

        Raises:
            TypeError: The image is not a single image.
            ValueError: An argument is invalid.
            UserError: The encoder's patches have no embeddings of their own, or the variant does not apply to it.
        """
        if unknown := set(variants) - set(VARIANTS):
            raise ValueError(f"variants is invalid: got {min(unknown)!r}, expected some of {', '.join(VARIANTS)}.")
        if len(listed := list_images(image)) != 1:
            raise TypeError(f"image is invalid: got {len(listed)} images, expected one. Segment them one by one.")
        self.image_encoder.require_patches()
        segmenter = ImageSegmenter(
            list_labels(labels),
            self.encode_labels(labels, templates),
            self.image_encoder,
            self._embed_patches,
            threshold=background,
            variants=variants,
        )
        picture = read_picture(listed[0], 0)
        with self.exact():
            return Segmentation(segmenter.label(picture, (picture.height, picture.width)), list(labels))

    def vision_tower(self, *, normalize: bool = True) -> VisionTower:
        """Return the image encoder and head as a vision tower for models like LLaVA.

        It shares its weights with this model.

        Args:
            normalize: Scale the embedding of each patch to unit length, as `segment` does.

        Raises:
            UserError: The encoder's patches have no embeddings of their own.
        """
        return VisionTower(self.image_encoder, self.alignment.image_head, normalize=normalize)

    def _head(self, side: Side) -> Head:
        return self.alignment.image_head if side == "image" else self.alignment.text_head

    def _check_corrected(self, corrected: bool) -> None:
        if corrected:
            self.alignment.require_correction()

    def _embed(self, side: Side, features: Tensor, normalize: bool, corrected: bool = False) -> Tensor:
        raw: Tensor = self._head(side)(features.to(self.device).float()).float()
        if corrected:
            return self.alignment.require_correction().extend(raw, side)
        return F.normalize(raw, dim=-1) if normalize else raw

    def _embed_patches(self, patches_NhwD: Tensor) -> Tensor:
        raw = self.alignment.image_head.of_patches(patches_NhwD.to(self.device).float())
        return F.normalize(raw.float(), dim=-1)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Compute without gradients, TF32 and autocast."""
        with torch.no_grad(), tf32_products(), torch.autocast(self.device.type, enabled=False):
            yield

"""Models that this project did not write, small and with random weights, and real images to run them on.

From `transformers` (built from their configs, nothing is downloaded), from timm where it can be imported, and a plain nn.Sequential.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subnet_pipelines.benchmarks.mnist import load

CLASSES = 10


@dataclass(frozen=True)
class Case:
    """make: a new model; inputs: rows of real data as keyword or positional arguments; heads: its ``per_task`` modules."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]
    heads: tuple[str, ...]
    needs: str | None = None

    def model(self, seed: int = 0) -> nn.Module:
        if (why := self.missing()) is not None:
            pytest.skip(why)
        torch.manual_seed(seed)
        return self.make()

    def missing(self) -> str | None:
        """Why the model cannot be made here, or None."""
        try:
            if self.needs is not None:
                importlib.import_module(self.needs)
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that is for another torch
            return f"{self.needs} cannot be imported: {error}"
        return None


def output(y: object) -> Tensor:
    """The tensor of what a model gives: its logits, or its last hidden states."""
    return y if isinstance(y, Tensor) else y["logits"] if "logits" in y else y["last_hidden_state"]


def labels(rows: int, first: int = 0) -> Tensor:
    """The digits on the images."""
    return load(None)[0][1][first : first + rows]


def images(rows: int, first: int = 0, channels: int = 3) -> Tensor:
    """MNIST's training images from a place on, framed to 32 x 32: float32 (rows, channels, 32, 32)."""
    pixels = load(None)[0][0][first : first + rows].float().div(255).sub(0.1307).div(0.3081)
    return F.pad(pixels, (2, 2, 2, 2))[:, None].repeat(1, channels, 1, 1)


def tokens(rows: int, first: int = 0) -> Tensor:
    """The same images as sequences of 16 tokens: how bright each of 4 x 4 parts is, int64 (rows, 16) below 32."""
    return F.avg_pool2d(images(rows, first, 1), 8).flatten(1).add(1).mul(8).long().clamp(0, 31)


def pictures(name: str) -> Callable[[int, int], dict[str, Tensor]]:
    return lambda rows, first=0: {name: images(rows, first)}


def _transformers(name: str, **config) -> nn.Module:
    library = importlib.import_module("transformers")
    kind = name.removesuffix("ForImageClassification").removesuffix("Model")
    options = {"add_pooling_layer": False} if name == "BertModel" else {}
    return getattr(library, name)(getattr(library, f"{kind}Config")(**config), **options)


def resnet(sizes: tuple[int, ...] = (16, 24, 24, 32), depths: tuple[int, ...] = (1, 1, 1, 1)) -> nn.Module:
    """transformers' ResNet of basic layers; sizes 64 to 512 and depths of 2 make its ResNet-18."""
    return _transformers(
        "ResNetForImageClassification",
        embedding_size=sizes[0],
        hidden_sizes=list(sizes),
        depths=list(depths),
        layer_type="basic",
        num_labels=CLASSES,
    )


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=2, dilation=2, groups=4),
        nn.GELU(),
        nn.ConvTranspose2d(16, 8, 2, stride=2),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.LayerNorm(32),
        nn.ReLU(),
        nn.Linear(32, CLASSES),
    )


def _timm(name: str, **options) -> nn.Module:
    return importlib.import_module("timm").create_model(name, pretrained=False, num_classes=CLASSES, **options)


VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
BERT = {"vocab_size": 32, "max_position_embeddings": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # so that two sides compute the same

CASES = {
    "ResNet (transformers)": Case(resnet, pictures("pixel_values"), ("classifier",), "transformers"),
    "ConvNeXt (transformers)": Case(
        functools.partial(
            _transformers,
            "ConvNextForImageClassification",
            hidden_sizes=[16, 16, 24, 32],
            depths=[1, 1, 1, 1],
            num_labels=CLASSES,
        ),
        pictures("pixel_values"),
        ("classifier",),
        "transformers",
    ),
    "ViT (transformers)": Case(
        functools.partial(_transformers, "ViTForImageClassification", num_attention_heads=2, num_labels=CLASSES, **VIT, **QUIET),
        pictures("pixel_values"),
        ("classifier",),
        "transformers",
    ),
    "BERT encoder (transformers)": Case(
        functools.partial(_transformers, "BertModel", num_attention_heads=2, **BERT, **QUIET),
        lambda rows, first=0: {"input_ids": tokens(rows, first)},
        (),
        "transformers",
    ),
    "nn.Sequential": Case(sequential, pictures("input"), ("11",)),
    "ResNet-18 (timm)": Case(
        functools.partial(_timm, "resnet18", channels=(16, 16, 24, 32), zero_init_last=False), pictures("x"), ("fc",), "timm"
    ),
    "ViT (timm)": Case(
        functools.partial(_timm, "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
        pictures("x"),
        ("head",),
        "timm",
    ),
}

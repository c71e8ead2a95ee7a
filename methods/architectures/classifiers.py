"""Small classifiers: an MLP, a CNN and a ViT of images, an MLP and a transformer of short token sequences.

They are ordinary transformers classes: ``save_pretrained`` writes them, and the Auto class of their name loads them
once ``methods.architectures.register`` has run. Each has its output layer under ``classifier``; what enters that layer
is the penultimate feature of a case. ``config.assay_head`` says what the output layer is: None for a linear one, else
the name and the options of a distance head, as in ``harmonic_llama``.

The token models are those of the algorithmic tasks of Baek et al. 2025, "Harmonic Loss Trains Interpretable AI
Models": a tied output layer uses the embedding's vectors as class vectors and has no bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput, SequenceClassifierOutput

from methods.stage import AssayError

# --- the output layer ----------------------------------------------------------------------------------------


def output_layer(config: Any, width: int) -> nn.Linear:
    """The layer from features of ``width`` to the classes: linear, or the distance head the config names."""
    if config.assay_head is not None:
        from methods.architectures.distance_head import DistanceHead

        return DistanceHead(width, config.num_labels, config.assay_head)
    return nn.Linear(width, config.num_labels, bias=has_bias(config))


def has_bias(config: Any) -> bool:
    """Whether the linear output layer has a bias: never where it shares the embedding's vectors."""
    return bool(config.output_bias) and not getattr(config, "tie_word_embeddings", False)


class Classifier(PreTrainedModel):
    """What our own classifiers share: layers start as torch starts them, class vectors as the config says."""

    config: Any
    classifier: nn.Module
    base_model_prefix = ""

    def _init_weights(self, module: nn.Module) -> None:
        """Draw a module's weights; transformers keeps those that were loaded."""
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        else:
            super()._init_weights(module)
        if self._holds_class_vectors(module):
            draw_class_vectors(module.weight, self.config.class_vectors)

    def get_output_embeddings(self) -> nn.Module:
        """The output layer, which adapters leave alone."""
        return self.classifier

    def _holds_class_vectors(self, module: nn.Module) -> bool:
        tied = getattr(self.config, "tie_word_embeddings", False)
        return module is (self.embedding if tied else self.classifier)


def draw_class_vectors(weight: Any, how: str) -> None:
    """Fill the class vectors [V,d]: ``linear`` as ``nn.Linear`` starts its weights, ``normal`` from N(0, 1/d)."""
    scale = weight.shape[1] ** -0.5
    if how == "normal":
        init.normal_(weight, std=scale)
    else:
        init.uniform_(weight, -scale, scale)


def known_start(config: Any) -> None:
    """Refuse a ``class_vectors`` that is neither of the two."""
    if config.class_vectors not in ("linear", "normal"):
        raise AssayError(
            f"class_vectors={config.class_vectors!r} in a {config.model_type} configuration: it is linear or normal."
        )


def widths_and_last(
    widths: Sequence[int], inputs: int, activation: type[nn.Module]
) -> tuple[nn.Sequential, int]:
    """Linear layers of these widths, each followed by the activation, and the width that comes out."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), activation()]
        inputs = width
    return nn.Sequential(*layers), inputs


# --- images --------------------------------------------------------------------------------------------------


class ImageConfig(PreTrainedConfig):
    """Images of ``num_channels`` x ``image_size`` (height, width), values from 0 to 1, in ``num_labels`` classes."""

    num_channels: int = 1
    image_size: list[int] | tuple[int, int] = (28, 28)
    output_bias: bool = True
    class_vectors: str = "linear"
    assay_head: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        known_start(self)


class ImageMLPConfig(ImageConfig):
    """An MLP with these hidden widths; without any it is one layer from the pixels to the classes."""

    model_type = "assay_image_mlp"

    hidden_sizes: list[int] | tuple[int, ...] = (64, 32)


class ImageCNNConfig(ImageConfig):
    """A CNN with these numbers of channels, and one hidden layer of ``hidden_size`` on top of them."""

    model_type = "assay_image_cnn"

    conv_channels: list[int] | tuple[int, ...] = (16, 32)
    hidden_size: int = 64


class ImageClassifier(Classifier):
    """A classifier of images [B, channels, height, width]."""

    main_input_name = "pixel_values"
    input_modalities = "image"

    def features(self, pixel_values: Tensor) -> Tensor:
        """What enters the output layer: [B,d]."""
        raise NotImplementedError

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """Scores [B,V] of the classes."""
        features = self.features(pixel_values.to(self.dtype))
        return ImageClassifierOutput(logits=self.classifier(features))

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Two images of the model's own shape."""
        return {"pixel_values": example_images(self.config)}


class ImageMLPForImageClassification(ImageClassifier):
    """Pixels -> (Linear -> ReLU) for every hidden width -> output layer."""

    config_class = ImageMLPConfig

    def __init__(self, config: ImageMLPConfig) -> None:
        super().__init__(config)
        pixels = config.num_channels * math.prod(config.image_size)
        self.hidden, width = widths_and_last(config.hidden_sizes, pixels, nn.ReLU)
        self.classifier = output_layer(config, width)
        self.post_init()

    def features(self, pixel_values: Tensor) -> Tensor:
        hidden: Tensor = self.hidden(pixel_values.flatten(1))
        return hidden


class ImageCNNForImageClassification(ImageClassifier):
    """(3x3 convolution -> ReLU -> 2x2 maximum) for every width -> Linear -> ReLU -> output layer."""

    config_class = ImageCNNConfig

    def __init__(self, config: ImageCNNConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = []
        before, sides = config.num_channels, list(config.image_size)
        for channels in config.conv_channels:
            # odd sides are rounded up, so that a small image never shrinks to nothing
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            before, sides = channels, [(side + 1) // 2 for side in sides]
        self.convolutions = nn.Sequential(*layers)
        self.hidden, width = widths_and_last((config.hidden_size,), before * math.prod(sides), nn.ReLU)
        self.classifier = output_layer(config, width)
        self.post_init()

    def features(self, pixel_values: Tensor) -> Tensor:
        hidden: Tensor = self.hidden(self.convolutions(pixel_values).flatten(1))
        return hidden


class ImageViTConfig(ViTConfig):
    """A ViT configuration with the name and the options of its head."""

    model_type = "assay_image_vit"

    output_bias: bool = True
    assay_head: dict[str, Any] | None = None


class ImageViTForImageClassification(ViTForImageClassification):
    """transformers' ViT; the state of the class token enters the output layer that the config names."""

    config_class = ImageViTConfig

    def __init__(self, config: ImageViTConfig) -> None:
        super().__init__(config)
        self.classifier = output_layer(config, config.hidden_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output layer, which adapters leave alone."""
        return self.classifier

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Two images of the model's own shape."""
        return {"pixel_values": example_images(self.config)}


def example_images(config: Any) -> Tensor:
    """Two images [2, channels, height, width]: one grey, one that grows brighter."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    grey = torch.full((1, config.num_channels, height, width), 0.5)
    return torch.cat([grey, torch.linspace(0.0, 1.0, grey.numel()).view_as(grey)])


# --- tokens --------------------------------------------------------------------------------------------------


class TokenConfig(PreTrainedConfig):
    """Sequences of ``sequence_length`` tokens out of ``vocab_size``, in ``num_labels`` classes."""

    vocab_size: int = 31
    sequence_length: int = 2
    hidden_size: int = 16
    tie_word_embeddings: bool = False
    output_bias: bool = True
    class_vectors: str = "linear"
    assay_head: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        known_start(self)
        if self.tie_word_embeddings and self.vocab_size != self.num_labels:
            raise AssayError(
                f"the class vectors cannot be the embedding's vectors: there are {self.num_labels} classes and "
                f"{self.vocab_size} tokens."
            )


class TokenMLPConfig(TokenConfig):
    """An MLP with these hidden widths; ``bottleneck``: a last linear layer back to the embedding's width."""

    model_type = "assay_token_mlp"

    hidden_sizes: list[int] | tuple[int, ...] = (100,)
    bottleneck: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.tie_word_embeddings and not self.bottleneck:
            raise AssayError(
                "class vectors shared with the embedding are as wide as it: a tied model needs bottleneck."
            )


class TokenTransformerConfig(TokenConfig):
    """A transformer of blocks as in Vaswani et al. 2017, with a residual around each whole block."""

    model_type = "assay_token_transformer"

    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 64
    hidden_dropout_prob: float = 0.0


class TokenClassifier(Classifier):
    """A classifier of token sequences [B,T], all of one length."""

    main_input_name = "input_ids"
    _tied_weights_keys = {"classifier.weight": "embedding.weight"}  # noqa: RUF012 — as transformers has it

    def __init__(self, config: TokenConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the tokens."""
        return self.embedding

    def features(self, input_ids: Tensor) -> Tensor:
        """What enters the output layer: [B,d]."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor) -> SequenceClassifierOutput:
        """Scores [B,V] of the classes."""
        return SequenceClassifierOutput(logits=self.classifier(self.features(input_ids)))

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Two sequences of the model's own length."""
        config = self.config
        return {"input_ids": torch.arange(2 * config.sequence_length).view(2, -1) % config.vocab_size}


class TokenMLPForSequenceClassification(TokenClassifier):
    """Embeddings, concatenated -> (Linear -> SiLU) for every hidden width -> Linear -> output layer.

    The second Linear leads back to the embedding's width and is left out without ``bottleneck``.
    """

    config_class = TokenMLPConfig

    def __init__(self, config: TokenMLPConfig) -> None:
        super().__init__(config)
        inputs = config.sequence_length * config.hidden_size
        self.hidden, width = widths_and_last(config.hidden_sizes, inputs, nn.SiLU)
        if config.bottleneck:
            self.bottleneck = nn.Linear(width, config.hidden_size)
            width = config.hidden_size
        self.classifier = output_layer(config, width)
        self.post_init()

    def features(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.hidden(self.embedding(input_ids).flatten(1))
        return self.bottleneck(hidden) if self.config.bottleneck else hidden


class TokenTransformerForSequenceClassification(TokenClassifier):
    """Embeddings + learned positions -> blocks, each with a residual around it -> the last position -> output layer."""

    config_class = TokenTransformerConfig

    def __init__(self, config: TokenTransformerConfig) -> None:
        super().__init__(config)
        self.positions = nn.Embedding(config.sequence_length, config.hidden_size)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                config.hidden_dropout_prob,
                batch_first=True,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.classifier = output_layer(config, config.hidden_size)
        self.post_init()

    def features(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids) + self.positions.weight
        for block in self.blocks:
            hidden = hidden + block(hidden)
        last: Tensor = hidden[:, -1]
        return last


IMAGES = (ImageMLPForImageClassification, ImageCNNForImageClassification, ImageViTForImageClassification)
TOKENS = (TokenMLPForSequenceClassification, TokenTransformerForSequenceClassification)

"""Convolutions between a wave or a spectrum and the transformer that reads them: their channels.

Found by the classes that hold them, as :mod:`benchmark.anatomy.families.loose`. Between one
convolution and the next stand an activation and norms of one number per channel, so channels can
trade places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from benchmark.anatomy.blocks import Axis, Channels, Slot

_WAVES = tuple(
    f"{name}FeatureEncoder" for name in ("Wav2Vec2", "Hubert", "UniSpeech", "UniSpeechSat")
)


def filters(model: nn.Module) -> Iterator[Channels]:
    """Those of every tower of ``model``, in the order of their names."""
    state = model.state_dict()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if type(module).__name__ == "WhisperEncoder":
            made, read = f"{prefix}conv1", f"{prefix}conv2.weight"
            yield Channels(made, (*_rows(made, state), Axis(Slot(read), 1)))
        elif type(module).__name__ in _WAVES:
            yield from _waves(prefix, state)


def _waves(prefix: str, state: Mapping[str, Tensor]) -> Iterator[Channels]:
    """A chain of convolutions. What the last gives is an output of a bare model, and what a
    quantizer reads: there it stays."""
    tower = prefix.removesuffix("feature_extractor.")
    number = 0
    while f"{(conv := f'{prefix}conv_layers.{number}.conv')}.weight" in state:
        axes = (*_rows(conv, state), *_rows(f"{prefix}conv_layers.{number}.layer_norm", state))
        number += 1
        if (following := f"{prefix}conv_layers.{number}.conv.weight") in state:
            yield Channels(conv, (*axes, Axis(Slot(following), 1)))
        elif tower and not any(key.startswith("quantizer.") for key in state):
            read = f"{tower}feature_projection"
            norm = _rows(f"{read}.layer_norm", state)
            yield Channels(conv, (*axes, *norm, Axis(Slot(f"{read}.projection.weight"), 1)))


def _rows(name: str, state: Mapping[str, Tensor]) -> tuple[Axis, ...]:
    """Weight and bias of a layer or norm along its channels, as far as there are."""
    keys = (f"{name}.{part}" for part in ("weight", "bias"))
    return tuple(Axis(Slot(key), 0) for key in keys if key in state)

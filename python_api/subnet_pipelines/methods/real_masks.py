"""Real-valued masks of ImpressLearn: kept values instead of bits, whose effective weights are made layer by layer in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

import subnet_kernels as sk
from subnet_pipelines.methods.masked import MaskedMethod


class RealMasks(MaskedMethod):
    """The part of ImpressLearn that runs masks whose entries are the scores themselves."""

    def __init__(self, config, benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        self.values: dict[str, tuple[tuple[str, ...], Tensor]] = {}  # {layer: K masks and their values, float32 (K, *shape)}
        self.made: tuple[str | None, dict[str, Tensor]] = (None, {})  # whose weights were made last

    def network(self, x: Tensor) -> Tensor:
        if self.config.mask == "real":
            self.bank.substitute(self.real_weights())
        return self.model(x)

    def real_weights(self) -> dict[str, Tensor]:
        """Effective weights of the active entry, of the combination that is learnt, or of the live mask, in the graph of what learns."""
        name, layers = self.bank.active, dict(zip(self.bank.layer_names, self.bank.layers()))
        if name is None and self.alphas is None:
            return {key: layer.weight * live_value(layer) for key, layer in layers.items()}
        if name is not None and self.made[0] == name:
            return self.made[1]
        if name is not None and self.bank[name].alphas is None:
            made = {key: layer.weight * self.value_of(name, key) for key, layer in layers.items()}
        else:
            alphas, over = (
                (self.coefficients(), tuple(self.over)) if name is None else (self.bank[name].alphas, self.bank[name].over)
            )
            made = {
                key: layer.weight * torch.tensordot(row, self.values_of(key, over), 1)
                for (key, layer), row in zip(layers.items(), alphas)
            }
        if name is not None:
            self.made = name, made
        return made

    def live_values(self) -> dict[str, Tensor]:
        """The values of the live mask on the weights that it opens, {"values/" layer: real_dtype (open,)}."""
        dtype, found = getattr(torch, self.config.real_dtype), {}
        for key, layer in zip(self.bank.layer_names, self.bank.layers()):
            found[f"values/{key}"] = live_value(layer).detach()[unpacked(layer)].to(dtype)
        return found

    def value_of(self, name: str, key: str) -> Tensor:
        """A mask of the basis in one layer, float32 (*shape)."""
        entry, layer = self.bank[name], dict(zip(self.bank.layer_names, self.bank.layers()))[key]
        mask = sk.unpack(self.bank.bits(name)[key], layer.weight.shape)
        return torch.zeros_like(layer.weight).masked_scatter_(mask, entry.tensors[f"values/{key}"].to(layer.weight))

    def values_of(self, key: str, over: tuple[str, ...]) -> Tensor:
        """These masks in one layer, float32 (K, *shape): made when others are asked for than last time."""
        if key not in self.values or self.values[key][0] != over:
            self.values[key] = over, torch.stack([self.value_of(name, key) for name in over])
        return self.values[key][1]


def unpacked(layer: sk.SubnetLayer) -> Tensor:
    """The live mask, bool (*shape)."""
    return sk.unpack(layer.bits, layer.scores.shape)


def live_value(layer: sk.SubnetLayer) -> Tensor:
    """The live real mask (*shape): the score over its initial bound where it is open; gradients go straight through to every score."""
    value = layer.scores * layer.scores[0].numel() ** 0.5
    return value + (value.detach() * unpacked(layer) - value.detach())

"""Models the attribution tests share: every architecture with seeded weights, and nets small enough to follow."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from harmonize_lib.data import load_dataset
from harmonize_lib.models import ARCHITECTURES, Model


def settle(network: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded weights, biases that are not zero and BatchNorm statistics that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            wide = parameter.ndim > 1
            scale = (2 / parameter[0].numel()) ** 0.5 if wide else 0.2
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(0.3 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
                module.weight.copy_(0.7 + 0.6 * torch.rand(module.weight.shape, generator=generator))
    return network


def wrap(network: nn.Module, classes: int = 10) -> Model:
    return Model(settle(network), "tiny", "tiny", tuple(map(str, range(classes))), input_size=(64, 64))


@lru_cache(maxsize=2 * len(ARCHITECTURES))
def model(architecture: str, dtype: torch.dtype = torch.float32) -> Model:
    return wrap(ARCHITECTURES[architecture](10)).to(dtype)


@lru_cache(maxsize=1)
def shapes5() -> tuple[Tensor, Tensor]:
    """Five images (5, 3, 64, 64) uint8 and their labels."""
    data = load_dataset("shapes-on-scenes", "test", 5)
    return data.images, data.labels


def floats(n: int = 3, channels: int = 2, side: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def small(*layers: nn.Module) -> nn.Module:
    """A plain network in eval mode with seeded weights."""
    return settle(nn.Sequential(*layers)).eval()


class Linear(nn.Module):
    """logits = W x + b on flat images."""

    def __init__(self, channels: int = 2, side: int = 6, classes: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.head = settle(nn.Linear(channels * side * side, classes, bias=bias))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))

    def weight_of(self, target: int, like: Tensor) -> Tensor:
        return self.head.weight[target].detach().view(like.shape[-3:])

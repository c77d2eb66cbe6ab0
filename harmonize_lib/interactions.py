"""Interactions of two features, and networks in which it is known which features interact."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from harmonize_lib.decomposition import patch_groups
from harmonize_lib.errors import unknown
from harmonize_lib.hierarchy import group_scores
from harmonize_lib.tasks import prepare

SIDE = 4  # the inputs of planted networks are images of 4 x 4 features
PLANTED = 4  # pairs of 120
HIDDEN = 64
BUILT = ("minimum", "maximum", "difference", "threshold")
LEARNED = ("learned minimum", "learned threshold", "learned product")
KINDS = BUILT + LEARNED


class Planted(NamedTuple):
    """A network whose interacting pairs of features are known.

    Attributes
    ----------
    network : nn.Module
        From images (N, 1, 4, 4) to one output (N, 1).
    pairs : Tensor
        (4, 2) int64, the features (row by row) that interact; no feature is in two.
    fit : float
        R² of the network on new inputs against the function it stands for; 1 where it was built.
    """

    network: nn.Module
    pairs: Tensor
    fit: float


def interactions(
    model: nn.Module, images: Tensor, targets: Tensor, groups: Tensor, score: str = "cd"
) -> tuple[Tensor, Tensor]:
    """What two groups contribute together beyond what they contribute one by one.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    images : Tensor
        (N, C, H, W) uint8 source pixels, or float images for a plain module.
    targets : Tensor
        (N) int64.
    groups : Tensor
        (G, H, W) bool.
    score : str
        See :func:`harmonize_lib.hierarchy.group_scores`.

    Returns
    -------
    tuple[Tensor, Tensor]
        (N, P) s(i + j) - s(i) - s(j) + s(nothing), in logits, and (P, 2) int64 the pairs i < j.

    References
    ----------
    Singh, Murdoch, Yu 2019 (ACD), section 3.1: the difference between a group's score and the sum of its parts'. For
    contextual decomposition s(nothing) is 0; for build-up and occlusion it is what makes an additive model's
    interactions 0.
    """
    x = prepare(model, images)
    pairs = torch.tensor(list(combinations(range(len(groups)), 2)))
    masks = torch.cat([groups, groups[pairs[:, 0]] | groups[pairs[:, 1]], torch.zeros_like(groups[:1])])
    rows = torch.arange(len(x)).repeat_interleave(len(masks))
    scores = group_scores(model, x[rows], targets.to(x.device)[rows], masks.repeat(len(x), 1, 1), score)
    alone, together, nothing = scores.view(len(x), -1).split([len(groups), len(pairs), 1], 1)
    return together - alone[:, pairs[:, 0]] - alone[:, pairs[:, 1]] + nothing, pairs


def planted(kind: str, count: int, seed: int) -> list[Planted]:
    """Networks of one kind: a sum of four gates of two features each, and of a term of each feature alone.

    Parameters
    ----------
    kind : str
        One of ``KINDS``: the gate, built of ReLUs or, where the name says so, learned by a perceptron with two
        hidden layers.
    count : int
        Networks, each with other pairs, weights and biases.
    seed : int
        Seed of all of it; every kind has its own draws.

    Returns
    -------
    list[Planted]
        The networks, frozen and in eval mode.

    Raises
    ------
    HarmonizeError
        Unknown kind.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    generator = torch.Generator().manual_seed(zlib.crc32(kind.encode()) + seed)
    n = SIDE * SIDE
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(count)])
    pairs = order[:, : 2 * PLANTED].view(count, PLANTED, 2)
    single = torch.randn(count, 3, n, generator=generator)  # each feature's weight, and its threshold
    built = [_build(kind.rpartition(" ")[2], p, s) for p, s in zip(pairs, single, strict=True)]
    if kind in BUILT:
        return [Planted(network, p.sort(1).values, 1.0) for network, p in zip(built, pairs, strict=True)]

    def responses(x: Tensor) -> Tensor:
        return torch.stack([_response(kind, network, x, p) for network, p in zip(built, pairs, strict=True)])

    weights = _learn(responses, count, generator)
    x = inputs(1000, generator)
    learned = [_perceptron([part[i] for part in weights]) for i in range(count)]
    outputs = torch.stack([network(x)[:, 0] for network in learned])
    wanted = responses(x)
    fits = 1 - (outputs - wanted).square().mean(1) / wanted.var(1, correction=0)
    return [
        Planted(network, p.sort(1).values, float(fit)) for network, p, fit in zip(learned, pairs, fits, strict=True)
    ]


def inputs(n: int, generator: torch.Generator) -> Tensor:
    """Inputs of planted networks.

    Parameters
    ----------
    n : int
        Images.
    generator : torch.Generator
        Source of randomness.

    Returns
    -------
    Tensor
        (n, 1, 4, 4), standard normal.
    """
    return torch.randn(n, 1, SIDE, SIDE, generator=generator)


def features() -> Tensor:
    """The features of planted networks as groups of pixels.

    Returns
    -------
    Tensor
        (16, 4, 4) bool.
    """
    return patch_groups(SIDE, SIDE, 1)


def _build(gate: str, pairs: Tensor, single: Tensor) -> nn.Module:
    """Linear, ReLU, linear; a row is a unit: weights, bias, weight in the output. A product is left out."""
    n = SIDE * SIDE
    unit = torch.eye(n)
    weight, bias, output = single.tolist()
    rows = [(weight[k] * unit[k], bias[k] / 2, output[k]) for k in range(n)]
    for first, second in pairs.tolist():
        a, b = unit[first], unit[second]
        if gate == "minimum":  # a - relu(a - b), and a itself is relu(a) - relu(-a)
            rows += [(a, 0.0, 1.0), (-a, 0.0, -1.0), (a - b, 0.0, -1.0)]
        elif gate == "maximum":
            rows += [(b, 0.0, 1.0), (-b, 0.0, -1.0), (a - b, 0.0, 1.0)]
        elif gate == "difference":
            rows += [(a - b, 0.0, 1.0), (b - a, 0.0, 1.0)]
        elif gate == "threshold":
            rows += [(a + b, -1.0, 1.0)]
    weights, biases, outputs = zip(*rows, strict=True)
    hidden, last = nn.Linear(n, len(rows)), nn.Linear(len(rows), 1)
    network = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), last).requires_grad_(False).eval()
    hidden.weight.copy_(torch.stack(weights))
    hidden.bias.copy_(torch.tensor(biases))
    last.weight.copy_(torch.tensor([outputs]))
    last.bias.fill_(sum(weight) / n)
    return network


def _response(kind: str, network: nn.Module, x: Tensor, pairs: Tensor) -> Tensor:
    value = network(x)[:, 0]
    if kind == "learned product":
        value = value + x.flatten(1)[:, pairs].prod(2).sum(1)
    return value


def _learn(
    responses: Callable[[Tensor], Tensor], count: int, generator: torch.Generator, steps: int = 1500
) -> list[Tensor]:
    """Least squares by Adam for all networks side by side."""
    sizes = [SIDE * SIDE, HIDDEN, HIDDEN, 1]
    weights = []
    for wide, narrow in pairwise(sizes):
        weights += [torch.randn(count, wide, narrow, generator=generator) * (2 / wide) ** 0.5]
        weights += [torch.zeros(count, 1, narrow)]
    weights = [part.requires_grad_() for part in weights]
    optimizer = torch.optim.Adam(weights, lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = inputs(256, generator)
        value = x.flatten(1)
        for layer in range(0, len(weights), 2):
            value = value @ weights[layer] + weights[layer + 1]
            value = value.relu() if layer + 2 < len(weights) else value
        optimizer.zero_grad()
        (value[..., 0] - responses(x)).square().mean(1).sum().backward()
        optimizer.step()
        schedule.step()
    return [part.detach() for part in weights]


def _perceptron(weights: list[Tensor]) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for weight, bias in zip(weights[::2], weights[1::2], strict=True):
        layer = nn.Linear(*weight.shape).requires_grad_(False)
        layer.weight.copy_(weight.T)
        layer.bias.copy_(bias[0])
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()

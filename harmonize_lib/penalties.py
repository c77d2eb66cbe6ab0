"""Penalties on explanations: training that is told which pixels should not matter (CDEP, RRR, expected gradients)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harmonize_lib.decomposition import propagate
from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.priors import training_attributions
from harmonize_lib.tasks import evaluated, logits_of

KINDS = ("cdep", "rrr", "eg")
FORMS = ("paper", "code")


def explanation_penalty(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    groups: Tensor,
    kind: str = "cdep",
    form: str = "paper",
    generator: torch.Generator | None = None,
) -> Tensor:
    """How much a network uses pixels it should not use, to be added to its loss.

    With N images, groups S and zero as the wanted explanation:

    - ``cdep``, paper: mean over images of the sum over S of the L1 norm of beta(x, S) over logits;
    - ``cdep``, code: mean over images, S and classes of sigmoid(beta - gamma);
    - ``rrr``: mean over images of the sum over S of the squared norm, inside S, of the gradient of the image's own
      cross-entropy;
    - ``eg``: mean over images of the sum over S of the L1 norm, inside S, of expected gradients of the true class's
      logit, one draw per image from the batch rolled by one (``priors.training_attributions``).

    Parameters
    ----------
    model : nn.Module
        Gives logits (N, K). It is put in eval mode for the penalty (dropout off, BatchNorm fixed) and left as found.
    x : Tensor
        (N, C, H, W) float, the model's own input.
    y : Tensor
        (N) int64 labels.
    groups : Tensor
        (N, H, W) bool, or (G, N, H, W) for several groups of each image.
    kind : str
        ``"cdep"``, ``"rrr"`` or ``"eg"``.
    form : str
        Of CDEP: ``"paper"`` or ``"code"``, which are different penalties.
    generator : torch.Generator | None
        Positions on the path of ``"eg"``, on the CPU; needed for it alone.

    Returns
    -------
    Tensor
        Scalar, at least 0, with the graph to the parameters.

    Raises
    ------
    HarmonizeError
        Unknown kind or form, groups of another shape, no generator for ``"eg"``.

    References
    ----------
    CDEP: Rieger, Singh, Murdoch, Yu 2020 (arXiv 1909.13584), section 3.3, and its published code. RRR: Ross, Hughes,
    Doshi-Velez 2017 (arXiv 1703.03717), as Erion et al. 2021 (arXiv 1906.10670) write it. EG: Erion et al. 2021.

    Notes
    -----
    RRR's code sums a pixel's gradients over channels before it squares them; here, as in the formula, it does not.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    groups = groups[None] if groups.ndim == 3 else groups
    if groups.dtype != torch.bool or groups.shape[1:] != (len(x), *x.shape[2:]):
        want = f"(N, H, W) or (G, N, H, W) with N, H, W = {(len(x), *x.shape[2:])}"
        raise HarmonizeError(f"groups must be bool {want}, not {groups.dtype} {tuple(groups.shape)}")
    with evaluated(model):
        if kind == "cdep":
            return _cdep(model, x, groups, form)
        if kind == "rrr":
            return _inside(_loss_gradient(model, x, y).square(), groups)
        if generator is None:
            raise HarmonizeError("kind 'eg' draws positions on the path: pass generator=torch.Generator()")
        return _inside(training_attributions(model, x, y, generator=generator).abs(), groups)


def _cdep(model: nn.Module, x: Tensor, groups: Tensor, form: str) -> Tensor:
    inside = groups[:, :, None]
    beta, gamma = propagate(model, (x * inside).flatten(0, 1), (x * ~inside).flatten(0, 1))
    if form == "code":
        return torch.sigmoid(beta - gamma).mean()
    return beta.abs().sum() / len(x)


def _loss_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    losses = F.cross_entropy(logits_of(model, x), y, reduction="sum")
    return torch.autograd.grad(losses, x, create_graph=True)[0]


def _inside(values: Tensor, groups: Tensor) -> Tensor:
    """Mean over images of the sum over groups and their pixels; (N, C, H, W) values."""
    return torch.einsum("nchw,gnhw->", values, groups.to(values)) / len(values)

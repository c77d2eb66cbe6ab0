"""One call for every attribution method: `explain`, the registry behind it, and its refusals."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harmonize_lib import cam, controls, decomposition, gradients, perturbation
from harmonize_lib.errors import HarmonizeError, one_line, unknown
from harmonize_lib.models import Model
from harmonize_lib.storage import sha256_tensors
from harmonize_lib.tasks import Result, Task, check_generator, in_batches, logits_of, pick, prepare

BATCH_SIZE = 128  # images of 64 x 64 pixels in one pass
REDUCTIONS = ("default", "sum", "magnitude")


@dataclass(frozen=True)
class Attribution:
    """What a method says about each image.

    Attributes
    ----------
    maps : Tensor
        (N, H, W) float32 on the CPU and on the grid of the images; signed, not normalized.
    logit : Tensor
        (N) the target's logit, which is what is explained.
    probability : Tensor
        (N) the target's softmax probability.
    completeness_gap : Tensor | None
        (N) absolute difference, in logits, between the sum of the attributions and what they should sum to; None
        where a method promises no sum.
    record : dict[str, Any]
        How it was made: method, its version, options with their defaults resolved, channel reduction, baseline,
        quadrature, steps (one number, or a list where images differ), relative gaps, seed, model, device, batch
        size, seconds.
    """

    maps: Tensor
    logit: Tensor
    probability: Tensor
    completeness_gap: Tensor | None
    record: dict[str, Any]


def _always(model: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class Method:
    """An entry of the registry.

    Attributes
    ----------
    function : Callable[..., Result]
        Takes a task and its own options by name; their defaults are its signature's.
    reduction : str | None
        How channels become one map: ``"sum"`` (signed), ``"magnitude"``, or None where there are no channels.
    completeness : bool
        Attributions sum to a difference of logits, and the gap is recorded.
    defined : Callable[[nn.Module], str | None]
        The reason why the method is not defined for a model, from its modules.
    patches : bool
        Reaches into the network; what it cannot reach shows only in a pass.
    stochastic : bool
        Draws random numbers.
    version : int
        Raised when results change.
    """

    function: Callable[..., Result]
    reduction: str | None = None
    completeness: bool = False
    defined: Callable[[nn.Module], str | None] = _always
    patches: bool = False
    stochastic: bool = False
    version: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """The options by name, with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


METHODS: dict[str, Method] = {
    "saliency": Method(gradients.saliency, "magnitude"),
    "input_x_gradient": Method(gradients.input_x_gradient, "sum", completeness=True),
    "smoothgrad": Method(gradients.smoothgrad, "magnitude", stochastic=True),
    "smoothgrad_squared": Method(gradients.smoothgrad_squared, "magnitude", stochastic=True),
    "guided_backprop": Method(gradients.guided_backprop, "magnitude", defined=gradients.guided_reason, patches=True),
    "deeplift": Method(gradients.deeplift, "sum", completeness=True, defined=gradients.deeplift_reason, patches=True),
    "integrated_gradients": Method(gradients.integrated_gradients, "sum", completeness=True),
    "integrated_gradients_smoothgrad": Method(
        gradients.integrated_gradients_smoothgrad, "sum", completeness=True, stochastic=True
    ),
    "expected_gradients": Method(gradients.expected_gradients, "sum", completeness=True, stochastic=True),
    "grad_cam": Method(cam.grad_cam, defined=cam.grad_cam_reason),
    "guided_grad_cam": Method(cam.guided_grad_cam, "sum", defined=cam.guided_grad_cam_reason, patches=True),
    "occlusion": Method(perturbation.occlusion),
    "rise": Method(perturbation.rise, stochastic=True),
    "attention_rollout": Method(cam.attention_rollout, defined=cam.rollout_reason, patches=True),
    "contextual_decomposition": Method(decomposition.patch_contributions, patches=True),
    "random": Method(controls.random, stochastic=True),
    "center": Method(controls.center),
    "edges": Method(controls.edges),
}


def list_methods(model: nn.Module | None = None) -> list[str]:
    """Names of the attribution methods.

    Parameters
    ----------
    model : nn.Module | None
        Only those that are defined for this model; None gives all.

    Returns
    -------
    list[str]
        Names, each good for ``explain``.
    """
    return [name for name in METHODS if model is None or refusal(model, name) is None]


def refusal(model: nn.Module, method: str) -> str | None:
    """Tell why a method does not run on a model.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    method : str
        One of ``list_methods()``.

    Returns
    -------
    str or None
        The reason; None where the method runs. A method that reaches into the network is tried on one random image
        where the model tells its preprocessing (``Model`` does).

    Raises
    ------
    HarmonizeError
        Unknown method.
    """
    entry = _entry(method)
    reason = entry.defined(model)
    if reason is not None or not entry.patches or not hasattr(model, "preprocess"):
        return reason
    size = getattr(model, "input_size", None) or (64, 64)
    channels = len(getattr(model, "mean", torch.empty(3)))
    image = torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(0))
    try:
        explain(model, image, torch.zeros(1, dtype=torch.int64), method)
    except HarmonizeError as error:
        return str(error)
    return None


def check_options(method: str, options: dict[str, Any], side: int) -> None:
    """Refuse values of options that no model would take, by trying them on a black image and the mean of its channels.

    Parameters
    ----------
    method : str
        One of ``list_methods()``; one that such a network does not take is not tried.
    options : dict[str, Any]
        The method's own options, each known.
    side : int
        Of the images in pixels.

    Raises
    ------
    HarmonizeError
        A value the method refuses.
    """
    if not options:
        return
    model = Model(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), "mean", "mean", ("red", "green", "blue"))
    if METHODS[method].defined(model) is not None:
        return
    image = torch.zeros(1, 3, side, side)
    task = Task(model, image, model.preprocess(image), torch.zeros(1, dtype=torch.int64), default_rows(image), 0)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            METHODS[method].function(task, **options)
    except HarmonizeError as error:
        raise HarmonizeError(f"options of {method}: {error}") from error
    except Exception as error:
        told = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise HarmonizeError(f"options of {method}: cannot use {told[:70]} ({one_line(error, 60)})") from error


def explain(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    method: str,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> Attribution:
    """Attribute each image's target logit to its pixels.

    Attributions are taken with respect to ``model.preprocess(images)``: normalized units on the grid of the images.
    An image's map depends on the model, the image, its target, the options and the generator's state alone, not on
    the other images.

    Parameters
    ----------
    model : nn.Module
        In eval mode: a ``Model``, or any module from float images to logits (N, K).
    images : Tensor
        (N, C, H, W) uint8 source pixels, or float images: for a ``Model`` in [0, 1], for a plain module its own input.
    targets : Tensor
        (N) int64, the class to explain, 0..K-1.
    method : str
        One of ``list_methods(model)``.
    generator : torch.Generator | None
        Source of all randomness; None is a generator seeded with 0. The global one is never used.
    batch_size : int | None
        Rows in one pass, (image, step) pairs counted; None takes 128 images of 64 x 64 pixels, fewer larger ones.
        Halved, with a warning, when the GPU's memory runs out.
    **options : Any
        The method's own (see its function), and ``reduction``: how channels become one map, ``"sum"`` (signed),
        ``"magnitude"`` (sum of magnitudes) or ``"default"`` (the registry's).

    Returns
    -------
    Attribution
        Maps, target logits and probabilities, completeness gaps and the record.

    Raises
    ------
    HarmonizeError
        Unknown method or option; targets that do not fit; a model in train mode, or one that returns a tuple or NaN;
        a method that is not defined for the model; a map that is zero everywhere.

    Notes
    -----
    Independence of the other images holds up to rounding, which depends on the batch's size: in single precision a
    unit of a ReLU network may flip at a kink, and a gradient then differs by more than rounding.
    """
    begin = time.perf_counter()
    entry = _entry(method)
    reduction = _reduction(entry, method, options.pop("reduction", "default"))
    for name in options:
        if name not in entry.options:
            raise unknown(f"option of {method}", name, [*entry.options, "reduction"])
    options = entry.options | options
    targets = _check_input(model, images, targets)
    reason = entry.defined(model)
    if reason is not None:
        raise HarmonizeError(reason)
    rows = default_rows(images) if batch_size is None else batch_size
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise HarmonizeError(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
    check_generator(generator)
    seed = 0
    if entry.stochastic and generator is not None:
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))

    with torch.inference_mode(False), torch.enable_grad():
        targets = targets.clone()
        parts, rows = in_batches(
            lambda part, rows: _explain_slice(
                entry, model, images[part], targets[part], rows, seed, reduction, options
            ),
            len(images),
            rows,
        )
        maps, logits = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        results = [part[2] for part in parts]
        _check_output(method, maps, images, allow_zero=bool(options.get("relu")))
        notes = results[0].notes
        record: dict[str, Any] = {
            "method": method,
            "version": entry.version,
            "options": {name: _described(notes.get(name, value)) for name, value in options.items()},
            "reduction": reduction,
            "baseline": _described(options.get("baseline")),
            "quadrature": None,
            "steps": _together([result.steps for result in results]),
            "relative_gap": None,
            "seed": seed if entry.stochastic else None,
            "explained": "logit",
            "n": len(maps),
            "model": getattr(model, "name", type(model).__name__),
            "device": parts[0][2].attributions.device.type,
            "batch_size": rows,
            **{name: value for name, value in notes.items() if name not in options},
        }
        gap = None
        if entry.completeness:
            missing, difference = (
                torch.cat([getattr(result, name) for result in results]).cpu() for name in ("missing", "difference")
            )
            gap = missing.abs()
            record["relative_gap"] = (gap / difference.abs()).tolist()
        targets = targets.to(logits.device)
        record["seconds"] = time.perf_counter() - begin
        return Attribution(maps, pick(logits, targets), pick(logits.softmax(1), targets), gap, record)


def default_rows(images: Tensor) -> int:
    """Rows in one pass that keep its memory the same for images of any size.

    Parameters
    ----------
    images : Tensor
        (N, C, H, W).

    Returns
    -------
    int
        128 for images of 64 x 64 pixels or less, fewer for larger ones, at least 1.
    """
    return max(1, BATCH_SIZE * 64 * 64 // max(64 * 64, images.shape[-2] * images.shape[-1]))


def _entry(method: str) -> Method:
    if method not in METHODS:
        raise unknown("method", method, METHODS, "list_methods()")
    return METHODS[method]


def _reduction(entry: Method, method: str, reduction: str) -> str | None:
    if reduction not in REDUCTIONS:
        raise unknown("reduction", reduction, REDUCTIONS)
    if entry.reduction is None and reduction != "default":
        raise HarmonizeError(f"{method} knows no channels: leave reduction out")
    return entry.reduction if reduction == "default" else reduction


def _check_input(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    if not isinstance(model, nn.Module):
        raise HarmonizeError(f"model must be a torch.nn.Module, not {type(model).__name__}: use load_model")
    if any(module.training for module in model.modules()):
        raise HarmonizeError("the model is in train mode: call model.eval() first")
    if any(isinstance(module, _BatchNorm) and module.running_mean is None for module in model.modules()):
        raise HarmonizeError("a BatchNorm without running statistics mixes the images of a batch: train it with them")
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) == 0:
        found = str(tuple(images.shape)) if isinstance(images, Tensor) else type(images).__name__
        raise HarmonizeError(f"images must be a tensor (N, C, H, W) with N of at least 1, not {found}")
    targets = torch.as_tensor(targets)
    if targets.shape != (len(images),) or targets.is_floating_point() or targets.dtype == torch.bool:
        found = f"{targets.dtype} {tuple(targets.shape)}"
        raise HarmonizeError(f"targets must be int64 of shape ({len(images)},), one class per image, not {found}")
    targets = targets.to(torch.int64)
    classes = getattr(model, "classes", None)
    if classes is not None:
        pick(torch.empty(1, len(classes), device=targets.device), targets)
    return targets


def _explain_slice(
    entry: Method,
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    rows: int,
    seed: int,
    reduction: str | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Result]:
    """Maps and logits on the CPU, and what else the method says."""
    x = prepare(model, images)
    task = Task(model, images, x, targets.to(x.device), rows, seed)
    result = entry.function(task, **options)
    logits = result.logits
    if logits is None:
        with torch.no_grad():
            logits = logits_of(model, x)
    pick(logits, task.targets)
    maps = result.attributions.detach()
    if maps.ndim == 4:
        maps = maps.sum(1) if reduction == "sum" else maps.abs().sum(1)
    light = Result(maps[:0], None, result.missing, result.difference, result.steps, result.notes)
    return maps.float().cpu(), logits.detach().float().cpu(), light


def _check_output(method: str, maps: Tensor, images: Tensor, allow_zero: bool) -> None:
    if maps.shape != (len(images), *images.shape[2:]):
        raise AssertionError(f"{method} turned images {tuple(images.shape)} into maps {tuple(maps.shape)}")
    wrong = ~maps.isfinite().all(1).all(1)
    if wrong.any():
        raise HarmonizeError(
            f"{method} gave NaN or infinite values for images {_some(wrong)}: check the model's weights"
        )
    zero = ~maps.any(1).any(1)
    if zero.any() and not allow_zero:
        line = f"{method} gave a map that is zero everywhere for images {_some(zero)}"
        raise HarmonizeError(f"{line}: nothing there reaches the logit; leave them out")


def _some(flags: Tensor) -> str:
    index = flags.nonzero().flatten().tolist()
    return ", ".join(map(str, index[:5])) + (f" and {len(index) - 5} more" if len(index) > 5 else "")


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"sha256": sha256_tensors({"": value}), "shape": list(value.shape)}
    return value


def _together(steps: list[Tensor | None]) -> int | list[int] | None:
    if steps[0] is None:
        return None
    values = torch.cat([step for step in steps if step is not None]).tolist()
    return values[0] if len(set(values)) == 1 else values

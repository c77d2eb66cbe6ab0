"""Networks behind one interface: the zoo, any timm model, or the user's own."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import timm
import torch
from safetensors.torch import load_file
from timm.data import ImageNetInfo, resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from harmonize_lib import paths
from harmonize_lib.errors import HarmonizeError, one_line, unknown
from harmonize_lib.storage import sha256_file, sha256_json, sha256_tensors

LEAST_GRID = 4  # a coarser grid than 4 x 4 carries no place
LOADED: dict[str, str] = {}  # name to weights hash of every model loaded since the notebook started


def _own_code(network: nn.Module) -> list[str]:
    """Source of the network's classes that no package's version stands for."""
    known = ("torch.", "torchvision.", "timm.")
    classes = {type(module) for module in network.modules() if not type(module).__module__.startswith(known)}
    found = []
    for kind in sorted(classes, key=lambda kind: kind.__qualname__):
        try:
            found.append(inspect.getsource(kind))
        except (OSError, TypeError):  # typed at a prompt
            found.append(kind.__qualname__)
    return found


def _vgg(classes: int) -> nn.Module:
    """Plain stacked convolutions with BatchNorm and max pooling; its last ReLU carries an 8 x 8 grid."""
    widths: tuple[int | str, ...] = (16, "M", 32, "M", 64, 64, "M", 96, 96)
    layers: list[nn.Module] = []
    channels = 3
    for width in widths:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
    network = nn.Sequential()
    network.add_module("features", nn.Sequential(*layers))
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("head", nn.Linear(channels, classes))
    network.feature_info = [{"module": "features", "num_chs": channels, "reduction": 8}]  # type: ignore[assignment]
    return network


def _timm(tag: str, **settings: Any) -> Callable[[int], nn.Module]:
    return lambda classes: timm.create_model(tag, num_classes=classes, **settings)


ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "resnet": _timm(
        "resnet18", layers=(1, 1, 1, 1), channels=(24, 48, 96, 128), output_stride=8, stem_width=12, stem_type="deep"
    ),
    "vgg": _vgg,
    "mobilenet": _timm("mobilenetv2_035", output_stride=16),
    "convnext": _timm(
        "convnext_atto",
        depths=(1, 2, 2, 1),
        dims=(24, 48, 72, 96),
        output_stride=8,
        kernel_sizes=5,
        ls_init_value=None,
        global_pool="max",  # LayerNorm lifts faint scenes to the strength of objects: an average would drown the object
    ),
    "vit": _timm("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, mlp_ratio=2),
    "swin": _timm(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        patch_size=4,
        window_size=4,
        embed_dim=32,
        depths=(2, 2, 2),
        num_heads=(2, 4, 8),
        mlp_ratio=2,
    ),
    "mobilevit": _timm("mobilevit_xxs"),
}


@dataclass(frozen=True)
class Geometry:
    """Which layer of a network carries places.

    Attributes
    ----------
    layer : str
        Name of the module inside ``Model.network``.
    grid : tuple[int, int]
        Rows and columns of its output.
    layout : str
        ``"NCHW"``, ``"NHWC"`` or ``"NLC"`` (tokens).
    prefix_tokens : int
        Tokens before the grid's (class token, registers).
    """

    layer: str
    grid: tuple[int, int]
    layout: str
    prefix_tokens: int

    def to_maps(self, output: Tensor) -> Tensor:
        """Bring the layer's output into the order of a picture.

        Parameters
        ----------
        output : Tensor
            The layer's output in ``layout``.

        Returns
        -------
        Tensor
            (N, C, rows, columns).
        """
        if self.layout == "NLC":
            return output[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, self.grid)
        return output.permute(0, 3, 1, 2) if self.layout == "NHWC" else output


class Model(nn.Module):
    """A frozen network in eval mode, with what is needed to explain it.

    ``model(model.preprocess(images))`` gives logits (N, K). ``preprocess`` only normalizes, so its result keeps the
    pixel grid of the source; a network that wants another size gets its input resized (bilinear, antialiased)
    inside ``forward``, and gradients with respect to the source grid pass through that resize.

    Parameters
    ----------
    network : nn.Module
        The bare network; it is frozen, put in eval mode, and its in-place activations are made plain.
    name : str
        The spec it was loaded by.
    architecture : str
        Same for all seeds and label sets of one design.
    classes : tuple[str, ...]
        K class names.
    mean : tuple[float, ...]
        Per channel, in [0, 1]: subtracted from the pixels.
    std : tuple[float, ...]
        Per channel: the pixels are divided by it.
    input_size : tuple[int, int] | None
        Height and width the network wants; None takes any.

    Attributes
    ----------
    family : str
        ``"cnn"``, ``"transformer"`` or ``"hybrid"``, from the modules: convolutions beyond the patch embedding,
        attention.
    geometry : Geometry | None
        Where places are; None where that could not be established.
    weights_hash : str
        sha256 over all parameters and buffers.
    """

    # What else than its weights a model's results depend on: layers with their settings, normalization, own code.
    form: str

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        name: str,
        architecture: str,
        classes: tuple[str, ...],
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        for module in network.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.name = name
        self.architecture = architecture
        self.classes = classes
        self.input_size = input_size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.family = _family(network)
        self.geometry = _geometry(network, len(mean), input_size or (64, 64))
        self.weights_hash = sha256_tensors(network.state_dict())
        self.form = sha256_json([str(network), _own_code(network), list(mean), list(std), input_size])
        self.eval()

    @property
    def identity(self) -> str:
        """Hash of everything about the model that its results depend on: rounding on another kind of device, too."""
        device = next(self.parameters()).device.type
        return sha256_json([self.weights_hash, self.form, *([] if device == "cpu" else [device])])

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalize source pixels.

        Parameters
        ----------
        images : Tensor
            (N, C, H, W) uint8, or float in [0, 1]. One channel is repeated where the network wants three.

        Returns
        -------
        Tensor
            (N, C, H, W) float32 on the model's device.
        """
        x = images.to(self.mean.device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        if x.ndim != 4 or x.shape[1] not in (1, len(self.mean)):
            raise HarmonizeError(
                f"images must be (N, {len(self.mean)}, H, W), not {tuple(images.shape)}: load them with load_dataset"
            )
        if not x.isfinite().all():
            raise HarmonizeError("images hold NaN or infinite values: clean them before they are explained")
        if x.numel() and (x.min() < -1 or x.max() > 2):  # noise may leave [0, 1] by a little
            raise HarmonizeError(f"float images reach {x.abs().max():.4g}: scale them to [0, 1], or give uint8 pixels")
        return (x - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        """Logits of preprocessed images.

        Parameters
        ----------
        x : Tensor
            (N, C, H, W) float32, from ``preprocess``.

        Returns
        -------
        Tensor
            (N, K) logits.
        """
        if self.input_size is not None and tuple(x.shape[-2:]) != self.input_size:
            x = F.interpolate(x, self.input_size, mode="bilinear", antialias=True)
        return self.network(x.contiguous(memory_format=torch.channels_last))


def _family(network: nn.Module) -> str:
    kinds = [type(module).__name__ for module in network.modules()]
    attends = any(
        ("Attention" in kind and "Pool" not in kind) or kind in ("ClassAttn", "TalkingHeadAttn") for kind in kinds
    )
    convolutions = sum(isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1) for module in network.modules())
    if not attends:
        return "cnn"
    return "transformer" if convolutions <= 1 else "hybrid"


def _geometry(network: nn.Module, channels: int, size: tuple[int, int]) -> Geometry | None:
    """The deepest layer of the network's own feature list with a fine enough grid that the logits depend on.

    Behind a class token the last block's patch tokens no longer reach the logits, so their gradient is zero and the
    search goes one layer up.
    """
    modules = dict(network.named_modules())
    layers = [info["module"] for info in getattr(network, "feature_info", []) if info.get("module") in modules]
    x = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for layer in reversed(layers):
        outputs: list[Tensor] = []
        handle = modules[layer].register_forward_hook(partial(_keep, outputs))
        with torch.enable_grad():
            logits = network(x)
        handle.remove()
        geometry = _read_layout(network, layer, outputs[0]) if outputs else None
        if geometry is None or min(geometry.grid) < LEAST_GRID:
            continue
        (gradient,) = torch.autograd.grad(logits.sum(), outputs[0], allow_unused=True)
        if gradient is not None and geometry.to_maps(gradient).abs().sum() > 0:
            return geometry
    return None


def _keep(outputs: list[Tensor], module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
    outputs.append(output)


def _read_layout(network: nn.Module, layer: str, output: Tensor) -> Geometry | None:
    if output.ndim == 4:
        layout = str(getattr(network, "output_fmt", "NCHW")).rpartition(".")[2].upper()
        if layout not in ("NCHW", "NHWC"):
            return None
        rows, columns = output.shape[2:] if layout == "NCHW" else output.shape[1:3]
        return Geometry(layer, (int(rows), int(columns)), layout, 0)
    prefix = getattr(network, "num_prefix_tokens", None)
    if output.ndim != 3 or prefix is None:
        return None
    rows, columns = getattr(getattr(network, "patch_embed", None), "grid_size", (0, 0))
    if rows * columns != output.shape[1] - prefix:
        return None
    return Geometry(layer, (rows, columns), "NLC", prefix)


def manifest() -> dict[str, dict[str, Any]]:
    """Read the zoo's manifest.

    Returns
    -------
    dict[str, dict[str, Any]]
        Model name to its entry: file, sha256, architecture, labels, seed, recipe, accuracy, command.

    Raises
    ------
    HarmonizeError
        The manifest is missing or damaged.
    """
    path = paths.WEIGHTS / "manifest.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise HarmonizeError(f"{path.name}: missing or damaged; restore data/weights from the repository") from error


def shipped_hash(name: str) -> str:
    """``Model.weights_hash`` of a zoo model as it ships, without building the network.

    Parameters
    ----------
    name : str
        A zoo name.

    Returns
    -------
    str
        sha256 over all parameters and buffers; empty where the file is missing or damaged.
    """
    try:
        return sha256_tensors(_as_float(_read_weights(paths.WEIGHTS / manifest()[name]["file"])))
    except HarmonizeError:
        return ""


def _as_float(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def list_models() -> list[str]:
    """Names of the zoo's models.

    Returns
    -------
    list[str]
        Sorted names, each good for ``load_model``.
    """
    return sorted(manifest())


def load_model(spec: str, weights: str | Path | None = None, device: str = "auto") -> Model:
    """Load a network, frozen and in eval mode.

    Parameters
    ----------
    spec : str
        A zoo name (``list_models()``); ``"timm:TAG"``, with settings behind a question mark as in
        ``"timm:mobilenetv2_100?pad_type=same&mean=0.5&std=0.5&weights=FILE"`` (mean and std override the tag's
        own, all else goes to ``timm.create_model``); or ``"python:module:callable"``, a callable without arguments
        that returns a network with ``classes`` (and, if it wants, ``mean``, ``std``, ``input_size``).
    weights : str | Path | None
        Local ``.safetensors``, ``.pth`` or ``.pt`` file (read without unpickling code); None takes the shipped
        weights (zoo) or the hub's (timm).
    device : str
        ``"auto"`` (a GPU where there is one), ``"cpu"``, ``"cuda"``, ...

    Returns
    -------
    Model
        The network with its preprocessing, classes, family and geometry.

    Raises
    ------
    HarmonizeError
        Unknown spec; weights that are missing, altered, or do not fit; a device that is not there.
    """
    place = find_device(device)
    check_spec(spec)
    kind, _, rest = spec.partition(":")
    if kind == "timm" and rest:
        model = _load_timm(spec, rest, weights)
    elif kind == "python" and rest:
        model = _load_python(spec, rest, weights)
    else:
        model = _load_zoo(spec, weights)
    LOADED[model.name] = model.weights_hash
    return model.to(place)


def check_spec(spec: str) -> None:
    """Refuse what ``load_model`` cannot know, without loading anything.

    Parameters
    ----------
    spec : str
        See :func:`load_model`.

    Raises
    ------
    HarmonizeError
        Neither a zoo name, nor a timm model, nor ``python:module:callable``.
    """
    kind, colon, rest = spec.partition(":")
    if not colon:
        if spec not in manifest():
            raise unknown("model", spec, manifest(), "list_models()")
    elif kind == "timm":
        tag = rest.partition("?")[0]
        if not timm.is_model(tag.partition(".")[0]):
            raise unknown("timm model", tag, timm.list_models(), "timm.list_models()")
    elif kind != "python" or not rest.partition(":")[2]:
        raise HarmonizeError(f"model {spec[:60]!r}: write a zoo name, 'timm:TAG' or 'python:module:callable'")


def find_device(device: str) -> torch.device:
    """Find a device by name.

    Parameters
    ----------
    device : str
        ``"auto"`` (a GPU where there is one), ``"cpu"``, ``"cuda"``, ...

    Returns
    -------
    torch.device
        The device, tried.

    Raises
    ------
    HarmonizeError
        It is not there.

    Notes
    -----
    On a GPU this process then convolves in full float32 instead of TF32, and repeats itself, so that attributions are
    the CPU's up to rounding.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise HarmonizeError(f"device {device!r} is not available here: use 'auto' or 'cpu'") from error
    if place.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    return place


def _load_zoo(name: str, weights: str | Path | None) -> Model:
    entries = manifest()
    entry = entries[name]
    path = Path(weights) if weights is not None else paths.WEIGHTS / entry["file"]
    if not path.is_file():
        raise HarmonizeError(f"weights of {name}: {path.name} is missing; restore it or run 'harmonize train {name}'")
    if weights is None and sha256_file(path) != entry["sha256"]:
        raise HarmonizeError(
            f"weights of {name}: {path.name} is not the file of the manifest (sha256 differs); restore it"
        )
    network = ARCHITECTURES[entry["architecture"]](len(entry["classes"]))
    _fill(network, _read_weights(path), path)
    return Model(network, name, entry["architecture"], tuple(entry["classes"]), input_size=(64, 64))


def _read_weights(path: Path) -> dict[str, Tensor]:
    state: Any
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {name: torch.as_tensor(value) for name, value in state.items()}
    except Exception as error:
        raise HarmonizeError(
            f"{path.name}: not a readable weights file: give .safetensors, or a .pth of tensors alone"
        ) from error


def _fill(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        network.load_state_dict(_as_float(state))
    except (RuntimeError, AttributeError) as error:
        raise HarmonizeError(
            f"{path.name}: these weights do not fit the architecture (names or shapes differ)"
        ) from error


def _load_timm(spec: str, rest: str, weights: str | Path | None) -> Model:
    tag, _, query = rest.partition("?")
    settings: dict[str, Any] = dict(parse_qsl(query))
    try:
        given = {key: float(settings.pop(key)) for key in ("mean", "std") if key in settings}
    except ValueError as error:
        raise HarmonizeError(f"timm:{tag}: mean and std take one number, as in '?mean=0.5&std=0.5'") from error
    weights = settings.pop("weights", weights)
    if weights is not None and not Path(weights).is_file():
        raise HarmonizeError(f"weights of timm:{tag}: {Path(weights).name} is missing: give the path of a local file")
    try:
        network = timm.create_model(tag, pretrained=weights is None, **settings)
    except TypeError as error:
        raise HarmonizeError(f"timm:{tag}: {str(error)[:120]}") from error
    except Exception as error:
        raise HarmonizeError(f"timm:{tag}: no weights from the hub; give a local file as '?weights=FILE'") from error
    if weights is not None:
        _fill(network, _read_weights(Path(weights)), Path(weights))
    config = resolve_data_config(model=network)
    mean = (given["mean"],) * 3 if "mean" in given else config["mean"]
    std = (given["std"],) * 3 if "std" in given else config["std"]
    classes = getattr(network, "num_classes", 0)
    info = ImageNetInfo()
    names = [info.index_to_description(i) for i in range(1000)] if classes == 1000 else map(str, range(classes))
    size = (int(config["input_size"][1]), int(config["input_size"][2]))
    return Model(network, spec.partition("?")[0], tag.partition(".")[0], tuple(names), mean, std, size)


def _load_python(spec: str, rest: str, weights: str | Path | None) -> Model:
    module, _, attribute = rest.partition(":")
    name = spec if len(spec) <= 60 else f"{spec[:57]}..."
    try:
        build = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise HarmonizeError(f"{name}: {one_line(error, 90)}; write 'python:module:callable'") from error
    except (Exception, SystemExit) as error:
        raise HarmonizeError(f"{name}: {one_line(error, 80)}: mend the module, so that Python can import it") from error
    try:
        network = build()
    except (Exception, SystemExit) as error:
        line = f"{name}: {one_line(error, 80)}"
        raise HarmonizeError(f"{line}: called without arguments, it must return a network") from error
    if not isinstance(network, nn.Module) or not hasattr(network, "classes"):
        raise HarmonizeError(f"{spec}: the callable must return a torch.nn.Module with an attribute 'classes'")
    if weights is not None:
        _fill(network, _read_weights(Path(weights)), Path(weights))
    names: Any = network.classes
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise HarmonizeError(f"{spec}: classes must be a list of names, as the data have them, not {str(names)[:40]}")
    given = {key: getattr(network, key) for key in ("mean", "std", "input_size") if hasattr(network, key)}
    size = given.get("input_size", (1, 1))
    if not isinstance(size, Sequence) or [type(side) for side in size] != [int, int]:
        raise HarmonizeError(f"{spec}: input_size must be (height, width), not {str(size)[:40]}")
    if any(is_lazy(weight) for weight in (*network.parameters(), *network.buffers())):
        raise HarmonizeError(f"{name}: a lazy layer has no weights yet: give its sizes, or call the network once")
    try:
        return Model(network, spec, rest, tuple(names), **given)
    except (TypeError, ValueError, RuntimeError) as error:
        right = "check feature_info, and that mean and std have a number per channel"
        raise HarmonizeError(f"{name}: {one_line(error, 60)}: {right}") from error


def shuffled(model: Model, seed: int) -> Model:
    """The same architecture without what it learned: each weight tensor's entries in random order.

    Parameters
    ----------
    model : Model
        Left as it is.
    seed : int
        Seed of the order.

    Returns
    -------
    Model
        A copy whose parameters keep their distributions and lose their meaning; BatchNorm statistics stay.
    """
    generator = torch.Generator().manual_seed(seed)
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        for parameter in network.parameters():
            flat = parameter.flatten()
            order = torch.randperm(len(flat), generator=generator).to(flat.device)
            parameter.copy_(flat[order].view_as(parameter))
    other = copy.copy(model)
    other._modules = dict(model._modules, network=network)
    other.name = f"{model.name}-shuffled"
    other.weights_hash = sha256_tensors(network.state_dict())
    return other

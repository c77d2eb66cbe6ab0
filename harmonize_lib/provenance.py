"""What made an output: the code a notebook had run, its parameters, and the weights it had loaded."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from IPython import get_ipython

from harmonize_lib.errors import HarmonizeError
from harmonize_lib.models import LOADED
from harmonize_lib.storage import sha256_json

KEY = "harmonize"  # under which an output of a notebook carries its stamp
INJECTED = "# Parameters"  # how papermill begins the cell it injects


def code_hash(cells: Iterable[str]) -> str:
    """Hash the code cells of a notebook, from the first on.

    Parameters
    ----------
    cells : Iterable[str]
        Sources in order. Empty cells, blank ends and the cell papermill injects do not count.

    Returns
    -------
    str
        Hexadecimal sha256.
    """
    sources = [source.strip() for source in cells]
    return sha256_json([source for source in sources if source and not source.startswith(INJECTED)])


def executed() -> list[str]:
    """Code cells this kernel has run so far, the running one included.

    Returns
    -------
    list[str]
        Sources in the order of execution; empty outside IPython.
    """
    shell = get_ipython()
    return [] if shell is None else list(shell.history_manager.input_hist_raw[1:])


def check_injection() -> None:
    """Refuse values that papermill put above everything, where the notebook's own defaults overwrite them.

    Raises
    ------
    HarmonizeError
        The notebook has no cell tagged ``parameters``.
    """
    if "".join(executed()[:1]).startswith(INJECTED):
        raise HarmonizeError("the notebook has no cell tagged 'parameters': tag its first code cell, then pass values")


def stamp(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Tell what made the output of the running cell.

    Parameters
    ----------
    parameters : Mapping[str, Any]
        From ``parameters.recorded``.

    Returns
    -------
    dict[str, Any]
        ``code`` (:func:`code_hash` of :func:`executed`), ``parameters`` (their hash) and ``weights`` (of every model
        loaded so far, name to the first 12 digits of ``Model.weights_hash``).
    """
    return {
        "code": code_hash(executed()),
        "parameters": sha256_json(dict(parameters)),
        "weights": {name: digest[:12] for name, digest in LOADED.items()},
    }


def stamp_outputs(parameters: Mapping[str, Any]) -> None:
    """Have everything the notebook displays from here on carry its stamp, in the output's metadata.

    Parameters
    ----------
    parameters : Mapping[str, Any]
        From ``parameters.recorded``. Outside a Jupyter kernel nothing happens.
    """
    publisher: Any = getattr(get_ipython(), "display_pub", None)
    if not hasattr(publisher, "register_hook"):
        return
    for hook in [hook for hook in publisher._hooks if getattr(hook, "func", None) is _add_stamp]:
        publisher.unregister_hook(hook)
    publisher.register_hook(functools.partial(_add_stamp, dict(parameters)))


def _add_stamp(parameters: Mapping[str, Any], message: dict[str, Any]) -> dict[str, Any]:
    if message["header"]["msg_type"] == "display_data":
        message["content"]["metadata"][KEY] = stamp(parameters)
    return message

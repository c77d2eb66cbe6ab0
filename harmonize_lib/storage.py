"""Hashes, atomic files, and the content-addressed store of what was computed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from harmonize_lib import paths
from harmonize_lib.errors import HarmonizeError


def sha256_bytes(data: bytes) -> str:
    """Hash bytes.

    Parameters
    ----------
    data : bytes
        Any.

    Returns
    -------
    str
        Hexadecimal sha256.
    """
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hash a file.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    str
        Hexadecimal sha256.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash named tensors: names, types, shapes and bytes.

    Parameters
    ----------
    tensors : Mapping[str, Tensor]
        Any; order does not matter.

    Returns
    -------
    str
        Hexadecimal sha256.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sha256_json(value: object) -> str:
    """Hash what JSON can say.

    Parameters
    ----------
    value : object
        Made of dicts, lists, strings, numbers, booleans and None.

    Returns
    -------
    str
        Hexadecimal sha256 of its canonical form.
    """
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written, before anything is computed for it.

    Parameters
    ----------
    folder : Path
        It need not exist; nothing is made.

    Raises
    ------
    HarmonizeError
        A file stands in the way, or the folder is read-only.
    """
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not there.is_dir():
        raise HarmonizeError(f"folder {str(folder)[-80:]!r}: {there.name} is a file; choose another folder")
    if not os.access(there, os.W_OK):
        raise HarmonizeError(f"folder {str(folder)[-80:]!r} cannot be written: choose another folder")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file whole or not at all.

    Parameters
    ----------
    path : Path
        Where; its folder is made.
    data : bytes | str
        What; text is written as UTF-8.

    Raises
    ------
    HarmonizeError
        The folder cannot be made or written, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except OSError as error:
        place = str(path)[-80:]
        raise HarmonizeError(f"cannot write {place}: {error.strerror}; choose a folder that can be written") from error


def stored_at(kind: str, key: Mapping[str, object], folder: Path | None = None) -> Path:
    """Where the store keeps a result.

    Parameters
    ----------
    kind : str
        See :func:`remember`.
    key : Mapping[str, object]
        See :func:`remember`.
    folder : Path | None
        See :func:`remember`.

    Returns
    -------
    Path
        The file, which exists once the result was computed.
    """
    digest = sha256_json(dict(key))
    return (folder or paths.CACHE) / kind / digest[:2] / f"{digest}.safetensors"


def remember(
    kind: str, key: Mapping[str, object], compute: Callable[[], dict[str, Tensor]], folder: Path | None = None
) -> dict[str, Tensor]:
    """Compute named tensors once, and read them from the store ever after.

    Parameters
    ----------
    kind : str
        Folder inside the store, e.g. ``"attribution"``.
    key : Mapping[str, object]
        Everything the result depends on, as JSON: hashes of weights and images, method, options, version.
    compute : Callable[[], dict[str, Tensor]]
        Gives the tensors when they are not stored.
    folder : Path | None
        The store; None takes ``paths.CACHE``.

    Returns
    -------
    dict[str, Tensor]
        The tensors, in the order of their names. A stored file whose checksum does not match is computed again, and a
        warning says so.
    """
    path = stored_at(kind, key, folder)
    if path.exists():
        checksum, _, data = path.read_bytes().partition(b"\n")
        if checksum.decode("ascii", "replace") == sha256_bytes(data):
            return dict(sorted(load(data).items()))
        warnings.warn(f"stored {kind} {path.stem[:12]} is corrupt: computing it again", stacklevel=2)
    tensors = {name: value.detach().cpu().contiguous() for name, value in sorted(compute().items())}
    data = save(tensors)
    write_atomic(path, sha256_bytes(data).encode() + b"\n" + data)
    return tensors

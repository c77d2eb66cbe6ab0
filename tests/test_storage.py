"""The store: computed once, checked on every read, written whole or not at all."""

from __future__ import annotations

import hashlib

import pytest
import torch

from harmonize_lib.storage import remember, sha256_file, sha256_json, sha256_tensors, write_atomic


def test_computed_once_then_read(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"b": torch.tensor([0.5, float("nan")]), "c": torch.zeros(2), "a": torch.arange(3)}

    first = remember("kind", {"x": 1}, compute, tmp_path)
    again = remember("kind", {"x": 1}, compute, tmp_path)
    assert len(calls) == 1 and torch.equal(first["a"], again["a"])
    assert list(first) == list(again) == ["a", "b", "c"]
    torch.testing.assert_close(first["b"], again["b"], equal_nan=True)
    remember("kind", {"x": 2}, compute, tmp_path)
    assert len(calls) == 2


def test_key_order_does_not_matter():
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: data[:-1] + b"x", lambda data: b""])
def test_a_corrupt_shard_is_told_and_computed_again(tmp_path, spoil):
    remember("kind", {"x": 1}, lambda: {"a": torch.arange(3)}, tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.warns(UserWarning, match="corrupt: computing it again"):
        result = remember("kind", {"x": 1}, lambda: {"a": torch.arange(3) + 1}, tmp_path)
    assert result["a"].tolist() == [1, 2, 3]
    assert remember("kind", {"x": 1}, dict, tmp_path)["a"].tolist() == [1, 2, 3]


def test_a_failed_computation_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        remember("kind", {"x": 1}, lambda: {"a": torch.tensor(1 / 0)}, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_atomic_write_replaces_and_leaves_no_partial_file(tmp_path):
    write_atomic(tmp_path / "deep" / "a.txt", "one")
    write_atomic(tmp_path / "deep" / "a.txt", b"two")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.txt"]
    assert sha256_file(tmp_path / "deep" / "a.txt") == hashlib.sha256(b"two").hexdigest()


def test_tensor_hash_sees_names_types_shapes_and_values():
    a = torch.arange(6.0)
    hashes = [
        sha256_tensors(tensors)
        for tensors in ({"a": a}, {"b": a}, {"a": a.double()}, {"a": a.view(2, 3)}, {"a": a.flip(0)})
    ]
    assert len(set(hashes)) == 5
    assert sha256_tensors({"a": a.view(2, 3).t()}) == sha256_tensors({"a": a.view(2, 3).t().contiguous()})

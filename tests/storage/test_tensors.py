"""Tensor files that shrink while they are read."""

import os

import pytest
import torch
from support import serialise

from nanonormuon.errors import CheckpointError
from nanonormuon.storage.tensors import TensorFile


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_not_a_signal(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(serialise({"a": torch.ones(1 << 16), "b": torch.arange(1 << 16)}))
    file = TensorFile(path)
    os.truncate(path, path.stat().st_size // 4)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a is truncated"):
        file.read("a")

"""Safetensors files: compared with the safetensors library, both ways."""

import hashlib

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_helpers import assert_same_bits, awkward_tensors, record_of

from nanochat.checkpoint.tensor_file import read_tensors, tensor_chunks, write_file


def test_tensor_files_agree_with_the_safetensors_library(tmp_path):
    tensors = awkward_tensors()
    record = write_file(tmp_path / "ours", tensor_chunks(tensors))
    assert_same_bits(safetensors.torch.load_file(tmp_path / "ours"), tensors)
    assert record == record_of(tmp_path / "ours")

    plain = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, tmp_path / "theirs", metadata={"format": "pt"})
    found, sha256 = read_tensors(tmp_path / "theirs")
    assert_same_bits(found, tensors)
    assert sha256 == hashlib.sha256((tmp_path / "theirs").read_bytes()).hexdigest()


def test_tensors_read_do_not_share_memory(tmp_path):
    write_file(tmp_path / "file", tensor_chunks({"a": torch.zeros(4), "b": torch.zeros(4)}))
    found, _ = read_tensors(tmp_path / "file")
    found["a"].fill_(1)
    assert found["b"].sum() == 0


def test_arrays_of_any_kind_are_written(tmp_path):
    read_only = np.arange(6, dtype=np.uint16).reshape(2, 3)
    read_only.flags.writeable = False
    arrays = {
        "read_only": read_only,
        "strided": np.arange(10)[::3],
        "int": np.int64(7),
        "none": np.zeros((0, 2), "f4"),
        "nothing": np.concatenate([np.empty(0, np.uint16)]),
    }
    write_file(tmp_path / "file", tensor_chunks(arrays))
    found = {name: tensor.numpy() for name, tensor in read_tensors(tmp_path / "file")[0].items()}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x02\0\0\0\0\0\0\0[]",
        b"\xff" * 8,
        b"\xff" * 40,
        b"\x02\0\0\0\0\0\0\0{}extra",
        *(
            len(text).to_bytes(8, "little") + text + b"\0" * 16
            for text in (
                b'{"a": 1}',
                b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}',
                b'{"a": {"dtype": "X", "shape": [4], "data_offsets": [0, 16]}}',
                b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}',
                b'{"a": {"dtype": "F32", "shape": [-4, -1], "data_offsets": [0, 16]}}',
                b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}',
            )
        ),
    ],
)
def test_a_file_of_another_format_raises(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises((ValueError, KeyError, TypeError)):
        read_tensors(tmp_path / "file")

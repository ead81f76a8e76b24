"""GGUF files are mapped, dequantised by rows, and refused where they are damaged."""

import gguf
import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.storage.gguf_file import open_gguf

_Q8 = gguf.GGMLQuantizationType.Q8_0


def _write(path, tensors, alignment=None, **settings):
    """A file of float32 tensors, quantised where their rows are of whole blocks."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, value in settings.items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for name, array in tensors.items():
        if array.shape[-1] % 32 == 0:
            writer.add_tensor(name, gguf.quantize(array, _Q8), raw_dtype=_Q8)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _refused(path, message):
    with pytest.raises(UserError, match=message) as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    shapes = {"a": (7, 64), "b": (5,), "c": (2, 3, 4)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("alignment", [None, 256])
def test_metadata_and_tensors_are_those_that_were_written(tmp_path, tensors, alignment):
    settings = {"n": -3, "x": 0.5, "yes": True, "text": "Zürich", "names": ["a", "", "ü"]}
    settings |= {"numbers": [1, 2, 3], "shares": [0.5, 0.25], "nested": [[1, 2], [3, 4]]}
    path = _write(tmp_path / "m.gguf", tensors, alignment, **settings)
    file, reader = open_gguf(path), gguf.GGUFReader(path)
    assert {name: file.metadata[name] for name in settings} == settings
    assert file.metadata["general.architecture"] == "llama"
    assert {tensor.name for tensor in reader.tensors} == set(file.tensors)
    for name, array in tensors.items():
        found = file.tensors[name]
        assert found.shape == array.shape
        rows = found.rows(0, len(array))
        np.testing.assert_allclose(rows, array, atol=0.05 if name == "a" else 0)
        np.testing.assert_array_equal(found.rows(1, 3), rows[1:3])
    for tensor in reader.tensors:
        assert file.tensors[tensor.name].data().tobytes() == tensor.data.tobytes()


def test_files_cut_anywhere_are_refused(tmp_path, tensors):
    data = _write(tmp_path / "whole.gguf", tensors, names=["a", "b"]).read_bytes()
    path = tmp_path / "m.gguf"
    for size in range(5, len(data) - 32, 3):  # what follows the last tensor is padding
        path.write_bytes(data[:size])
        _refused(path, r"m.gguf has \d+ bytes.*: expected a whole GGUF file, not truncated")
    for size in (0, 3):
        path.write_bytes(data[:size])
        _refused(path, "m.gguf does not begin with GGUF: expected a GGUF file")
    _refused(tmp_path / "none.gguf", r"none.gguf is missing: expected a GGUF file")


def test_damaged_files_are_refused(tmp_path, tensors):
    data = _write(tmp_path / "whole.gguf", tensors, 64, number=5).read_bytes()
    path = tmp_path / "m.gguf"
    shape = data.index(b"\x01\0\0\0\0\0\0\0a\x02\0\0\0") + 13
    alignment = data.index(b"general.alignment") + len("general.alignment") + 4
    for at, changed, message in (
        (4, b"\x09", r"m.gguf has GGUF version 9: expected one of \(2, 3\)"),
        (data.index(b"number") + 6, b"\x63", "has a value of type 99: expected a whole GGUF file"),
        (shape, b"\x21", r"has tensor a of shape \(7, 33\) in blocks of 32: expected a whole"),
        (shape + 16, b"\xc8", "has tensor a of type 200: expected a whole GGUF file"),
        (alignment, b"\0", r"general.alignment is 0: expected a positive integer"),
    ):
        path.write_bytes(data[:at] + changed + data[at + len(changed) :])
        _refused(path, message)


def test_types_that_are_not_dequantised_are_refused(tmp_path):
    blocks = np.zeros((2, 3, 64), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("a", blocks.astype(np.int8), raw_dtype=gguf.GGMLQuantizationType.I8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="GGUF tensor type I8: expected one of those that"):
        open_gguf(tmp_path / "m.gguf").tensors["a"].rows(0, 1)

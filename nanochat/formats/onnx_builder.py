"""OnnxBuilder: collects the nodes and constants of an ONNX graph; matrices and look-up tables in float32 or int8.

Only operators of the ONNX standard, as they were in its operator set 17 (2022): any runtime that knows them can run it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat.common import UserError

OPSET, IR_VERSION = 17, 8
INLINE_BYTES = 1_900_000_000  # larger models keep their tensors in a second file: a protobuf message ends at 2 GiB
ENDLESS = np.iinfo(np.int64).max


def import_onnx() -> Any:
    """The package onnx. Raises UserError if it is not installed."""
    try:
        import onnx
    except ImportError:
        raise UserError("ONNX needs the package onnx: pip install 'nanochat[onnx]'") from None
    return onnx


class OnnxBuilder:
    """Methods take and return names of values of the graph; arrays and numbers become constants."""

    def __init__(self, int8: bool = False) -> None:
        self.onnx, self.int8 = import_onnx(), int8
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.scope = ""  # where in the network the next nodes belong; part of their names
        self._small: dict[tuple[str, bytes, tuple[int, ...]], str] = {}  # numbers and shapes, each stored once
        self._quantized: dict[str, tuple[str, str]] = {}  # int8 forms of activations that several matrices share

    # -- values ---------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; its output, or a list of them where `outputs` is more than one."""
        names = [self.value(x) for x in inputs]
        label = f"{self.scope}{kind}_{len(self.nodes)}"
        results = [label] if outputs == 1 else [f"{label}.{i}" for i in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(kind, names, results, name=label, **attributes))
        return results[0] if outputs == 1 else results

    def value(self, x: Any) -> str:
        """The name of `x`: itself, or that of a constant. Floats are float32, integers int64."""
        if isinstance(x, str):
            return x
        array = np.asarray(x)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64) if array.dtype.itemsize > 1 else array
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self._small:
            self._small[key] = self.constant(f"constant_{len(self._small)}", array)
        return self._small[key]

    def constant(self, name: str, array: np.ndarray | torch.Tensor) -> str:
        """Store a tensor under this name."""
        assert name not in self.constants, name
        self.constants[name] = array.float().numpy() if isinstance(array, torch.Tensor) else array
        return name

    def input(self, name: str, dtype: str, shape: list[Any]) -> str:
        """Declare an input; a dimension is a number, or a word where it varies."""
        self.inputs.append(self._info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, shape: list[Any]) -> None:
        """Declare a float32 value as an output of this name."""
        self.nodes.append(self.onnx.helper.make_node("Identity", [value], [name], name=f"output_{name}"))
        self.outputs.append(self._info(name, "FLOAT", shape))

    def _info(self, name: str, dtype: str, shape: list[Any]) -> Any:
        return self.onnx.helper.make_tensor_value_info(name, getattr(self.onnx.TensorProto, dtype), shape)

    # -- what the network is made of ------------------------------------------------------------------

    def slice(self, x: str, start: Any, end: Any, axis: int) -> str:
        """x[start:end] along an axis; a number, or the name of an int64 value of shape (1,)."""
        start, end = (v if isinstance(v, str) else [v] for v in (start, end))
        return self.op("Slice", x, start, end, [axis])

    def reshape(self, x: str, *shape: int) -> str:
        """A dimension of 0 stays as it is, -1 is what is left."""
        return self.op("Reshape", x, shape)

    def rms_norm(self, x: str) -> str:
        """x / sqrt(mean(x^2)) over the last dimension, with the epsilon of PyTorch."""
        square = self.op("ReduceMean", self.op("Mul", x, x), axes=[-1], keepdims=1)
        return self.op("Div", x, self.op("Sqrt", self.op("Add", square, float(torch.finfo(torch.float32).eps))))

    def matmul(self, x: str, weight: torch.Tensor, name: str, exact: bool = False) -> str:
        """x (..., C) times the transpose of weight (N, C) -> (..., N); in int8 unless `exact`.

        Each row of x and of the weight has a scale of its own: a token's result depends on no other token.
        """
        if exact or not self.int8:
            return self.op("MatMul", x, self.constant(name, weight.T.contiguous()))
        codes, scales = quantize_rows(weight)
        # Unsigned, zero at 128: signed weights overflow the 16-bit sums of x86 processors without VNNI.
        table = self.constant(name, np.ascontiguousarray((codes.astype(np.int16) + 128).astype(np.uint8).T))
        row, row_scale = self._quantize(x)
        zero = np.uint8(128)
        product = self.op("Cast", self.op("MatMulInteger", row, table, zero, zero), to=self.onnx.TensorProto.FLOAT)
        return self.op("Mul", self.op("Mul", product, row_scale), self.constant(f"{name}.scale", scales[:, 0]))

    def _quantize(self, x: str) -> tuple[str, str]:
        """x (..., C) as uint8 with zero at 128, and the scale of each row (..., 1)."""
        if x not in self._quantized:
            largest = self.op("ReduceMax", self.op("Abs", x), axes=[-1], keepdims=1)
            scale = self.op("Div", self.op("Max", largest, 1e-20), 127.0)
            shifted = self.op("Add", self.op("Round", self.op("Div", x, scale)), 128.0)
            self._quantized[x] = self.op("Cast", shifted, to=self.onnx.TensorProto.UINT8), scale
        return self._quantized[x]

    def embedding(self, ids: str, weight: torch.Tensor, name: str) -> str:
        """Rows of weight (V, C) by ids (...) -> (..., C)."""
        if not self.int8:
            return self.op("Gather", self.constant(name, weight), ids)
        codes, scales = quantize_rows(weight)
        rows = self.op("Cast", self.op("Gather", self.constant(name, codes), ids), to=self.onnx.TensorProto.FLOAT)
        return self.op("Mul", rows, self.op("Gather", self.constant(f"{name}.scale", scales), ids))

    # -- the file -------------------------------------------------------------------------------------

    def save(self, path: Path, comment: str) -> bool:
        """Write the graph to `path`; whether its tensors went to a second file, PATH_data."""
        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, "nanochat", self.inputs, self.outputs, doc_string=comment)
        external = sum(array.nbytes for array in self.constants.values()) > INLINE_BYTES
        for name in list(self.constants):
            graph.initializer.append(self.onnx.numpy_helper.from_array(self.constants.pop(name), name))
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="nanochat")
        self.onnx.save_model(model, path, save_as_external_data=external, location=f"{path.name}_data")
        return external


def quantize_rows(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """weight (N, C) -> int8 codes (N, C) and float32 scales (N, 1): weight is about codes * scales."""
    scales = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-20) / 127
    return (weight.float() / scales).round().to(torch.int8).numpy(), scales.numpy()

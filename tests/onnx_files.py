"""Small ONNX files of face detectors, written byte by byte: no package for it is needed.

The networks see brightness. A cell that is bright is a face, with a box of a fixed size around its
centre.
"""

import math
from pathlib import Path

import numpy as np

FLOAT, INT64 = 1, 7


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _field(number: int, value: int | bytes | str) -> bytes:
    """A field of a protobuf message: an integer, or bytes of a text or of a message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _tensor(name: str, array: np.ndarray) -> bytes:
    kind = FLOAT if array.dtype == np.float32 else INT64
    dims = b"".join(_field(1, size) for size in array.shape)
    return dims + _field(2, kind) + _field(8, name) + _field(9, array.tobytes())


def _ints(name: str, values: list[int]) -> bytes:
    packed = b"".join(_field(8, value) for value in values)
    return _field(5, _field(1, name) + packed + _field(20, 7))


def _node(kind: str, inputs: list[str], output: str, attributes: bytes = b"") -> bytes:
    read = b"".join(_field(1, name) for name in inputs)
    return _field(1, read + _field(2, output) + _field(3, output) + _field(4, kind) + attributes)


def _value(name: str, shape: list[int]) -> bytes:
    dims = b"".join(_field(1, _field(1, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, FLOAT) + _field(2, dims)))


class _Graph:
    def __init__(self) -> None:
        self.nodes, self.tensors, self.outputs = b"", b"", b""

    def conv(self, name: str, stride: int, sees: float, bias: list[float]) -> None:
        """Brightness (0 to 1) times `sees` plus a bias, a channel for each, in cells."""
        weight = np.full((len(bias), 3, stride, stride), sees / (255 * 3 * stride**2), np.float32)
        self.tensors += _field(5, _tensor(f"{name}.w", weight))
        self.tensors += _field(5, _tensor(f"{name}.b", np.array(bias, np.float32)))
        how = _ints("kernel_shape", [stride] * 2) + _ints("strides", [stride] * 2)
        self.nodes += _node("Conv", ["input", f"{name}.w", f"{name}.b"], name, how)

    def flat(self, name: str, source: str, channels: int, cells: int) -> None:
        """`[1, C, h, w]` as `[1, h * w, C]`."""
        self.nodes += _node("Transpose", [source], f"{name}.t", _ints("perm", [0, 2, 3, 1]))
        shape = np.array([1, -1, channels], np.int64)
        self.tensors += _field(5, _tensor(f"{name}.shape", shape))
        self.nodes += _node("Reshape", [f"{name}.t", f"{name}.shape"], name)
        self.output(name, [1, cells, channels])

    def output(self, name: str, shape: list[int]) -> None:
        self.outputs += _field(12, _value(name, shape))

    def write(self, path: Path, size: int) -> Path:
        graph = self.nodes + _field(2, "faces") + self.tensors
        graph += _field(11, _value("input", [1, 3, size, size])) + self.outputs
        path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 11)))
        return path


def write_yunet(path: Path, side: float = 64.0) -> Path:
    """Bright cells of 32 x 32 pixels are faces of `side` pixels."""
    graph, size = _Graph(), 320
    for stride in (8, 16, 32):
        cells, log_side = (size // stride) ** 2, math.log(side / stride)
        sees = 1.0 if stride == 32 else 0.0
        parts = {
            "cls": (sees, [0.0]),
            "obj": (0.0, [1.0]),
            "bbox": (0.0, [0.5, 0.5, log_side, log_side]),
            "kps": (0.0, [0.0] * 10),
        }
        for part, (weight, bias) in parts.items():
            name = f"{part}_{stride}"
            graph.conv(f"{name}.c", stride, weight, bias)
            graph.flat(name, f"{name}.c", len(bias), cells)
    return graph.write(path, size)


def write_centerface(path: Path, height: float = 40.0, width: float = 32.0) -> Path:
    """Bright cells of 4 x 4 pixels are faces of this size, whose centre is the cell's."""
    graph, size = _Graph(), 320
    parts = {
        "537": (1.0, [0.0]),
        "538": (0.0, [math.log(height / 4), math.log(width / 4)]),
        "539": (0.0, [0.0, 0.0]),
        "540": (0.0, [0.0] * 10),
    }
    for name, (weight, bias) in parts.items():
        graph.conv(name, 4, weight, bias)
        graph.output(name, [1, len(bias), size // 4, size // 4])
    return graph.write(path, size)


def write_other(path: Path) -> Path:
    """A network that is no face detector."""
    graph = _Graph()
    graph.conv("scores", 4, 1.0, [0.0])
    graph.output("scores", [1, 1, 8, 8])
    return graph.write(path, 32)

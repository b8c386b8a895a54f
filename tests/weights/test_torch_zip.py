"""Files of PyTorch: what it writes is read, what is written it reads, and nothing is run."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import needs_torch
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from affectgpt_jax.weights import torch_zip
from affectgpt_jax.weights.streaming import WeightsError


@pytest.fixture(scope="module")
def torch():
    return needs_torch.pytorch("the files are written and read by PyTorch")


def values(tree):
    """A tree with its tensors read, and in the form of NumPy arrays."""
    if isinstance(tree, dict):
        return {key: values(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(values, tree))
    return tree.numpy() if isinstance(tree, torch_zip.Tensor) else tree


def bits(array):
    """Bytes, dtype and shape: NaN and signed zeros compare too."""
    array = np.asarray(array)
    return array.tobytes(), array.dtype.name, array.shape


def torch_bits(tensor):
    """The same of a PyTorch tensor; NumPy has no bfloat16 of PyTorch's."""
    import torch

    # Of a dimension of size 1, `contiguous` keeps whatever stride there is.
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    raw = dense.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return raw, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


# --- What PyTorch writes --------------------------------------------------------------------------

DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "uint16",
    "uint32",
    "uint64",
)


@given(st.data())
def test_any_view_of_any_dtype_is_read_bit_for_bit(torch, data):
    dtype = getattr(torch, data.draw(st.sampled_from(DTYPES)))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    raw = torch.tensor(data.draw(st.lists(st.integers(0, 255), min_size=512, max_size=512)))
    tensor = (raw % 2 if dtype == torch.bool else raw).to(torch.uint8).view(dtype)
    tensor = tensor[: int(np.prod(shape, dtype=int))].reshape(shape)
    tensor = tensor.permute(data.draw(st.permutations(range(tensor.ndim))))
    for axis, size in enumerate(tensor.shape):
        start, step = data.draw(st.integers(0, size)), data.draw(st.integers(1, 3))
        tensor = tensor[(slice(None),) * axis + (slice(start, None, step),)]
    if data.draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    file = io.BytesIO()
    torch.save({"x": tensor}, file)
    path = scratch(file.getvalue())
    try:
        assert bits(torch_zip.load(path)["x"].numpy()) == torch_bits(tensor)
    finally:
        os.unlink(path)


def scratch(content):
    """A file of its own for an example of hypothesis, which shares fixtures among examples."""
    import tempfile

    handle, path = tempfile.mkstemp(suffix=".pth")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    return path


def test_everything_plain_that_a_checkpoint_holds_is_read(torch, tmp_path):
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=np.float64(0.5))
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = {
        "model": layer.state_dict(),  # an OrderedDict with the attribute _metadata
        "parameters": [*layer.parameters()],
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "config": {"run": {"lr": 1e-5, "name": "ä", "seeds": [1, 2**40, -3], "none": None}},
        "plain": (torch.Size([1, 2]), torch.device("cuda:0"), OrderedDict(a=True)),
    }
    torch.save(saved, tmp_path / "c.pth")
    found = torch_zip.load(tmp_path / "c.pth")
    assert found["config"] == saved["config"]
    assert found["scaler"] == saved["scaler"]
    assert found["plain"] == ((1, 2), "cuda", {"a": True})
    group = found["optimizer"]["param_groups"][0]
    assert group["lr"] == 0.5 and group["betas"] == (0.9, 0.999)
    weight = layer.state_dict()["weight"].numpy()
    for tensor in (found["model"]["weight"], found["parameters"][0]):
        np.testing.assert_array_equal(tensor.numpy(), weight)
    average = optimizer.state_dict()["state"][0]["exp_avg"].numpy()
    np.testing.assert_array_equal(found["optimizer"]["state"][0]["exp_avg"].numpy(), average)


def test_tensors_that_share_a_storage_are_read_as_they_are(torch, tmp_path):
    whole = torch.arange(12.0)
    torch.save([whole, whole[3:7], whole.view(3, 4).t()], tmp_path / "c.pth")
    assert len([n for n in zipfile.ZipFile(tmp_path / "c.pth").namelist() if "/data/" in n]) == 1
    found = [tensor.numpy() for tensor in torch_zip.load(tmp_path / "c.pth")]
    np.testing.assert_array_equal(found[0], np.arange(12.0))
    np.testing.assert_array_equal(found[1], np.arange(3.0, 7.0))
    np.testing.assert_array_equal(found[2], np.arange(12.0).reshape(3, 4).T)


# --- What PyTorch reads ---------------------------------------------------------------------------

arrays = st.builds(
    lambda dtype, shape, seed: (
        np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)
        if dtype == "bool"
        else np.frombuffer(
            np.random.default_rng(seed).bytes(int(np.prod(shape, dtype=int)) * dtype.itemsize),
            dtype,
        ).reshape(shape)
    ),
    st.sampled_from([*torch_zip.STORAGES.values()]),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 2**32 - 1),
)
plain = st.recursive(
    arrays
    | st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(-(2**60), 2**60), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(found, expected, read):
    """Whether two trees are equal, arrays bit by bit."""
    if isinstance(expected, np.ndarray):
        return read(found) == bits(expected)
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return [*found] == [*expected] and same([*found.values()], [*expected.values()], read)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(
            same(x, y, read) for x, y in zip(found, expected)
        )
    return found == expected


@given(plain)
def test_pytorch_and_this_reader_read_back_what_is_written(torch, value):
    path = scratch(b"")
    os.unlink(path)
    try:
        torch_zip.save(path, value)
        assert same(torch_zip.load(path), value, lambda tensor: bits(tensor.numpy()))
        assert same(torch.load(path, weights_only=True), value, torch_bits)
        assert same(torch.load(path, weights_only=True, mmap=True), value, torch_bits)
    finally:
        os.unlink(path)


def test_storages_stand_where_pytorch_can_map_them(tmp_path):
    torch_zip.save(tmp_path / "c.pth", [np.arange(n, dtype=np.int8) for n in (1, 70, 3)])
    for tensor in torch_zip.load(tmp_path / "c.pth"):
        assert tensor.storage.data.ctypes.data % 64 == 0  # the map begins at a page


def test_what_cannot_be_written_is_refused_and_leaves_nothing_behind(tmp_path):
    for value in ({1}, object(), np.zeros(2, "U3"), {"a": [np.zeros(2, complex)]}):
        with pytest.raises(TypeError):
            torch_zip.save(tmp_path / "c.pth", value)
    (tmp_path / "old.pth").write_bytes(b"mine")
    with pytest.raises(WeightsError, match="old.pth exists already"):
        torch_zip.save(tmp_path / "old.pth", {})
    assert [path.name for path in tmp_path.iterdir()] == ["old.pth"]
    assert (tmp_path / "old.pth").read_bytes() == b"mine"


# --- What is refused ------------------------------------------------------------------------------


def archive(path, program, storages=(), folder="archive", **options):
    """A file as PyTorch lays it out, with a pickle of one's own."""
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr(f"{folder}/data.pkl", program)
        for key, content in storages:
            file.writestr(f"{folder}/data/{key}", content)
        file.writestr(f"{folder}/version", b"3\n")
    return path


def tensor_program(
    key="0", kind="torch FloatStorage", count=4, offset=0, shape=(4,), strides=(1,), function=None
):
    """A pickle (protocol 2) of one tensor; every number may lie."""

    def number(n):
        if not isinstance(n, int) or isinstance(n, bool):
            return pickle.dumps(n, 0)[:-1]
        return b"\x8a\x10" + n.to_bytes(16, "little", signed=True)

    def text(t):
        return b"X" + struct.pack("<I", len(t.encode())) + t.encode()

    def name(n):
        return b"c" + n.replace(" ", "\n").encode() + b"\n"

    identity = text("storage") + name(kind) + text(key) + text("cpu") + number(count)
    sizes = b"".join(b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (shape, strides))
    hooks = name("collections OrderedDict") + b")R"
    call = name(function or "torch._utils _rebuild_tensor_v2")
    rest = number(offset) + sizes + b"\x89" + hooks
    return b"\x80\x02" + call + b"((" + identity + b"tQ" + rest + b"tR."


FLOATS = np.arange(4, dtype=np.float32).tobytes()


def refused(path, *words):
    with pytest.raises(WeightsError) as error:
        for tensor in [torch_zip.load(path)]:
            tensor.numpy()
    for word in (str(path), *words):
        assert word in str(error.value)


def test_a_pickle_by_hand_is_read(tmp_path):
    path = archive(tmp_path / "c.pth", tensor_program(), [("0", FLOATS)])
    np.testing.assert_array_equal(torch_zip.load(path).numpy(), np.arange(4))


class Hostile:
    """Calls a function when Python unpickles it."""

    def __init__(self, *call, state=None):
        self.call = (call[0], call[1:]) if state is None else (call[0], call[1:], state)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_hostile_values_run_nothing_wherever_they_stand(tmp_path, protocol):
    trace = tmp_path / "trace"
    command = f"touch {trace}"
    hostile = [
        Hostile(os.system, command),
        Hostile(eval, f"__import__('os').system({command!r})"),
        Hostile(exec, f"open({str(trace)!r}, 'w')"),
        Hostile(open, str(trace), "w"),
        Hostile(getattr, Hostile(__import__, "os"), "system"),
        Hostile(OrderedDict, Hostile(os.system, command)),
        Hostile(OrderedDict, state=Hostile(os.system, command)),
        Hostile(pickle.loads, pickle.dumps(Hostile(os.system, command))),
        Hostile(bytearray, 10),
    ]
    for one in hostile:
        for value in (one, {"model": {}, "optimizer": {"state": [one]}}, {"model": {"w": one}}):
            path = archive(tmp_path / "c.pth", pickle.dumps(value, protocol))
            refused(path, "holds a pickle")
    assert not trace.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch trace'\ntR.",
        b"(S'touch trace'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch trace'\no.",
        b"\x80\x02cos\nsystem\n\x8c\x0btouch trace\x85\x81.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch trace\x85R.",
        # A name that is put together from values, and one that goes through a module.
        b"\x80\x04]\x8c\x06system\x93\x8c\x0btouch trace\x85R.",
        b"\x80\x04\x8c\x05torch\x8c\x1b_utils.__builtins__.getattr\x93)R.",
        b"\x80\x04\x8c\x00\x8c\x06system\x93)R.",
        # Names of PyTorch that do more than hold data.
        b"\x80\x02ctorch\nload\nX\x05\x00\x00\x00x.pth\x85R.",
        b"\x80\x02ctorch.hub\nload\nX\x01\x00\x00\x00x\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\ncos\nsystem\n\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\ncos\nsystem\n\x85R.",
        # State for a name, a tuple, a tensor's class.
        b"\x80\x02cos\nsystem\n}b.",
        b"\x80\x02)}b.",
        b"\x80\x02ctorch\nFloatStorage\n}X\x08\x00\x00\x00__init__cos\nsystem\nsb.",
        # Calling a value, extension codes, other persistent ids, buffers out of band.
        b"\x80\x02})R.",
        b"\x82\x01.",
        b"\x80\x02Pstorage\n.",
        b"\x80\x02X\x01\x00\x00\x00xQ.",
        b"\x80\x02((X\x07\x00\x00\x00storagecos\nsystem\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
        b"\x80\x05\x97.",
        # The memo: what was never put there.
        b"\x80\x02h\x05.",
        b"\x80\x04j\xff\xff\xff\xff.",
        # Stack games, and no end.
        b"\x80\x02R.",
        b"\x80\x02t.",
        b"\x80\x02(0.",
        b"\x80\x02}",
        b"",
    ],
)
def test_hostile_programs_are_refused(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    refused(archive(tmp_path / "c.pth", program), "holds a")
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def test_names_and_calls_of_values_are_refused_before_they_are_looked_at(tmp_path):
    # l = [l, l], sixty times: its text would have 2 ** 60 characters.
    program = b"\x80\x04]" + b"q\x00]h\x00ah\x00a" * 60 + b"\x8c\x01x\x93."
    refused(archive(tmp_path / "a.pth", program), "a name that is not text")
    refused(archive(tmp_path / "b.pth", b"\x80\x02})R."), "calls one of its values")


def test_a_name_is_text_and_not_the_thing(tmp_path):
    path = archive(tmp_path / "c.pth", b"\x80\x02cos\nsystem\n.")
    assert type(torch_zip.load(path)).__name__ == "Name"


def nested_tuples(times):
    """A program that leaves t = (t, t), nested many times: printing or hashing it has no end."""
    return b")" + b"".join(b"q%ch%ch%c\x86" % (n, n, n) for n in range(times))


@pytest.mark.timeout(30)
def test_values_that_have_no_end_are_refused(tmp_path):
    refused(archive(tmp_path / "a.pth", b"\x80\x02]q\x00h\x00a."), "nested deeper than 100")
    program = b"\x80\x02}" + nested_tuples(60) + b"Ns."
    refused(archive(tmp_path / "b.pth", program), "the key ((")
    program = b"\x80\x02}" + b"(" + b"K\x01" * 10**6 + b"tq\x00N" + b"sh\x00N" * 10**5 + b"s."
    refused(archive(tmp_path / "c.pth", program), "the key (1, 1")
    # As the shape of a tensor.
    shape = tensor_program(shape=(), strides=()).replace(
        b"(t(t", b"(" + nested_tuples(60) + b"t(t", 1
    )
    refused(
        archive(tmp_path / "d.pth", shape, [("0", FLOATS)]), "a tensor of shape ((), ((), ()), ("
    )


@pytest.mark.parametrize(
    ("lies", "words"),
    [
        ({"key": "1"}, ["'1' is missing"]),
        ({"key": "../version"}, ["missing"]),
        ({"key": "../../../etc/passwd"}, ["missing"]),
        ({"key": "/etc/passwd"}, ["missing"]),
        ({"count": 5}, ["has 16 bytes; expected 20"]),
        ({"count": 3}, ["has 16 bytes; expected 12"]),
        ({"count": -4}, ["has 16 bytes; expected -16"]),
        ({"count": 2**60}, ["has 16 bytes"]),
        ({"kind": "torch DoubleStorage"}, ["has 16 bytes; expected 32"]),
        ({"kind": "torch ComplexFloatStorage"}, ["'torch.ComplexFloatStorage'", "FloatStorage"]),
        ({"kind": "os FloatStorage"}, ["'os.FloatStorage'"]),
        ({"shape": (5,)}, ["beyond the 4 elements"]),
        ({"offset": 1}, ["beyond the 4 elements"]),
        ({"offset": -1}, ["a tensor of shape"]),
        ({"shape": (-1,)}, ["a tensor of shape"]),
        ({"strides": (-1,)}, ["a tensor of shape"]),
        ({"strides": (2,)}, ["beyond the 4 elements"]),
        ({"shape": (2, 3), "strides": (1, 1, 1)}, ["a tensor of shape"]),
        ({"shape": (2**62, 2**62), "strides": (1, 1)}, ["a tensor of shape"]),
        ({"shape": (2**31, 2**31), "strides": (1, 1)}, ["beyond"]),
        ({"shape": (2**100,), "strides": (0,)}, ["a tensor of shape"]),
        ({"shape": (1,) * 65, "strides": (1,) * 65}, ["a tensor of shape"]),
        ({"shape": (1, 8), "strides": (1, 0)}, ["repeats the elements", "contiguous"]),
        ({"shape": (2**20, 2**20), "strides": (0, 0)}, ["repeats the elements", "contiguous"]),
        ({"function": "torch._utils _rebuild_tensor_v3"}, ["_rebuild_tensor_v3"]),
        ({"function": "torch._utils _rebuild_sparse_tensor"}, ["_rebuild_sparse_tensor"]),
    ],
)
def test_a_lying_tensor_is_refused(tmp_path, lies, words):
    path = archive(tmp_path / "c.pth", tensor_program(**lies), [("0", FLOATS)])
    refused(path, *words)


def test_a_tensor_without_extent_takes_no_memory_until_it_is_read(tmp_path):
    program = tensor_program(shape=(2**40, 2**20), strides=(0, 0))
    tensor = torch_zip.load(archive(tmp_path / "c.pth", program, [("0", FLOATS)]))
    assert tensor.shape == (2**40, 2**20) and tensor.size == 2**60


@pytest.mark.parametrize(
    "program",
    [
        tensor_program(shape=(2.0,)),
        tensor_program(strides=(1.0,)),
        tensor_program(offset=0.0),
        tensor_program(shape=(True,)),
        tensor_program(shape=(None,)),
        tensor_program(shape=("4",)),
    ],
)
def test_sizes_that_are_no_whole_numbers_are_refused(tmp_path, program):
    refused(archive(tmp_path / "c.pth", program, [("0", FLOATS)]), "a tensor of shape")


def test_the_step_along_an_axis_of_one_element_may_be_any(tmp_path):
    program = tensor_program(shape=(1, 4), strides=(2**62, 1))
    tensor = torch_zip.load(archive(tmp_path / "c.pth", program, [("0", FLOATS)]))
    np.testing.assert_array_equal(tensor.numpy(), np.arange(4)[None])


def test_a_storage_that_no_whole_number_of_elements_fills_is_read_as_far_as_it_goes(tmp_path):
    program = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n((X\x07\x00\x00\x00storagectorch.storage\n"
        b"UntypedStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0dtQK\x00K\x01\x85K\x01\x85\x89N"
        b"ctorch\nuint64\ntR."
    )
    content = np.uint64(2**60).tobytes() + b"12345"
    tensor = torch_zip.load(archive(tmp_path / "c.pth", program, [("0", content)]))
    assert tensor.numpy().tolist() == [2**60]


def test_a_damaged_byte_is_noticed(tmp_path):
    path = archive(tmp_path / "c.pth", tensor_program(), [("0", FLOATS)])
    content = path.read_bytes()
    path.write_bytes(content.replace(FLOATS, FLOATS[:-1] + b"\xff"))
    refused(path, "data/0", "checksum")
    program = tensor_program()
    path.write_bytes(content.replace(program, program.replace(b"cpu", b"cpv")))
    refused(path, "data.pkl", "checksum")


def lie_about_size(content, name, size):
    """The archive with another size of an entry in its central directory."""
    at = content.rindex(name) - 46
    assert content[at : at + 4] == b"PK\x01\x02"
    return content[: at + 20] + struct.pack("<II", size, size) + content[at + 28 :]


def test_an_entry_that_lies_about_its_size_is_refused(tmp_path):
    path = archive(tmp_path / "c.pth", tensor_program(), [("0", FLOATS)])
    content = path.read_bytes()
    for size, words in ((2**31, ["beyond the end"]), (4, ["has 4 bytes; expected 16"])):
        path.write_bytes(lie_about_size(content, b"archive/data/0", size))
        refused(path, *words)
    # One that runs on over the next entries has the wrong checksum.
    path.write_bytes(lie_about_size(content, b"archive/data/0", 20))
    refused(path, "has 20 bytes; expected 16")


def test_broken_archives_are_refused(tmp_path):
    path = tmp_path / "c.pth"
    program = tensor_program()
    whole = archive(path, program, [("0", FLOATS)]).read_bytes()
    for content, words in (
        (b"", ["is empty"]),
        (b"hello", ["is no zip file"]),
        (whole[:-1], ["is not a whole file"]),
        (whole[: len(whole) // 2], ["is not a whole file"]),
        (whole.replace(b"PK\x01\x02", b"PK\x01\x03"), ["is not a whole file"]),
    ):
        path.write_bytes(content)
        refused(path, *words)
    refused(tmp_path / "nowhere.pth", "cannot be read")
    refused(tmp_path, "cannot be read")
    for name in ("a/b/data.pkl", "a/data_pkl", "data.pkl"):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(name, program)
        refused(path, "no data.pkl")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"N.")
        file.writestr("archive/data.pkl", program)
    refused(path, "two entries")
    archive(path, program, [("0", FLOATS)], compression=zipfile.ZIP_DEFLATED)
    refused(path, "compressed")
    archive(path, program, [("0", FLOATS)])
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/byteorder", b"big")
    refused(path, "big-endian")


def test_the_format_of_old_versions_is_refused_with_the_way_out(torch, tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    refused(path, "no zip file", "torch.save(torch.load(")


def test_bfloat16_needs_no_alignment(tmp_path):
    values = np.asarray(jnp.linspace(-2, 2, 4, dtype=jnp.bfloat16))
    for folder in ("archive", "archive1"):  # shifts what follows by a byte
        program = tensor_program(kind="torch BFloat16Storage")
        storages = [("0", values.tobytes())]
        path = archive(tmp_path / f"{folder}.pth", program, storages, folder=folder)
        assert bits(torch_zip.load(path).numpy()) == bits(values)

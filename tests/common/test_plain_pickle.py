"""Pickles of plain values read as Python reads them; any other is refused, and runs nothing."""

import pickle
import struct
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from affectgpt_jax.common import plain_pickle

plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(), inner)
        | st.builds(OrderedDict, st.dictionaries(st.text(), inner))
    ),
    max_leaves=12,
)


@given(plain_values, st.integers(0, pickle.HIGHEST_PROTOCOL))
@example({1, "a"}, 4)
@example(frozenset({1}), 4)
def test_plain_pickles_read_as_pickle_reads_them(value, protocol):
    try:
        found = plain_pickle.loads(pickle.dumps(value, protocol))
    except plain_pickle.PickleError as error:
        # Before protocol 4, a set is a call of `set`, and empty bytes before 3 one of `bytes`.
        assert protocol < 4 and "builtin" in str(error)
    else:
        assert found == value


@pytest.mark.parametrize("protocol", range(2, 5))
@pytest.mark.parametrize(
    "array",
    [
        np.asarray({"a": {"emo": 1}}, object),
        np.asarray(["x", None], object),
        np.asarray([1.5, -2]),
        np.asarray([1, 2], ">i2"),
        np.asarray(["ä", "bc"]),
        np.asarray([True, False]),
    ],
)
def test_pickled_arrays_are_lists(array, protocol):
    expected = array.ravel().tolist()
    assert plain_pickle.loads(pickle.dumps(array, protocol)) == expected
    assert plain_pickle.loads(pickle.dumps([array, array], protocol)) == [expected] * 2


@pytest.mark.parametrize("scalar", [np.float32(0.5), np.int64(-3), np.str_("a"), np.bool_(True)])
def test_pickled_scalars_are_values(scalar):
    assert plain_pickle.loads(pickle.dumps({"val": scalar}, 4)) == {"val": scalar}


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04cos\nsystem\n.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02cos\nsystem\n)\x81.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x82\x01.",
        b"Px\n.",
        b"R.",
        b"a.",
        b"",
        b"]",
        b"h\x05.",
        b"}]Nsb.",
        b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntRNb.",
        b"cnumpy\ndtype\n(S'M8[ns]'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cos\nsystem\n(I0\ntS'b'\ntR.",
        b"\x80\x04]\x8c\x06system\x93)R.",
        b"\x80\x02X\x01\x00\x00\x00xQ.",
    ],
)
def test_hostile_programs_are_refused_or_stay_text(program):
    try:
        value = plain_pickle.loads(program)
    except plain_pickle.PickleError:
        return
    assert value == plain_pickle.Name("os.system")


NUMPY_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tS'b'\ntR"
MEGABYTE = b"B" + struct.pack("<I", 2**20) + bytes(2**20)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        # t = (t, t), sixty times, as a key: hashing it would take 2 ** 60 steps.
        (b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns.", "with the key (((("),
        (b"\x80\x04(" + b")" + b"q\x00h\x00\x86" * 60 + b"\x91.", "with the key (((("),
        # A tuple of many parts is hashed anew each time that it is a key.
        (b"}(" + b"K\x01" * 10**6 + b"tq\x00Ns" + b"h\x00Ns" * 10**6 + b".", "with the key (1, 1"),
        # Numbers whose hashes are equal, and others that are no keys.
        (pickle.dumps({2**61 - 1: 0}), "with the key 2305843009213693951"),
        (b"}G\x7f\xf8" + bytes(6) + b"Ns.", "with the key nan"),
        # The same tuples as the shape of an array, which the message has.
        (
            b")" + b"q\x00h\x00\x86" * 60 + b"q\x01" + NUMPY_ARRAY + b"(K\x01h\x01cnumpy\ndtype\n"
            b"(S'i4'\nK\x00K\x01tR\x89C\x00tb.",
            "array of shape (((((",
        ),
        # An array of a million numbers, filled a million times; text and bytes that are copied.
        (
            MEGABYTE + b"q\x00cnumpy\ndtype\n(S'u1'\nK\x00K\x01tRq\x01]("
            + (NUMPY_ARRAY + b"(K\x01J\x00\x00\x10\x00\x85h\x01\x89h\x00tb") * 10**4 + b"e.",
            "copies one value many times",
        ),
        (
            b"X" + struct.pack("<I", 2**20) + b"x" * 2**20 + b"q\x00]("
            + b"c_codecs\nencode\n(h\x00S'latin1'\ntR" * 10**5 + b"e.",
            "copies one value many times",
        ),
        (b"]" * 500_000 + b"a" * 499_999 + b".", "nested deeper than 100 levels"),
        (b"(" * 101 + b"t" * 101 + b".", "nested deeper than 100 levels"),
        (b"]q\x00h\x00a.", "nested deeper than 100 levels"),
        (b"}q\x00X\x01\x00\x00\x00a]h\x00as.", "nested deeper than 100 levels"),
    ],
)  # fmt: skip
@pytest.mark.timeout(20)
def test_small_pickles_that_would_take_forever_are_refused(program, reason):
    with pytest.raises(plain_pickle.PickleError) as error:
        plain_pickle.loads(program)
    assert reason in str(error.value)
    assert len(str(error.value)) < 300


def test_a_value_that_many_hold_is_looked_at_once():
    twice = [1]
    for _ in range(90):
        twice = [twice, twice]
    found = plain_pickle.loads(pickle.dumps(twice))
    assert found[0] is found[1]
    # Deepest where it is reached by the longer of two ways.
    chain = inner = []
    for _ in range(60):
        inner.append([])
        inner = inner[0]
    with pytest.raises(plain_pickle.PickleError, match="nested deeper"):
        deep = chain
        for _ in range(60):
            deep = [deep]
        plain_pickle.loads(pickle.dumps([chain, deep]))

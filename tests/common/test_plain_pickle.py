"""Pickles of plain values read as Python reads them; any other is refused, and runs nothing."""

import pickle
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
        # t = (t, t), sixty times, as a key: hashing it would take 2 ** 60 steps.
        b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns.",
        b"\x80\x04(" + b")" + b"q\x00h\x00\x86" * 60 + b"\x91.",
    ],
)
def test_hostile_programs_are_refused_or_stay_text(program):
    try:
        value = plain_pickle.loads(program)
    except plain_pickle.PickleError:
        return
    assert value == plain_pickle.Name("os.system")

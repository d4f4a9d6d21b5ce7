"""Do codes take their true size and come back, for every width and length?"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboquant.packing import pack, unpack


@given(bits=st.integers(1, 8), n=st.integers(0, 40), rows=st.integers(0, 4), seed=st.integers(0, 99))
def test_round_trip_and_size(bits, n, rows, seed):
    codes = torch.randint(
        0, 2**bits, (rows, 2, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    packed = pack(codes, bits)
    assert packed.shape == (rows, 2, (n * bits + 7) // 8)
    assert torch.equal(unpack(packed, bits, n), codes)


@given(bits=st.integers(1, 8), n=st.integers(1, 40), seed=st.integers(0, 99))
def test_layout_is_a_little_endian_bit_stream(bits, n, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, n, dtype=np.uint8)
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    expected = stream.to_bytes((n * bits + 7) // 8, "little")
    assert pack(torch.from_numpy(codes), bits).numpy().tobytes() == expected


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_strided_and_misaligned_codes(bits):
    wide = torch.randint(0, 2**bits, (5, 33), dtype=torch.uint8)
    for view in (wide[:, 1:17], wide[1:, ::2], wide.T):
        assert torch.equal(unpack(pack(view, bits), bits, view.shape[-1]), view)
    packed = pack(wide, bits)
    assert torch.equal(unpack(packed[2:], bits, 33), wide[2:])


def test_bits_above_the_width_do_not_leak():
    assert torch.equal(
        pack(torch.tensor([255, 0, 255], dtype=torch.uint8), 2),
        pack(torch.tensor([3, 0, 3], dtype=torch.uint8), 2),
    )


def test_errors():
    codes = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"1\.\.8, not 0"):
        pack(codes, 0)
    with pytest.raises(ValueError, match="codes must be uint8"):
        pack(codes.int(), 2)
    with pytest.raises(ValueError, match="4 codes of 3 bits take 2 bytes a row, not 4"):
        unpack(codes, 3, 4)

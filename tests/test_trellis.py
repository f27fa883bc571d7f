import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrqdit import native
from lrqdit.config import TRELLIS_BITS
from lrqdit.errors import ConfigError
from lrqdit.numerics import codebook, trellis

ISAS = [] if native.LIBRARY is None else [i for i, lack in native.instruction_sets(native.LIBRARY).items() if not lack]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(weight, bits):
    return trellis.expand(codebook.fit(weight, bits), weight)


def error(book, weight):
    return float((book.quantize(weight) - weight).square().sum() / weight.square().sum())


def test_levels_follow_the_convolutional_code():
    """u and the four bits before it give the subset as Ungerboeck's parity polynomials 103 and 024 (octal) say."""
    codes = torch.randint(0, 8, (40, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    bits = [[0] * 3] * 6 + (codes & 1).tolist()
    for n, column in itertools.product(range(40), range(3)):
        u = [bits[n + 6 - d][column] for d in range(7)]
        low = sum(u[d] for d in range(7) if 0o024 >> d & 1) % 2
        high = sum(u[d] for d in range(7) if 0o103 >> d & 1) % 2
        expected = 4 * (int(codes[n, column]) >> 1) + 2 * high + low
        assert int(trellis.level_index(codes)[n, column]) == expected


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), seed=st.integers(0, 1000), spread=st.sampled_from([0.3, 1.0, 5.0]))
def test_no_path_is_better(rows, seed, spread):
    """Against every path there is, of rows with different scales."""
    weight, scale = spread * random(rows, 3, seed=seed), 0.01 + torch.rand(rows) * 0.02
    table = torch.randint(-127, 128, (1, 8), generator=torch.Generator().manual_seed(seed)).sort().values.to(torch.int8)
    book = trellis.TrellisCodebook("twin_log", 2, table, scale)
    found = (book.quantize(weight) - weight).square().sum(0)
    paths = torch.tensor(list(itertools.product(range(4), repeat=rows)), dtype=torch.uint8).T.contiguous()
    for column in range(3):
        every = (book.decode(paths) - weight[:, column : column + 1]).square().sum(0)
        assert float(found[column]) <= float(every.min()) * (1 + 1e-5) + 1e-12


@pytest.mark.skipif(not ISAS, reason="no native library")
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_native_codes_are_those_of_the_reference(bits):
    isa, threads = native.LIBRARY.lrq_isa().decode(), torch.get_num_threads()
    try:
        # fewer columns than a register has lanes, some more, several tasks; blocks of rows that are not full
        for rows, columns in ((1, 1), (2, 16), (5, 40), (32, 7), (33, 17), (95, 130), (200, 3)):
            weight = random(rows, columns, seed=rows) ** 3  # heavy tails leave the table's range
            weight[:: max(2, rows // 5)] *= 1e4
            weight[rows // 2] = 0
            book = fitted(weight, bits)
            expected = trellis._encode(weight.numpy(), book.table[0].numpy(), book.row_scale.numpy())
            for name, count in itertools.product(ISAS, (1, 2)):
                native.use(name)
                torch.set_num_threads(count)
                assert np.array_equal(book.encode(weight).numpy(), expected), name
                for column in {0, columns // 2, columns - 1}:  # GPTQ asks for one at a time
                    one = book.encode(weight[:, column : column + 1])
                    assert np.array_equal(one[:, 0].numpy(), expected[:, column]), name
    finally:
        native.use(isa)
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.0842), (3, 0.0228), (4, 0.0062), (5, 0.0016)])
def test_error_of_gaussian_weights(bits, expected):
    """As documented, and at most .73 of the scalar levels'."""
    weight = random(512, 256) * 0.02
    found = error(fitted(weight, bits), weight)
    assert found == pytest.approx(expected, rel=0.03)
    assert found < 0.73 * error(codebook.fit(weight, bits), weight)


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_scaling_the_weight_scales_the_result(bits):
    weight = random(64, 48)
    found, large = fitted(weight, bits), fitted(weight * 1024, bits)
    assert torch.equal(found.table, large.table) and torch.equal(found.row_scale * 1024, large.row_scale)
    assert torch.equal(found.encode(weight), large.encode(weight * 1024))


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_special_rows(bits):
    """Zeros are exact, and one sign, one entry or huge rows stay finite."""
    weight = random(20, 48)
    weight[3] = 0
    weight[4] = weight[4].abs()
    weight[5] *= 1e6
    book = fitted(weight, bits)
    quantized = book.quantize(weight)
    assert (quantized[3] == 0).all() and torch.isfinite(quantized).all()
    assert error(book, weight) < 0.2
    assert (fitted(torch.zeros(4, 6), bits).quantize(torch.zeros(4, 6)) == 0).all()


def test_expand_refuses_what_has_no_trellis():
    weight = random(8, 16)
    with pytest.raises(ConfigError, match="8 bits with 1 tables; a trellis has one table of 2 to 5 bits"):
        trellis.expand(codebook.fit(weight, 8), weight)
    with pytest.raises(ConfigError, match="4 bits with 8 tables"):
        trellis.expand(codebook.fit(weight, 4, scope="row"), weight)


def test_the_better_code_is_near_the_rate_distortion_bound():
    """Scalar levels lose 2.4 dB at least against 2^(-2 bits) at 3 bits, the trellis less than 1.7."""
    weight = random(1024, 64)
    lost = 10 * math.log10(error(fitted(weight, 3), weight) * 4**3)
    assert 1.0 < lost < 1.7

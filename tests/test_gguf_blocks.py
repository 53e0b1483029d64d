"""Blocks carried over stand for exactly the weights that ggml's dequantizer gives."""

import draws
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import quants
from gguf_fixtures import random_blocks

from leangen.exporters import gguf_blocks

FORMS = sorted(gguf_blocks.FORMS)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_stand_for_the_same_weights(form):
    data = random_blocks(draws.rng(), (24, 1536), form)
    expected = quants.dequantize(data, Type[form]).astype(np.float64)
    blocks = gguf_blocks.unpack(form, data)
    assert blocks.shape == expected.shape
    # Exact where there is no offset; an offset is one fp32 rounding away from ggml's own.
    tolerance = 0 if blocks.offsets is None else 2**-22 * np.abs(blocks.offsets).max()
    np.testing.assert_allclose(blocks.dequantize(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_codes_use_the_declared_width(form):
    blocks = gguf_blocks.unpack(form, random_blocks(draws.rng(), (8, 512), form))
    n, k = blocks.shape
    assert blocks.codes.nbytes * 8 == n * k * blocks.bits
    assert blocks.codes.dtype == np.uint8
    assert blocks.scales.shape == (n, k // blocks.block_size)
    stored = sum(a.nbytes for a in (blocks.codes, blocks.scales, blocks.offsets) if a is not None)
    assert blocks.bits_per_weight == pytest.approx(8 * stored / (n * k))


@pytest.mark.parametrize("form", FORMS)
def test_stacking_stacks_rows(form):
    rng = draws.rng()
    data = [random_blocks(rng, (n, 512), form) for n in (8, 24)]
    together = gguf_blocks.stack([gguf_blocks.unpack(form, part) for part in data])
    alone = gguf_blocks.unpack(form, np.concatenate(data))
    np.testing.assert_array_equal(together.dequantize(), alone.dequantize())

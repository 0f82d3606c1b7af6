"""Layouts of scales: every byte at its place, padding zero, and back."""

import pytest
import torch

from wush_compile.ops import layouts


@pytest.mark.parametrize("rows, groups", [(0, 4), (1, 1), (3, 18), (128, 4), (129, 5), (300, 48)])
def test_swizzled_scales(rows, groups):
    scales = torch.randint(1, 256, (rows, groups), dtype=torch.uint8)
    swizzled = layouts.swizzle_scales(scales)
    assert swizzled.shape == layouts.swizzled_shape(rows, groups) and swizzled.is_contiguous()
    flat, wide = swizzled.flatten(), swizzled.shape[1]
    r, c = torch.arange(rows)[:, None], torch.arange(groups)
    offset = (r // 128 * wide + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    assert torch.equal(flat[offset], scales)
    assert flat.count_nonzero() == scales.numel()  # what is not a scale is zero
    assert torch.equal(layouts.unswizzle_scales(swizzled, rows, groups), scales)

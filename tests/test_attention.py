"""CBAM scales by channel and by place, and by nothing else."""

import pytest
import torch

from autofed.training.attention import CBAM


@pytest.mark.parametrize("shape", [(6, 5), (4, 6, 5)])
def test_attention_scales_every_element_by_between_nought_and_one(shape):
    torch.manual_seed(0)
    block, image = CBAM(len(shape), 8), torch.rand(2, 8, *shape) + 0.5
    torch.nn.init.uniform_(block.squeeze.weight)  # no hidden unit is dead
    share = (block(image) / image).detach()
    assert share.shape == image.shape and share.min() > 0 and share.max() < 1
    # one factor per channel times one per place: all rows of the logarithm differ by a constant
    logs = share.log().flatten(2)
    differences = logs - logs[:, :1]
    assert torch.allclose(differences, differences[:, :, :1].expand_as(differences), atol=1e-4)
    assert differences.abs().max() > 1e-3 and (logs - logs[:, :, :1]).abs().max() > 1e-3


def test_without_weights_it_halves_twice():
    block = CBAM(2, 4)
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    image = torch.rand(1, 4, 3, 3)
    assert torch.allclose(block(image), image / 4)

"""The layers of the autoencoder: against plain convolutions."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_ddpm.autoencoder.vqvae import ResnetBlock, Upsample


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
def test_upsampling_is_a_convolution_of_doubled_pixels(batch, channels, height, width):
    torch.manual_seed(0)
    upsample, x = Upsample(channels).double(), torch.randn(batch, channels, height, width).double()
    doubled = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    expected, made = upsample.conv(doubled), upsample(x)
    assert torch.allclose(made, expected, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((y * weights).sum(), upsample.parameters(), retain_graph=True) for y in (made, expected)
    ]
    for ours, plain in zip(*gradients, strict=True):
        assert torch.allclose(ours, plain, atol=1e-12)


def test_a_residual_block_starts_as_its_skip():
    block, x = ResnetBlock(8, 8, 2), torch.randn(2, 8, 4, 4)
    assert torch.allclose(block(x) - x, block.conv2.bias.view(-1, 1, 1).expand_as(x), atol=1e-6)

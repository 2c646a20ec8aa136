"""A new U-Net starts as its skip connections, and every layer learns."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

from latent_ddpm.config import UNetConfig
from latent_ddpm.diffusion.unet import make_unet


@pytest.mark.parametrize("kind", ["default", "scale_shift"])
@torch.no_grad()
def test_a_new_unet_is_its_skips(kind):
    config = UNetConfig(
        dataset_name="x",
        unet_block_out_channels=[16, 32],
        unet_attention_levels=[0, 1],
        unet_norm_num_groups=8,
        unet_attention_head_dim=8,
        unet_time_scale_shift=kind,
    )
    unet = make_unet(config, 3, 4)
    noisy = torch.randn(2, 3, 4, 4)
    assert not unet(noisy, torch.tensor([3, 700])).sample.any()
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D | Attention)]
    assert len(blocks) == 12 + 11
    assert all(block.group_norm is not None for block in blocks if isinstance(block, Attention))
    for block in blocks:
        if isinstance(block, Attention):
            x = torch.randn(2, block.to_q.in_features, 4, 4)
            assert torch.equal(block(x), x)
        else:
            x = torch.randn(2, block.in_channels, 4, 4)
            skip = x if block.conv_shortcut is None else block.conv_shortcut(x)
            assert torch.equal(block(x, torch.randn(2, 64)), skip)
            assert block.time_embedding_norm == kind


@pytest.mark.parametrize("kind", ["default", "scale_shift"])
def test_a_new_unet_learns_in_every_layer(kind):
    torch.manual_seed(0)
    config = UNetConfig(
        dataset_name="x",
        unet_block_out_channels=[16, 32],
        unet_attention_levels=[1],
        unet_norm_num_groups=8,
        unet_time_scale_shift=kind,
    )
    unet = make_unet(config, 3, 4)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-2)
    for _ in range(4):  # zeroed layers pass gradients only after a step
        loss = (unet(torch.randn(4, 3, 4, 4), torch.randint(1000, (4,))).sample - torch.randn(4, 3, 4, 4)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    still = [name for name, value in unet.state_dict().items() if torch.equal(value, before[name])]
    # a key's bias shifts all logits of a query equally, which softmax ignores
    assert all(name.endswith("to_k.bias") for name in still), still

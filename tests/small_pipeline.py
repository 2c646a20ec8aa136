"""A stock pipeline with tiny networks, for the tests that draw."""

import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel


def save_pipeline(folder, scheduler=None):
    torch.manual_seed(0)
    vqvae = VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=64,
        scaling_factor=0.7,
    )
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    scheduler = scheduler or DDIMScheduler(prediction_type="v_prediction", clip_sample=False, beta_end=0.012)
    LDMPipeline(vqvae=vqvae, unet=unet, scheduler=scheduler).save_pretrained(folder)
    return folder

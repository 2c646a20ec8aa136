"""Every class of autoencoder that stage 2 takes, with tiny networks and random weights."""

import diffusers
import torch
from conftest import fill_zeros

TWO = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
FLUX = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
SPATIAL = {
    **TWO,
    "block_out_channels": (32, 32),
    "up_block_types": ("AttnUpDecoderBlock2D",) * 2,
    "norm_num_groups": 32,
    "norm_type": "spatial",
}
DEEP = {
    **{f"{part}_block_out_channels": (8, 16, 16) for part in ("encoder", "decoder")},
    **{f"{part}_layers_per_block": (1, 1, 1) for part in ("encoder", "decoder")},
    **{f"{part}_qkv_multiscales": ((), (), (5,)) for part in ("encoder", "decoder")},
    **{f"{part}_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock") for part in ("encoder", "decoder")},
}
VIT = {
    "encoder_type": "mae",
    "encoder_hidden_size": 64,
    "encoder_patch_size": 4,
    "encoder_num_hidden_layers": 1,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
    "patch_size": 4,
    "encoder_input_size": 16,
}
SMALL = {  # class, arguments; images of 16 pixels
    "kl": ("AutoencoderKL", TWO),
    "kl as in FLUX": ("AutoencoderKL", {**TWO, **FLUX, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
    "vq": ("VQModel", {**TWO, "num_vq_embeddings": 16, "vq_embed_dim": 3, "latent_channels": 4}),
    "vq with spatial normalization": ("VQModel", {**SPATIAL, "num_vq_embeddings": 16, "latent_channels": 4}),
    "asymmetric": (
        "AsymmetricAutoencoderKL",
        {key: TWO[key] for key in ("down_block_types", "up_block_types", "norm_num_groups")}
        | {"down_block_out_channels": (8, 16), "up_block_out_channels": (8, 16)},
    ),
    "flux2": ("AutoencoderKLFlux2", {**TWO, "latent_channels": 8}),
    "rae": ("AutoencoderRAE", VIT),
    "tiny": (
        "AutoencoderTiny",
        {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
        | {f"num_{part}_blocks": (1, 1) for part in ("encoder", "decoder")},
    ),
    "dc": ("AutoencoderDC", {**DEEP, "latent_channels": 8, "attention_head_dim": 8}),
    "hunyuan": (
        "AutoencoderKLHunyuanImage",
        {"in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": (32, 64)}
        | {"layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 16},
    ),
    "kvae": (
        "AutoencoderKLKVAE",
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2)},
    ),
    "qwen": (
        "AutoencoderKLQwenImage",
        {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
        | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
    ),
}
FOLDS = [name for name, (kind, _) in SMALL.items() if kind in
         ("AutoencoderKL", "VQModel", "AsymmetricAutoencoderKL", "AutoencoderKLFlux2", "AutoencoderRAE")]  # fmt: skip


def small_autoencoder(name, seed=0):
    """One of SMALL, for images (B, 3, 16, 16)."""
    kind, arguments = SMALL[name]
    torch.manual_seed(seed)
    autoencoder = fill_zeros(getattr(diffusers, kind)(**arguments)).eval().requires_grad_(False)
    if kind == "VQModel":
        torch.nn.init.normal_(autoencoder.quantize.embedding.weight)
    return autoencoder

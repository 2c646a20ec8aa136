"""Pipelines with tiny networks, for the tests that draw."""

import copy

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DConditionModel, UNet2DModel, VQModel

from pipeline_latent_ddpm import LatentDDPMPipeline

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "fish", "bird"]
CONFIG = {  # of LatentDDPMPipeline, by what it is conditioned on
    "class": {"class_names": ["cat", "dog"]},
    "map": {"conditioning_classes": 2},
    "text": {"max_caption_tokens": 4},
}
CHANNELS = {"image": 4, "map": 2}


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


def small_text(folder):
    """A text encoder of 8 channels that knows a few words, and its tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizer

    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **shape)).eval()
    return {"text_encoder": encoder, "tokenizer": BertTokenizer(str(folder / "vocab.txt"))}


def small_autoencoder(kl=False):
    """For images 3x16x16, latents 3x8x8."""
    torch.manual_seed(0)
    shape = {"in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "norm_num_groups": 4}
    shape |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    shape |= {"latent_channels": 3, "scaling_factor": 0.7, "mid_block_add_attention": False}
    if kl:
        return AutoencoderKL(**shape).eval()
    vqvae = VQModel(num_vq_embeddings=64, **shape).eval()
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    return vqvae


def make(kinds, text=None, kl=False, **config):
    """A LatentDDPMPipeline.

    Args:
        kinds: what it is conditioned on, of class, image or map, and text, in one word such as "class text".
        text: from `small_text`, for text.
        kl: with an AutoencoderKL instead of a VQModel.
        config: further arguments of the pipeline.
    """
    kinds = kinds.split()
    config = {key: value for kind in kinds for key, value in CONFIG.get(kind, {}).items()} | config
    vqvae = small_autoencoder(kl)
    channels = sum(CHANNELS.get(kind, 0) for kind in kinds)
    classes = len(config["class_names"]) + 1 if "class" in kinds else None
    shape = {"sample_size": 8, "in_channels": 3 + channels, "out_channels": 3, "layers_per_block": 1,
             "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8,
             "num_class_embeds": classes}  # fmt: skip
    attention = "CrossAttn" if "text" in kinds else "Attn"
    shape["down_block_types"] = ("DownBlock2D", f"{attention}DownBlock2D")
    shape["up_block_types"] = (f"{attention}UpBlock2D", "UpBlock2D")
    if "text" in kinds:
        unet, config = UNet2DConditionModel(cross_attention_dim=8, **shape), copy.deepcopy(text) | config
    else:
        unet = UNet2DModel(**shape)
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, beta_end=0.012)
    pipe = LatentDDPMPipeline(vqvae=vqvae, unet=unet.eval(), scheduler=scheduler, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe

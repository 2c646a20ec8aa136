"""LatentDDPMPipeline: against stock LDMPipeline and closed forms, and its documented behaviour."""

import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from diffusers.callbacks import PipelineCallback
from PIL import Image

from pipeline_latent_ddpm import LatentDDPMPipeline, noise_level, skip_steps

# Not ours: diffusers' schedulers convert tensors to numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

PIPELINE_FILE = Path(__file__).parents[1] / "pipeline_latent_ddpm.py"
NOISE_TABLE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {}),
    "pndm-plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    "dpmsolver++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-leading": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
STOCHASTIC = {"ddpm", "dpmsolver++-sde", "euler-a", "kdpm2-a"}
MIDWAY = [name for name in SCHEDULERS if name != "pndm"]  # pndm needs its Runge-Kutta steps at the start
WITHOUT_SAMPLE = {"pndm", "pndm-plms", "euler-a", "kdpm2", "kdpm2-a"}  # without prediction_type "sample" in diffusers


def make_scheduler(name, **changes):
    class_name, config = SCHEDULERS[name]
    table = {"num_train_timesteps": 1000} if class_name.startswith("FlowMatch") else NOISE_TABLE
    return getattr(diffusers, class_name)(**table | config | changes)


def make_unet(latent_channels=3):
    torch.manual_seed(1)
    return UNet2DModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()


def make_components(channels=3):
    torch.manual_seed(0)
    vqvae = VQModel(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=64,
        scaling_factor=0.7,
    ).eval()
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)  # spread like latents, so that all codes are used
    return {"vqvae": vqvae, "unet": make_unet(), "scheduler": make_scheduler("ddim")}


def make_pipeline(channels=3, **components):
    pipe = LatentDDPMPipeline(**make_components(channels) | components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export as training writes it: a stock LDMPipeline folder with pipeline.py."""
    folder = tmp_path_factory.mktemp("export") / "pipeline"
    LDMPipeline(**make_components()).save_pretrained(folder)
    shutil.copy(PIPELINE_FILE, folder / "pipeline.py")
    return folder


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------- stock at the edge


@pytest.mark.parametrize("channels", [1, 3])
def test_draws_the_images_of_stock_ldm_pipeline(channels):
    stock, ours = LDMPipeline(**make_components(channels)), make_pipeline(channels)
    stock.set_progress_bar_config(disable=True)
    arguments = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"}
    expected = stock(generator=seeded(), **arguments).images
    images = ours(generator=seeded(), **arguments).images
    assert images.shape == (2, 16, 16, channels)
    assert expected.std() > 0.01
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-6)


def test_from_pretrained_of_a_folder_that_says_ldm_pipeline(folder):
    pipe = LatentDDPMPipeline.from_pretrained(folder)
    assert isinstance(pipe.vqvae, VQModel) and isinstance(pipe.unet, UNet2DModel)
    assert isinstance(pipe.scheduler, DDIMScheduler)


# ---------------------------------------------------------------------------------- schedulers


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_runs(name):
    pipe = make_pipeline(scheduler=make_scheduler(name))
    runs = [pipe(batch_size=2, num_inference_steps=5, generator=seeded(), output_type="pt").images for _ in range(2)]
    assert runs[0].shape == (2, 3, 16, 16)
    assert runs[0].isfinite().all() and runs[0].min() >= 0 and runs[0].max() <= 1
    assert torch.equal(runs[0], runs[1])  # the first call leaves no state in the scheduler
    assert pipe.num_timesteps == len(pipe.scheduler.timesteps)


def level(t, flow):
    """(keep, spread) of the U-Net's input keep * x0 + spread * noise at timestep t."""
    t = float(t)
    if flow:
        return 1 - t / 1000, t / 1000
    # log sigma is interpolated between the whole timesteps, as second-order schedulers do
    alphas = DDIMScheduler(**NOISE_TABLE).alphas_cumprod.double().numpy()
    log_sigma = np.interp(t, np.arange(1000), np.log((1 - alphas) / alphas) / 2)
    keep = (1 + np.exp(2 * log_sigma)) ** -0.5
    return keep, (1 - keep**2) ** 0.5


class GaussianUNet(UNet2DModel):
    """The exact predictor for data N(MEAN, STD**2), the optimum of training."""

    MEAN, STD = 2.0, 0.5

    def forward(self, sample, timestep, return_dict=True):
        keep, spread = level(timestep, self.flow)
        residual = (sample - keep * self.MEAN) / (keep**2 * self.STD**2 + spread**2)
        x0, noise = self.MEAN + keep * self.STD**2 * residual, spread * residual
        prediction = noise - x0 if self.flow else keep * noise - spread * x0  # v of arXiv 2202.00512, appendix D
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=prediction)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_finds_gaussian_data(name):
    unet = GaussianUNet.from_config(make_unet().config)
    unet.flow = name.startswith("flow")
    pipe = make_pipeline(unet=unet, scheduler=make_scheduler(name))
    noise = torch.randn(16, 3, 8, 8, generator=seeded())
    found = pipe(batch_size=16, num_inference_steps=50, latents=noise, generator=seeded(1), output_type="latent").images
    assert found.std().item() == pytest.approx(unet.STD, rel=0.12)
    if name in STOCHASTIC:
        assert found.mean().item() == pytest.approx(unet.MEAN, abs=0.02)
    else:
        # The probability flow is a straight line. A true x_T still contains a little of the mean, but the initial
        # noise does not; flow matching ends in pure noise.
        keep = 0.0 if unet.flow else float(DDIMScheduler(**NOISE_TABLE).alphas_cumprod[-1]) ** 0.5
        scale = unet.STD / (keep**2 * unet.STD**2 + 1 - keep**2) ** 0.5
        assert torch.allclose(found, unet.MEAN + scale * (noise - keep * unet.MEAN), atol=0.15)


def test_ddim_agrees_with_the_paper():
    pipe = make_pipeline()
    noise = torch.randn(2, 3, 8, 8, generator=seeded())
    found = pipe(batch_size=2, num_inference_steps=5, latents=noise, output_type="latent").images

    betas = torch.linspace(NOISE_TABLE["beta_start"] ** 0.5, NOISE_TABLE["beta_end"] ** 0.5, 1000).double() ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    x = noise
    for t in (800, 600, 400, 200, 0):
        alpha, before = alphas[t], alphas[t - 200] if t else torch.tensor(1.0)
        with torch.no_grad():
            v = pipe.unet(x, t).sample
        x0 = alpha.sqrt() * x - (1 - alpha).sqrt() * v  # arXiv 2202.00512, appendix D
        noise = alpha.sqrt() * v + (1 - alpha).sqrt() * x
        x = (before.sqrt() * x0 + (1 - before).sqrt() * noise).float()  # arXiv 2010.02502, equation 12, sigma = 0
    assert torch.allclose(found, x, atol=1e-5)


def test_eta_reaches_ddim_and_is_kept_from_the_others():
    arguments = {"num_inference_steps": 4, "output_type": "latent"}
    pipe = make_pipeline()
    noisy = pipe(eta=1.0, generator=seeded(), **arguments).images
    assert not torch.allclose(noisy, pipe(eta=0.0, generator=seeded(), **arguments).images, atol=1e-3)
    assert torch.equal(noisy, pipe(eta=1.0, generator=seeded(), **arguments).images)
    pipe.scheduler = make_scheduler("euler")
    assert torch.equal(
        pipe(eta=1.0, generator=seeded(), **arguments).images, pipe(eta=0.0, generator=seeded(), **arguments).images
    )


# ---------------------------------------------------------------------------------- noise


def test_latents_stand_in_for_the_draw():
    pipe = make_pipeline(scheduler=make_scheduler("euler"))  # init_noise_sigma is far from 1
    arguments = {"batch_size": 2, "num_inference_steps": 3, "output_type": "latent"}
    noise = torch.randn(2, 3, 8, 8, generator=seeded(5))
    kept = noise.clone()
    given = pipe(latents=noise, **arguments).images
    assert torch.equal(given, pipe(generator=seeded(5), **arguments).images)
    assert torch.equal(noise, kept)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmsolver++-sde", "euler-a"])
def test_image_follows_from_its_own_generator(name):
    pipe = make_pipeline(scheduler=make_scheduler(name))
    arguments = {"num_inference_steps": 4, "eta": 1.0, "output_type": "latent"}
    together = pipe(batch_size=3, generator=[seeded(i) for i in (7, 8, 9)], **arguments).images
    alone = pipe(batch_size=1, generator=[seeded(8)], **arguments).images
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    assert not torch.allclose(together[:1], together[1:2], atol=0.1)


# ---------------------------------------------------------------------------------- callbacks


def test_callback_reads_and_replaces_latents():
    pipe = make_pipeline()
    seen = []

    def callback(pipe, step, t, inputs):
        seen.append((step, int(t), inputs["latents"].clone()))
        return {"latents": torch.ones_like(inputs["latents"])} if step == 2 else {}

    images = pipe(num_inference_steps=3, output_type="latent", callback_on_step_end=callback).images
    assert [entry[:2] for entry in seen] == [(0, 666), (1, 333), (2, 0)]
    assert not torch.equal(seen[0][2], seen[1][2])
    assert torch.equal(images, torch.ones_like(images))


def test_callback_replacement_enters_the_next_step():
    pipe = make_pipeline()
    noise = torch.randn(1, 3, 8, 8, generator=seeded())
    arguments = {"num_inference_steps": 3, "latents": noise, "output_type": "latent"}
    same = pipe(callback_on_step_end=lambda pipe, step, t, inputs: inputs, **arguments).images
    changed = pipe(
        callback_on_step_end=lambda pipe, step, t, inputs: {"latents": inputs["latents"] + (step == 0)}, **arguments
    ).images
    assert torch.equal(same, pipe(**arguments).images)
    assert not torch.allclose(same, changed, atol=1e-3)


def test_interrupt_skips_what_remains_and_is_forgotten():
    pipe = make_pipeline()
    steps = []

    class Stop(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            steps.append(step_index)
            pipeline._interrupt = step_index == 1
            return callback_kwargs

    assert pipe(num_inference_steps=4, callback_on_step_end=Stop(), output_type="pt").images.isfinite().all()
    assert steps == [0, 1]
    assert pipe.interrupt
    pipe(num_inference_steps=1)
    assert not pipe.interrupt


@pytest.mark.parametrize("name", ["ddim", "heun", "pndm"])
def test_progress_bar_counts_steps_not_evaluations(name):
    pipe = make_pipeline(scheduler=make_scheduler(name))
    bars = []

    class Bar:
        def __init__(self, total):
            self.total, self.count = total, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self):
            self.count += 1

    pipe.progress_bar = lambda iterable=None, total=None: Bar(total)
    pipe(num_inference_steps=5, output_type="latent")
    assert [(bar.total, bar.count) for bar in bars] == [(5, 5)]


# ---------------------------------------------------------------------------------- predicted x0


class OracleUNet(UNet2DModel):
    """The exact predictor for data of one point, `self.point`, for any prediction type `self.kind`."""

    def forward(self, sample, timestep, return_dict=True):
        keep, spread = level(timestep, self.kind == "flow")
        noise = (sample - keep * self.point) / spread
        prediction = {
            "epsilon": noise,
            "v_prediction": keep * noise - spread * self.point,
            "sample": self.point,
            "flow": noise - self.point,
        }[self.kind]
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=prediction)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_predicted_original_is_the_only_data_point(name, kind):
    flow = name.startswith("flow")
    if (flow and kind != "epsilon") or (kind == "sample" and name in WITHOUT_SAMPLE):
        pytest.skip("there is no such scheduler")
    unet = OracleUNet.from_config(make_unet().config)
    unet.kind = "flow" if flow else kind
    unet.point = torch.randn(2, 3, 8, 8, generator=seeded(1))
    pipe = make_pipeline(unet=unet, scheduler=make_scheduler(name, **({} if flow else {"prediction_type": kind})))
    seen = []
    pipe(
        batch_size=2,
        num_inference_steps=7,
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=lambda pipe, step, t, inputs: seen.append(inputs["pred_original_sample"]) or {},
        callback_on_step_end_tensor_inputs=["pred_original_sample"],
    )
    assert len(seen) == pipe.num_timesteps
    assert max((x0 - unet.point).abs().max() for x0 in seen) < 1e-3


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "name", ["ddim", "ddpm", "euler", "euler-leading", "euler-a", "heun", "kdpm2", "kdpm2-a", "lms"]
)
def test_predicted_original_is_the_schedulers_own(name, kind):
    pipe = make_pipeline(scheduler=make_scheduler(name, prediction_type=kind))
    own, seen, step = [], [], pipe.scheduler.step

    def watched_step(prediction, t, latents, generator=None, **arguments):
        if "generator" in step.__func__.__code__.co_varnames:
            arguments["generator"] = generator
        own.append(step(prediction, t, latents, **arguments | {"return_dict": True}))
        return (own[-1].prev_sample,)

    pipe.scheduler.step = watched_step
    pipe(
        num_inference_steps=5,
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=lambda pipe, step, t, inputs: seen.append(inputs["pred_original_sample"]) or {},
        callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
    )
    assert len(own) == len(seen) >= 5
    for theirs, ours in zip(own, seen, strict=True):
        assert torch.allclose(ours, theirs.pred_original_sample, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------- starting from an image


def picture(count=1, seed=3, channels=3, side=16):
    return torch.rand(count, channels, side, side, generator=seeded(seed))


def to_pil(images):
    return LatentDDPMPipeline.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())


def hole(top=4, left=5, height=6, width=7, side=16):
    """A mask whose edges do not match the latents of 2x2 pixels."""
    mask = torch.zeros(1, 1, side, side)
    mask[..., top : top + height, left : left + width] = 1
    return mask


@pytest.mark.parametrize("name", MIDWAY)
@pytest.mark.parametrize("skipped", [1, 4])
def test_noise_level_is_that_of_the_schedulers_own_noising(name, skipped):
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(6)
    timesteps = skip_steps(scheduler, skipped)
    clean, noise = torch.randn(2, 2, 3, 8, 8, generator=seeded())
    keep, spread = noise_level(scheduler, timesteps[0])
    if name.startswith("flow"):
        expected = scheduler.scale_noise(clean, timesteps[:1], noise)
    else:
        expected = scheduler.add_noise(clean, noise, timesteps[:1])
    assert torch.allclose(keep * clean + spread * noise, expected, atol=1e-4)
    if name != "lms":  # lms has a truncated schedule
        begins_at = len(scheduler.timesteps) - len(timesteps)
        assert getattr(scheduler, "begin_index", begins_at) == begins_at


@pytest.mark.parametrize("name", MIDWAY)
def test_every_scheduler_takes_gaussian_data_from_midway_back_to_it(name):
    unet = GaussianUNet.from_config(make_unet().config)
    unet.flow = name.startswith("flow")
    pipe = make_pipeline(unet=unet, scheduler=make_scheduler(name))
    clean, noise = torch.randn(2, 8, 3, 8, 8, generator=seeded())
    clean = clean * unet.STD + unet.MEAN
    pipe.encode = lambda images: clean
    begins = []
    found = pipe(
        batch_size=8,
        num_inference_steps=50,
        image=picture(),
        strength=0.5,
        latents=noise,
        generator=seeded(1),
        output_type="latent",
        callback_on_step_end=lambda pipe, step, t, inputs: begins.append(t) or {},
    ).images
    assert pipe.num_timesteps == len(begins)
    assert pipe.num_timesteps == {"heun": 49, "flow-heun": 49, "kdpm2": 49, "kdpm2-a": 49, "pndm-plms": 26}.get(
        name, 25
    )
    if name in STOCHASTIC:
        assert found.mean().item() == pytest.approx(unet.MEAN, abs=0.03)
        assert found.std().item() == pytest.approx(unet.STD, rel=0.15)
    else:  # the probability flow is a straight line, here from a true x_t
        keep, spread = level(begins[0], unet.flow)
        scale = unet.STD / (keep**2 * unet.STD**2 + spread**2) ** 0.5
        expected = unet.MEAN + scale * (keep * clean + spread * noise - keep * unet.MEAN)
        # The linear multistep method must not lack its history when it begins midway.
        assert torch.allclose(found, expected, atol=0.01 if name == "lms" else 0.1)


def test_strength_one_leaves_nothing_of_the_image():
    pipe = make_pipeline(scheduler=make_scheduler("euler"))
    arguments = {"batch_size": 2, "num_inference_steps": 4, "output_type": "latent"}
    without = pipe(generator=seeded(), **arguments).images
    assert torch.equal(pipe(image=picture(), strength=1.0, generator=seeded(), **arguments).images, without)
    by_default = pipe(image=picture(), generator=seeded(), **arguments).images
    assert torch.equal(by_default, pipe(image=picture(), strength=0.8, generator=seeded(), **arguments).images)
    assert not torch.allclose(by_default, without, atol=0.1)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "flow-euler"])
def test_little_strength_leaves_nearly_the_image(name):
    pipe = make_pipeline(scheduler=make_scheduler(name))
    clean = pipe.encode(picture() * 2 - 1)
    distances = []
    for steps, strength in ((1000, 0.0001), (20, 0.3), (20, 0.9)):
        found = pipe(
            num_inference_steps=steps, image=picture(), strength=strength, generator=seeded(), output_type="latent"
        ).images
        distances.append(((found - clean).std() / clean.std()).item())
    assert pipe.num_timesteps == 18
    assert distances[0] < 0.2 and distances[0] < distances[1] < distances[2]


def test_image_and_mask_in_every_form():
    pipe = make_pipeline()
    arguments = {"batch_size": 2, "num_inference_steps": 3, "output_type": "pt", "strength": 0.7}
    whole = torch.from_numpy((picture(2) * 255).round().numpy() / 255)  # torch's division differs in the last bit
    draw = lambda image, mask: pipe(image=image, mask_image=mask, generator=seeded(), **arguments).images  # noqa: E731
    expected = draw(whole, hole())
    mask = to_pil(hole())[0]
    assert torch.equal(draw(to_pil(whole), mask), expected)
    assert torch.equal(draw([*whole], hole().expand(2, -1, -1, -1)), expected)
    assert torch.equal(draw(whole.permute(0, 2, 3, 1).numpy(), [mask, mask.convert("RGB")]), expected)
    one = draw(to_pil(whole)[0], mask)
    assert torch.allclose(one[0], expected[0], atol=1e-4) and not torch.allclose(one[1], expected[1], atol=0.1)
    larger = to_pil(whole.repeat_interleave(3, 2).repeat_interleave(3, 3))
    assert draw(larger, mask.resize((48, 48), Image.Resampling.NEAREST)).shape == expected.shape


def test_colour_is_for_models_of_colour():
    gray = make_pipeline(channels=1)
    coloured = to_pil(picture())[0]
    found = gray(image=coloured, mask_image=hole(0, 0, 2, 2), num_inference_steps=2).images[0]
    assert found.mode == "L"
    np.testing.assert_array_equal(np.asarray(found)[4:], np.asarray(coloured.convert("L"))[4:])


# ---------------------------------------------------------------------------------- a mask


@pytest.mark.parametrize("name", SCHEDULERS)
def test_only_the_inside_of_the_mask_changes(name):
    pipe = make_pipeline(scheduler=make_scheduler(name))
    image, outside = picture(2), ~hole().bool().expand(2, 3, -1, -1)
    for strength in (1.0,) if name == "pndm" else (1.0, 0.5):
        arguments = {"batch_size": 2, "num_inference_steps": 5, "image": image, "strength": strength}
        found = pipe(mask_image=hole(), generator=seeded(), output_type="pt", **arguments).images
        assert torch.equal(found[outside], image[outside])
        assert (found - image)[~outside].abs().mean() > 0.05
        latents = pipe(mask_image=hole(), generator=seeded(), output_type="latent", **arguments).images
        kept = torch.ones(8, 8, dtype=bool)
        kept[2:5, 2:6] = False  # every latent with a pixel of the hole
        clean = pipe.encode(image * 2 - 1)
        assert torch.equal(latents[..., kept], clean[..., kept])
        assert not (latents == clean)[..., ~kept].any()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_unet_sees_the_image_at_its_noise_level_outside_of_the_mask(name):
    pipe = make_pipeline(scheduler=make_scheduler(name))
    noise = torch.randn(1, 3, 8, 8, generator=seeded())
    clean = pipe.encode(picture() * 2 - 1)
    seen, forward = [], pipe.unet.forward

    def watched_forward(sample, t, **arguments):
        seen.append((sample.clone(), t))
        return forward(sample, t, **arguments)

    pipe.unet.forward = watched_forward
    strength = 1.0 if name == "pndm" else 0.7
    pipe(num_inference_steps=5, image=picture(), mask_image=hole(), strength=strength, latents=noise)
    assert len(seen) == pipe.num_timesteps
    for sample, t in seen:
        keep, spread = level(t, name.startswith("flow"))
        assert torch.allclose(sample[..., 6:], (keep * clean + spread * noise)[..., 6:], atol=1e-3)
        assert not torch.allclose(sample[..., 2:5, 2:6], (keep * clean + spread * noise)[..., 2:5, 2:6], atol=1e-2) or (
            t == seen[0][1] and strength < 1
        )


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++-sde", "euler-a", "flow-heun"])
def test_painted_image_follows_from_its_own_generator(name):
    pipe = make_pipeline(scheduler=make_scheduler(name))
    arguments = {"num_inference_steps": 5, "eta": 1.0, "strength": 0.6, "mask_image": hole(), "output_type": "latent"}
    images = picture(3)
    together = pipe(batch_size=3, image=images, generator=[seeded(i) for i in (7, 8, 9)], **arguments).images
    alone = pipe(batch_size=1, image=images[1:2], generator=[seeded(8)], **arguments).images
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    other = pipe(batch_size=1, image=images[1:2], generator=[seeded(9)], **arguments).images
    assert not torch.allclose(other, alone, atol=0.1)


def test_each_image_has_its_own_mask():
    pipe = make_pipeline()
    masks = torch.cat((torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16)))
    arguments = {"batch_size": 2, "num_inference_steps": 3, "output_type": "pt"}
    found = pipe(image=picture(2), mask_image=masks, generator=seeded(), **arguments).images
    assert torch.equal(found[0], picture(2)[0])
    assert torch.equal(found[1], pipe(generator=seeded(), **arguments).images[1])  # fully masked: as without image


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ddim", "euler", "kdpm2", "flow-euler", "unipc"])
def test_half_precision_with_an_image(folder, dtype, name):
    pipe = LatentDDPMPipeline.from_pretrained(folder).to(dtype)
    pipe.scheduler = make_scheduler(name)
    pipe.set_progress_bar_config(disable=True)
    kinds = []
    arguments = {"num_inference_steps": 4, "image": picture(), "mask_image": hole(), "strength": 0.6}
    found = pipe(
        generator=seeded(),
        output_type="pt",
        callback_on_step_end=lambda pipe, step, t, inputs: kinds.extend(x.dtype for x in inputs.values()) or {},
        callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
        **arguments,
    ).images
    assert found.dtype == torch.float32 and found.isfinite().all() and set(kinds) == {torch.float32}
    outside = ~hole().bool().expand(1, 3, -1, -1)
    assert torch.equal(found[outside], picture()[outside])
    latents = pipe(generator=seeded(), output_type="latent", **arguments).images
    full = make_pipeline(scheduler=make_scheduler(name))
    close = full(generator=seeded(), output_type="latent", **arguments).images
    assert latents.dtype == dtype and (close - latents.float()).abs().mean() < 0.05 * close.std()


# ---------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types_agree(channels, mode):
    pipe = make_pipeline(channels)
    arguments = {"batch_size": 2, "num_inference_steps": 3, "latents": torch.randn(2, 3, 8, 8, generator=seeded())}
    pt, array, pil, latents = (pipe(output_type=kind, **arguments).images for kind in ("pt", "np", "pil", "latent"))
    assert pt.shape == (2, channels, 16, 16) and pt.dtype == torch.float32 and pt.min() >= 0 and pt.max() <= 1
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert [image.mode for image in pil] == [mode, mode]
    pixels = np.stack([np.asarray(image).reshape(16, 16, channels) for image in pil])
    assert np.abs(pixels / 255 - array).max() <= 0.5 / 255 + 1e-6
    assert latents.shape == (2, 3, 8, 8)
    assert torch.equal(pipe.decode(latents) / 2 + 0.5, pt)
    (same,) = pipe(output_type="pt", return_dict=False, **arguments)
    assert torch.equal(same, pt)


def test_latents_are_in_model_space():
    pipe = make_pipeline()
    images = torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1
    with torch.no_grad():
        own = pipe.vqvae.encode(images).latents
        decoded = pipe.vqvae.decode(own).sample
    latents = pipe.encode(images)
    assert torch.equal(latents, own * 0.7)
    assert torch.allclose(pipe.decode(latents), decoded.clamp(-1, 1), atol=1e-5)


def test_autoencoder_kl():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=3,
        norm_num_groups=4,
        scaling_factor=0.5,
    ).eval()
    pipe = make_pipeline(vqvae=vae)
    images = torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1
    with torch.no_grad():
        mean = vae.encode(images).latent_dist.mean
    assert torch.equal(pipe.encode(images), mean * 0.5)
    assert pipe(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 16, 16, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ddim", "dpmsolver++-sde", "euler", "flow-euler", "unipc"])
def test_half_precision(folder, dtype, name):
    pipe = LatentDDPMPipeline.from_pretrained(folder).to(dtype)
    pipe.scheduler = make_scheduler(name)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 3, "generator": seeded()}
    latents = pipe(output_type="latent", **arguments).images
    assert latents.dtype == pipe.unet.dtype == dtype and latents.isfinite().all()
    array = pipe(output_type="np", **arguments).images
    assert array.dtype == np.float32 and np.isfinite(array).all()
    full = make_pipeline(scheduler=make_scheduler(name))
    close = full(num_inference_steps=3, generator=seeded(), output_type="latent").images
    assert (close - latents.float()).abs().mean() < 0.05 * close.std()  # the same noise gives the same image


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent, got 'jpeg'"),
        ({"batch_size": 2, "generator": [seeded()]}, "generator is a list of 1 for batch_size 2"),
        ({"latents": torch.zeros(1, 3, 8, 9)}, r"latents must have shape \(1, 3, 8, 8\), got \(1, 3, 8, 9\)"),
        ({"batch_size": 2, "latents": torch.zeros(1, 3, 8, 8)}, r"latents must have shape \(2, 3, 8, 8\)"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs .* got \\['noise'\\]"),
    ],
)
def test_errors_name_what_was_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0.5}, "strength and mask_image need an image"),
        ({"mask_image": torch.ones(1, 1, 16, 16)}, "strength and mask_image need an image"),
        ({"image": torch.zeros(1, 3, 16, 16), "strength": 0.0}, r"strength must be in \(0, 1\], got 0.0"),
        ({"image": torch.zeros(1, 3, 16, 16), "strength": 1.5}, r"strength must be in \(0, 1\], got 1.5"),
        ({"image": torch.zeros(2, 3, 16, 16)}, r"image must be 1 or 1 of 3 channels .* got the shape \(2, 3"),
        ({"image": torch.zeros(1, 1, 16, 16)}, r"image must be .* of 3 channels \(16x16 pixels\), got the shape"),
        ({"image": -torch.ones(1, 3, 16, 16)}, r"image must be in \[0, 1\], got \[-1, -1\]"),
        ({"image": torch.full((1, 3, 16, 16), torch.nan)}, r"image must be in \[0, 1\], got \[nan"),
        (
            {"image": torch.zeros(1, 3, 16, 16), "mask_image": torch.zeros(3, 1, 16, 16)},
            r"mask_image must be 1 or 1 of 1 channels",
        ),
        ({"image": "photo.png"}, "incorrect format"),
    ],
)
def test_errors_about_images_name_what_was_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(**arguments)


def test_schedulers_that_do_not_fit_are_refused_by_name():
    midway = {"num_inference_steps": 10, "image": picture(), "strength": 0.5}
    with pytest.raises(ValueError, match="PNDMScheduler cannot begin midway with skip_prk_steps=False"):
        make_pipeline(scheduler=make_scheduler("pndm"))(**midway)
    with pytest.raises(ValueError, match="EDMEulerScheduler does not say how noisy"):
        make_pipeline(scheduler=diffusers.EDMEulerScheduler())(**midway)


def test_error_when_the_unet_does_not_say_its_size():
    pipe = make_pipeline()
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="sample_size"):
        pipe()


def test_the_uploaded_file_stands_alone():
    imported = {
        line.split()[1].split(".")[0]
        for line in PIPELINE_FILE.read_text().splitlines()
        if line.startswith(("import ", "from "))
    }
    assert imported - sys.stdlib_module_names <= {"torch", "numpy", "PIL", "diffusers", "huggingface_hub"}

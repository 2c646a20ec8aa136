"""LatentDDPMPipeline does what diffusers' own pipelines do: the promises that diffusers' PipelineTesterMixin checks.

Each check is for a model without conditions and for one of each kind of condition.
"""

import inspect
import json
import shutil

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from conftest import ROOT
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from small_pipeline import CONFIG, make, small_text

from pipeline_latent_ddpm import LatentDDPMPipeline

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:__array:DeprecationWarning")

KINDS = ["none", "class", "image", "map", "text"]
MAP = Image.fromarray(np.repeat(np.arange(16, dtype=np.uint8)[None] // 8, 16, 0))
GIVEN = {
    "none": {},
    "class": {"class_labels": "dog"},
    "image": {"conditioning_image": Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3))},
    "map": {"conditioning_image": MAP},
    "text": {"prompt": "a red fish"},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return small_text(tmp_path_factory.mktemp("words"))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def pipe(kind, text):
    return make(kind, text)


def draw(pipe, kind="none", **words):
    """float32 (B, 3, 16, 16) of a fixed seed."""
    words = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"} | words
    pipe.set_progress_bar_config(disable=True)
    images = pipe(**GIVEN[kind] | words).images
    assert images.isfinite().all()
    return images


def same(found, expected):
    """Up to the last bits, which depend on where in memory the weights are."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def load(folder, **words):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True, **words)
    assert type(pipe).__name__ == "LatentDDPMPipeline"
    return pipe


# ------------------------------------------------------------------------------------------------ save and load


def test_saved_is_loaded(pipe, kind, tmp_path):
    expected = draw(pipe, kind)
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.__class__.__module__.startswith("diffusers_modules.")
    same(draw(again, kind), expected)
    assert {key: list(v) if isinstance(v, list) else v for key, v in again.parameters.items() if v is not None} == (
        CONFIG.get(kind, {})
    )
    assert (again.text_encoder is None) == (again.tokenizer is None) == (kind != "text")
    for loaded in (LatentDDPMPipeline.from_pretrained(tmp_path), LatentDDPMPipeline.from_pretrained(str(tmp_path))):
        assert type(loaded) is LatentDDPMPipeline and loaded.name_or_path in (str(tmp_path), tmp_path)
        same(draw(loaded, kind), expected)
    # by the class that diffusers has made of the file, over a folder of another model, and over its own
    again.save_pretrained(tmp_path)
    other = tmp_path / "other"
    make("class" if kind != "class" else "none", {}).save_pretrained(other)
    again.save_pretrained(other)
    for folder in (tmp_path, other):
        assert (folder / "pipeline.py").read_bytes() == (ROOT / "pipeline_latent_ddpm.py").read_bytes()
        same(draw(load(folder), kind), expected)


def test_what_stock_diffusers_can_draw_is_saved_as_stock(text, tmp_path):
    pipe = make("none", text)
    pipe.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is LDMPipeline
    stock.set_progress_bar_config(disable=True)
    words = {"num_inference_steps": 2, "output_type": "np"}
    images = stock(generator=torch.Generator().manual_seed(0), **words).images
    np.testing.assert_allclose(
        images, pipe(generator=torch.Generator().manual_seed(0), **words).images, rtol=0, atol=1e-6
    )
    assert "text_encoder" not in json.loads((tmp_path / "model_index.json").read_text())
    pipe.unet = torch.compile(pipe.unet)  # of which the weights alone are saved
    pipe.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is LDMPipeline


@pytest.mark.parametrize("change", ["flow", "rectangle"])
def test_what_stock_diffusers_cannot_draw_names_its_class(change, text, tmp_path):
    pipe = make("none", text)
    if change == "flow":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    else:
        pipe.unet.register_to_config(sample_size=(8, 8))
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == ["pipeline", "LatentDDPMPipeline"]
    same(draw(load(tmp_path)), expected)


def test_the_file_that_is_saved_is_the_one_of_the_class(text, tmp_path):
    """diffusers copies each local pipeline.py to one place: by then, it may be another one's."""
    make("class", text).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    later = (ROOT / "pipeline_latent_ddpm.py").read_text() + "\n# a later version\n"
    (tmp_path / "b" / "pipeline.py").write_text(later)
    first, second = load(tmp_path / "a"), load(tmp_path / "b")
    first.save_pretrained(tmp_path / "c")
    second.save_pretrained(tmp_path / "d")
    assert (tmp_path / "c" / "pipeline.py").read_bytes() == (ROOT / "pipeline_latent_ddpm.py").read_bytes()
    assert (tmp_path / "d" / "pipeline.py").read_text() == later


def test_variants_shards_and_pickle(pipe, kind, tmp_path):
    expected = draw(pipe, kind)
    pipe.save_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    same(draw(load(tmp_path, variant="fp16", use_safetensors=True), kind), expected)
    with pytest.raises(ValueError, match="variant=no_ema"):
        load(tmp_path, variant="no_ema")
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 1
    same(draw(load(tmp_path / "shards"), kind), expected)
    pipe.save_pretrained(tmp_path / "shards")  # no index of the shards may be left
    same(draw(load(tmp_path / "shards"), kind), expected)
    pipe.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    same(draw(load(tmp_path / "pickle"), kind), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saved_in_half_precision(pipe, kind, dtype, tmp_path):
    pipe.to(dtype)
    expected = draw(pipe, kind)
    pipe.save_pretrained(tmp_path, variant="half")
    again = load(tmp_path, variant="half", torch_dtype=dtype)
    assert {model.dtype for model in again.components.values() if isinstance(model, torch.nn.Module)} == {dtype}
    same(draw(again, kind), expected)


def test_each_part_in_a_dtype_of_its_own(pipe, kind, tmp_path):
    expected = draw(pipe, kind)
    pipe.save_pretrained(tmp_path)
    for parts in ({"unet": torch.float16, "default": torch.float32}, {"vqvae": torch.bfloat16}):
        again = load(tmp_path, torch_dtype=parts)
        assert (again.unet.dtype == torch.float16) == ("unet" in parts)
        assert (draw(again, kind) - expected).abs().mean() < 0.02


@pytest.mark.parametrize("words", [{"low_cpu_mem_usage": False}, {"device_map": "cpu"}, {"torch_dtype": "auto"}])
def test_ways_to_load(words, text, tmp_path):
    pipe = make("text", text)
    pipe.save_pretrained(tmp_path)
    same(draw(load(tmp_path, **words), "text"), draw(pipe, "text"))


def test_optional_components_may_be_absent(text, tmp_path):
    pipe = make("text", text)
    embeds, mask = pipe.encode_prompt("a red fish")
    no_text = dict(zip(("negative_prompt_embeds", "negative_prompt_attention_mask"), pipe.encode_prompt("")))  # noqa: B905
    words = {"prompt": None, "prompt_embeds": embeds, "prompt_attention_mask": mask, "guidance_scale": 2.0, **no_text}
    expected = draw(pipe, "text", guidance_scale=2.0)
    for name in pipe._optional_components:
        setattr(pipe, name, None)
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.text_encoder is None and again.tokenizer is None
    same(draw(again, "text", **words), expected)
    same(draw(load(tmp_path, **text), "text", guidance_scale=2.0), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_encoder_that_is_only_named_is_loaded_and_saved(dtype, text, tmp_path):
    pipe = make("text", text)
    expected = draw(pipe, "text", guidance_scale=2.0)
    pipe.text_encoder.save_pretrained(tmp_path / "encoder")
    pipe.tokenizer.save_pretrained(tmp_path / "encoder")
    words = {"text_encoder_id": str(tmp_path / "encoder"), "max_caption_tokens": 4}
    named = LatentDDPMPipeline(pipe.vqvae, pipe.unet, pipe.scheduler, **words)
    named.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a" / "text_encoder").exists()
    again = load(tmp_path / "a", torch_dtype=dtype)
    assert (draw(again, "text", guidance_scale=2.0) - expected).abs().mean() < 0.02
    again.save_pretrained(tmp_path / "b")
    shutil.rmtree(tmp_path / "encoder")
    assert (draw(load(tmp_path / "b"), "text", guidance_scale=2.0) - expected).abs().mean() < 0.02


def test_an_encoder_with_code_of_its_own_is_refused_and_not_asked_about(text, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks at the terminal"))
    content = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    parts = make("text", text).components | {"text_encoder": None, "tokenizer": None}
    with pytest.raises(ValueError, match="custom code"):
        LatentDDPMPipeline(**parts, text_encoder_id=str(tmp_path)).encode_prompt("a fish")


# ------------------------------------------------------------------------------------------------ other pipelines


def test_from_pipe_and_components(pipe, kind):
    expected = draw(pipe, kind)
    assert set(pipe.components) == {"vqvae", "unet", "scheduler", "text_encoder", "tokenizer"}
    for again in (LatentDDPMPipeline(**pipe.components, **pipe.parameters), LatentDDPMPipeline.from_pipe(pipe)):
        assert again.unet is pipe.unet and again.parameters == pipe.parameters
        same(draw(again, kind), expected)


def test_from_pipe_of_the_stock_class(text, tmp_path):
    pipe = make("none", text)
    pipe.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    richer = LatentDDPMPipeline.from_pipe(stock)
    assert richer.unet is stock.unet
    same(draw(richer), draw(pipe))
    assert type(LDMPipeline.from_pipe(richer)) is LDMPipeline


# ------------------------------------------------------------------------------------------------ device and dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_a_dtype(pipe, kind, dtype):
    expected = draw(pipe, kind)
    pipe.to("cpu", dtype)
    images = draw(pipe, kind, guidance_scale=2.0 if kind != "none" else 1.0)
    assert images.shape == (1, 3, 16, 16) and images.dtype == torch.float32
    for noise in (torch.float16, torch.float32, torch.float64):
        latents = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(noise)
        assert (draw(pipe, kind, latents=latents) - expected).abs().mean() < 0.05
    assert draw(pipe, kind, output_type="latent").dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_small_steps_are_not_rounded_away(dtype, text):
    """In bfloat16 latents, a step below 1/256 of a latent is lost."""
    pipe = make("none", text)
    words = {"num_inference_steps": 100, "output_type": "latent"}
    expected = draw(pipe, **words)
    found = draw(pipe.to(dtype), **words).float()
    assert (found - expected).abs().mean() < (0.0007 if dtype is torch.float16 else 0.008) * expected.std()


def test_sequential_offloading_finds_every_component(pipe, kind, monkeypatch):
    """The hooks see each call: here the CPU takes the place of the accelerator."""
    image = torch.full((1, 3, 16, 16), 0.5)
    words = {"image": image, "num_inference_steps": 4}
    expected = draw(pipe, kind), draw(pipe, kind, **words)
    # not cpu:0, as diffusers says, of which accelerate makes no Parameter
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, _, **more: cpu_offload(model, torch.device("cpu")))
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert next(pipe.unet.parameters()).device.type == "meta"
    for _ in range(2):
        same(draw(pipe, kind), expected[0])
        same(draw(pipe, kind, **words), expected[1])


def test_model_offloading_hooks_each_component_in_its_order(pipe, kind):
    models = {name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    order = pipe.model_cpu_offload_seq.split("->")
    assert models <= set(order)
    expected = draw(pipe, kind)
    pipe.enable_model_cpu_offload(device="cpu")
    loaded = []
    for name in models:
        hook = getattr(pipe, name)._hf_hook

        def note(module, *args, name=name, before=hook.pre_forward, **kwargs):
            loaded.extend([name] if name not in loaded else [])
            return before(module, *args, **kwargs)

        hook.pre_forward = note
    same(draw(pipe, kind), expected)
    assert loaded == [name for name in order if name in models]
    same(draw(pipe, kind), expected)


def test_group_offloading(pipe, kind):
    expected = draw(pipe, kind)
    words = {"offload_type": "leaf_level", "exclude_modules": ["vqvae"]}  # which VQModel does not support
    pipe.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **words)
    same(draw(pipe, kind), expected)


def test_layerwise_casting(pipe, kind):
    expected = draw(pipe, kind)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert (draw(pipe, kind) - expected).abs().mean() < 0.1


def test_attention_processors_and_slicing(pipe, kind):
    expected = draw(pipe, kind)
    if kind == "text":  # UNet2DModel has no processors to set
        pipe.unet.set_default_attn_processor()
        same(draw(pipe, kind), expected)
    pipe.enable_attention_slicing()
    same(draw(pipe, kind), expected)


# ------------------------------------------------------------------------------------------------ calls


def test_callbacks_may_return_anything(pipe, kind):
    expected = draw(pipe, kind)
    for answer in (None, {}, {"something": 1}):
        same(draw(pipe, kind, callback_on_step_end=lambda *_, answer=answer: answer), expected)

    def replaced(pipe, step, t, tensors):
        assert tensors["latents"].shape == (1, 3, 8, 8) and tensors["latents"].dtype == torch.float32
        return {"latents": torch.zeros(1, 3, 8, 8, dtype=torch.float64)}

    words = {"callback_on_step_end_tensor_inputs": ["latents", "pred_original_sample"], "output_type": "latent"}
    assert draw(pipe, kind, callback_on_step_end=replaced, **words).abs().sum() == 0


def test_callbacks_get_the_tensors_that_they_name(pipe, kind):
    seen = set()

    def callback(pipe, step, t, tensors):
        seen.update(tensors)

    draw(pipe, kind, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs)
    assert seen == set(pipe._callback_tensor_inputs)


def test_a_callback_changes_the_guidance(pipe, kind):
    if kind == "none":
        pytest.skip("nothing to guide")

    def stronger(pipe, step, t, tensors):
        pipe._guidance_scale += 1.0

    changed = draw(pipe, kind, guidance_scale=1.0, num_inference_steps=3, callback_on_step_end=stronger)
    assert pipe.guidance_scale == 4.0
    assert not torch.equal(changed, draw(pipe, kind, guidance_scale=1.0, num_inference_steps=3))


def test_a_tuple_and_an_output_are_the_same(pipe, kind):
    expected = draw(pipe, kind)
    words = {**GIVEN[kind], "num_inference_steps": 2, "output_type": "pt"}
    answer = pipe(generator=torch.Generator().manual_seed(0), return_dict=False, **words)
    assert isinstance(answer, tuple)
    same(answer[0], expected)


def test_a_batch_is_its_images(pipe, kind):
    words = {name: [value] * 3 for name, value in GIVEN[kind].items()}
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = draw(pipe, kind, batch_size=3, generator=generators, **words)
    for seed in range(3):
        alone = draw(pipe, kind, generator=[torch.Generator().manual_seed(seed)])
        same(together[seed : seed + 1], alone)


def test_several_images_of_each_condition(text):
    pipe = make("class", text)
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = draw(pipe, class_labels=["cat", "dog"], num_images_per_prompt=2, latents=noise)
    same(found, draw(pipe, class_labels=["cat", "cat", "dog", "dog"], batch_size=4, latents=noise))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    words = {"latents": noise, "mask_image": torch.zeros(1, 1, 16, 16)}
    found = draw(pipe, class_labels=[0, 1], num_images_per_prompt=2, image=images, **words)
    same(found, images.repeat_interleave(2, 0))
    assert len(draw(make("text", text), "text", prompt=["a fish", "a bird"], num_images_per_prompt=3)) == 6
    assert len(draw(make("none", text), batch_size=2, num_images_per_prompt=2)) == 4


@pytest.mark.parametrize("words", [{"batch_size": "a cat"}, {"batch_size": 2.0}, {"num_images_per_prompt": 0}])
def test_conditions_are_given_by_name(words, text):
    with pytest.raises(ValueError, match="are numbers of images.* prompt='...'"):
        make("none", text)(**words)


def test_timesteps_and_sigmas_of_the_scheduler(text):
    pipe = make("none", text)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    expected = draw(pipe, num_inference_steps=5)
    given = pipe.scheduler.timesteps.tolist()
    same(draw(pipe, timesteps=given), expected)
    torch.testing.assert_close(draw(pipe, sigmas=pipe.scheduler.sigmas.tolist()), expected, rtol=0, atol=1e-2)
    assert pipe.num_timesteps == 5
    image = torch.full((1, 3, 16, 16), 0.5)
    draw(pipe, timesteps=given, image=image, strength=0.4)
    assert pipe.num_timesteps == 2
    with pytest.raises(ValueError, match="give one of them"):
        draw(pipe, timesteps=given, sigmas=[1.0, 0.0])
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="DDIMScheduler takes no timesteps"):
        draw(pipe, timesteps=given)


def test_every_scheduler_is_made_from_the_config_of_the_one_before(text):
    pipe = make("none", text)
    pipe.scheduler.register_to_config(skip_prk_steps=True)  # as in diffusers' own test
    for scheduler in KarrasDiffusionSchedulers:
        if scheduler.name == "DPMSolverSDEScheduler":  # needs the package torchsde
            continue
        pipe.scheduler = getattr(diffusers, scheduler.name).from_config(pipe.scheduler.config)
        assert draw(pipe, num_inference_steps=5 if "KDPM2" in scheduler.name else 2).shape == (1, 3, 16, 16)


def test_a_guiding_unet_in_another_dtype(pipe, kind, text):
    expected = draw(pipe, kind, guidance_unet=make(kind, text).unet, guidance_scale=2.0)
    half = make(kind, text).unet.half()
    assert (draw(pipe, kind, guidance_unet=half, guidance_scale=2.0) - expected).abs().mean() < 0.02


def test_the_arguments_of_diffusers_are_there():
    words = set(inspect.signature(LatentDDPMPipeline.__call__).parameters)
    assert words >= {"num_inference_steps", "num_images_per_prompt", "generator", "latents", "output_type",
                     "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}  # fmt: skip

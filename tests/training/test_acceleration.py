"""How a device computes: equal results in every layout and compiled, and a step that never waits for the device."""

import copy
import functools
import os
import subprocess
import sys
import traceback

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT, checkpoint_tensors, environment, fill_zeros, launch, losses
from diffusers import UNet2DConditionModel, UNet2DModel
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import train_unet
from latent_ddpm.autoencoder import quantizers, training_step
from latent_ddpm.autoencoder.quantizers import sum_by_code
from latent_ddpm.autoencoder.training_step import AutoencoderStep
from latent_ddpm.autoencoder.vqvae import Autoencoder
from latent_ddpm.config import AutoencoderConfig, UNetConfig
from latent_ddpm.errors import UserError
from latent_ddpm.training import acceleration, optim
from latent_ddpm.training.acceleration import (
    align_state,
    check_compiler,
    compile_networks,
    contiguous,
    double_pixels,
    group_norm,
    prepare_for_compiler,
    set_arithmetic,
    set_layout,
    take_compile_request,
    uncompiled,
)
from latent_ddpm.training.loop import TrainingRun
from latent_ddpm.training.optim import clip_gradients

TINY = {"block_out_channels": [8, 16], "norm_num_groups": 4, "num_vq_embeddings": 32, "resolution": 16}
TINY |= {"adam_epsilon": 1e-3}  # otherwise the first steps depend on the signs of gradients near zero
FSQ = {"fsq_levels": [4, 8], "latent_channels": 2}
DISC = {"disc_weight": 0.5, "disc_channels": 8, "disc_layers": 2, "disc_adaptive_steps": 2}


@pytest.fixture(autouse=True)
def other_tests_choose_their_algorithms():
    yield
    torch.use_deterministic_algorithms(False)


def gradients(outputs, inputs):
    return torch.autograd.grad(outputs.square().sum() + outputs.sum(), inputs)


# ------------------------------------------------------------------------------------------------ replaced operators


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    width=st.integers(1, 5),
    spatial=st.lists(st.integers(2, 7), min_size=1, max_size=2),
    offset=st.sampled_from([0.0, 30.0]),
    affine=st.booleans(),
)
def test_group_norm_is_torchs(groups, width, spatial, offset, affine):
    norm = nn.GroupNorm(groups, groups * width, affine=affine)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = (torch.randn(3, groups * width, *spatial) + offset).requires_grad_()
    inputs = [x, *norm.parameters()]
    exact = nn.GroupNorm(groups, groups * width, affine=affine).double()
    exact.load_state_dict(norm.state_dict())
    exact_inputs = [x.detach().double().requires_grad_(), *exact.parameters()]
    found, expected = group_norm(norm, x), exact(exact_inputs[0])
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * (1 + offset))
    for one, other in zip(gradients(found, inputs), gradients(expected, exact_inputs), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-2, atol=1e-3 * (1 + offset))


def test_group_norm_of_bf16_is_float32():
    norm, x = nn.GroupNorm(2, 8), torch.randn(2, 8, 4, 4)
    assert group_norm(norm, x.bfloat16()).dtype == torch.float32  # as under autocast


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_double_pixels_is_nearest_interpolation(layout):
    x = torch.randn(2, 3, 4, 5).to(memory_format=layout).requires_grad_()
    found, expected = double_pixels(x), F.interpolate(x, scale_factor=2.0, mode="nearest")
    assert torch.equal(found, expected) and found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gradients(found, x)[0], gradients(expected, x)[0])


def unet():
    torch.manual_seed(0)
    return fill_zeros(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )


def conditional_unet():
    torch.manual_seed(0)
    return fill_zeros(
        UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            mid_block_type="UNetMidBlock2DCrossAttn",
            cross_attention_dim=12,
            attention_head_dim=8,
        )
    )


def autoencoder():
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(dataset_name="embedded:mnist", quantizer="kl", **TINY))


CALLS = {
    unet: lambda network: network(torch.randn(2, 3, 8, 8), torch.arange(2)).sample,
    conditional_unet: lambda network: network(torch.randn(2, 3, 8, 8), torch.arange(2), torch.randn(2, 5, 12)).sample,
    autoencoder: lambda network: network(torch.randn(2, 3, 16, 16), torch.arange(2)).reconstruction,
}


@pytest.mark.parametrize("make", CALLS)
def test_what_is_prepared_for_the_compiler_computes_the_same(make):
    plain, prepared, found = make(), make(), []
    prepare_for_compiler(prepared)
    assert list(plain.state_dict()) == list(prepared.state_dict())
    for network in (plain, prepared):
        torch.manual_seed(1)
        output = CALLS[make](network)
        weights = [p for p in network.parameters() if p.requires_grad]
        found.append((output, torch.autograd.grad(output.square().mean(), weights, allow_unused=True)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("make", "others"), [(unet, 1), (conditional_unet, 1), (autoencoder, 2)])
def test_compiled_convolutions_read_channels_last(make, others):
    """`others` take latents or images, whose layout is the caller's."""
    network, inputs = make().to(memory_format=torch.channels_last), []

    def look(graph, _):
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.convolution.default:
                value = node.args[0].meta["val"]
                inputs.append(value.is_contiguous(memory_format=torch.channels_last))
        return make_boxed_func(graph.forward)

    prepare_for_compiler(network)
    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    parts = (network.encoder, network.decoder) if make is autoencoder else (network,)
    for part in parts:
        part.compile(backend=backend, dynamic=False)
    CALLS[make](network).square().mean().backward()
    assert len(inputs) > 8 and inputs.count(False) <= others


# ---------------------------------------------------------------------------------------------------------- layout


def test_moments_take_the_layout_of_their_parameters():
    network = set_layout(unet(), UNetConfig(dataset_name="embedded:mnist", channels_last=True), torch.device("cpu"))
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    CALLS[unet](network).square().mean().backward()
    optimizer.step()
    saved = {
        number: {name: value.contiguous() for name, value in state.items()}
        for number, state in optimizer.state_dict()["state"].items()
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved})
    align_state(optimizer)
    four = [p for p in network.parameters() if p.ndim == 4 and min(p.shape) > 1]
    assert len(four) > 5
    for p in four:
        assert p.is_contiguous(memory_format=torch.channels_last)
        assert optimizer.state[p]["exp_avg"].stride() == optimizer.state[p]["exp_avg_sq"].stride() == p.stride()
    optimizer.step()


def test_export_is_contiguous():
    network = unet()
    assert contiguous(network) is network
    network.to(memory_format=torch.channels_last)
    made = contiguous(network)
    assert made is not network and all(value.is_contiguous() for value in made.state_dict().values())
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in made.state_dict().items())


# ---------------------------------------------------------------------------------------------------- torch.compile


def test_the_launchers_request_becomes_the_key(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "reduce-overhead")
    config = UNetConfig(dataset_name="embedded:mnist")
    take_compile_request(config)
    assert config.torch_compile == "reduce-overhead" and "ACCELERATE_DYNAMO_BACKEND" not in os.environ
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    config = UNetConfig(dataset_name="embedded:mnist")
    take_compile_request(config)
    assert config.torch_compile == "off" and os.environ["ACCELERATE_DYNAMO_BACKEND"] == "EAGER"


def test_modes_that_the_key_lacks_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "max-autotune-no-cudagraphs")
    with pytest.raises(UserError, match="max-autotune-no-cudagraphs of accelerate launch is not supported"):
        take_compile_request(UNetConfig(dataset_name="embedded:mnist"))
    with pytest.raises(UserError, match="deterministic"):
        UNetConfig(dataset_name="embedded:mnist", torch_compile="max-autotune").validate()
    UNetConfig(dataset_name="embedded:mnist", torch_compile="max-autotune", deterministic=False).validate()


def test_a_missing_compiler_is_named(monkeypatch):
    config = UNetConfig(dataset_name="embedded:mnist", torch_compile="default")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler \(g\+\+\). Install one, or set torch_compile off"):
        check_compiler(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(acceleration.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package triton"):
        check_compiler(config)
    check_compiler(UNetConfig(dataset_name="embedded:mnist"))


def stage_1(state=None, first_step=0, accumulation=1, **keys):
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    keys = {**TINY, "gradient_accumulation_steps": accumulation, "learning_rate": 1e-4, **keys}
    keys |= FSQ if keys.get("quantizer") == "fsq" else {}
    config = AutoencoderConfig(dataset_name="embedded:mnist", **keys)
    set_arithmetic(config.deterministic)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    return AutoencoderStep(config, accelerator, None, state, first_step)


def images(step, count=4):
    generator = torch.Generator().manual_seed(step)
    return torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1, torch.arange(step * count, (step + 1) * count)


def steps_of(networks, numbers, accumulation=1):
    found = []
    for step in numbers:
        if step in (0, networks.config.codebook_start):
            networks.start_codes(images(step)[0])
        found.append(networks.step(step, [images(2 * step + k) for k in range(accumulation)], 1.0))
    return found


@pytest.fixture
def counter(monkeypatch):
    """torch.compile captures graphs, which are counted, but compiles nothing."""
    torch._dynamo.reset()
    made = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(acceleration, "BACKEND", made)
    yield made
    torch._dynamo.reset()


@pytest.mark.parametrize("quantizer", ["ema", pytest.param("fsq", marks=pytest.mark.long), "kl"])
def test_stage_1_is_the_same_compiled(counter, quantizer):
    """The codebook enters at step 2, the discriminator at 4; a validation lies between 5 and 6."""
    keys = {**DISC, "quantizer": quantizer, "disc_start": 4, "gradient_checkpointing": quantizer == "fsq"}
    keys["codebook_start"] = 0 if quantizer == "kl" else 2
    eager, compiled = stage_1(**keys), stage_1(torch_compile="default", **keys)
    assert list(eager.state_dict(9)["model"]) == list(compiled.state_dict(9)["model"])
    found = [steps_of(networks, range(6)) for networks in (eager, compiled)]
    graphs = counter.frame_count
    assert graphs >= 3  # encoder, decoder, discriminator
    for networks in (eager, compiled):
        with torch.no_grad():
            networks.ema.model(images(3, 3)[0], torch.arange(3))  # another batch size, in evaluation mode
    for of_run, networks in zip(found, (eager, compiled), strict=True):
        of_run += steps_of(networks, range(6, 9))
    assert counter.frame_count == graphs
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        for name in ("loss", "reconstruction_loss", "grad_norm"):
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_transforms_compile_one_more_size(counter):
    """Encoder, decoder at two sizes, discriminator with and without gradients of weights; turning needs none."""
    networks = stage_1(**DISC, quantizer="kl", equivariance_share=0.9, torch_compile="default")
    steps_of(networks, range(16))
    assert counter.frame_count == 5


def test_checkpoints_of_eager_and_compiled_runs_interchange(counter):
    keys = {**DISC, "quantizer": "ema", "disc_start": 1}
    eager = stage_1(**keys)
    steps_of(eager, range(3))
    state = copy.deepcopy(eager.state_dict(3))
    expected = steps_of(eager, range(3, 5))
    compiled = stage_1(torch_compile="default", state=state, first_step=3, **keys)
    found = steps_of(compiled, [3])
    back = stage_1(state=compiled.state_dict(4), first_step=4, **keys)
    found += steps_of(back, [4])
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one["loss"], other["loss"], rtol=1e-4, atol=1e-5)


def test_rare_shapes_do_not_compile(counter):
    network = unet()
    compile_networks([network, None], UNetConfig(dataset_name="embedded:mnist", torch_compile="default"))
    CALLS[unet](network)
    graphs = counter.frame_count
    with uncompiled():
        network(torch.randn(7, 3, 8, 8), torch.arange(7))
    assert counter.frame_count == graphs > 0


def test_inductor_compiles_on_a_cpu(photos, tmp_path):
    """The real compiler in a real run. benchmarks/check_compile.py checks both stages, at a size that takes minutes."""
    flags = {"train_data_dir": photos, "resolution": 16, "max_train_steps": 4}
    launch("train_autoencoder.py", tmp_path, **flags)
    flags |= {"autoencoder": tmp_path / "autoencoder", "unet_attention_levels": "[]", "unet_layers_per_block": 1}
    flags |= {"unet_block_out_channels": "[16]", "unet_dropout": 0, "validation_steps": 2, "checkpointing_steps": 2}
    folders = {"off": tmp_path / "eager", "default": tmp_path / "compiled"}
    for mode, folder in folders.items():
        launch("train_unet.py", folder, torch_compile=mode, **flags)
    one, other = (losses(folder, "unet") for folder in folders.values())
    assert list(one) == list(other) == [1, 2, 3, 4]
    assert max(abs(one[step] - other[step]) / one[step] for step in one) < 1e-4
    names = [checkpoint_tensors(folder, "unet", 2).keys() for folder in folders.values()]
    assert names[0] == names[1]


# --------------------------------------------------------------------------------------------- nothing waits in a step


class Reads(TorchDispatchMode):
    """Counts the operators whose result Python or a shape depends on: on a GPU, each waits for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.WAITS or masks:
            where = [f for f in traceback.extract_stack() if "latent_ddpm" in f.filename or "train_" in f.filename]
            if where and where[-1].name == "transform_of":  # reads what it draws on the CPU, on any machine
                return func(*args, **(kwargs or {}))
            self.found.append(f"{name} in {where[-1].name}, line {where[-1].lineno}" if where else name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The code takes the paths of a device that Python cannot read for free."""
    for module in (quantizers, training_step, optim):
        monkeypatch.setattr(module, "reads_are_free", lambda tensor: False)


@pytest.mark.parametrize("quantizer", ["ema", "simvq", "fsq", "kl"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_of_stage_1_reads_nothing(as_on_a_gpu, quantizer, optimizer):
    keys = {**DISC, "quantizer": quantizer, "optimizer": optimizer, "disc_lecam_weight": 0.1, "disc_r1_weight": 0.1}
    networks = stage_1(accumulation=2, equivariance_share=0.5, **keys)
    steps_of(networks, range(4), accumulation=2)  # with the entries of codebook and discriminator
    with Reads() as reads:
        losses = [networks.step(step, [images(step), images(step + 9)], 1.0) for step in range(4, 8)]
        assert reads.found == []
        float(losses[-1]["loss"])
    assert len(reads.found) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_of_stage_2_reads_nothing(as_on_a_gpu, monkeypatch, photos, tmp_path, optimizer):
    flags = {"train_data_dir": photos, "resolution": 16, "max_train_steps": 4}
    launch("train_autoencoder.py", tmp_path, **flags)
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    words = {**flags, "output_dir": tmp_path / "unet", "autoencoder": tmp_path / "autoencoder", "optimizer": optimizer}
    words |= {"max_train_steps": 8, "train_batch_size": 4, "logging_steps": 100, "validation_steps": 100}
    words |= {"unet_block_out_channels": "[16,32]", "unet_attention_levels": "[1]", "unet_norm_num_groups": 8}
    words |= {"checkpointing_steps": 100, "gradient_accumulation_steps": 2, "num_validation_samples": 4}
    words |= {"num_inference_steps": 2, "unet_attention_head_dim": 8, "ema_snapshots": 0, "max_validation_images": 8}
    reads, at_step, advance = Reads(), [], TrainingRun.advance

    def note(self):
        advance(self)
        at_step.append(len(reads.found))

    monkeypatch.setattr(TrainingRun, "advance", note)
    with reads:
        assert train_unet.main([word for key, value in words.items() for word in (f"--{key}", str(value))]) == 0
    assert len(at_step) == 8 and at_step[-1] == at_step[0], reads.found[at_step[0] : at_step[-1]]
    assert len(reads.found) > at_step[-1]  # the count sees the validation after the last step


# ------------------------------------------------------------------------------------ what only a GPU computes this way


@pytest.mark.parametrize("values", [torch.randn(500, 3) * 50, torch.ones(500, 1, dtype=torch.int64)])
def test_integer_sums_equal_float_sums(as_on_a_gpu, values):
    nearest = torch.randint(0, 7, (500,))
    expected = torch.zeros(7, values.shape[1], dtype=torch.float64).index_add_(0, nearest, values.double())
    found = sum_by_code(nearest, values, 7)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    order = torch.randperm(500)
    assert torch.equal(found, sum_by_code(nearest[order], values[order], 7))


@pytest.mark.parametrize("max_norm", [1e-3, 1e6])
def test_clipping_inside_adamw_is_clipping_before_it(monkeypatch, max_norm):
    weights = []
    for free in (True, False):
        monkeypatch.setattr(optim, "reads_are_free", lambda tensor, free=free: free)
        torch.manual_seed(0)
        layer = nn.Linear(8, 8)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, eps=1e-3, fused=True)
        for number in range(3):
            layer(torch.randn(4, 8)).square().sum().backward()
            if number == 1:
                layer.weight.grad[0, 0] = torch.inf  # the step is skipped
            clip_gradients(optimizer, max_norm)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def muon_steps(steps=6, broken=None):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24), nn.Conv2d(16, 16, 3), nn.Linear(24, 4))
    optimizer = optim.Muon(layers.parameters(), lr=0.02, weight_decay=0.1, fused=True)
    for number in range(steps):
        for p in layers.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number + p.numel()))
        if number == broken:
            layers[2].weight.grad[0] = torch.nan
        clip_gradients(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    momenta = [optimizer.state[p]["momentum"] for p in layers.parameters() if "momentum" in optimizer.state[p]]
    return [p.detach() for p in layers.parameters()], momenta


@pytest.mark.parametrize("broken", [None, 0, 3])
def test_muon_on_a_gpu_is_muon_in_bf16(monkeypatch, broken):
    """Updates agree as far as bf16 does, momenta to rounding; a gradient that is not finite changes nothing."""
    found = []
    for free in (True, False):
        monkeypatch.setattr(optim, "reads_are_free", lambda tensor, free=free: free)
        found.append(muon_steps(broken=broken))
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.linalg.vector_norm(one - other) < 0.02 * torch.linalg.vector_norm(one)


PHILOX = """
import torch
from latent_ddpm import philox_kernel
from latent_ddpm.random import _words
numbers = torch.tensor([0, 1, 77, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**61])
for seed, stream, count in ((7, 3, 1), (2**63 + 12345, 9, 300), (2**64 - 1, 1, 1024)):
    blocks = -(-count // 4)
    words = philox_kernel.philox_words(seed, stream, numbers, blocks)[:, :count]
    assert torch.equal(words, _words(seed, stream, numbers, count)), (seed, stream, count)
print("equal")
"""


def test_the_gpu_kernel_draws_the_same_bits():
    """In Triton's interpreter; benchmarks/gpu_correctness.py compares on a GPU."""
    pytest.importorskip("triton")
    run = functools.partial(subprocess.run, capture_output=True, text=True, cwd=ROOT, timeout=300)
    done = run([sys.executable, "-c", PHILOX], env={**environment(), "TRITON_INTERPRET": "1"})
    assert done.stdout == "equal\n", done.stderr[-2000:]

"""Training throughput on a GPU: our steps against the stock recipe, with each lever alone and all together.

    python benchmarks/gpu_throughput.py --json DIR/throughput.json --minutes 4

The stock recipe is the loop of diffusers' examples around its own UNet2DModel, or VQModel with LPIPS and a
discriminator as in its VQGAN example, under accelerate in bf16. Stock and ours have the same network and batch, and
take turns in one process. A variant is our step with some keys changed. FLOPs are counted on one eager step; the share
of the card's peak follows from them. Every figure is written as soon as it is measured. `--rehearse` runs everything on
a CPU at toy size. `--cases` and `--variants` choose. `--lock FILE` is for several of these processes: they compile side
by side, and one measures while the others wait.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import latent_ddpm.autoencoder.vqvae as vqvae
import latent_ddpm.training.acceleration as acceleration
from latent_ddpm.autoencoder.discriminator import PatchDiscriminator
from latent_ddpm.autoencoder.stock import new_vqmodel
from latent_ddpm.autoencoder.training_step import AutoencoderStep
from latent_ddpm.config import AutoencoderConfig, UNetConfig, parse_config
from latent_ddpm.diffusion.noise_schedule import noise_table
from latent_ddpm.diffusion.objective import training_batch
from latent_ddpm.diffusion.unet import make_unet
from latent_ddpm.files import write_json
from latent_ddpm.training.acceleration import (
    compile_networks,
    next_iteration,
    set_arithmetic,
    set_layout,
    strict,
    uncompiled,
)
from latent_ddpm.training.ema import PowerEMA
from latent_ddpm.training.optim import clip_gradients, make_optimizer, set_learning_rate

ROOT = Path(__file__).resolve().parent.parent
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 3090": 71}  # bf16, dense
KINDS = {  # of kernels, by parts of their names
    "attention": ("sdpa", "flash", "fmha"),
    "convolution": ("implicit_gemm", "fprop", "dgrad", "wgrad", "convolve", "cudnn::cnn", "winograd"),
    "product": ("nvjet", "gemm", "cutlass", "Gemm"),
    "fused": ("triton_",),
    "layout": ("nchwToNhwc", "nhwcToNchw"),
    "optimizer, averages, clipping": ("multi_tensor_apply",),
    "copy": ("copy_kernel", "CatArray", "Memcpy", "Memset"),
    "indexing": ("index",),
}
POOL = 4  # batches of made-up data

# Variants of our step: keys, and switches of the library that have no key.
VARIANTS: dict[str, dict] = {
    "eager": {"channels_last": False},
    "eager, channels_last": {"channels_last": True},
    "eager, any algorithm": {"channels_last": False, "deterministic": False},
    "compiled": {"channels_last": False, "torch_compile": "default"},
    "compiled, channels_last": {"channels_last": True, "torch_compile": "default"},
    "compiled, channels_last, any algorithm": {
        "channels_last": True,
        "torch_compile": "default",
        "deterministic": False,
    },
    "compiled, channels_last, summed taps": {"channels_last": True, "torch_compile": "default", "summed_taps": True},
    "compiled, channels_last, recomputed": {
        "channels_last": True,
        "torch_compile": "default",
        "gradient_checkpointing": True,
    },
    "reduce-overhead, channels_last": {"channels_last": True, "torch_compile": "reduce-overhead"},
    "reduce-overhead, channels_last, any algorithm": {
        "channels_last": True,
        "torch_compile": "reduce-overhead",
        "deterministic": False,
    },
}
FULL = "compiled, channels_last"


@dataclasses.dataclass
class Case:
    """What is timed: a stage of a config, a batch size, and the variants in order of worth."""

    stage: str
    words: list[str]
    batch: int
    variants: list[str]


def cases(rehearse: bool) -> dict[str, Case]:
    """The cases in order of worth."""
    if rehearse:
        tiny = ["--config", str(ROOT / "configs/mnist.yaml"), "--learning_rate", "1e-4"]
        small = ["--block_out_channels", "[8,8,8]", "--norm_num_groups", "4", "--num_vq_embeddings", "32"]
        adversarial = [*small, "--disc_weight", "0.5", "--disc_channels", "8", "--disc_layers", "2"]
        small_unet = ["--unet_block_out_channels", "[32]", "--unet_attention_levels", "[]"]
        return {
            "unet": Case("unet", [*tiny, *small_unet], 4, [FULL]),
            "autoencoder": Case("autoencoder", [*tiny, *adversarial], 4, [FULL]),
        }

    def of(name: str) -> list[str]:
        words = ["--config", str(ROOT / "configs" / f"{name}.yaml")]
        return [*words, "--train_data_dir", "null", "--dataset_name", "none"]  # the data is made up

    free, graphs = "compiled, channels_last, any algorithm", "reduce-overhead, channels_last"
    most = [FULL, free, "eager, channels_last", "eager", "compiled"]
    late = ["--disc_start", "0", "--disc_adaptive_steps", "1"]
    no_gan, no_lpips = ["--disc_weight", "0"], ["--lpips_weight", "0"]
    summed = "compiled, channels_last, summed taps"
    return {
        "unet_256": Case("unet", of("celebahq_256"), 32, most),
        "autoencoder_256_all": Case("autoencoder", of("celebahq_256") + late, 6, [*most[:3], summed, *most[3:]]),
        "autoencoder_256_lpips": Case("autoencoder", of("celebahq_256") + no_gan, 6, [FULL]),
        "autoencoder_256_plain": Case("autoencoder", of("celebahq_256") + no_gan + no_lpips, 6, [FULL]),
        "unet_64": Case("unet", of("image_folder_64"), 128, [graphs, FULL, "eager"]),
        "unet_cifar10": Case("unet", of("cifar10"), 512, [graphs, "eager"]),
        "autoencoder_64_all": Case("autoencoder", of("image_folder_64") + late, 64, [FULL, "eager"]),
        "autoencoder_cifar10": Case("autoencoder", of("cifar10"), 256, [graphs, FULL, "eager"]),
    }


# ------------------------------------------------------------------------------------------------------- contestants


class Pool:
    """Made-up data in pinned memory, as a run's reader leaves it."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.device, self.count = device, 0
        pin = device.type == "cuda"
        made = [torch.randn(shape).clamp(-1, 1) for _ in range(POOL)]
        self.batches = [batch.pin_memory() if pin else batch for batch in made]

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch and its example numbers, on the device."""
        batch = self.batches[self.count % POOL]
        numbers = torch.arange(self.count * len(batch), (self.count + 1) * len(batch), device=self.device)
        self.count += 1
        return batch.to(self.device, non_blocking=True), numbers


class StockUNetLoop:
    """diffusers' unconditional training example: autocast, AdamW, clipping, EMAModel."""

    def __init__(self, config: UNetConfig, shape: tuple, accelerator: Accelerator) -> None:
        self.accelerator, self.pool = accelerator, Pool(shape, accelerator.device)
        self.unet = make_unet(config, shape[1], shape[2], zero_branches=False)
        optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
        self.model, self.optimizer = accelerator.prepare(self.unet, optimizer)
        self.ema = EMAModel(self.unet.parameters(), decay=0.9999, use_ema_warmup=True)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")

    def step(self) -> None:
        clean, _ = self.pool.next()
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),), device=clean.device).long()
        prediction = self.model(self.scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        self.accelerator.backward(F.mse_loss(prediction.float(), noise.float()))
        self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())


class OurUNetLoop:
    """The step of train_unet.py."""

    def __init__(self, config: UNetConfig, shape: tuple, accelerator: Accelerator) -> None:
        self.accelerator, self.config, device = accelerator, config, accelerator.device
        self.pool, self.count = Pool(shape, device), 0
        self.unet = make_unet(config, shape[1], shape[2])
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.ema = PowerEMA(self.unet, config.ema_sigma_rels)
        for network in (self.unet, *self.ema.models):
            set_layout(network.to(device), config, device)
        compile_networks([self.unet], config)
        optimizer = make_optimizer(self.unet.parameters(), config, config.learning_rate, config.optimizer)
        self.model, self.optimizer = accelerator.prepare(self.unet, optimizer)
        table = noise_table(config)
        self.table = None if table is None else table.to(device)

    def loss(self) -> torch.Tensor:
        clean, numbers = self.pool.next()
        batch = training_batch(clean, numbers, self.config, self.table)
        return batch.loss(self.model(batch.noisy, batch.timesteps).sample)

    def update(self) -> None:
        clip_gradients(self.optimizer.optimizer, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        next_iteration(self.config)
        set_learning_rate(self.optimizer, 1e-4)
        loss = self.loss()
        with strict(self.config):
            self.accelerator.backward(loss)
        self.update()
        self.ema.update(self.unet, self.count + 1000)  # as late in a run
        self.count += 1

    def parts(self) -> dict[str, Callable[[], object]]:
        """What a step consists of, besides forward, backward and optimizer."""
        clean, numbers = self.pool.next()
        for p in self.unet.parameters():
            p.grad = torch.ones_like(p)
        return {
            "noise, times, targets": lambda: training_batch(clean, numbers, self.config, self.table),
            "clipping": lambda: clip_gradients(self.optimizer.optimizer, self.config.max_grad_norm),
            "averages, 4 steps": lambda: [self.ema.update(self.unet, 1000 + k) for k in range(4)],
        }


class StockAutoencoderLoop:
    """diffusers' VQModel with the losses of its VQGAN example: LPIPS, hinge loss, adaptive weight by autograd."""

    def __init__(self, config: AutoencoderConfig, shape: tuple, accelerator: Accelerator) -> None:
        self.accelerator, self.config, device = accelerator, config, accelerator.device
        self.pool = Pool(shape, device)
        self.vqmodel = new_vqmodel(config, mid_block_add_attention=config.mid_block_add_attention)
        optimizer = torch.optim.AdamW(self.vqmodel.parameters(), lr=1e-4)
        self.model, self.optimizer = accelerator.prepare(self.vqmodel, optimizer)
        self.ema = EMAModel(self.vqmodel.parameters(), decay=0.9999)
        self.lpips = lpips_without_weights(config, device)
        self.discriminator = None
        if config.disc_weight > 0:
            shape = (config.image_channels, config.disc_channels, config.disc_layers, config.disc_norm)
            self.disc = PatchDiscriminator(*shape)
            disc_optimizer = torch.optim.AdamW(self.disc.parameters(), lr=1e-4)
            self.discriminator, self.disc_optimizer = accelerator.prepare(self.disc, disc_optimizer)

    def step(self) -> None:
        images, _ = self.pool.next()
        output = self.model(images)
        reconstruction, commitment = output.sample.float(), output.commit_loss.float().mean()
        loss = F.l1_loss(reconstruction, images)
        if self.lpips is not None:
            with self.accelerator.autocast():
                loss = loss + self.lpips(reconstruction, images).mean()
        if self.discriminator is not None:
            adversarial = -self.discriminator(reconstruction).float().mean()
            last = self.vqmodel.decoder.conv_out.weight
            of_loss = torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
            of_adversarial = torch.autograd.grad(adversarial, last, retain_graph=True)[0].norm()
            loss = loss + (of_loss / (of_adversarial + 1e-6)).clamp(0, 1e4).detach() * adversarial
        self.accelerator.backward(loss + commitment)
        self.accelerator.clip_grad_norm_(self.vqmodel.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.discriminator is not None:
            self.disc_optimizer.zero_grad()
            real = F.relu(1 - self.discriminator(images).float()).mean()
            fake = F.relu(1 + self.discriminator(reconstruction.detach()).float()).mean()
            self.accelerator.backward(0.5 * (real + fake))
            self.accelerator.clip_grad_norm_(self.disc.parameters(), 1.0)
            self.disc_optimizer.step()
            self.disc_optimizer.zero_grad()
        self.ema.step(self.vqmodel.parameters())


class OurAutoencoderLoop:
    """The step of train_autoencoder.py."""

    def __init__(self, config: AutoencoderConfig, shape: tuple, accelerator: Accelerator) -> None:
        lpips = lpips_without_weights(config, accelerator.device)
        self.networks = AutoencoderStep(config, accelerator, lpips, None, 0)
        self.pool, self.count = Pool(shape, accelerator.device), 0

    def step(self) -> None:
        if self.count == 0:
            self.networks.start_codes(self.pool.next()[0])
        self.networks.step(self.count, [self.pool.next()], 1.0)
        self.count += 1


def lpips_without_weights(config: AutoencoderConfig, device: torch.device) -> torch.nn.Module | None:
    """LPIPS with a random trunk, which costs what a trained one costs; None where the config has no LPIPS."""
    if config.lpips_weight == 0:
        return None
    import lpips

    return lpips.LPIPS(net=config.lpips_net, pnet_rand=True, verbose=False).eval().requires_grad_(False).to(device)


LOOPS = {"unet": (StockUNetLoop, OurUNetLoop), "autoencoder": (StockAutoencoderLoop, OurAutoencoderLoop)}


# ------------------------------------------------------------------------------------------------------- measurement


class OperatorCount(TorchDispatchMode):
    """Counts the operators that reach the device; a stand-in for kernels where there is no GPU."""

    count = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.count += 1
        return func(*args, **(kwargs or {}))


class FlopCount(TorchDispatchMode):
    """Counts the floating-point operations of products and convolutions, forward and backward.

    torch's FlopCounterMode does the same per module, with hooks that torch.autograd.grad does not allow.
    """

    count = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.count += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def kernels(work: Callable[[], object], device: torch.device) -> dict:
    """Kernels launched by `work`: their count, milliseconds by kind, and those that take most time.

    On a CPU the count is that of operators.
    """
    if device.type != "cuda":
        with OperatorCount() as counter:
            work()
        return {"count": counter.count}
    from torch.profiler import ProfilerActivity, profile

    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        synchronize(device)
    found = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    found.sort(key=lambda event: -event.self_device_time_total)
    top = [
        {"kernel": e.key[:110], "ms": round(e.self_device_time_total / 1000, 3), "count": e.count} for e in found[:24]
    ]
    kinds: dict[str, float] = {}
    for event in found:
        kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + event.self_device_time_total / 1000
    return {"count": sum(event.count for event in found), "ms": kinds, "top": top}


def seconds_of(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of one call, from the average over `repeats`."""
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - begun) / repeats


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """What one call needs at most beyond what is allocated when it begins."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    synchronize(device)
    return torch.cuda.max_memory_allocated() - before


def peak_tflops(device: torch.device) -> float | None:
    """The card's peak in bf16 by its datasheet; None for an unknown one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def shape_of(config: AutoencoderConfig | UNetConfig, stage: str, batch: int, words: list[str]) -> tuple[int, ...]:
    """The shape of a batch: images, or latents of the config's autoencoder."""
    if stage == "autoencoder":
        return (batch, config.image_channels, config.resolution, config.resolution)
    path = words[words.index("--config") + 1]
    data = [word for word in words if word in ("--train_data_dir", "--dataset_name", "null", "none")]
    own = parse_config(AutoencoderConfig, ["--config", path, *data])
    side = own.resolution // 2 ** (len(own.block_out_channels) - 1)
    return (batch, own.latent_channels, side, side)


class Bench:
    """Measures one case after the other, and writes what is known after every variant."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.ends = time.monotonic() + 60 * options.minutes
        self.repeats = 1 if options.rehearse else options.steps
        self.rounds = 1 if options.rehearse else options.rounds
        self.accelerator = Accelerator(mixed_precision="bf16" if device.type == "cuda" else "no")
        self.result = {
            "command": "python benchmarks/gpu_throughput.py " + " ".join(sys.argv[1:]),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "peak_tflops": peak_tflops(device),
            "cases": {},
        }

    def write(self) -> None:
        write_json(self.options.json, self.result)

    def out_of_time(self) -> bool:
        return time.monotonic() > self.ends

    def run(self) -> None:
        chosen = cases(self.options.rehearse)
        for name in self.options.cases or chosen:
            case = chosen[name]
            if self.out_of_time():
                self.result.setdefault("left_out", []).append(name)
                continue
            try:
                self.measure(name, case)
            except Exception:
                self.result["cases"].setdefault(name, {})["error"] = traceback.format_exc()[-3000:]
                traceback.print_exc()
            self.write()
            self.forget()
        self.write()

    def forget(self) -> None:
        self.accelerator._models.clear()  # it would keep every network that it has prepared
        self.accelerator._optimizers.clear()
        gc.collect()
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def build(self, case: Case, loop: type, changes: dict) -> object:
        kind = UNetConfig if case.stage == "unet" else AutoencoderConfig
        words = list(case.words)
        keys = {key: value for key, value in changes.items() if key != "summed_taps"}
        config = dataclasses.replace(parse_config(kind, words), train_batch_size=case.batch, **keys)
        config = dataclasses.replace(config, gradient_accumulation_steps=1)
        vqvae.SUMMED_TAPS_DEVICES = {"cpu", "cuda"} if changes.get("summed_taps") else {"cpu"}
        set_arithmetic(config.deterministic)
        torch.manual_seed(0)
        return loop(config, shape_of(config, case.stage, case.batch, words), self.accelerator)

    def warm_up(self, contestant: object) -> float:
        begun = time.perf_counter()
        for _ in range(3):
            contestant.step()
        synchronize(self.device)
        return time.perf_counter() - begun

    @contextlib.contextmanager
    def holding(self, exclusive: bool) -> Iterator[None]:
        """Hold the lock: shared to compile, exclusive to measure."""
        if self.options.lock is None:
            yield
            return
        with self.options.lock.open("a", encoding="utf-8") as file:
            with contextlib.suppress(ImportError):  # Windows
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield

    def measure(self, name: str, case: Case) -> None:
        stock_loop, our_loop = LOOPS[case.stage]
        found = self.result["cases"].setdefault(name, {"batch": case.batch, "variants": {}})
        self.arithmetic_of_stock()
        with self.holding(exclusive=False):
            stock = stock_loop(*self.arguments(case))
            found["stock_warm_up_s"] = self.warm_up(stock)
        found["stock_peak_gib"] = as_gib(peak_bytes(stock.step, self.device))
        for variant in case.variants:
            if self.options.variants and variant not in self.options.variants:
                continue
            if self.out_of_time():
                found.setdefault("left_out", []).append(variant)
                continue
            try:
                found["variants"][variant] = self.measure_variant(case, variant, stock, our_loop, found)
            except Exception:
                found["variants"][variant] = {"error": traceback.format_exc()[-3000:]}
                traceback.print_exc()
            shown = {key: value for key, value in found["variants"][variant].items() if key != "kernels"}
            print(name, variant, json.dumps(shown), flush=True)
            self.write()
            self.forget()

    def arguments(self, case: Case) -> tuple:
        kind = UNetConfig if case.stage == "unet" else AutoencoderConfig
        config = dataclasses.replace(parse_config(kind, case.words), train_batch_size=case.batch)
        torch.manual_seed(0)
        return config, shape_of(config, case.stage, case.batch, case.words), self.accelerator

    def measure_variant(self, case: Case, variant: str, stock: object, our_loop: type, found: dict) -> dict:
        with self.holding(exclusive=False):
            ours = self.build(case, our_loop, VARIANTS[variant])
            measured: dict = {"warm_up_s": self.warm_up(ours)}
        with self.holding(exclusive=True):
            if "flops_per_step" not in found:
                with FlopCount() as counter, uncompiled():
                    ours.step()
                found["flops_per_step"] = counter.count
            measured |= self.rates(case, variant, stock, ours)
            if self.device.type == "cuda":  # cuDNN may measure its algorithms: the choice can differ between runs
                torch.backends.cudnn.benchmark = True
                seconds_of(ours.step, 2, self.device)
                measured["images_per_s_with_cudnn_benchmark"] = case.batch / seconds_of(
                    ours.step, self.repeats, self.device
                )
                torch.backends.cudnn.benchmark = False
            measured["peak_gib"] = as_gib(peak_bytes(ours.step, self.device))
            measured["kernels"] = kernels(ours.step, self.device)
            if "stock_kernels" not in found:
                found["stock_kernels"] = kernels(stock.step, self.device)
            if hasattr(ours, "parts"):
                measured["parts"] = {
                    part: {key: value for key, value in kernels(work, self.device).items() if key != "top"}
                    for part, work in ours.parts().items()
                }
        measured["tflops"] = found["flops_per_step"] / case.batch * measured["images_per_s"] / 1e12
        if self.result["peak_tflops"]:
            measured["share_of_peak"] = measured["tflops"] / self.result["peak_tflops"]
        return measured

    def rates(self, case: Case, variant: str, stock: object, ours: object) -> dict:
        """Images/s of stock and ours, in turns."""
        for contestant in (stock, ours):
            seconds_of(contestant.step, 2, self.device)
        turns: dict[str, list[float]] = {"stock": [], "ours": []}
        for _ in range(self.rounds):
            self.arithmetic_of_stock()
            turns["stock"].append(case.batch / seconds_of(stock.step, self.repeats, self.device))
            set_arithmetic(VARIANTS[variant].get("deterministic", True))
            turns["ours"].append(case.batch / seconds_of(ours.step, self.repeats, self.device))
        ratios = [b / a for a, b in zip(turns["stock"], turns["ours"], strict=True)]
        return {
            "images_per_s": statistics.median(turns["ours"]),
            "stock_images_per_s": statistics.median(turns["stock"]),
            "over_stock": statistics.median(ratios),
            "over_stock_range": [min(ratios), max(ratios)],
        }

    def arithmetic_of_stock(self) -> None:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.enable_cudnn_sdp(True)


def as_gib(count: int | None) -> float | None:
    return None if count is None else count / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--variants", nargs="+")
    parser.add_argument("--steps", type=int, default=6, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--lock", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.rehearse else "cpu")
    if options.rehearse:
        acceleration.BACKEND = "aot_eager"  # captures the same graphs, without minutes of compiling
    Bench(options, device).run()


if __name__ == "__main__":
    main()

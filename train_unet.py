"""Stage 2: train a UNet2DModel on the latents of stage 1, from scratch or from pretrained weights (--init_unet).

    accelerate launch train_unet.py --config configs/mnist.yaml

Takes the autoencoder from <output_dir>/autoencoder/, or another one of diffusers with --autoencoder: a folder or an id
of the Hub. Encodes the training set once, and leaves <output_dir>/pipeline/, which DiffusionPipeline.from_pretrained of
an unmodified diffusers loads. Any key of the config can be overridden (--learning_rate 2e-4). The same command starts a
run, resumes it, or says that it is finished.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin

from latent_ddpm.autoencoder.scaling import fold_normalization
from latent_ddpm.autoencoder.stock import (
    StockAutoencoder,
    autoencoder_folder,
    autoencoder_hash,
    check_autoencoder_fits,
    is_of_a_run,
    latents_of,
    load_autoencoder,
    normalization_of,
)
from latent_ddpm.config import UNetConfig, encoding_batch_size, parse_config
from latent_ddpm.data.dataset import ExampleOrder, ImageDataset, range_batches
from latent_ddpm.data.images import to_float
from latent_ddpm.data.inspection.known import say_of_data
from latent_ddpm.data.latents import LatentCache, images_for_run, latents_for_run, read_ahead
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.data.sources.splits import open_sources
from latent_ddpm.diffusion.conditions import (
    Conditions,
    Given,
    check_conditioning_images,
    check_source,
    identity_of,
    load_encoder,
    make_conditions,
    to_device,
    unet_inputs,
)
from latent_ddpm.diffusion.few_steps import (
    FEW_STEPS,
    FewStepTraining,
    few_step_config,
    few_step_origin,
    few_step_scheduler,
    with_matching,
)
from latent_ddpm.diffusion.noise_schedule import noise_table, sampling_scheduler
from latent_ddpm.diffusion.objective import training_batch
from latent_ddpm.diffusion.sampling import draw_film
from latent_ddpm.diffusion.self_guidance import (
    SELF_GUIDANCE,
    Guide,
    self_guidance_config,
    self_guidance_origin,
    sweep_scales,
    weak_step,
)
from latent_ddpm.diffusion.start import UNetStart, load_unet_start, new_unet_like, weights_for, with_unet_of
from latent_ddpm.diffusion.unet import StockUNet, check_latents_fit, make_unet
from latent_ddpm.errors import UserError
from latent_ddpm.evaluation.grids import make_grid, reconstruction_grid
from latent_ddpm.evaluation.reconstruction import evaluate_autoencoder
from latent_ddpm.files import save_png
from latent_ddpm.planning.batch import fitting_images
from latent_ddpm.planning.minutes import plan
from latent_ddpm.planning.sizes import choose_sizes
from latent_ddpm.pretrained import commit_of
from latent_ddpm.publishing.curves import draw_scales
from latent_ddpm.publishing.export import export_pipeline
from latent_ddpm.publishing.hub import check_before_training, make_publisher
from latent_ddpm.random import Stream, normal, permutation, seed_for_step, uniform
from latent_ddpm.training.acceleration import (
    align_state,
    compile_networks,
    next_iteration,
    pinned,
    set_layout,
    strict,
)
from latent_ddpm.training.checkpoint import must_fit
from latent_ddpm.training.ema import PowerEMA, nearest_snapshot
from latent_ddpm.training.launch import run as run_script
from latent_ddpm.training.loop import TrainingRun
from latent_ddpm.training.optim import clip_gradients, learning_rate_factor, make_optimizer, set_learning_rate
from latent_ddpm.training.remote import with_run_of_hub
from latent_ddpm.training.sharding import Sharding, gather, load_optimizer, prepare, whole_unet, whole_weights
from latent_ddpm.training.skipped import SkippedSteps
from latent_ddpm.training.tracking import noted_of
from pipeline_latent_ddpm import LatentDDPMPipeline, decode_latents, latent_channels_of

logger = logging.getLogger("train_unet")

REPORTED_IMAGES = 200  # on which a pretrained autoencoder is measured
LOW_PSNR = 22  # dB
PIPELINE, FEW_STEP_PIPELINE = "pipeline/model_index.json", "pipeline-few-steps/model_index.json"


def main(argv: list[str]) -> int:
    config = with_run_of_hub(parse_config(UNetConfig, argv), "unet")
    pretrained = load_unet_start(config)
    if pretrained is not None:
        config = with_unet_of(config, pretrained)
    training = TrainingRun(config, "unet")
    config = training.config
    check_before_training(config)
    folder = autoencoder_folder(config)
    autoencoder = load_autoencoder(folder, config.autoencoder)
    autoencoder_id = autoencoder_hash(folder)
    latent_size = check_fit(training, autoencoder, autoencoder_id)

    # ---------------------------------------------------------------------------------------------- latents
    sharding = Sharding.take_request()
    latent_shape = (latent_channels_of(autoencoder), latent_size)
    config = training.start_processes(
        lambda config, free, processes: fitting_images(config, latent_shape, free, processes if sharding else 1),
        plan,
        functools.partial(choose_sizes, latent_shape=latent_shape, training_images=lambda: images_of(config)),
    )
    if is_finished(training):
        return 0
    training.claim()
    accelerator, device = training.accelerator, training.accelerator.device
    is_main, wait = accelerator.is_main_process, accelerator.wait_for_everyone
    autoencoder.to(device)
    encoder = load_encoder(config)
    images = images_for_run(config, is_main, wait, functools.partial(check_images, training))
    about = report_autoencoder(training, autoencoder, images[0])
    latents, held_out = latents_for_run(config, autoencoder, device, is_main, wait, images)
    conditions, of_held_out = make_conditions(config, images, latent_size, latents.flips, device, wait, encoder)
    check_conditions(training, conditions)
    outside = fold_normalization(autoencoder, latents.mean, latents.std)
    if is_main:
        stds = torch.as_tensor(latents.std).reshape(-1)
        shown = f"{stds.min():.3g}" if len(stds) == 1 else f"{stds.min():.3g} to {stds.max():.3g}, by channel,"
        logger.info(
            "%d images as latents of %s in %s (std %s before normalization)",
            len(latents), "x".join(map(str, latents.shape)), latents.folder, shown,
        )  # fmt: skip
    for of_split in images:  # their latents are what is trained on
        of_split.source.release()
    of_run = (latents, held_out, conditions, of_held_out)
    data = Data(autoencoder, autoencoder_id, *of_run, sharding, outside, about, pretrained)

    # ---------------------------------------------------------------------------------------------- chapters
    for name, steps in ((SELF_GUIDANCE, config.self_guidance_steps), (FEW_STEPS, config.few_step_training_steps)):
        if not steps:
            training.forget(name)
    exported = training.was_finished(PIPELINE)
    if not exported:
        training.reopen(SELF_GUIDANCE, FEW_STEPS)
    averaged, status = train(training, data, data.pretrained_weights(config))
    if averaged is None:
        return status
    if not exported:  # where it was, a later chapter may have replaced it
        export(training, data, averaged)
    training.note_finished()
    if config.self_guidance_steps:
        averaged, status = self_guide(training, data, averaged)
        if averaged is None:
            return status
    draw_film_strip(training, data, averaged)
    if config.few_step_training_steps:
        status = distill(training, data, averaged)
        if status:
            return status
    return training.finish("pipeline", from_chapter=config.self_guidance_steps > 0)


@dataclasses.dataclass
class Data:
    """What the chapters of stage 2 share.

    Attributes:
        autoencoder: with the normalization of the latents folded in, on its device.
        autoencoder_id: identifies the autoencoder.
        latents: of the training images.
        held_out: of the held-out images.
        conditions: of the training images.
        of_held_out: of the held-out images.
        sharding: how U-Nets are sharded, or None.
        outside: the normalization of latents that the autoencoder cannot hold, as arguments of the pipeline.
        about: what was measured of a pretrained autoencoder, for run.json; empty where that is there already.
        pretrained: the U-Net that training starts from, or None.
    """

    autoencoder: StockAutoencoder
    autoencoder_id: str
    latents: LatentCache
    held_out: LatentCache
    conditions: Conditions
    of_held_out: Conditions
    sharding: Sharding | None
    outside: dict[str, list[float]]
    about: dict[str, Any]
    pretrained: UNetStart | None

    @property
    def pipeline_arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline that come with the data."""
        return self.conditions.pipeline_arguments() | self.outside

    def new_unet(self, config: UNetConfig) -> StockUNet:
        """A new U-Net on the CPU."""
        (channels, size), arguments = self.latents.shape[:2], self.conditions.unet_arguments()
        if self.pretrained is not None:
            return new_unet_like(self.pretrained, channels, size, arguments)
        return make_unet(config, channels, size, **arguments)

    def pretrained_weights(self, config: UNetConfig) -> dict[str, torch.Tensor] | None:
        """The weights that the first chapter starts with; None from scratch."""
        if self.pretrained is None:
            return None
        names = self.conditions.pipeline_arguments().get("class_names")
        return weights_for(self.new_unet(config), self.pretrained, names)

    def place(self, network: StockUNet, config: UNetConfig, device: torch.device) -> StockUNet:
        """The network on its device, sharded or in its memory layout, in place."""
        network.to(device)
        if self.sharding is not None:
            self.sharding.cut(network)
        else:
            set_layout(network, config, device)
        return network

    def parts_of(self, network: StockUNet) -> list[torch.nn.Module]:
        """What of a network is compiled: the whole, or the blocks of a sharded one."""
        return [network] if self.sharding is None else self.sharding.blocks(network)

    def frozen(self, weights: dict[str, torch.Tensor], config: UNetConfig, device: torch.device) -> StockUNet:
        """A frozen U-Net with these whole weights, on its device, compiled like the trained one."""
        network = self.new_unet(config)
        network.load_state_dict(weights)
        self.place(network.eval().requires_grad_(False), config, device)
        compile_networks(self.parts_of(network), config)
        return network


def train(
    run: TrainingRun,
    data: Data,
    start: dict[str, torch.Tensor] | None = None,
    guide: Guide | None = None,
    facts: dict[str, Any] | None = None,
) -> tuple[StockUNet | None, int]:
    """Train a U-Net: the first chapter of stage 2, or its self-guidance.

    Args:
        run: the stage, or a chapter of it.
        data: the latents and their conditions.
        start: whole weights to start from; None starts with random ones.
        guide: gives the predictions that are learned; None learns the targets of the diffusion.
        facts: what a chapter has decided, kept in its checkpoints and in run.json.

    Returns:
        The averaged U-Net, which may be sharded, and 0; or None and the exit status of a run that was told to stop.
    """
    config, state, accelerator = run.config, run.state, run.accelerator
    device, is_main = accelerator.device, accelerator.is_main_process
    latents, conditions, sharding = data.latents, data.conditions, data.sharding

    # -------------------------------------------------------------------------------------- model and optimizer
    torch.manual_seed(config.seed)
    unet = data.new_unet(config)
    if start is not None:
        unet.load_state_dict(start)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    ema = PowerEMA(unet, config.ema_sigma_rels)
    if state:
        with must_fit(config.resume_from_checkpoint):
            unet.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
        if state["latents"] != latents.folder.name and run.data_changed is None:
            logger.warning(
                "The images or their transform differ from those of the checkpoint. Training continues on the new ones."
            )
    for network in (unet, *ema.models):
        data.place(network, config, device)
    compile_networks(data.parts_of(unet), config)
    optimizer = make_optimizer(unet.parameters(), config, config.learning_rate, config.optimizer)
    if state:
        with must_fit(config.resume_from_checkpoint):
            load_optimizer(optimizer, state["optimizer"])
    align_state(optimizer)
    model, optimizer = prepare(accelerator, unet, optimizer)
    run.restore_scaler()
    alphas_cumprod = noise_table(config)
    alphas_cumprod = alphas_cumprod.to(device) if alphas_cumprod is not None else None
    saved_counts = state.get("skipped") if state else None
    skipped = SkippedSteps("U-Net", saved_counts, device, scaled=accelerator.scaler is not None)
    del state, start

    sharded = f", sharded over {accelerator.num_processes} processes" if sharding else ""
    description = f"U-Net of {unet.num_parameters() / 1e6:.2f} million parameters{sharded}"
    tracker = run.start_tracking(len(latents), len(data.held_out), description)
    tracker.note(**(facts or {}))
    if guide is None:
        tracker.note(**data.about)
        run.publisher = make_publisher(config, accelerator, "unet", tracker.say)

    def training_state() -> dict[str, Any]:
        """The checkpoint: whole tensors in the main process, None for them in the others."""
        saved = {
            "latents": latents.folder.name,
            "autoencoder": data.autoencoder_id,
            "normalization": config.latent_normalization,
            "conditions": conditions.meaning(),
            "model": unet.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.optimizer.state_dict(),
            "skipped": skipped.counts,
            **(facts or {}),
        }
        return gather(saved, keep=is_main)

    # ---------------------------------------------------------------------------------------------- the loop
    accumulation = config.gradient_accumulation_steps
    snapshot_steps = -(-run.first_planned // config.ema_snapshots) if config.ema_snapshots else None
    micro_batches = read_ahead(
        examples_of(run, latents, conditions), run.first_step * accumulation, run.steps_at_most * accumulation
    )
    for step in run.steps():
        rate = learning_rate_factor(step, config)
        set_learning_rate(optimizer, rate * config.learning_rate)
        torch.manual_seed(seed_for_step(config.seed, run.before + step, accelerator.process_index))  # for dropout
        next_iteration(config)
        total_loss = torch.zeros((), device=device)
        for _ in range(accumulation):
            numbers, clean, given = next(micro_batches)
            numbers, clean = numbers.to(device, non_blocking=True), clean.to(device, non_blocking=True)
            given = to_device(given, device)
            batch = training_batch(clean, numbers, config, alphas_cumprod)
            if guide is not None:
                with accelerator.autocast():
                    batch.wanted = guide(batch.noisy, batch.timesteps, batch.level, given)
            noisy, words = unet_inputs(batch.noisy, given)
            with accelerator.accumulate(model):
                loss = batch.loss(model(noisy, batch.timesteps, **words).sample)
                with strict(config):
                    accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.unscale_gradients(optimizer)
                    grad_norm, kept = clip_gradients(optimizer.optimizer, config.max_grad_norm)
                    skipped.add(kept)
                optimizer.step()
                optimizer.zero_grad()
            total_loss += loss.detach() / accumulation
        ema.update(unet, step)
        run.advance()

        if run.is_due(config.logging_steps):
            mean_loss = float(accelerator.reduce(total_loss, "mean"))
            skipped.report(tracker.say)
            tracker.log(loss=mean_loss, grad_norm=float(grad_norm), learning_rate=rate * config.learning_rate)
        if snapshot_steps and run.is_due(snapshot_steps):
            ema.save_snapshots(run.output_dir / "ema", run.step, keep=is_main)
            tracker.pause()
        if run.is_due(config.validation_steps):
            validate(run, data, ema.model, with_loss=guide is None)
            if run.publishes_best():
                export(run, data, ema.model)
                run.publish()
        if run.should_stop():
            return None, run.stop(training_state())
        if run.is_due(config.checkpointing_steps):
            run.save(training_state())
            if run.publishes_checkpoint():
                export(run, data, ema.model)
                run.publish()
            tracker.pause()
    tracker.close()
    return ema.model, 0


def self_guide(training: TrainingRun, data: Data, averaged: StockUNet) -> tuple[StockUNet | None, int]:
    """The second chapter: train the guidance into the weights, and export the result.

    Args:
        training: the stage, whose first chapter is done.
        data: the latents and their conditions.
        averaged: the U-Net of the first chapter.

    Returns:
        As `train`.
    """
    config, device = training.config, training.accelerator.device
    run = training.chapter(SELF_GUIDANCE, self_guidance_config(config), self_guidance_origin(config))
    exported = run.was_finished(PIPELINE)
    strong = whole_weights(averaged)
    training.accelerator.free_memory()
    early, step = nearest_snapshot(training.output_dir / "ema", config.ema_sigma_rels[0], weak_step(config))
    frozen = [data.frozen(weights, config, device) for weights in (strong, {**strong, **early})]
    nothing = data.conditions.nothing if data.conditions else None

    def guide_of(scale: float) -> Guide:
        return Guide(*frozen, scale, config.self_guidance_interval, config.guidance_scale, nothing)

    scale, distances = config.self_guidance_scale, None
    if scale == "auto":
        distances = run.state["distances"] if run.state else try_scales(run, data, frozen[0], guide_of)
        scale = float(min(distances, key=distances.get))
    logger.info("self-guidance: scale %g away from the average after %d steps", scale, step)
    facts = {"scale": scale, "distances": distances, "weak_step": step}
    guided, status = train(run, data, strong, guide_of(scale), facts)
    if guided is not None:
        if not exported:
            export(run, data, guided)
        run.note_finished()
    return guided, status


def try_scales(run: TrainingRun, data: Data, strong: StockUNet, guide_of: Callable[[float], Guide]) -> dict[str, float]:
    """The distance of samples to real latents by guidance scale, from a short sweep; draws it in samples/."""
    held_out, latents, device = data.held_out, data.latents, run.accelerator.device
    order = permutation(run.config.seed, 0, len(latents))

    def reals(numbers: torch.Tensor) -> tuple[torch.Tensor, Given]:
        """The latents of the held-out images, then of training images."""
        parts, first = [], numbers[numbers < len(held_out)].numpy()
        rest = numbers[numbers >= len(held_out)].numpy() - len(held_out)
        for cache, conditions, rows in (
            (held_out, data.of_held_out, first),
            (latents, data.conditions, order[rest % len(latents)]),
        ):
            if len(rows):
                records = cache.records(rows)
                parts.append((cache.normalized(records), conditions.given(records)))
        given = {name: torch.cat([part[1][name] for part in parts]) for name in parts[0][1]}
        return torch.cat([part[0] for part in parts]).to(device), to_device(given, device)

    logger.info("self-guidance: trying scales")
    found = sweep_scales(guide_of, strong, reals, run.config, device)
    distances = {f"{scale:g}": round(value, 4) for scale, value in found.items()}
    logger.info("distance by scale: %s", ", ".join(f"{scale}: {value:.2f}" for scale, value in distances.items()))
    if run.accelerator.is_main_process:
        draw_scales(distances, run.output_dir / "samples" / f"{SELF_GUIDANCE}-scales.png")
    return distances


def distill(training: TrainingRun, data: Data, averaged: StockUNet) -> int:
    """The third chapter: train a U-Net that samples in few steps, and export it beside the pipeline.

    Args:
        training: the stage, whose other chapters are done.
        data: the latents and their conditions.
        averaged: the U-Net of the chapter before.

    Returns:
        0, or the exit status of a run that was told to stop.
    """
    accelerator, device = training.accelerator, training.accelerator.device
    config = few_step_config(training.config)
    run = training.chapter(FEW_STEPS, config, few_step_origin(training.config, self_guidance_origin(training.config)))
    exported = run.was_finished(FEW_STEP_PIPELINE)
    weights, state = whole_weights(averaged), run.state or {}
    accelerator.free_memory()
    made = {name: data.new_unet(config) for name in ("generator", *["critic"] * with_matching(config))}
    for name, network in made.items():
        network.load_state_dict(state.get(name, weights))
    ema = PowerEMA(made["generator"], config.ema_sigma_rels)
    if state:
        ema.load_state_dict(state["ema"])
    for network in (*made.values(), *ema.models):
        data.place(network, config, device)
    for network in made.values():
        compile_networks(data.parts_of(network), config)
    nothing = data.conditions.nothing if data.conditions else None
    scale = training.config.sampling_guidance_scale
    teacher = Guide(data.frozen(weights, config, device), guidance_scale=scale, nothing=nothing)
    networks = FewStepTraining(config, accelerator, made, teacher, ema, state)
    run.restore_scaler()
    del state, weights
    counts = ", ".join(map(str, config.few_step_counts))
    tracker = run.start_tracking(len(data.latents), len(data.held_out), f"sampling in {counts} steps by distillation")
    tracker.note(counts=config.few_step_counts)
    accumulation = config.gradient_accumulation_steps
    micro_batches = read_ahead(
        examples_of(run, data.latents, data.conditions),
        run.first_step * accumulation,
        config.max_train_steps * accumulation,
    )
    for step in run.steps():
        rate = learning_rate_factor(step, config)
        next_iteration(config)
        examples = (next(micro_batches) for _ in range(accumulation))
        losses = networks.step(
            step,
            run.before,
            (
                (numbers.to(device, non_blocking=True), clean.to(device, non_blocking=True), to_device(given, device))
                for numbers, clean, given in examples
            ),
            rate,
        )
        run.advance()
        if run.is_due(config.logging_steps):
            norm, names = float(losses.pop("grad_norm")), list(losses)
            means = accelerator.reduce(torch.stack([losses[name] for name in names]), "mean").tolist()
            for skipped in networks.skipped.values():
                skipped.report(tracker.say)
            shown = dict(zip(names, means, strict=True))
            tracker.log(**shown, grad_norm=norm, learning_rate=rate * config.learning_rate)
        if run.is_due(config.validation_steps):
            validate(run, data, ema.model, with_loss=False)
        if run.should_stop():
            return run.stop(gather(networks.state_dict(), keep=accelerator.is_main_process))
        if run.is_due(config.checkpointing_steps):
            run.save(gather(networks.state_dict(), keep=accelerator.is_main_process))
            tracker.pause()
    tracker.close()
    if not exported:
        export(run, data, ema.model)
    run.note_finished()  # the card says it
    run.publisher = make_publisher(training.config, accelerator, FEW_STEPS, tracker.say)
    return run.finish("pipeline-few-steps", from_chapter=True)


def is_finished(training: TrainingRun) -> bool:
    """Whether all chapters are done and exported, and nothing is left to publish; logs it if so.

    Raises:
        UserError: more steps are done than max_train_steps.
    """
    config = training.config
    guided = self_guidance_origin(config)
    for name, steps, origin in (
        (SELF_GUIDANCE, config.self_guidance_steps, guided),
        (FEW_STEPS, config.few_step_training_steps, few_step_origin(config, guided)),
    ):
        if name == FEW_STEPS and steps and not (training.output_dir / FEW_STEP_PIPELINE).exists():
            return False
        noted = noted_of(training.output_dir, name)
        done = (noted.get("finished_at", 0), noted.get("origin")) == (steps, origin)
        if not done and (steps or noted):
            return False
    return training.is_finished(PIPELINE)


def check_fit(training: TrainingRun, autoencoder: StockAutoencoder, autoencoder_id: str) -> int:
    """Check that config, autoencoder and checkpoint fit together; returns the height of the latents.

    The config then says how the latents are normalized.

    Raises:
        UserError: they do not.
    """
    state, config = training.state, training.config
    if state and state.get("autoencoder", autoencoder_id) != autoencoder_id:
        used = noted_of(training.output_dir, "unet").get("autoencoder", {}).get("revision")
        revision = f" and --autoencoder_revision {used}" if used else ""
        raise UserError(
            f"The checkpoints in {training.checkpoints.folder} were trained with a different autoencoder than "
            f"{config.autoencoder or config.autoencoder_dir}. Give that one with --autoencoder{revision}, or use a new "
            f"--output_dir."
        )
    before = state.get("normalization", "overall") if state else normalization_of(config, autoencoder)
    if config.latent_normalization not in (None, before):
        raise UserError(
            f"The checkpoints in {training.checkpoints.folder} were trained with latent_normalization {before}. Set "
            f"that, or use a new --output_dir."
        )
    config.latent_normalization = before
    latent_size = check_autoencoder_fits(autoencoder, config)
    if not config.auto_sizes:  # which chooses levels that fit
        check_latents_fit(config, latent_size)
    return latent_size


@torch.no_grad()
def report_autoencoder(training: TrainingRun, autoencoder: StockAutoencoder, images: ImageDataset) -> dict[str, Any]:
    """Measure a pretrained autoencoder on some of the images, and draw them over their reconstructions.

    It is only done before the first step, and not for an autoencoder of a run, which stage 1 has measured. Call it in
    all processes.

    Args:
        training: the stage.
        autoencoder: on its device.
        images: the training images.

    Returns:
        Facts for run.json.
    """
    config, accelerator = training.config, training.accelerator
    if training.first_step or is_of_a_run(config):
        return {}
    chosen = torch.linspace(0, len(images) - 1, min(REPORTED_IMAGES, len(images))).long().unique()
    mine = chosen[accelerator.process_index :: accelerator.num_processes].tolist()

    def reconstruct(batch: torch.Tensor) -> tuple[torch.Tensor, None]:
        return decode_latents(autoencoder, latents_of(autoencoder, batch)), None

    batches = range_batches(images, mine, min(16, encoding_batch_size(config)))
    measured = evaluate_autoencoder(reconstruct, batches, 0, accelerator.device, with_ssim=True)
    if accelerator.is_main_process:
        originals = to_float(torch.stack([images.get(i) for i in chosen[:: -(-len(chosen) // 16)].tolist()]))
        made = torch.cat([reconstruct(one.to(accelerator.device))[0].cpu() for one in originals.split(1)])
        path = training.output_dir / "samples" / "autoencoder-pretrained.png"
        save_png(reconstruction_grid(originals, made), path)
        psnr, ssim = measured["psnr"], measured["ssim"]
        logger.info(
            "%s reconstructs %d of the images with PSNR %.2f dB, SSIM %.3f: see %s",
            config.autoencoder, measured["images"], psnr, ssim, path,
        )  # fmt: skip
        if psnr < LOW_PSNR:
            logger.warning(
                "Samples cannot be sharper than these reconstructions. Below %d dB, an autoencoder trained on your "
                "images (train_autoencoder.py) or fine-tuned on them (its --init_from) may serve better.", LOW_PSNR,
            )  # fmt: skip
    facts = {"class": type(autoencoder).__name__, "revision": commit_of(autoencoder_folder(config))}
    return {"autoencoder": facts | {key: measured[key] for key in ("psnr", "ssim", "images")}}


def images_of(config: UNetConfig) -> int:
    """The number of training images: as stage 1 has noted it in this folder, or counted."""
    noted = noted_of(Path(config.output_dir), "autoencoder").get("training_images") if not config.autoencoder else None
    return noted or len(open_sources(config)[0])


def check_images(training: TrainingRun, sources: tuple[ImageSource, ImageSource], config: UNetConfig) -> None:
    """Check that the training images have what the conditions need and are those of the run; say what is known of them.

    Raises:
        UserError: they lack it, or are those of another run.
    """
    check_source(sources[0], config)
    if "image" in config.conditions:
        check_conditioning_images(sources[0], config)
    training.check_data(identity_of(sources[0], config), sources[0].findings.notes)
    if training.accelerator.is_main_process:
        say_of_data(config, sources, "unet", logger)


def check_conditions(training: TrainingRun, conditions: Conditions) -> None:
    """Raises `UserError` when the checkpoint was trained with other conditions."""
    state = training.state
    if state and state.get("conditions", conditions.meaning()) != conditions.meaning():
        raise UserError(
            f"{training.checkpoints.folder} was trained with other conditions: different class names, a different "
            f"order of them, or a different text_encoder. Use the same conditions, or a new --output_dir."
        )


def examples_of(
    training: TrainingRun, latents: LatentCache, conditions: Conditions
) -> Callable[[int], tuple[torch.Tensor, torch.Tensor, Given]]:
    """A function from a micro-batch number to this process's example numbers, latents and conditions.

    They are on the CPU, in page-locked memory if the run is on a GPU.
    """
    config, accelerator, device = training.config, training.accelerator, training.accelerator.device
    order, before = ExampleOrder(len(latents), config.seed), training.before * config.gradient_accumulation_steps

    def examples(number: int) -> tuple[torch.Tensor, torch.Tensor, Given]:
        share = (before + number) * accelerator.num_processes + accelerator.process_index
        numbers = share * config.train_batch_size + torch.arange(config.train_batch_size)
        flipped = (uniform(config.seed, Stream.FLIP, numbers) < 0.5).numpy() if latents.flips else None
        records = latents.records(order.indices(numbers.numpy()))
        given = conditions.given(records, flipped, numbers)
        given = {name: pinned(value, device) for name, value in given.items()}
        return pinned(numbers, device), pinned(latents.normalized(records, flipped), device), given

    return examples


@torch.no_grad()
def validate(run: TrainingRun, data: Data, averaged: StockUNet, with_loss: bool) -> None:
    """Measure the averaged U-Net on the held-out images, and draw a grid of samples.

    Args:
        run: the stage or chapter.
        data: its held-out latents and their conditions.
        averaged: the U-Net, which may be sharded.
        with_loss: whether to measure.
    """
    whole = whole_unet(averaged, keep=run.accelerator.is_main_process)
    if whole is not None and run.accelerator.is_main_process:
        if with_loss and len(data.held_out):
            run.tracker.log(validation_loss=validation_loss(run, whole, data.held_out, data.of_held_out))
        draw_grid(run, data, whole)
    run.accelerator.wait_for_everyone()
    run.tracker.pause()


def validation_loss(training: TrainingRun, averaged: StockUNet, held_out: LatentCache, conditions: Conditions) -> float:
    """The mean training loss over the held-out images, with the same noise and times at every validation."""
    config, accelerator, total = training.config, training.accelerator, 0.0
    alphas_cumprod = noise_table(config)
    for start in range(0, len(held_out), config.train_batch_size):
        numbers = torch.arange(start, min(start + config.train_batch_size, len(held_out)))
        records = held_out.records(numbers.numpy())
        clean = held_out.normalized(records).to(accelerator.device)
        batch = training_batch(clean, numbers.to(accelerator.device), config, alphas_cumprod)
        noisy, words = unet_inputs(batch.noisy, to_device(conditions.given(records), accelerator.device))
        with accelerator.autocast():
            total += float(batch.loss(averaged(noisy, batch.timesteps, **words).sample)) * len(numbers)
    return total / len(held_out)


def make_sampler(run: TrainingRun, data: Data, unet: StockUNet) -> tuple[LatentDDPMPipeline, dict[str, Any]]:
    """The pipeline that pictures are drawn with, without a progress bar, and the conditions of its samples."""
    pipeline = LatentDDPMPipeline(data.autoencoder, unet, scheduler_of(run), **data.pipeline_arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, data.of_held_out.shown(data.held_out, run.config.num_validation_samples, run.config.guidance_scale)


def draw_grid(run: TrainingRun, data: Data, unet: StockUNet) -> None:
    """Draw samples from fixed seeds."""
    config, accelerator, tracker = run.config, run.accelerator, run.tracker
    numbers = torch.arange(config.num_validation_samples, device=accelerator.device)
    sampler, shown = make_sampler(run, data, unet)
    with accelerator.autocast():
        pictures = sampler(
            batch_size=len(numbers),
            latents=normal(config.seed, Stream.SAMPLE, numbers, data.latents.shape),
            num_inference_steps=config.num_inference_steps,
            output_type="pt",
            **shown,
        ).images
    path = tracker.image(make_grid(pictures.cpu() * 2 - 1))
    tracker.say(f"samples in {path}")


def scheduler_of(run: TrainingRun) -> SchedulerMixin:
    """The stock scheduler of a stage's or chapter's pipeline."""
    return few_step_scheduler(run.config) if run.stage == FEW_STEPS else sampling_scheduler(run.config)


def export(run: TrainingRun, data: Data, averaged: StockUNet) -> None:
    """Write the pipeline folder of a stage or chapter with the averaged U-Net, which may be sharded."""
    whole = whole_unet(averaged, keep=run.accelerator.is_main_process)
    if run.accelerator.is_main_process:
        folder = run.output_dir / (FEW_STEP_PIPELINE if run.stage == FEW_STEPS else PIPELINE)
        known, steps = data.pipeline_arguments, run.config.num_inference_steps
        few = run.stage == FEW_STEPS
        export_pipeline(folder.parent, data.autoencoder, whole, scheduler_of(run), steps, record_steps=few, **known)


def draw_film_strip(run: TrainingRun, data: Data, averaged: StockUNet) -> None:
    """Draw four samples as they take shape: a row per sample, a column per sampling step."""
    whole = whole_unet(averaged, keep=run.accelerator.is_main_process)
    if not run.accelerator.is_main_process:
        return
    sampler, shown = make_sampler(run, data, whole)
    four = {name: value[:4] if isinstance(value, torch.Tensor) else value for name, value in shown.items()}
    steps, seed = run.config.num_inference_steps, run.config.seed
    _, film = draw_film(sampler, 4, seed, torch.arange(4), steps, **four)  # (4, S, C, R, R)
    save_png(make_grid(film.flatten(0, 1) * 2 - 1, film.shape[1]), run.output_dir / "samples" / "film_strip.png")


if __name__ == "__main__":
    run_script(main)

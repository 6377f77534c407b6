"""Adapt Stable Diffusion XL to pictures with captions, with LoRA, LoHa or LoKr.

    python train_sdxl.py                              # the embedded demo: a drawer of clothes learns digits
    python train_sdxl.py --recipe pokemon-lokr --data-dir pictures    # SDXL, on a GPU
    python train_sdxl.py --adapter lora --data-dir pictures --epochs 20 --prompts "a red bird|a cat"
    python train_sdxl.py --out runs/x --resume        # resume a stopped run, bit for bit
    torchrun --nproc_per_node=2 train_sdxl.py --batch-size 4 ...      # two processes share each batch

pictures holds images and metadata.jsonl ({"file_name": ..., "text": ...} in each line), or a .txt with the
caption beside each image. Needs diffusers and transformers: pip install -r requirements-sdxl.txt

In a notebook:

    import train_sdxl
    from engine.config_sdxl import Config
    result = train_sdxl.train(Config(adapter="lora", rank=8, alpha=8))
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from engine import demo_sdxl, devices, samples
from engine.adapt import relative_norms
from engine.checkpoint import ADAPTER_FILE
from engine.config_sdxl import Config, hyperparameters, parse
from engine.devices import process, processes
from engine.images import progress
from engine.run import Run, Stopped, exit_status
from engine.sdxl import Sampler, save_files
from engine.start_sdxl import prepare
from engine.text_to_image import plan

COLUMNS = {  # TensorBoard's tag: the column of metrics.csv
    "train/lr": "lr",
    "train/loss": "train_loss",
    "train/throughput": "pictures_per_second",
    "val/loss": "val_loss",
}
TIMES = 4  # timesteps of a held-out picture


def fit(run: Run) -> dict:
    """Train all epochs; evaluate, draw samples and save as --evaluate-every says; return what train does."""
    config, pictures, base = run.config, run.dataset.train, run.dataset.base
    unet = run.model = run.model.to(run.device)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay
    )
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    print(
        f"{config.adapter}: {run.trainable:,} of {run.total:,} parameters train "
        f"({run.trainable / run.total:.2%}), on {len(pictures):,} pictures, {run.device}, "
        f"{str(run.dtype)[6:]}",
        flush=True,
    )
    order = {"batch_size": config.batch_size, "grad_accum": config.grad_accum, "seed": config.seed}
    steps = len(plan(pictures, **order, epoch=0))  # in each epoch
    with run.training(optimizer, scaler, steps, COLUMNS):
        if run.result:
            print(f"{run.folder}: finished already, nothing is left to train")
            return run.result | {"run_dir": str(run.folder)}
        draw = Sampler(base, unet, run.device, config)
        save = partial(save_files, unet, run.folder, config.adapter, base.name)
        if "before" not in run.extra:
            show(run, draw, 0)
            run.extra["before"] = score(run, draw)
        while run.epoch < config.epochs:
            unet.train()
            first = run.step - run.epoch * steps  # not 0 in the first epoch after a resume
            batches = plan(pictures, **order, epoch=run.epoch)[first:]
            epoch = run.epoch + 1
            bar = {"desc": f"epoch {epoch}/{config.epochs}", "initial": first, "total": steps}
            for step in progress(batches, **bar):
                lr = config.lr * rate(config, run.step, config.epochs * steps)
                optimizer.param_groups[0]["lr"] = lr
                count = sum(map(len, step))
                loss = train_step(run, step, optimizer, scaler)
                run.step += 1
                if run.meter.add(loss, count):
                    point = {"train/loss": run.meter.loss, "train/lr": lr}
                    run.log.write({**point, "train/throughput": run.meter.images_per_second})
                run.after_step()  # saves now and then, and stops when asked to
            evaluated = epoch == config.epochs or epoch % config.evaluate_every == 0
            if evaluated:
                show(run, draw, epoch)
            run.epoch = epoch  # not before: a stop in the evaluation repeats it
            run.meter.start()
            run.save()  # first: it refuses tensors that are not finite, and a run that has it can be resumed
            if evaluated:
                run.attempt(ADAPTER_FILE, save)
        return finish(run, draw, save)


def rate(config: Config, step: int, steps: int) -> float:
    """The learning rate of a step as a fraction of --lr: up to 1 in the warmup, then constant or to 0."""
    rising = math.ceil(config.warmup * steps)
    if step < rising:
        return step / rising
    return 1 - (step - rising) / (steps - rising) if config.schedule == "linear" else 1.0


def train_step(run: Run, batches: list, optimizer, scaler) -> torch.Tensor:
    """One step of the optimizer on some batches; returns the mean loss of their pictures.

    Each picture counts alike: the gradient is that of one large batch, for any number of batches and
    processes. What is random depends on the seed, the step and the picture's place in the step alone, so
    processes that share a batch draw what one would (but for dropout: each draws the same), and a resumed run
    draws what the whole one did.
    """
    config, count = run.config, sum(map(len, batches))
    parameters = optimizer.param_groups[0]["params"]
    mean_loss = torch.zeros((), device=run.device)
    seed = (config.seed * 1_000_003 + run.step) % 2**32
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(2**32 - 1 - seed)  # dropout; of the same seed, it would repeat `random`
    # Here the loss scale gets its first value, also in a process without a picture in its first step.
    scaler.scale(mean_loss)
    for rows in batches:
        pictures = [run.dataset.train[row] for row in rows]
        flips, drops, times, *noises = numbers(run, pictures, random)
        mine = slice(process(), None, processes())
        if pictures[mine]:
            flips, drops = flips[mine].tolist(), drops[mine].tolist()
            batch = run.dataset.batch(pictures[mine], flips, drops, run.device)
            draws = [tensor[mine].to(run.device) for tensor in (times, *noises)]
            loss = losses(run, batch, *draws, config.snr_gamma).sum() / count
            scaler.scale(loss).backward()
            mean_loss += loss.detach()
    if processes() > 1:
        add_up_gradients(parameters)
    if config.clip_norm:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, config.clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return devices.add_up(mean_loss)


def numbers(run: Run, pictures: list, random: torch.Generator) -> tuple[torch.Tensor, ...]:
    """What is random about a batch: which pictures are flipped, which lose their caption, their timesteps,
    and noise (B, channels, height, width) for the VAE's sample and for the UNet."""
    config, base = run.config, run.dataset.base
    uniform = torch.rand(3, len(pictures), generator=random)
    flips, drops = (uniform[0] < 0.5) & config.flip, uniform[1] < config.caption_dropout
    times = timesteps(base, uniform[2] ** (1 / config.timestep_bias))
    shape = base.latent_shape(pictures[0].bucket)
    return flips, drops, times, *torch.randn(2, len(pictures), *shape, generator=random)


def timesteps(base, fractions: torch.Tensor) -> torch.Tensor:
    last = len(base.alpha_bar) - 1
    return ((last + 1) * fractions).long().clamp(max=last)  # a fraction may be rounded up to 1


def losses(run: Run, batch: dict, times, sample_noise, noise, snr_gamma=None) -> torch.Tensor:
    """(B,) the UNet's mean squared error for each picture of a batch, in float32.

    x_t = sqrt(a) x + sqrt(1 - a) noise; the target is the noise, or v = sqrt(a) noise - sqrt(1 - a) x.
    Ho et al. 2020, arXiv 2006.11239, equation 4; Salimans and Ho 2022, arXiv 2202.00512, appendix D.
    snr_gamma: min-SNR weights; Hang et al. 2023, arXiv 2303.09556.
    """
    x = batch["mean"] + batch["std"] * sample_noise
    # In float32: in bfloat16, the first timesteps would have no noise at all.
    a = run.dataset.base.alpha_bar.to(run.device)[times].view(-1, 1, 1, 1)
    noisy = a.sqrt() * x + (1 - a).sqrt() * noise
    velocity = run.dataset.base.velocity
    target = a.sqrt() * noise - (1 - a).sqrt() * x if velocity else noise
    more = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
    with torch.autocast(run.device.type, run.dtype, run.dtype != torch.float32):
        predicted = run.model(noisy, times, batch["words"], added_cond_kwargs=more).sample
    errors = (predicted.float() - target).square().mean((1, 2, 3))
    if snr_gamma:
        snr = (a / (1 - a)).flatten()
        errors = errors * snr.clamp(max=snr_gamma) / (snr + 1 if velocity else snr)
    return errors


def add_up_gradients(parameters: list[nn.Parameter]) -> None:
    """Give each parameter the sum of its gradients over all processes, of which some may have none."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = devices.add_up(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = total.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """The loss of the held-out pictures, with the same noise and timesteps each time; {} if there are none.

    Each picture has TIMES timesteps, evenly spread. A training loss is too noisy to compare.
    """
    run.model.eval()
    held, total = run.dataset.held, torch.zeros((), device=run.device)
    steps = plan(held, max(1, run.config.batch_size // TIMES), 1, seed=0, epoch=0)
    for start in run.watch(progress(range(0, len(steps), processes()), desc="held out")):
        if (mine := start + process()) < len(steps):
            (rows,) = steps[mine]
            batch, draws = held_out(run, rows.tolist())
            total += losses(run, batch, *draws).sum() / TIMES
    return {"val_loss": (devices.add_up(total) / len(held)).item()} if held else {}


def held_out(run: Run, rows: list[int]) -> tuple[dict, list[torch.Tensor]]:
    """A batch with TIMES copies of each held-out picture, and the other arguments of losses."""
    draws, base, pictures = [], run.dataset.base, [run.dataset.held[row] for row in rows]
    for row, picture in zip(rows, pictures, strict=True):
        random = torch.Generator().manual_seed(row)
        noises = torch.randn(2, TIMES, *base.latent_shape(picture.bucket), generator=random)
        spread = (torch.arange(TIMES) + torch.rand((), generator=random)) / TIMES
        draws.append((timesteps(base, spread), *noises))
    no = len(rows) * TIMES * [False]  # neither flipped nor without caption
    batch = run.dataset.batch([p for p in pictures for _ in range(TIMES)], no, no, run.device)
    return batch, [torch.cat(part).to(run.device) for part in zip(*draws, strict=True)]


def show(run: Run, draw: Sampler, epoch: int) -> None:
    """Evaluate after an epoch, and draw the prompts from the same noise as ever; log both."""
    figures, config, material = evaluate(run), run.config, run.dataset
    run.best = {**figures, "epoch": epoch}
    file = Path("samples", f"{run.step:06}.png")
    if process() == 0:
        shape = material.base.latent_shape(2 * (config.image_size,))
        random = torch.Generator().manual_seed(config.seed)
        noise = torch.randn(len(material.prompts), *shape, generator=random)
        drawn = draw(material.words(material.prompts), material.empty(), noise)
        run.attempt(str(file), lambda: samples.save_strip(drawn, run.folder / file))
    norms = [norm for norm in relative_norms(run.model).values() if math.isfinite(norm)]
    row = {key.replace("val_", "val/"): value for key, value in figures.items()}
    if norms:
        row["weights/relative_update"] = norms
    run.log.write({**row, "samples": str(file)})
    loss = f", train loss {run.meter.mean(run.steps):.4f}" if epoch else ""
    loss += f", held-out loss {figures['val_loss']:.4f}" if figures else ""
    speed = f", {run.meter.images_per_second:,.2f} pictures/s" if epoch else ""
    print(f"epoch {epoch}/{config.epochs}{loss}{speed}", flush=True)


def score(run: Run, draw: Sampler) -> float | None:
    """For the demo: the fraction of drawn digits that a classifier recognises. Else None."""
    if run.config.data_dir or run.config.image_size != demo_sdxl.SIDE or process() > 0:
        return None
    material, size = run.dataset, 2 * (demo_sdxl.SIDE,)
    return demo_sdxl.score(
        lambda words, noise: draw(words, material.empty(), noise),
        material.words,
        material.base.latent_shape(size),
    )


def finish(run: Run, draw: Sampler, save: Callable[[], None]) -> dict:
    """Save the adapter and draw the pictures; return the result."""
    config, figures = run.config, dict(run.best)
    after = score(run, draw)
    if after is not None:
        figures |= {"digits_before": run.extra["before"], "digits_after": after}
    run.log.save()  # the curves are drawn from it
    run.attempt("pictures", lambda: samples.draw_run(run))
    metrics = {
        key.replace("val_", "val/"): value for key, value in figures.items() if key != "epoch"
    }
    run.log.close(hyperparameters(config), metrics, {"samples/all": run.folder / "samples.png"})
    if not run.attempt(ADAPTER_FILE, save):  # also after a kill between last.pt and these files
        file = run.folder / ADAPTER_FILE
        raise ValueError(f"{file}: cannot be written; free disk space and {run.how_to_resume()}")
    sizes = {"trainable": run.trainable, "total": run.total}
    run.result = {**figures, **sizes, "images_per_second": run.meter.images_per_second}
    run.save()
    print(f"run folder: {run.folder}")
    if "val_loss" in figures:
        print(f"Held-out loss: {figures['val_loss']:.4f}")
    if after is not None:
        before = run.extra["before"]
        print(f"Drawn digits that a classifier recognises: {before:.1%} before, {after:.1%} after")
    return {**run.result, "run_dir": str(run.folder)}


def train(config: Config) -> dict:
    """Train as config says; return val_loss (held out, if there are such pictures), run_dir and more.

    Raises ValueError or OSError with one line: before the run's folder is made, if the config, the base or
    the pictures cannot work; later, if the loss is not finite, memory is too small, or the adapter cannot be
    written. Raises Stopped, a KeyboardInterrupt, after a signal. Files that are written stay. After
    --max-hours, the dict has "stopped" as well, which says how to resume.
    """
    try:
        run = prepare(config)
        result = fit(run)
    except Stopped as stopped:
        if stopped.status:
            raise
        print(stopped)
        sizes = {"trainable": run.trainable, "total": run.total, "run_dir": str(run.folder)}
        result = {**run.best, **sizes, "stopped": str(stopped)}
    except (MemoryError, RuntimeError) as error:
        if advice := devices.memory_advice(config, error, alike=""):  # other pictures share a step
            raise ValueError(advice if config.recompute else f"{advice}; or --recompute") from None
        raise
    devices.leave()
    return result


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; return the exit status, see exit_status."""
    return exit_status("train_sdxl.py", lambda: train(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())

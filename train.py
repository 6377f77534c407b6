"""Adapt a pretrained Vision Transformer to a data set with LoRA, LoHa or LoKr.

    python train.py                                   # the embedded demo, about a minute on two cores
    python train.py --adapter lokr --rank 8           # any field of Config is a flag
    python train.py --recipe tiny-imagenet-lora       # ViT-B/16 and Tiny-ImageNet, best on a GPU
    python train.py --init-adapter runs/x/adapter.safetensors      # on from an adapter, or a PEFT folder
    python train.py --out runs/x --resume             # on where runs/x was stopped, bit for bit
    torchrun --nproc_per_node=2 train.py              # two processes share each batch

or, in a notebook, the same with

    import train
    result = train.train(train.Config(adapter="lokr", rank=8))
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
import export
import vit
from engine import checkpoint
from engine.adapt import ADAPT, adapt
from engine.config import RECIPES, Config, begun, check, check_rank, check_sizes, named, parse
from engine.devices import (
    Autocast,
    in_turn,
    join,
    keep_freed_memory,
    out_of_memory,
    pick_device,
    pick_dtype,
    rank,
    spread,
    world,
)
from engine.images import Split, keep, progress
from engine.run import Progress, Run, Signals, Stopped, attempt, draw, make_folder, refuse_others

__all__ = ["RECIPES", "Config", "evaluate", "fit", "main", "parse", "prepare", "train"]


def train(config: Config) -> dict:
    """Train as config says; return val_accuracy (0..1, the best epoch's), run_dir, trainable, total, ...

    Raises ValueError or OSError in one line: for a config or data that cannot work, before the run's folder
    is made; later for a loss that is not finite, memory that does not suffice, an adapter that cannot be
    written. Stopped, a KeyboardInterrupt, if a signal asks for it. What was saved before stays.
    """
    try:
        result = fit(prepare(config))
    except (MemoryError, RuntimeError) as error:
        if "DataLoader worker" in str(error):
            reason = str(error).splitlines()[0]
            raise ValueError(f"{reason[:200]}; if memory is short, try --workers 0") from None
        if not out_of_memory(error):
            raise
        raise ValueError(smaller(config, error)) from None
    if world() > 1:
        dist.destroy_process_group()
    return result


def prepare(config: Config) -> Run:
    """Check the config, load data and trunk, adapt the trunk and make the run's folder."""
    check(config)
    device = pick_device(join(config.device))
    dtype = pick_dtype(config.amp, device)
    keep_freed_memory(device)
    checkpoint.seed_generators(config.seed)
    c = config
    cache_dir = c.cache_dir or (Path(c.out).parent if c.out else Path("runs")) / "cache"
    with in_turn():
        dataset = data.load(c.dataset, c.data_dir, c.limit, c.classes, c.download, c.holdout)
        check_sizes(config, dataset)
        model, preprocessing = vit.build(
            c.model, c.weights, len(dataset.classes), c.image_size, c.head_dropout, c.seed
        )
        arguments = {key: getattr(config, key) for key in ADAPT}
        trainable, total = adapt(
            model, dropout=config.adapter_dropout, module_dropout=config.module_dropout, **arguments
        )
        check_rank(config, model)
        if then := begun(c):  # images are prepared as they were, wherever weights lie now
            preprocessing |= then["identity"].get("preprocessing", {})
        elif c.init_adapter:
            said, images = export.start(model, c.init_adapter, dataset.classes)
            preprocessing |= images
            print(said)
        for split in (dataset.train, dataset.val, *([dataset.test] if c.test else [])):
            keep(split, cache_dir, preprocessing["image_size"], c.cache, c.workers)
    info = {
        **arguments,
        "model": config.model,
        "weights": named(config.weights),
        "seed": config.seed,
        "trunk": checkpoint.fingerprint(model),
        "eps": model.encoder.ln.eps,
        "classes": dataset.classes,
        "preprocessing": preprocessing,
    }
    refuse_others(config, dataset, info)
    made = make_folder(config)
    return Run(config, dataset, model, info, trainable, total, device, dtype, *made)


def smaller(config: Config, error: Exception) -> str:
    """What to say where the memory does not suffice."""
    batch = config.batch_size
    part = next((n for n in range(2, batch + 1) if batch % n == 0), 1)  # into so many equal ones
    smaller = f"--batch-size {batch // part} --grad-accum {config.grad_accum * part}, which learns the same"
    amp = config.amp not in ("bf16", "fp16")
    tries = [smaller] * (part > 1) + ["--amp bf16, on older GPUs --amp fp16"] * amp
    tries += [] if tries else ["a smaller --image-size, or fewer --targets"]
    again = config.out and (Path(config.out) / "config.json").exists()
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"out of memory with --batch-size {batch} ({reason[:200]}); try {'; or '.join(tries)}"
        f"{'; in another --out' if again else ''}"
    )


def fit(run: Run) -> dict:
    """Train for the epochs of the config, evaluate after each, keep the best, draw the pictures."""
    config = run.config
    model = run.model.to(run.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    with run.lock, Signals() as signals:
        at = Progress(run, optimizer, scaler)
        forward = spread(Autocast(model, run.device, run.dtype), run.device)
        if at.result and (not config.test or "test_loss" in at.result):
            print(f"{run.folder}: finished already, nothing is left to train")
            print(f"Validation Accuracy: {at.best['val_accuracy']:.2%}")
            return at.result | {"run_dir": str(run.folder)}
        try:
            while at.epoch < config.epochs:
                train_epoch(run, forward, at, signals)
            return finish(run, forward, at, signals)
        except FloatingPointError as error:
            raise ValueError(at.diverged(error)) from None
        finally:
            at.log.release()


def train_epoch(run: Run, forward: nn.Module, at: Progress, signals: Signals) -> None:
    """What is left of the epoch that the run is in: its steps, its evaluation, the best epoch kept."""
    config, split, steps = run.config, run.dataset.train, at.steps
    per_step = config.batch_size * config.grad_accum
    first = at.done - at.epoch * steps
    run.model.train()
    batches = load_batches(run, split, train=True, epoch=at.epoch, start=first * per_step)
    bar = {"desc": f"epoch {at.epoch + 1}/{config.epochs}", "initial": first, "total": steps}
    for step in progress(range(first, steps), **bar):
        lr = config.lr * (1 - at.done / (config.epochs * steps))
        at.optimizer.param_groups[0]["lr"] = lr
        # A step's dropout depends on its number alone: torchrun's processes draw unequal amounts, if their
        # shares are, and only the first one's generators are saved.
        torch.manual_seed((config.seed * 1_000_003 + at.done) % 2**32)
        images = min(per_step, len(split) - step * per_step)  # the last step may be smaller
        loss = train_step(run, forward, batches, images, at.optimizer, at.scaler)
        at.done += 1
        at.log.step(at.done, loss, lr, images)
        if at.due():
            at.save()
        signals.obey(at)
    batches = signals.watch(load_batches(run, run.dataset.val), at)
    counts = torch.zeros(2 * [len(run.dataset.classes)], dtype=torch.int32)
    val_loss, val_accuracy = evaluate(forward, batches, counts)
    at.epoch += 1
    at.log.epoch(at.epoch, val_loss, val_accuracy)
    better = val_accuracy > at.best["val_accuracy"]
    if better:
        at.best = {"val_loss": val_loss, "val_accuracy": val_accuracy, "best_epoch": at.epoch}
        at.best_tensors, at.best_counts = checkpoint.trained(run.model), counts
    at.save()  # first, so that where there is an adapter file, there is a run to go on with
    if better or checkpoint.ADAPTER_FILE in run.unwritten:
        at.save_adapter()


def finish(run: Run, forward: nn.Module, at: Progress, signals: Signals) -> dict:
    """Put the best epoch back, test it if that was asked for, draw it, and return the result."""
    config, best = run.config, at.best
    checkpoint.put(run.model, at.best_tensors)
    run.model.eval()  # a run that goes on after its last epoch has not been evaluated
    if config.test:
        batches = signals.watch(load_batches(run, run.dataset.test), at)
        test_loss, test_accuracy = evaluate(forward, batches)
        best = best | {"test_loss": test_loss, "test_accuracy": test_accuracy}
        at.log.list_bad()
        print(f"Test Accuracy: {test_accuracy:.2%}")
    at.log.save()  # the curves are drawn from it
    attempt(run, "pictures", lambda: draw(run, best["val_accuracy"], at.best_counts))
    at.log.close(best)
    if checkpoint.ADAPTER_FILE in run.unwritten and not at.save_adapter():
        raise ValueError(
            f"{run.folder / checkpoint.ADAPTER_FILE}: cannot be written; make room and {at.go_on()}"
        )
    counts = {"trainable": run.trainable, "total": run.total}
    at.result = {**best, **counts, "images_per_second": at.log.images_per_second}
    at.save()
    print(f"run folder: {run.folder}")
    print(f"Validation Accuracy: {best['val_accuracy']:.2%}")
    return {**at.result, "run_dir": str(run.folder)}


def train_step(run, model, batches, images: int, optimizer, scaler) -> torch.Tensor:
    """One step of the optimizer on the next so many images; the mean loss of them, on the device.

    Each batch weighs as much as it has images: the gradient is that of all of them in one batch, however
    many processes share it. Those exchange gradients in the last backward, and DDP takes the mean of them.
    """
    mean_loss = torch.zeros((), device=run.device)
    for left in reversed(range(-(-images // run.config.batch_size))):
        pixels, labels = next(batches)
        with model.no_sync() if left and world() > 1 else nullcontext():
            loss = F.cross_entropy(model(pixels).float(), labels, reduction="sum") / images
            scaler.scale(loss * world()).backward()
        mean_loss += loss.detach()
    if world() > 1:
        dist.all_reduce(mean_loss)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return mean_loss


@torch.inference_mode()
def evaluate(model: nn.Module, batches, counts: torch.Tensor | None = None) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (0..1) of the model over all batches, in eval mode.

    counts: (classes, classes) whole numbers on the CPU; each image adds 1 at [its class, the prediction].
    """
    model.eval()
    loss = correct = total = 0
    pairs = []  # of each batch (2, images): labels, predictions
    for images, labels in batches:
        logits = model(images)
        predictions = logits.argmax(-1)
        pairs.append(torch.stack([labels, predictions]))
        loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
        correct += (predictions == labels).sum().item()
        total += (labels >= 0).sum().item()
    if world() > 1:
        sums = torch.tensor([loss, correct, total], dtype=torch.float64, device=labels.device)
        dist.all_reduce(sums)
        loss, correct, total = sums.tolist()
    if counts is not None:
        counts += confusion(torch.cat(pairs, 1), counts)
    return loss / total, correct / total


def confusion(pairs: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """How often each pair of label and prediction (2, images) occurs, in all processes; of like's shape."""
    labels, predictions = pairs[:, pairs[0] >= 0].cpu()  # the rest is padding of torchrun's shares
    counts = torch.zeros_like(like)
    counts.index_put_((labels, predictions), counts.new_ones(()), accumulate=True)
    if world() > 1:
        counts = counts.to(pairs.device)  # nccl knows no other place
        dist.all_reduce(counts)
    return counts.to(like.device)


def load_batches(run: Run, split: Split, train: bool = False, epoch: int = 0, start: int = 0):
    """The batches of a split as the run's config wants them."""
    c, preprocessing = run.config, run.info["preprocessing"]
    augment = {"train": train, "min_crop": c.min_crop, "flip": c.flip}
    random = {"seed": c.seed, "epoch": epoch, "start": start, "part": (rank(), world())}
    batches = data.batches(
        split, c.batch_size, preprocessing, run.device, workers=c.workers, **augment, **random
    )
    if train:
        return batches  # the bar of an epoch counts steps
    return progress(batches, desc="evaluate", total=-(-len(split) // c.batch_size))


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; 0, or after one line on stderr 2 for what cannot work, and 128 + its
    number for a signal."""
    who = f"train.py, process {rank()}" if rank() > 0 else "train.py"
    try:
        train(parse(argv))
    except Stopped as stopped:
        print(f"{who}: {stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print(f"{who}: stopped at once; what was saved before is kept", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"{who}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

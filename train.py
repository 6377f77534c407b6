"""Adapt a pretrained Vision Transformer to a data set with LoRA, LoHa or LoKr.

    python train.py                                   # the embedded demo, about a minute on two cores
    python train.py --adapter lokr --rank 8           # any field of Config is a flag
    python train.py --recipe tiny-imagenet-lora       # ViT-B/16 and Tiny-ImageNet, best on a GPU
    python train.py --init-adapter runs/x             # start from an adapter, or from a PEFT folder
    python train.py --out runs/x --resume             # resume a stopped run, bit for bit
    torchrun --nproc_per_node=2 train.py              # two processes share each batch

In a notebook:

    import train
    from engine.config import Config
    result = train.train(Config(adapter="lokr", rank=8))
"""

import math
import sys
from collections import Counter
from contextlib import closing, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
from engine import checkpoint, devices, pictures
from engine.adapt import relative_norms
from engine.config import Config, hyperparameters, parse
from engine.devices import process, processes
from engine.files import atomic
from engine.images import progress
from engine.run import Run, Stopped, exit_status
from engine.start import prepare

COLUMNS = {  # TensorBoard's tag: the column of metrics.csv
    "train/lr": "lr",
    "train/loss": "train_loss",
    "train/throughput": "images_per_second",
    "val/loss": "val_loss",
    "val/accuracy": "val_accuracy",
    "val/balanced_accuracy": "val_balanced_accuracy",
}
FEW = 10  # images of a class, below which it gets a line of advice


def fit(run: Run) -> dict:
    """Train all epochs, evaluate after each, keep the best one; return what train returns."""
    config, images, model = run.config, run.dataset.train, run.model.to(run.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    forward = devices.Autocast(model, run.device, run.dtype)
    print(
        f"{config.adapter}: {run.trainable:,} of {run.total:,} parameters train "
        f"({run.trainable / run.total:.2%}), on {len(images):,} images, {run.device}, {str(run.dtype)[6:]}",
        flush=True,
    )
    advise(run)
    smoothing = {"label_smoothing": config.label_smoothing}
    criterion = partial(F.cross_entropy, weight=class_weights(run), **smoothing)
    per_step = config.batch_size * config.grad_accum  # images in a step
    steps = -(-len(images) // per_step)  # in an epoch
    with run.training(optimizer, scaler, steps, COLUMNS), closing(run.dataset):
        if run.result and (not config.test or "test_loss" in run.result):
            print(f"{run.folder}: finished already, nothing is left to train")
            print(f"Validation Accuracy: {run.best['val_accuracy']:.2%}")
            return run.result | {"run_dir": str(run.folder)}
        if processes() > 1:  # under torchrun, each process has a share of each batch, and one GPU
            on_gpu = run.device.type == "cuda"
            forward = DistributedDataParallel(forward, device_ids=[run.device] if on_gpu else None)
            if not on_gpu:
                forward.register_comm_hook(None, devices.mean_in_order)
        elif devices.many_gpus(run.device):
            forward = nn.DataParallel(forward)

        while run.epoch < config.epochs:
            model.train()
            first = run.step - run.epoch * steps  # not 0 in the first epoch after a resume
            batches = load_batches(run, images, train=True, start=first * per_step)
            bar = {"desc": f"epoch {run.epoch + 1}/{config.epochs}", "initial": first}
            for step in progress(range(first, steps), total=steps, **bar):
                lr = config.lr * rate(run.step, config.epochs * steps, config.warmup)
                optimizer.param_groups[0]["lr"] = lr
                # Dropout is seeded by the step: processes with unequal shares draw unequally many numbers,
                # and last.pt has the generators of only one.
                torch.manual_seed((config.seed * 1_000_003 + run.step) % 2**32)
                count = min(per_step, len(images) - step * per_step)  # the last step may be smaller
                loss = train_step(run, forward, batches, count, optimizer, scaler, criterion)
                run.step += 1
                if run.meter.add(loss, count):
                    speed = run.meter.images_per_second
                    point = {"train/loss": run.meter.loss, "train/lr": lr}
                    run.log.write({**point, "train/throughput": speed})
                run.after_step()  # saves now and then, and stops when asked to

            confusion = torch.zeros(2 * [len(run.dataset.classes)], dtype=torch.int32)
            batches = run.watch(load_batches(run, run.dataset.val))
            val_loss, val_accuracy = evaluate(forward, batches, confusion)
            run.epoch += 1
            figures = {"val_loss": val_loss, "val_accuracy": val_accuracy}
            figures["val_balanced_accuracy"] = balanced_accuracy(confusion)
            best = not run.best or score(config, figures) > score(config, run.best)
            if best:
                run.best = {**figures, "best_epoch": run.epoch}
                run.best_tensors = checkpoint.trained(model)
                run.extra["confusion"] = confusion
            log_epoch(run, figures)
            run.save()  # before the adapter file: a run that has one can be resumed
            if best or checkpoint.ADAPTER_FILE in run.unwritten:
                run.save_adapter()
        return finish(run, forward)


def rate(step: int, steps: int, warmup: float = 0.0) -> float:
    """The learning rate of a step as a fraction of --lr: from zero up to 1, then down to zero, both linearly.

    warmup: the fraction of all steps in which it rises, rounded up to whole steps. The same numbers as
    transformers' get_linear_schedule_with_warmup.
    """
    rising = math.ceil(warmup * steps)
    return step / rising if step < rising else 1 - (step - rising) / (steps - rising)


def train_step(
    run: Run, forward, batches, count: int, optimizer, scaler, criterion=F.cross_entropy
) -> torch.Tensor:
    """One step of the optimizer on the next `count` images; returns their mean loss.

    criterion: F.cross_entropy with its weights and label smoothing.
    Each image counts alike, or as its class weighs: the gradient equals that of one large batch, for any
    number of batches and processes. Processes exchange gradients in the last backward only; DDP takes their
    mean. --clip-norm limits the norm of this gradient, without the loss scale.
    """
    mean_loss = torch.zeros((), device=run.device)
    for left in reversed(range(-(-count // run.config.batch_size))):
        pixels, labels = next(batches)
        with forward.no_sync() if left and processes() > 1 else nullcontext():
            logits = forward(pixels).float()
            loss = criterion(logits, labels, reduction="sum") / count
            scaler.scale(loss * processes()).backward()
        mean_loss += loss.detach()
    if run.config.clip_norm:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], run.config.clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return devices.add_up(mean_loss)


def class_weights(run: Run) -> torch.Tensor | None:
    """(classes,): images / (classes that have images * images of the class), so that an image's mean weight
    is 1, as scikit-learn's "balanced"; None if all images count alike."""
    if run.config.class_weights == "none":
        return None
    labels = torch.as_tensor(run.dataset.train.labels)
    counts = labels.bincount(minlength=len(run.dataset.classes))
    weights = len(labels) / ((counts > 0).sum() * counts.clamp(min=1))
    return weights.to(run.device, torch.float32)


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches, confusion: torch.Tensor | None = None
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (0..1) of the model over all batches, in eval mode.

    confusion: integers (classes, classes), on the CPU. Each image adds 1 at [its class, the predicted class].
    """
    model.eval()
    loss = correct = total = 0
    pairs = []  # for each batch (2, images): labels, predictions
    for images, labels in batches:
        logits = model(images)
        predictions = logits.argmax(-1)
        pairs.append(torch.stack([labels, predictions]))
        loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
        correct += (predictions == labels).sum().item()
        total += (labels >= 0).sum().item()  # the label -100 is padding
    sums = torch.tensor([loss, correct, total], dtype=torch.float64)
    if processes() > 1:
        sums = devices.add_up(sums.to(labels.device))
    loss, correct, total = sums.tolist()
    if confusion is not None:
        count_confusion(torch.cat(pairs, 1), confusion)
    return loss / total, correct / total


def balanced_accuracy(confusion: torch.Tensor) -> float:
    """The mean over classes of the fraction (0..1) of their images that are recognised."""
    images = confusion.sum(1).double()
    return (confusion.diag() / images)[images > 0].mean().item()


def score(config: Config, figures: dict) -> float:
    """What the best epoch has most of."""
    if config.best_by == "loss":
        return -figures["val_loss"]
    return figures["val_balanced_accuracy" if config.best_by == "balanced" else "val_accuracy"]


def advise(run: Run) -> None:
    """Name the classes with few training images. Not with --limit, which is for trying things out."""
    names, counts = run.dataset.classes, Counter(run.dataset.train.labels.tolist())
    few = sorted((count, names[label]) for label, count in counts.items() if count < FEW)
    if few and not run.config.limit:
        listed = ", ".join(f"{name} ({count})" for count, name in few[:3])
        print(
            f"{len(few)} of {len(counts)} classes have fewer than {FEW} training images: {listed}"
            f"{' ...' if len(few) > 3 else ''}; collect more, or try --class-weights balanced"
        )


def log_epoch(run: Run, figures: dict[str, float]) -> None:
    """Write an epoch's metrics to TensorBoard, metrics.csv and the screen."""
    row = {key.replace("val_", "val/"): value for key, value in figures.items()}
    row["val/best_accuracy"] = run.best["val_accuracy"]
    norms = [norm for norm in relative_norms(run.model).values() if math.isfinite(norm)]
    run.log.write(row | ({"weights/relative_update": norms} if norms else {}))
    print(
        f"epoch {run.epoch}/{run.config.epochs}: train loss {run.meter.mean(run.steps):.4f}, "
        f"validation loss {figures['val_loss']:.4f}, accuracy {figures['val_accuracy']:.2%}, "
        f"balanced {figures['val_balanced_accuracy']:.2%}, "
        f"{run.meter.images_per_second:,.0f} images/s",
        flush=True,
    )
    run.meter.start()
    list_unreadable(run)


def finish(run: Run, forward: nn.Module) -> dict:
    """Restore the best epoch, test it if --test is given, draw the pictures; return the result."""
    config = run.config
    checkpoint.put(run.model, run.best_tensors)
    run.model.eval()  # a run resumed after its last epoch has not been evaluated
    figures, metrics = dict(run.best), {"val/best_accuracy": run.best["val_accuracy"]}
    if config.test:
        batches = run.watch(load_batches(run, run.dataset.test))
        confusion = torch.zeros_like(run.extra["confusion"])
        figures["test_loss"], figures["test_accuracy"] = evaluate(forward, batches, confusion)
        figures["test_balanced_accuracy"] = balanced_accuracy(confusion)
        metrics["test/accuracy"] = figures["test_accuracy"]
        list_unreadable(run)
        print(f"Test Accuracy: {figures['test_accuracy']:.2%}")
    run.log.save()  # the curves are drawn from it
    drawn = run.attempt("pictures", lambda: pictures.draw_run(run, *sample(run)))
    files = {f"val/{name}": run.folder / f"{name}.png" for name in ("confusion", "predictions")}
    run.log.close(hyperparameters(config), metrics, files if drawn else {})
    if checkpoint.ADAPTER_FILE in run.unwritten and not run.save_adapter():
        file = run.folder / checkpoint.ADAPTER_FILE
        raise ValueError(f"{file}: cannot be written; free disk space and {run.how_to_resume()}")
    sizes = {"trainable": run.trainable, "total": run.total}
    measured = {"images_per_second": run.meter.images_per_second, "dtype": str(run.dtype)[6:]}
    run.result = {**figures, **sizes, **measured}
    run.save()
    print(f"run folder: {run.folder}")
    print(f"Validation Accuracy: {run.best['val_accuracy']:.2%}")
    return {**run.result, "run_dir": str(run.folder)}


def sample(run: Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """24 validation images, the model's logits for them, and their labels."""
    few = run.dataset.val.rows(data.even_rows(run.dataset.val.labels, 24))
    batches = data.batches(few, 24, run.info["preprocessing"], run.device, workers=0)
    images, labels = next(iter(batches))
    with torch.inference_mode():
        return images.cpu(), run.model(images).float().cpu(), labels.cpu()


def count_confusion(pairs: torch.Tensor, confusion: torch.Tensor) -> None:
    """Add the pairs of label and prediction (2, images) of all processes to confusion (classes, classes)."""
    labels, predictions = pairs[:, pairs[0] >= 0].cpu()  # the label -100 is padding
    counts = torch.zeros_like(confusion)
    counts.index_put_((labels, predictions), counts.new_ones(()), accumulate=True)
    confusion += devices.add_up(counts.to(pairs.device)).cpu()  # nccl adds on GPUs only


def list_unreadable(run: Run) -> None:
    """Write unreadable.txt: the images that any process has replaced, and why."""
    splits = (run.dataset.train, run.dataset.val, run.dataset.test)
    reasons = [reason for split in splits if split for reason in split.bad.values()]
    if reasons := devices.gather(reasons):
        text, file = "".join(f"{reason}\n" for reason in reasons), run.folder / "unreadable.txt"
        names = {"encoding": "utf-8", "errors": "surrogateescape"}  # some names are not UTF-8

        def write():
            with atomic(file) as temporary:
                temporary.write_text(text, **names)

        run.attempt(file.name, write)


def load_batches(run: Run, split, train: bool = False, start: int = 0):
    """The batches of a split; for training, those of this epoch, without its first `start` images."""
    c = run.config
    augment = {"train": train, "min_crop": c.min_crop, "flip": c.flip}
    random = {"seed": c.seed, "epoch": run.epoch, "start": start, "part": (process(), processes())}
    how = {"workers": c.workers, **augment, **random}
    batches = data.batches(split, c.batch_size, run.info["preprocessing"], run.device, **how)
    if train:
        return batches
    return progress(batches, desc="evaluate", total=-(-len(split) // c.batch_size))


def train(config: Config) -> dict:
    """Train as config says; return val_accuracy (0..1, best epoch), run_dir, trainable, total and more.

    Raises ValueError or OSError with one line: before the run's folder is made, if the config or the data
    cannot work; later, if the loss is not finite, memory is too small, or the adapter file cannot be
    written. Raises Stopped, a KeyboardInterrupt, after a signal. Files that are written stay.
    After --max-hours, the dict has "stopped" as well, which says how to resume, and val_accuracy is that of
    the best epoch so far, or None.
    """
    try:
        run = prepare(config)
        result = fit(run)
    except Stopped as stopped:
        if stopped.status:
            raise
        print(stopped)
        sizes = {"trainable": run.trainable, "total": run.total, "run_dir": str(run.folder)}
        result = {"val_accuracy": None, **run.best, **sizes, "stopped": str(stopped)}
    except (MemoryError, RuntimeError) as error:
        if advice := devices.memory_advice(config, error):
            raise ValueError(advice) from None
        raise
    devices.leave()
    return result


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; return the exit status, see exit_status."""
    return exit_status("train.py", lambda: train(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())

"""The settings of a run of train_sdxl.py: Config, its recipes, and which values are refused.

As engine/config.py, only data. Fields of both have the same meaning.
"""

import math
import os
from dataclasses import asdict, dataclass, field

from engine import config as shared
from engine.adapt import ADAPTERS
from engine.config import check_values, fill, option


@dataclass
class Config:
    """Everything that a run depends on. A field that is not given has the recipe's value, or the default.

    Every field is a flag of train_sdxl.py. Raises ValueError for an unknown recipe or a value of the wrong
    type.
    """

    recipe: str | None = field(
        default=None,
        metadata={
            "help": "the settings to start from (default: demo; sdxl, with --data-dir or --base)"
        },
    )
    base: str = option(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "Stable Diffusion XL: a folder as diffusers saves it, OWNER/NAME on Hugging Face, or embedded",
    )
    data_dir: str | None = option(
        None, "folder of pictures with captions; without it the embedded digits"
    )
    limit: int | None = option(None, "use at most this many pictures")
    holdout: float = option(
        0.05, "fraction of the pictures for the held-out loss, which do not train"
    )
    image_size: int = option(
        1024, "a picture has about the area of a square with this side in pixels"
    )
    flip: bool = option(True, "mirror training pictures at random")
    adapter: str = option("lokr", "what trains", tuple(ADAPTERS))
    rank: int = option(8, "inner dimension of the adapters")
    alpha: float = option(8.0, "the update is scaled by alpha / rank")
    targets: str = option(
        "to_q,to_k,to_v,to_out.0",
        "all, or the ends of names of the UNet's layers, separated by commas",
    )
    factor: int = option(
        -1, "LoKr: wanted rows and columns of W1; -1: near the square root of the layer's"
    )
    decompose_both: bool = option(
        False, "LoKr: W1 is a product of two factors too, if rank is small enough"
    )
    adapter_dropout: float = option(0.0, "dropout of each adapter's input")
    module_dropout: float = option(0.0, "probability that a forward leaves out an adapter")
    caption_dropout: float = option(0.1, "probability that a picture trains without its caption")
    snr_gamma: float | None = option(None, "weigh the loss by min-SNR with this gamma, such as 5")
    timestep_bias: float = option(
        1.0,
        "above 1, noisier timesteps are more frequent: t = 1000 u^(1 / bias), u uniform in 0..1",
    )
    epochs: int = option(20, "passes through the training pictures")
    batch_size: int = option(2, "pictures in a forward pass, over all processes")
    grad_accum: int = option(1, "batches per optimizer step")
    lr: float = option(1e-4, "the highest learning rate")
    schedule: str = option("constant", "the rate after the warmup", ("constant", "linear"))
    warmup: float = option(0.0, "fraction of all steps in which the rate rises linearly to --lr")
    beta2: float = option(0.999, "AdamW's decay of squared gradients")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    clip_norm: float = option(1.0, "largest norm of a step's gradients; 0: they are not clipped")
    recompute: bool = option(
        False, "run each block again in backward, and keep less for it: slower, less memory"
    )
    evaluate_every: int = option(1, "epochs between two evaluations, with sample pictures")
    prompts: str | None = option(
        None, "what the sample pictures show, separated by | (default: four captions)"
    )
    sample_steps: int = option(25, "steps of the sampler, DPM-Solver++")
    guidance: float = option(5.0, "classifier-free guidance of the sample pictures; 1: none")
    amp: str = option("auto", "mixed precision", ("auto", "bf16", "fp16", "off"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int | None = option(None, "threads that decode pictures (default: one per core)")
    cache: bool = option(True, "encode captions and pictures only once and keep that on disk")
    cache_dir: str | None = option(
        None, "folder for what is encoded (default: cache/ beside --out)"
    )
    seed: int = option(0, "seed of everything random")
    out: str | None = option(
        None, "the run's folder (default: runs/<recipe>-<adapter>-<seed>-<time>)"
    )
    resume: bool = option(False, "resume the run in --out; start it if there is none")
    save_minutes: float = option(10.0, "minutes between two saves of last.pt within an epoch")
    max_hours: float | None = option(
        None, "hours after which the run saves and ends, with status 0; --resume continues it"
    )

    def __post_init__(self):
        if self.recipe is None:  # the demo's settings would ruin a full-size model
            self.recipe = "sdxl" if self.data_dir or self.base else "demo"
        fill(self, RECIPES)


RECIPES = {
    "demo": {
        "base": "embedded",
        "image_size": 24,
        "flip": False,  # a mirrored digit is not a digit
        "adapter": "lokr",
        "rank": 8,
        "alpha": 8.0,
        "targets": "all",
        "epochs": 8,
        "batch_size": 64,
        "lr": {"lora": 0.0033, "loha": 0.0083, "lokr": 0.02},
        "schedule": "linear",
        "beta2": 0.99,
        "weight_decay": 0.0,
        "timestep_bias": 3.0,
        "holdout": 0.02,
        "evaluate_every": 4,
        "prompts": "the digit zero|the digit three|the digit seven|the digit eight",
        "sample_steps": 10,
        "guidance": 7.0,
    },
    "sdxl": {"recompute": True},
    "pokemon-lokr": {  # DiffEngine's stable_diffusion_xl_lokr_pokemon_blip
        "image_size": 1024,
        "flip": True,
        "adapter": "lokr",
        "rank": 8,
        "alpha": 8.0,
        "targets": "to_q,to_k,to_v,to_out.0",
        "caption_dropout": 0.0,
        "epochs": 50,
        "batch_size": 2,
        "lr": 1e-5,
        "schedule": "constant",
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "recompute": True,
        "prompts": "yoda pokemon|yoda pokemon|yoda pokemon|yoda pokemon",
        "sample_steps": 50,
        "amp": "fp16",
    },
}

# What a resumed run may change: it does not change what is learnt, or it is compared elsewhere (the base).
FREE = (
    "recipe base data_dir recompute evaluate_every device workers cache cache_dir out resume save_minutes "
    "max_hours"
).split()
# What samples.png depends on: its pictures are compared, so a resumed run may not change this either.
SHOWN = ["prompts", "sample_steps", "guidance"]


def parse(argv: list[str] | None = None) -> Config:
    """The command line as a Config. Raises ValueError for an unknown flag or a wrong value."""
    what = "Adapt Stable Diffusion XL to pictures with captions, with LoRA, LoHa or LoKr."
    return shared.parse(argv, Config, RECIPES, what)


def check(config: Config) -> None:
    """Raise ValueError in one line, with flag, value and what is allowed, for a value that cannot work."""
    c, cores = config, os.cpu_count() or 1
    side = 64 if c.image_size >= 256 else 8
    limits = {
        "limit >= 1": c.limit is None or c.limit >= 1,
        "holdout in [0, 1)": 0 <= c.holdout < 1,
        f"image_size a multiple of {side}": c.image_size > 0 and c.image_size % side == 0,
        "rank >= 1": c.rank >= 1,
        "alpha > 0": 0 < c.alpha < math.inf,
        "targets (names of layers, or all)": bool(c.targets),
        "factor any whole number but 0": c.factor != 0,
        "adapter_dropout in [0, 1)": 0 <= c.adapter_dropout < 1,
        "module_dropout in [0, 1)": 0 <= c.module_dropout < 1,
        "caption_dropout in [0, 1]": 0 <= c.caption_dropout <= 1,
        "snr_gamma > 0": c.snr_gamma is None or 0 < c.snr_gamma < math.inf,
        "timestep_bias > 0": 0 < c.timestep_bias < math.inf,
        "epochs >= 1": c.epochs >= 1,
        "batch_size >= 1": c.batch_size >= 1,
        "grad_accum >= 1": c.grad_accum >= 1,
        "lr in (0, 1000]": 0 < c.lr <= 1000,
        "warmup in [0, 1)": 0 <= c.warmup < 1,
        "beta2 in [0, 1)": 0 <= c.beta2 < 1,
        "weight_decay >= 0": 0 <= c.weight_decay < math.inf,
        "clip_norm >= 0": 0 <= c.clip_norm < math.inf,
        "evaluate_every >= 1": c.evaluate_every >= 1,
        "sample_steps >= 1": c.sample_steps >= 1,
        "guidance >= 1": 1 <= c.guidance < math.inf,
        f"workers in 0..{4 * cores}": c.workers is None or 0 <= c.workers <= 4 * cores,
        "seed in 0..4294967295": 0 <= c.seed < 2**32,
        "save_minutes >= 0": c.save_minutes >= 0,
        "max_hours > 0": c.max_hours is None or c.max_hours > 0,
    }
    check_values(config, limits)
    if c.recipe != "demo" and not c.data_dir:
        raise ValueError(
            "expected --data-dir, a folder of pictures with captions: without it, only the demo trains"
        )


def hyperparameters(config: Config) -> dict:
    """The settings that change what is learnt."""
    settings = {key: value for key, value in asdict(config).items() if key not in [*FREE, *SHOWN]}
    return {key: value for key, value in settings.items() if value is not None} | {
        "base": config.base
    }

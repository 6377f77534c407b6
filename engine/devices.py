"""Where a run computes: device, precision, memory; several GPUs of one process, processes of torchrun."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
# From this width of a trunk on, bfloat16 is faster. It takes 0.7 to 1.2 of float32's time with width 128, 0.6
# to 0.8 with 192, and 0.5 to 0.6 with 384 (two cores of an AMD EPYC with AVX512-BF16).
BFLOAT16_WIDTH = 192


def pick_device(name: str) -> torch.device:
    """The device of this name; auto is a GPU if there is one. Raises ValueError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if name == "cpu" and torch.backends.mps.is_available() else name
    try:
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available():
            check_architecture(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # ImportError: hpu
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: cannot be used ({reason}); try --device cpu") from None
    return device


def check_architecture(device: torch.device) -> None:
    """Raise ValueError for a GPU that this torch has no kernels for, as Kaggle's P100."""
    built = torch.cuda.get_arch_list()
    alone = device.index is not None
    for index in [device.index] if alone else range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not torch.version.hip and not runs_on((major, minor), built):
            raise ValueError(
                f"--device {device}: {torch.cuda.get_device_name(index)} is sm_{major}{minor}, and "
                f"torch {torch.__version__} is built for {', '.join(built)}; on Kaggle choose the "
                "accelerator GPU T4 x2; elsewhere install an older torch or use --device cpu"
            )


def runs_on(capability: tuple[int, int], built: list[str]) -> bool:
    """True if a GPU of this capability can run one of a build's architectures: machine code (sm_) runs within
    its major version, code that the driver compiles (compute_) on all later ones too."""
    for name in built:
        if found := re.match(r"(sm|compute)_(\d+)(\d)", name):
            version = int(found[2]), int(found[3])
            if version <= capability and (found[1] == "compute" or version[0] == capability[0]):
                return True
    return False


def pick_dtype(config, device: torch.device, width: int = 0) -> torch.dtype:
    """The type of mixed precision; float32 means none. width: of the trunk's tokens.

    auto on a GPU: bfloat16 if it has it natively, else float16. auto on a CPU: bfloat16 if it has it natively
    and the trunk is wide enough to gain by it, else float32.
    On a CPU, which computes float16 many times slower than float32, a recipe's fp16 means auto. Raises
    ValueError there for --amp fp16.
    """
    amp = config.amp
    if amp == "fp16" and device.type == "cpu" and not computes_float16():
        if "amp" not in config.filled:
            raise ValueError("--amp fp16: much slower than float32 on this CPU; leave the flag out")
        amp = "auto"
    if amp == "auto":
        if device.type == "cpu" and width >= BFLOAT16_WIDTH and computes_bfloat16():
            return torch.bfloat16
        if device.type != "cuda":
            return torch.float32
        native = torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 only emulates it
        return torch.bfloat16 if native else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]


def computes_float16() -> bool:
    """True if the CPU multiplies float16 itself (AVX512-FP16, AMX-FP16), as far as torch says it."""
    return can("avx512_fp16", "amx_fp16")


def computes_bfloat16() -> bool:
    """True if the CPU multiplies bfloat16 itself (AVX512-BF16, AMX-BF16, Arm's BF16), as far as torch says
    it."""
    return can("avx512_bf16", "amx_bf16", "bf16")


def can(*names: str) -> bool:
    """True if the CPU has one of these capabilities; torch before 2.11 names none."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name) for name in names)


class Autocast(nn.Module):
    """The model in mixed precision. It is a module because DataParallel's threads ignore an autocast around
    them."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.model, self.device_type, self.dtype = model, device.type, dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device_type, self.dtype, self.dtype != torch.float32):
            return self.model(images)


def keep_freed_memory(device: torch.device) -> None:
    """On Linux and a CPU: let the process keep freed memory for the next tensor. Elsewhere: nothing.

    glibc's malloc takes blocks of more than 32 MB from the system and gives them back at once. So each batch
    of images or activations lies in new pages, which the system has to clear one by one. With this call, the
    process and those that it forks keep the most memory that they ever had until they end.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # musl has none
        mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap too
        mallopt(M_TRIM_THRESHOLD, -1)  # and the heap never shrinks


def out_of_memory(error: Exception) -> bool:
    texts = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA's; the CPU's
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def memory_advice(config, error: Exception, alike: str = ", which learns the same") -> str | None:
    """What to try instead, for a run that is out of memory; None for another error.

    alike: what is said of smaller batches.
    """
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if "DataLoader worker" in str(error):
        return f"{reason}; if memory is short, try --workers 0"
    if not out_of_memory(error):
        return None
    batch = config.batch_size
    parts = next((n for n in range(2, batch + 1) if batch % n == 0), 1)  # equal parts of a batch
    smaller = f"--batch-size {batch // parts} --grad-accum {config.grad_accum * parts}{alike}"
    precision = config.amp not in ("bf16", "fp16")
    advice = [smaller] * (parts > 1) + ["--amp bf16, on older GPUs --amp fp16"] * precision
    advice += [] if advice else ["a smaller --image-size, or fewer --targets"]
    begun = config.out and (Path(config.out) / "config.json").exists()
    return (
        f"out of memory with --batch-size {batch} ({reason}); try {'; or '.join(advice)}"
        f"{'; in another --out' if begun else ''}"
    )


def many_gpus(device: torch.device) -> bool:
    """True if this process has several GPUs and none was named: nn.DataParallel uses them all."""
    return device.type == "cuda" and device.index is None and torch.cuda.device_count() > 1


def process() -> int:
    """The number of this process among torchrun's; 0 without torchrun."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def processes() -> int:
    """The number of processes that torchrun has started, on all machines; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def join(device: str) -> str:
    """Under torchrun, connect to the other processes and take a GPU for this one. Returns the device to use.

    Raises ValueError if there is none for this process.
    """
    if processes() == 1:
        return device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"--device {device}: under torchrun expected auto, cpu or cuda (cuda: a GPU for each process)"
        )
    if device == "cuda":
        index, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if index >= gpus:
            raise ValueError(
                f"--device cuda: this machine has {gpus} GPUs for "
                f"{os.environ['LOCAL_WORLD_SIZE']} processes; start one for each, or give --device cpu"
            )
        device = f"cuda:{index}"
        torch.cuda.set_device(device)
    # Hours: the first process of a machine may decode a large data set while the others wait (in_turn).
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(hours=3))
    if process() > 0:
        sys.stdout = open(os.devnull, "w")  # only the first process prints
    return device


def leave() -> None:
    """Under torchrun, end the connection to the other processes."""
    if processes() > 1:
        dist.destroy_process_group()


@contextmanager
def in_turn() -> Iterator[None]:
    """Under torchrun, let the first process of each machine run the block before the others.

    They then find what it has downloaded or decoded.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if processes() > 1 and not first:
        dist.barrier()
    yield
    if processes() > 1 and first:
        dist.barrier()


def gather(texts: list[str]) -> list[str]:
    """The texts of all processes, without duplicates."""
    if processes() == 1:
        return texts
    found = [None] * processes()
    dist.all_gather_object(found, texts)
    return list(dict.fromkeys(text for part in found for text in part))


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in place."""
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def check_same_step(step: int, device: torch.device) -> None:
    """Raise ValueError if the processes resume at different steps: they have not read the same last.pt."""
    if processes() > 1:
        ends = torch.tensor([step, -step], device=device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise ValueError("--resume: --out must be a folder that all machines share")


def mean_in_order(_, bucket) -> torch.futures.Future[torch.Tensor]:
    """A communication hook of DistributedDataParallel: the mean gradient, in the order of the processes.

    DDP's own order depends on the place of a gradient in its bucket, which differs after a restart.
    """
    parts = [torch.empty_like(bucket.buffer()) for _ in range(processes())]
    dist.all_gather(parts, bucket.buffer())
    future = torch.futures.Future()
    future.set_result(sum(parts) / processes())
    return future

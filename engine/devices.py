"""What a run computes on: device, precision and memory, GPUs of one process, processes of torchrun."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def pick_device(name: str) -> torch.device:
    """The device that a name means; auto is a GPU if there is one. ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if name == "cpu" and torch.backends.mps.is_available() else name
    try:
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available():
            check_architecture(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: cannot be used ({reason}); try --device cpu") from None
    return device


def check_architecture(device: torch.device) -> None:
    """Name a GPU that this torch has no kernels for, as Kaggle's P100; torch itself fails in the first."""
    built = torch.cuda.get_arch_list()
    alone = device.index is not None
    for index in [device.index] if alone else range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not torch.version.hip and not runs_on((major, minor), built):
            raise ValueError(
                f"--device {device}: {torch.cuda.get_device_name(index)} is sm_{major}{minor}, and "
                f"torch {torch.__version__} is built for {', '.join(built)} alone; on Kaggle choose "
                "the accelerator GPU T4 x2; elsewhere an older torch, or --device cpu"
            )


def runs_on(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether one of a build's architectures runs on a GPU: machine code (sm_) within its major version,
    and what the driver compiles (compute_) on all later ones."""
    for name in built:
        if found := re.match(r"(sm|compute)_(\d+)(\d)", name):
            version = int(found[2]), int(found[3])
            if version <= capability and (found[1] == "compute" or version[0] == capability[0]):
                return True
    return False


def pick_dtype(amp: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where a GPU has it natively, float16 on older ones, else float32."""
    if amp == "auto":
        if device.type != "cuda":
            return torch.float32
        native = torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 only emulates it
        return torch.bfloat16 if native else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]


class Autocast(nn.Module):
    """The model in mixed precision. A module, so that it reaches the threads of DataParallel, which
    know nothing of an autocast around them."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.model, self.device_type, self.dtype = model, device.type, dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device_type, self.dtype, self.dtype != torch.float32):
            return self.model(images)


def keep_freed_memory(device: torch.device) -> None:
    """Linux: memory that a tensor on the CPU has freed stays with the process, for the next one.

    For another device than the CPU nothing changes: there torch keeps the memory itself.

    glibc's malloc takes more than 32 MB from the system each time and gives it back at once, so that a batch
    of images or of activations always comes in fresh pages, which the system clears one by one. With this,
    the process, and those that it forks, hold on to the most that they ever had, until they end.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # musl has none
        mallopt(M_MMAP_MAX, 0)  # however large, it comes from the heap
        mallopt(M_TRIM_THRESHOLD, -1)  # which never shrinks


def out_of_memory(error: Exception) -> bool:
    texts = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA's; the CPU's
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def rank() -> int:
    """Which of torchrun's processes this is; without torchrun 0."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def world() -> int:
    """How many processes torchrun has started, on all machines; without torchrun 1."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def join(device: str) -> str:
    """Under torchrun: meet the other processes, take a GPU of one's own. Returns the device to use.

    Raises ValueError if there is none for this process.
    """
    if world() == 1:
        return device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"--device {device}: under torchrun expected auto, cpu or cuda, which is a GPU for each process"
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
    # The first process of a machine may decode a large data set while the others wait: see in_turn.
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(hours=3))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    return device


@contextmanager
def in_turn() -> Iterator[None]:
    """Under torchrun: the first process of each machine goes first, the others find what it fetched."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if world() > 1 and not first:
        dist.barrier()
    yield
    if world() > 1 and first:
        dist.barrier()


def gather(texts: list[str]) -> list[str]:
    """The texts of all of torchrun's processes, each once."""
    if world() == 1:
        return texts
    found = [None] * world()
    dist.all_gather_object(found, texts)
    return list(dict.fromkeys(text for part in found for text in part))


def meet_at(step: int, device: torch.device) -> None:
    """Raise ValueError if torchrun's processes did not all read the same last.pt."""
    if world() > 1:
        ends = torch.tensor([step, -step], device=device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise ValueError("--resume: --out must be a folder that all machines share")


def spread(forward: nn.Module, device: torch.device) -> nn.Module:
    """The model on all that there is: torchrun's processes, or else the GPUs of this one."""
    if world() > 1:
        if device.type == "cuda":
            return DistributedDataParallel(forward, device_ids=[device])
        parallel = DistributedDataParallel(forward)
        parallel.register_comm_hook(None, mean_in_order)
        return parallel
    return nn.DataParallel(forward) if many_gpus(device) else forward


def mean_in_order(_, bucket) -> torch.futures.Future[torch.Tensor]:
    """The mean of the processes' gradients in a bucket of DDP's, added in the order of their ranks. DDP's own
    order depends on where a gradient lies in its bucket, which another start of the processes changes."""
    parts = [torch.empty_like(bucket.buffer()) for _ in range(world())]
    dist.all_gather(parts, bucket.buffer())
    future = torch.futures.Future()
    future.set_result(sum(parts) / world())
    return future


def many_gpus(device: torch.device) -> bool:
    return device.type == "cuda" and device.index is None and torch.cuda.device_count() > 1

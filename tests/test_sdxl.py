"""train_sdxl.py against diffusers, transformers and PEFT: the step, what it reads, what it saves."""

import json
import re
import shlex
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoKrConfig, PeftModel, get_peft_model
from PIL import Image
from sdxl import toy_pipeline, write_pictures

import train_sdxl
from engine import checkpoint, sdxl
from engine.adapt import ADAPTERS, adapt
from engine.config_sdxl import RECIPES, Config, parse
from engine.files import read_tensors
from engine.kohya import load_kohya
from engine.start_sdxl import prepare
from lokr import LoKrLinear
from lora import replace_linear

SMALL = {
    "image_size": 32,
    "batch_size": 4,
    "sample_steps": 2,
    "workers": 1,
    "lr": 0.01,
    "epochs": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base: a toy SDXL; v: the same that predicts v; pictures: nine, of several shapes."""
    root = tmp_path_factory.mktemp("sdxl")
    toy_pipeline(root / "base")
    shutil.copytree(root / "base", root / "v")
    change(root / "v" / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    write_pictures(root / "pictures")
    return root


@pytest.fixture
def config(folder, tmp_path):
    paths = {"data_dir": folder / "pictures", "cache_dir": folder / "cache"}
    return partial(Config, base=folder / "base", out=tmp_path / "run", **paths, **SMALL)


def change(file, **values):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | values))


def a_batch(run, rows=(0, 1)):
    """A batch of pictures of one bucket with timesteps and noise, as losses takes them."""
    pictures = [run.dataset.train[0] for _ in rows]
    batch = run.dataset.batch(pictures, [False, True], [False, True], run.device)
    random = torch.Generator().manual_seed(5)
    noises = torch.randn(2, *batch["mean"].shape, generator=random)
    return batch, torch.tensor([3, 950]), *noises


def randomise(model):
    """Other factors than at the start, where the update is zero."""
    random = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=random)


@pytest.mark.parametrize("base", ["base", "v"])
def test_noise_target_and_loss_are_those_of_diffusers(base, folder, config):
    run = prepare(config(base=folder / base, targets="all"))
    randomise(run.model)
    batch, times, sample_noise, noise = a_batch(run)
    found = train_sdxl.losses(run, batch, times, sample_noise, noise)
    x = batch["mean"] + batch["std"] * sample_noise
    scheduler = DDPMScheduler.from_pretrained(folder / base, subfolder="scheduler")
    noisy = scheduler.add_noise(x, noise, times)
    target = noise if base == "base" else scheduler.get_velocity(x, noise, times)
    more = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
    predicted = run.model(noisy, times, batch["words"], added_cond_kwargs=more).sample
    assert torch.allclose(found, (predicted - target).square().mean((1, 2, 3)), rtol=1e-5)
    # min-SNR: of low noise only so much counts, and of high noise all (predicting noise)
    gamma, a = 5.0, scheduler.alphas_cumprod[times].double()
    snr = a / (1 - a)
    weight = torch.minimum(snr, torch.tensor(gamma)) / (snr if base == "base" else snr + 1)
    weighed = train_sdxl.losses(run, batch, times, sample_noise, noise, gamma)
    assert torch.allclose(weighed.double(), weight * found, rtol=1e-4)
    assert snr[0] > gamma > snr[1]


def test_latents_are_those_of_the_vae(folder, config):
    run = prepare(config())
    pipe = StableDiffusionXLPipeline.from_pretrained(folder / "base")
    for picture in run.dataset.train[:3]:
        for flip in (False, True):
            with torch.no_grad():
                latents = pipe.vae.encode(picture.pixels(flip)[None]).latent_dist
            (found,) = run.dataset.latents([(picture, flip)])
            scale = pipe.vae.config.scaling_factor
            assert torch.allclose(found["mean"], scale * latents.mean[0], atol=1e-5)
            assert torch.allclose(found["std"], scale * latents.std[0], atol=1e-5)
    assert len({p.bucket for p in run.dataset.train}) > 2


@pytest.mark.parametrize("zeros", [True, False])
def test_words_and_time_ids_are_those_of_the_pipeline(zeros, folder, config, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    change(base / "model_index.json", force_zeros_for_empty_prompt=zeros)
    run = prepare(config(base=base, cache=False))
    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    (picture, *_) = (p for p in run.dataset.train if p.left(False) != p.left(True))
    words, none, pooled, none_pooled = pipe.encode_prompt(picture.caption)
    (found,) = run.dataset.words([picture.caption])
    assert torch.allclose(found["words"], words[0], atol=1e-6)
    assert torch.allclose(found["pooled"], pooled[0], atol=1e-6)
    empty = run.dataset.empty()
    assert torch.allclose(empty["words"], none[0], atol=1e-6)
    assert torch.allclose(empty["pooled"], none_pooled[0], atol=1e-6)
    assert bool((empty["words"] == 0).all()) == zeros
    pictures = [picture, picture]
    batch = run.dataset.batch(pictures, [False, True], [False, True], run.device)
    assert (
        torch.equal(batch["words"][1], empty["words"]) and batch["time_ids"].dtype == torch.float32
    )
    assert torch.allclose(batch["words"][0], words[0], atol=1e-6)
    for flip, ids in zip((False, True), batch["time_ids"], strict=True):
        corner = picture.time_ids(False)[2], picture.left(flip)
        theirs = pipe._get_add_time_ids(picture.size, corner, picture.bucket, torch.float32, 32)
        assert torch.equal(ids, theirs[0])


def steps_of(config, steps=((0, 1), (2,)), **settings):
    """Prepare a run, take some steps; return the losses and the trained tensors."""
    run = prepare(config(caption_dropout=0.3, **settings))
    run.lock.close()
    optimizer = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad], lr=0.01)
    scaler, losses = torch.amp.GradScaler("cpu", enabled=False), []
    for rows in steps:
        losses.append(
            train_sdxl.train_step(run, [np.array([row]) for row in rows], optimizer, scaler)
        )
        run.step += 1
    return torch.stack(losses), checkpoint.trained(run.model)


def test_what_is_encoded_once_trains_as_what_is_encoded_in_each_step(
    config, tmp_path, capsys, monkeypatch
):
    cache = {"cache_dir": tmp_path / "cache", "limit": 6, "resume": True}
    losses, tensors = steps_of(config, **cache)
    fresh_losses, fresh_tensors = steps_of(config, **cache | {"cache": False})
    assert torch.allclose(losses, fresh_losses, rtol=1e-5) and losses[0] != losses[1]
    assert all(torch.allclose(tensors[k], fresh_tensors[k], atol=1e-4) for k in tensors)
    written = {
        file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")
    }
    assert len(written) == 2
    victim = max(written, key=lambda file: file.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    victim.write_bytes(content)
    capsys.readouterr()
    monkeypatch.setattr(sdxl, "IN_MEMORY", 0)  # read from the disk in each step
    again, _ = steps_of(config, **cache)
    assert f"{victim}: damaged" in capsys.readouterr().out and torch.equal(again, losses)
    before = {file: file.stat().st_mtime_ns for file in written}
    assert [file for file in written if before[file] != written[file]] == [victim]
    steps_of(config, ((0,),), **cache)
    assert {file: file.stat().st_mtime_ns for file in written} == before, "nothing is encoded twice"
    steps_of(config, ((0,),), **cache | {"limit": 7})  # one picture more
    files = [*(tmp_path / "cache").rglob("*.safetensors")]
    assert len(files) == 3 and {file: file.stat().st_mtime_ns for file in written} == before


def test_recomputing_gives_the_same_gradients_and_frozen_weights_get_none(config):
    found = []
    for recompute in (False, True):
        run = prepare(config(recompute=recompute, resume=recompute))
        run.lock.close()
        randomise(run.model)
        run.model.train()
        train_sdxl.losses(run, *a_batch(run)).sum().backward()
        grads = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
        assert grads.keys() == {n for n, _ in run.model.named_parameters() if "lokr" in n}
        assert all(grad.abs().max() > 0 for grad in grads.values())
        assert run.model.is_gradient_checkpointing == recompute
        found.append(grads)
    for name, grad in found[0].items():
        assert torch.allclose(found[1][name], grad, rtol=1e-4, atol=1e-7), name


def test_half_precision_is_of_the_frozen_weights_alone(config):
    run = prepare(config(amp="bf16"))
    for name, p in run.model.named_parameters():
        assert p.dtype == (torch.float32 if "lokr" in name else torch.bfloat16), name
    optimizer = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = train_sdxl.train_step(run, [np.array([0])], optimizer, scaler)
    full = prepare(config(amp="off", resume=True))
    more = {"text_embeds": torch.zeros(1, 32), "time_ids": torch.tensor([[833.0, 1, 0, 0, 1, 1]])}
    embedded = run.model.add_time_proj(more["time_ids"].flatten())
    assert torch.equal(embedded, full.model.add_time_proj(more["time_ids"].flatten())), (
        "833, not 832"
    )
    assert loss.isfinite() and 0.5 < loss < 2


def test_a_step_of_several_batches_is_that_of_each_picture(config, monkeypatch):
    """The gradient is the mean over pictures, not over batches; and the flags of the optimizer arrive."""
    run = prepare(config(clip_norm=0, caption_dropout=0.5))
    randomise(run.model)
    run.model.train()
    optimizer = torch.optim.SGD([p for p in run.model.parameters() if p.requires_grad], lr=0)
    scaler, seen, real = torch.amp.GradScaler("cpu", enabled=False), [], train_sdxl.losses

    def watched(run, batch, *rest):
        found = real(run, batch, *rest)
        seen.append((batch, rest))
        return found

    monkeypatch.setattr(train_sdxl, "losses", watched)
    monkeypatch.setattr(optimizer, "zero_grad", lambda: None)
    mean = train_sdxl.train_step(run, [np.array([0]), np.array([2, 2, 2])], optimizer, scaler)
    grads = [p.grad.clone() for p in run.model.parameters() if p.requires_grad]
    losses = torch.cat([real(run, batch, *rest) for batch, rest in seen])
    assert len(losses) == 4 and mean == pytest.approx(losses.mean().item(), rel=1e-5)
    for p in run.model.parameters():
        p.grad = None
    losses.mean().backward()
    for grad, p in zip(grads, [p for p in run.model.parameters() if p.requires_grad], strict=True):
        assert torch.allclose(grad, p.grad, rtol=1e-3, atol=1e-7)


def test_a_process_without_a_picture_in_its_first_step_takes_part(config, monkeypatch):
    """With fp16's loss scale, which torch makes at the first loss."""
    run = prepare(config(clip_norm=1.0))
    parameters = [p for p in run.model.parameters() if p.requires_grad]

    def add_up(parameters):  # as torchrun does, with another process that has the picture
        for p in parameters:
            p.grad = torch.ones_like(p)

    monkeypatch.setattr(train_sdxl, "process", lambda: 1)
    monkeypatch.setattr(train_sdxl, "processes", lambda: 2)
    monkeypatch.setattr(train_sdxl, "add_up_gradients", add_up)
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    train_sdxl.train_step(run, [np.array([0])], optimizer, torch.amp.GradScaler("cpu"))
    assert all((p != q).any() for p, q in zip(parameters, before, strict=True))


def test_weights_that_are_not_read_do_not_change_the_base(folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    file = next((base / "unet").glob("*.safetensors"))
    half = file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    before = sdxl.fingerprint(base)
    weights = sdxl.load(sdxl.read_base(str(base)), "unet", torch.float32)
    file.write_bytes(b"downloaded later")
    (base / "vae_1_0").mkdir()
    (base / "vae_1_0" / "config.json").write_text("{}")
    assert sdxl.fingerprint(base) == before
    again = sdxl.load(sdxl.read_base(str(base)), "unet", torch.float32)
    for name, tensor in weights.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    half.write_bytes(b"other weights")
    assert sdxl.fingerprint(base) != before


def test_what_is_random_is_drawn_as_the_flags_say(config):
    run = prepare(config(caption_dropout=0.25, timestep_bias=2.0))
    random = torch.Generator().manual_seed(0)
    pictures = [run.dataset.train[0]] * 4000
    flips, drops, times, *noises = train_sdxl.numbers(run, pictures, random)
    assert flips.float().mean() == pytest.approx(0.5, abs=0.03)
    assert drops.float().mean() == pytest.approx(0.25, abs=0.03)
    assert times.min() >= 0 and times.max() == 999
    assert times.float().mean() == pytest.approx(2 / 3 * 1000, abs=15)  # 500 if uniform
    for noise in noises:
        assert noise.std() == pytest.approx(1, abs=0.02)
    assert (noises[0] * noises[1]).mean().abs() < 0.01
    run.config.flip, run.config.timestep_bias = False, 1.0
    flips, _, times, *_ = train_sdxl.numbers(run, pictures, random)
    assert not flips.any() and times.float().mean() == pytest.approx(500, abs=20)
    run.config.timestep_bias = 1e9  # u^(1 / bias) is 1 in float32
    assert set(train_sdxl.numbers(run, pictures, random)[2].tolist()) == {999}


def test_dropout_does_not_repeat_what_else_is_random(config, monkeypatch):
    """On a CPU both come from a generator that is seeded in each step: with one seed, an adapter would always
    be left out at the same timesteps."""
    run = prepare(config())
    optimizer = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad])
    drawn, real = [], train_sdxl.numbers

    def numbers(run, pictures, random):
        copied = torch.Generator()
        copied.set_state(random.get_state())
        drawn.append((torch.rand(99), torch.rand(99, generator=copied)))
        return real(run, pictures, random)

    monkeypatch.setattr(train_sdxl, "numbers", numbers)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for run.step in range(2):
        train_sdxl.train_step(run, [np.array([0])], optimizer, scaler)
    first, second = drawn
    everything = torch.cat([*first, *second])
    assert len(everything.unique()) > 390, "of 396 some are equal by chance"


def test_peft_s_lokr_on_the_same_unet_gives_the_same_losses(folder, config):
    found, start = [], {}
    for theirs in (False, True):
        run = prepare(config(rank=4, alpha=6.0, resume=theirs))
        run.lock.close()
        if theirs:
            unet = UNet2DConditionModel.from_pretrained(folder / "base", subfolder="unet")
            settings = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
            peft = get_peft_model(unet, LoKrConfig(r=4, alpha=6.0, **settings))
            own = {n: p for n, p in peft.named_parameters() if p.requires_grad}
            assert len(own) == len(start)
            for name, tensor in start.items():
                module, _, last = name.rpartition(".")
                own[f"base_model.model.{module}.{last}.default"].data.copy_(tensor)
            run.model = peft
        else:
            randomise(run.model)
            start |= {n: p.clone() for n, p in run.model.named_parameters() if p.requires_grad}
        parameters = [p for p in run.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.01)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        losses = []
        for run.step in range(10):
            losses.append(train_sdxl.train_step(run, [np.array([0, 0])], optimizer, scaler).item())
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-4) and len(set(found[0])) == 10


def drawn(pipe, **how):
    random = torch.Generator().manual_seed(2)
    how = {"height": 32, "width": 32, "num_inference_steps": 2, "generator": random, **how}
    return np.asarray(pipe("a red bird", output_type="np", **how).images[0])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_saved_opens_in_diffusers_peft_and_our_layers(adapter, folder, config, tmp_path):
    """The pictures that the pipeline draws with it are those of the trained UNet, not of the base."""
    out = config(
        adapter=adapter, alpha=4.0, lr=0.05, epochs=1, targets="to_k,to_v,proj_in,linear_1"
    )
    result = train_sdxl.train(out)
    assert result["val_loss"] > 0 and result["trainable"] < result["total"]
    pipe = partial(StableDiffusionXLPipeline.from_pretrained, folder / "base")
    plain, pipes = drawn(pipe()), {"peft": pipe(), "ours": pipe()}
    pipes["peft"].unet = PeftModel.from_pretrained(pipes["peft"].unet, tmp_path / "run" / "unet")
    load_kohya(pipes["ours"].unet, tmp_path / "run" / "adapter.safetensors")
    if adapter == "lora":
        for name, file in (("diffusers", None), ("kohya", "adapter.safetensors")):
            pipes[name] = pipe()
            pipes[name].load_lora_weights(str(tmp_path / "run"), weight_name=file)
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["tensors"]
    tensors = read_tensors(tmp_path / "run" / "unet" / "adapter_model.safetensors")[0]
    assert len(tensors) == len(last) and all(tensor.isfinite().all() for tensor in tensors.values())
    pictures = {name: drawn(found) for name, found in pipes.items()}
    for name, picture in pictures.items():
        assert np.abs(picture - pictures["peft"]).max() < 1e-4, name
    assert np.abs(plain - pictures["peft"]).max() > 1e-3
    header = read_tensors(tmp_path / "run" / "adapter.safetensors")[1]
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    strip = Image.open(tmp_path / "run" / "samples" / "000000.png")
    assert strip.size == (3 * 32, 32) and (tmp_path / "run" / "curves.png").is_file()


def test_a_pipeline_takes_a_unet_whose_every_linear_layer_is_adapted(folder):
    """It reads add_embedding.linear_1.in_features."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder / "base")
    plain = drawn(pipe)
    names = replace_linear(pipe.unet, partial(LoKrLinear, rank=2))
    assert "add_embedding.linear_1" in names
    assert np.abs(drawn(pipe) - plain).max() < 1e-5  # the update is zero at first


def test_samples_are_those_of_the_pipeline(folder, config):
    """With the same noise, and what the text encoders make of the prompt."""
    run = prepare(config(prompts="a red bird", sample_steps=3, guidance=4.0))
    draw = sdxl.Sampler(run.dataset.base, run.model, run.device, run.config)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    (found,) = draw(run.dataset.words(["a red bird"]), run.dataset.empty(), noise)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder / "base")
    pipe.scheduler = type(draw.pipe.scheduler).from_config(pipe.scheduler.config)
    theirs = drawn(pipe, latents=noise, num_inference_steps=3, guidance_scale=4.0)
    assert np.abs(found.permute(1, 2, 0).numpy() - theirs).max() < 1e-4


REFUSED = [  # part of the base, key, value, what the message names
    ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", True, "rescale_betas_zero_snr"),
    ("scheduler/scheduler_config.json", "prediction_type", "sample", "prediction_type sample"),
    ("scheduler/scheduler_config.json", "trained_betas", [0.1], "trained_betas: expected None"),
    ("unet/config.json", "addition_embed_type", None, "addition_embed_type: expected text_time"),
    ("unet/config.json", "in_channels", 9, "in_channels: expected 4, found 9"),
    ("unet/config.json", "addition_time_embed_dim", 5, "projection_class_embeddings_input_dim"),
    ("vae/config.json", "latents_mean", [0.1] * 4, "latents_mean: expected None"),
    (
        "model_index.json",
        "_class_name",
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline, found",
    ),
]


@pytest.mark.parametrize(("file", "key", "value", "message"), REFUSED)
def test_a_base_that_is_not_trained_is_refused_by_name(file, key, value, message, folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    assert sdxl.read_base(str(base)).channels == 4
    change(base / file, **{key: value})
    with pytest.raises(ValueError, match="found") as error:
        sdxl.read_base(str(base))
    assert message in str(error.value) and str(base / file) in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rank 0", "--rank 0: expected >= 1"),
        ("--snr-gamma 0", "--snr-gamma 0.0: expected > 0"),
        ("--image-size 1000", "--image-size 1000: expected a multiple of 64"),
        ("--adapter full", "--adapter full: expected one of lora, loha, lokr"),
        ("--schedule cosine", "--schedule cosine: expected one of constant, linear"),
        ("--recipe nothing", "--recipe nothing: expected one of demo, sdxl, pokemon-lokr"),
        ("--recipe pokemon-lokr", "expected --data-dir, a folder"),
        ("--base nowhere --data-dir x", "--base nowhere: no such folder"),
        ("--targets nothing", "--targets nothing: target 'nothing' matches no nn.Linear"),
        ("--rank 500 --image-size 32", "--rank 500: "),
        ("--resume", "--resume: expected --out as well"),
        ("--nothing", "unrecognized arguments: --nothing; see --help"),
    ],
)
def test_a_mistake_is_one_line(flags, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = flags.split()
    if "pokemon-lokr" not in flags and "--base" not in flags:
        flags = ["--base", str(folder / "base"), "--data-dir", str(folder / "pictures"), *flags]
        flags += [] if "--image-size" in flags else ["--image-size", "32"]
        flags += ["--cache-dir", str(folder / "cache")]
    assert train_sdxl.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("train_sdxl.py: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("runs/*")), "no folder is made"


def test_missing_libraries_are_one_line(monkeypatch, folder, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    flags = [
        "--base",
        str(folder / "base"),
        "--data-dir",
        str(folder / "pictures"),
        "--image-size",
        "32",
    ]
    assert train_sdxl.main(flags) == 2
    error = capsys.readouterr().err
    assert "pip install -r requirements-sdxl.txt" in error and error.count("\n") == 1


def test_broken_pictures_are_named_together_before_the_training(folder, config, tmp_path, capsys):
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    lines = (tmp_path / "pictures" / "metadata.jsonl").read_text()
    for name in "24":
        file = tmp_path / "pictures" / f"{name}.png"
        Image.open(file).save(file.with_suffix(".jpg"))
        content = file.with_suffix(".jpg").read_bytes()
        file.with_suffix(".jpg").write_bytes(content[: len(content) // 2])
        lines = lines.replace(file.name, f"{name}.jpg")
    (tmp_path / "pictures" / "metadata.jsonl").write_text(lines)
    paths = {"data_dir": tmp_path / "pictures", "cache_dir": tmp_path / "cache"}
    with pytest.raises(
        ValueError, match=r"2 pictures cannot be read; remove them: .*[24]\.jpg.*[24]\.jpg"
    ):
        train_sdxl.train(config(flip=False, **paths))


def test_recipes_are_those_of_the_documents():
    assert parse([]).recipe == "demo" and parse([]).base == "embedded"
    plain = parse(["--data-dir", "x", "--rank", "4"])
    assert plain.recipe == "sdxl" and plain.lr == 1e-4 and plain.rank == 4 and plain.recompute
    assert "stable-diffusion-xl-base-1.0" in plain.base
    pokemon = parse(["--recipe", "pokemon-lokr", "--data-dir", "x"])
    numbers = {
        "rank": 8, "alpha": 8.0, "lr": 1e-5, "weight_decay": 0.01, "clip_norm": 1.0, "batch_size": 2,
        "epochs": 50, "image_size": 1024, "flip": True, "amp": "fp16", "schedule": "constant",
        "targets": "to_q,to_k,to_v,to_out.0", "adapter": "lokr", "factor": -1,
    }  # fmt: skip
    assert {key: getattr(pokemon, key) for key in numbers} == numbers
    for name in RECIPES:
        train_sdxl.Config(recipe=name)


PAGE = (ROOT / "docs" / "text-to-image.md").read_text("utf-8")


def test_the_page_s_commands_train_and_its_lines_open_what_they_save(folder, tmp_path, monkeypatch):
    """With the toy model, small pictures and few steps; on the CPU."""
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"(?m)^python train_sdxl\.py(.*)$", PAGE)
    assert lines[0] == "" and len(lines) == 3 and "--recipe pokemon-lokr" in lines[2]
    small = [
        "--base",
        str(folder / "base"),
        "--image-size",
        "32",
        "--sample-steps",
        "1",
        "--limit",
        "3",
    ]
    small += ["--cache-dir", str(folder / "cache"), "--epochs", "1"]
    for line in lines[1:]:
        flags = shlex.split(line.replace("/path/to", str(folder)))
        assert parse(flags).image_size == 1024 and parse(flags).recompute
        assert train_sdxl.main([*flags, *small]) == 0
    listed = set(re.findall(r"(?m)^\| `(\w[\w.]*/?)`", PAGE)) | {
        "samples/",
        "metrics.csv",
        "config.json",
    }
    for name in listed - {"pytorch_lora_weights.safetensors"}:
        assert (tmp_path / "runs" / "mine" / name).exists(), name
    assert list(tmp_path.glob("runs/sdxl-lora-*/pytorch_lora_weights.safetensors"))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    small = "num_inference_steps=2, height=32, width=32"
    for old, new in (
        ("stabilityai/stable-diffusion-xl-base-1.0", str(folder / "base")),
        (', torch_dtype=torch.float16, variant="fp16"', ""),
        ('"cuda"', '"cpu"'),
        ("num_inference_steps=50", small),
    ):
        assert code.count(old) == 1
        code = code.replace(old, new)
    exec(code, {})
    assert Image.open("yoda.png").size == (32, 32)


@pytest.mark.slow
def test_the_page_s_numbers_of_sdxl():
    """The real architecture, without its numbers."""
    settings = {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    }  # fmt: skip
    said = " ".join(PAGE.split())
    assert "11.6 (LoRA), 23.2 (LoHa) or 0.9 (LoKr) million numbers" in said
    with torch.device("meta"):
        for adapter, millions in {"lora": 11.6, "loha": 23.2, "lokr": 0.9}.items():
            unet = UNet2DConditionModel(**settings)
            assert sum(p.numel() for p in unet.parameters()) / 1e9 == pytest.approx(2.57, abs=0.01)
            targets = RECIPES["pokemon-lokr"]["targets"]
            trainable, _ = adapt(unet, adapter=adapter, rank=8, alpha=8.0, targets=targets)
            assert trainable / 1e6 == pytest.approx(millions, abs=0.05)
        unet.half().train().enable_gradient_checkpointing()
        kept, own = {}, {p.untyped_storage()._cdata for p in unet.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes(), tensor
            return tensor

        half = {"dtype": torch.float16}
        more = {"text_embeds": torch.empty(1, 1280, **half), "time_ids": torch.empty(1, 6)}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            x, words = torch.empty(1, 4, 128, 128, **half), torch.empty(1, 77, 2048, **half)
            unet(x, torch.zeros(1, dtype=torch.long), words, added_cond_kwargs=more)
    assert sum(size for size, _ in kept.values()) / 1e9 == pytest.approx(0.49, abs=0.01)
    assert "0.5 GB for each picture" in said

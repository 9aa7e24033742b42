"""Trains the UNet with its text encoder, phase by phase: `python -m training.unet --phase camera --out build/demo`.

Only some frames of each video are trained on, at their true places in time; memory and time go as the chosen frames.
Under `torchrun --nproc-per-node N` the processes share each step; on busy cores one thread each beats N in one.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.embeddings import SinusoidalPositionalEmbedding

from training import checkpoints, models, processes
from training.curriculum import PHASES, Phase
from training.draws import Draws
from training.guide import Guide
from training.motions import LAST, Videos, render
from training.optimizer import Optimizer
from training.prompts import MOTIONS
from training.worlds import Worlds, kept_worlds

ASPECTS: Final = (1.0, 1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16)
NUM_FRAMES: Final = (16, 16, 16, 16, 16, 8, 12, 20, 24)
SIZE_STEP: Final = 16
"""Edges are multiples of it: latents that halve twice."""

STEP: Final = 125
"""Timesteps between two of eight steps."""

LATE: Final = 300
"""Timesteps below which detail is made."""

OWN_STEPS: Final = 2
"""How many steps before them the model takes by itself, where it is shown its own latents."""

EMPTY_PROMPTS: Final = 0.06
"""Share of prompts that are left out, for guidance."""


class ChosenFrames:
    """Gives a UNet's motion modules the true places in time of the frames they see."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.places: torch.Tensor | None = None
        for module in unet.modules():
            if isinstance(module, SinusoidalPositionalEmbedding):
                module.register_forward_hook(self._placed)

    def _placed(self, module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output if self.places is None else inputs[0] + module.pe[:, self.places]


@dataclass(frozen=True)
class Sample:
    """One batch as the UNet sees it."""

    latents: torch.Tensor  # [n, 4, k, h, w], of the chosen frames
    picture: torch.Tensor  # [n, 4, h, w]
    masks: torch.Tensor  # [n, k]
    tokens: torch.Tensor  # [n, L]
    places: torch.Tensor  # [k]
    videos: Videos
    num_frames: int


class Training:
    """A run of one phase: its models, optimizer and random numbers, and the state that a resumed run goes on from."""

    def __init__(self, phase: Phase, start: Path, worlds: Worlds, *, seed: int, device: str, pixels: int) -> None:
        self.phase, self.worlds, self.pixels = phase, worlds, pixels
        self.device = torch.device(device)
        self.draws = Draws(seed + 1000 * processes.rank(), self.device)
        self.shapes = Draws(seed)  # the same in all processes, so that none waits for a larger batch of another
        torch.manual_seed(seed)  # of the initial weights, where there is nothing to start from
        self.vae = models.load_vae(start).to(self.device, memory_format=torch.channels_last)
        self.vae.eval().requires_grad_(False)
        self.tokenizer = models.make_tokenizer()
        trained = (start / "unet").is_dir()
        unet = models.load_unet(start) if trained else models.make_unet()
        text = models.load_text_encoder(start, self.tokenizer) if trained else models.make_text_encoder(self.tokenizer)
        self.guide = Guide(unet)
        parts = {"unet": unet.to(memory_format=torch.channels_last), "text": text, "guide": self.guide.places}
        self.model: Any = torch.nn.ModuleDict(parts).to(self.device).train()
        self.average = checkpoints.Average(self.model, memory=phase.memory)
        self.chosen = [ChosenFrames(module["unet"]) for module in (self.model, self.average.module)]
        self.optimizer = Optimizer(self.model.named_parameters())
        self.signal = models.make_scheduler().alphas_cumprod.to(self.device)
        self.done = 0

    def step(self) -> dict[str, float]:
        """Takes one step and gives its losses."""
        sample = self._sample()
        count = len(sample.latents)
        timesteps = self._timesteps(count)
        noisy = self._noisy(sample, timesteps)
        keep = self._kept(timesteps)
        target = (keep.sqrt() * noisy - sample.latents) / (1 - keep).sqrt()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type != "cpu"):
            velocity = self._predict(0, self.model, noisy, timesteps, sample)
        # min-SNR weights for v-prediction, shifted so that pure noise, where sampling starts, counts too.
        snr = self.signal[timesteps] / (1 - self.signal[timesteps]).clamp_min(1e-8)
        weight = (snr + 1).clamp(max=5) / (snr + 1)
        error = (weight * detailed_error(velocity - target, self.phase.detail)).mean()
        if self.phase.texture:
            found = keep.sqrt() * noisy - (1 - keep).sqrt() * velocity
            error = error + self.phase.texture * (texture_error(found, sample.latents) * (timesteps < LATE)).mean()
        pointing, placing = self.guide.loss(sample.videos, sample.places, sample.num_frames)
        self.optimizer.zero_grad()
        (error + self.phase.guidance * (pointing + 5 * placing)).backward()
        self._share_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(self.rate())
        self.done += 1
        self.average.follow(self.model, self.done)
        losses = {"error": error, "pointing": pointing, "placing": placing}
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def rate(self) -> float:
        """The learning rate of the next step: a short warm-up, a plateau, a cosine down to 2 %."""
        phase = self.phase
        part = self.done / max(1, phase.steps)
        fall = 1.0 if part < phase.hold else 0.5 * (1 + math.cos(math.pi * (part - phase.hold) / (1 - phase.hold)))
        return phase.rate * min(1.0, (self.done + 1) / 50) * (0.02 + 0.98 * fall)

    @torch.no_grad()
    def validate(self, *, size: int = 64, seed: int = 4242, videos: int = 3) -> dict[str, float]:
        """By motion: the averaged model's error from pure noise, over that of showing the picture unmoved."""
        draws = Draws(seed, self.device)
        places = torch.tensor((2, 6, 10, LAST), device=self.device)
        motions = torch.arange(len(MOTIONS), device=self.device).repeat(videos)
        errors = torch.zeros(2, len(MOTIONS), device=self.device)
        for part in motions.split(len(MOTIONS)):
            rendered = render(self.worlds, draws, motions=part, frames=places, num_frames=16, height=size, width=size)
            sample = self._encoded(rendered, places, 16, draws, empty=0.0)
            noise = draws.normal(*sample.latents.shape)
            last = torch.full((len(part),), len(self.signal) - 1, device=self.device)
            found = -self._predict(1, self.average.module, noise, last, sample)  # at no signal, v is minus the latent
            errors[0] += (found - sample.latents).square().mean((1, 2, 3, 4))
            errors[1] += (sample.picture[:, :, None] - sample.latents).square().mean((1, 2, 3, 4))
        # Still videos have nothing to copy wrongly: their error is told against the mean of all.
        base = torch.where(errors[1] > 0.1 * errors[1].mean(), errors[1], errors[1].mean())
        return dict(zip(MOTIONS, (errors[0] / base).tolist(), strict=True))

    def state(self, phase: str) -> dict[str, Any]:
        """Everything that `restore` and the export need."""
        return {
            "phase": phase,
            "done": self.done,
            "model": self.model.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": self.optimizer.state(),
            "draws": processes.gathered(self.draws.state()),
            "shapes": self.shapes.state(),
        }

    def restore(self, state: dict[str, Any], phase: str) -> None:
        """Goes on exactly where the state was taken; in another phase, from its average with a fresh optimizer."""
        self.average.module.load_state_dict(state["average"])
        if state["phase"] != phase:
            self.model.load_state_dict(state["average"])
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.restore(state["optimizer"])
        if processes.rank() < len(state["draws"]):
            self.draws.restore(state["draws"][processes.rank()])
        self.shapes.restore(state["shapes"])
        self.done = state["done"]

    def _share_gradients(self) -> None:
        """Averages the gradients of all processes; a parameter without one counts as zero."""
        if processes.count() == 1:
            return
        parameters = list(self.model.parameters())
        parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat)
        for each, part in zip(parameters, flat.split([each.numel() for each in parameters]), strict=True):
            each.grad = part.view_as(each) / processes.count()

    def _sample(self) -> Sample:
        phase, draws, shapes = self.phase, self.draws, self.shapes
        chosen = shapes.words.choices(list(phase.frames), list(phase.frames.values()))[0]
        num_frames = shapes.one_of(NUM_FRAMES)
        count = chosen or num_frames
        long = shapes.words.choices(list(phase.sizes), list(phase.sizes.values()))[0]
        if long**2 * count > self.pixels:
            long = min(phase.sizes)  # a single large video would cost as much as several steps
        aspect = shapes.one_of(ASPECTS)
        short = max(32, round(long * min(aspect, 1 / aspect) / SIZE_STEP) * SIZE_STEP)
        height, width = (short, long) if aspect > 1 else (long, short)
        # The last frame is always there: it tells a loop from a way out and not back.
        others = torch.randperm(num_frames - 1, generator=draws.generator, device=self.device)[: count - 1]
        places = torch.cat([others.sort().values, torch.tensor([num_frames - 1], device=self.device)])
        videos = max(1, self.pixels // (height * width * count))
        rendered = render(
            self.worlds,
            draws,
            motions=draws.weighted(phase.weights, videos),
            frames=places,
            num_frames=num_frames,
            height=height,
            width=width,
        )
        return self._encoded(rendered, places, num_frames, draws, empty=EMPTY_PROMPTS)

    @torch.no_grad()
    def _encoded(self, videos: Videos, places: torch.Tensor, num_frames: int, draws: Draws, *, empty: float) -> Sample:
        count = len(videos.frames)
        flat = videos.frames.flatten(0, 1).to(memory_format=torch.channels_last)
        means, deviations = [], []
        for part in flat.split(128):
            posterior = self.vae.encode(part).latent_dist
            means.append(posterior.mean)
            deviations.append(posterior.std)
        latents = torch.cat(means).unflatten(0, (count, -1)) * self.vae.config.scaling_factor  # [n, 1 + k, 4, h, w]
        spread = torch.cat(deviations).unflatten(0, (count, -1))[:, 0] * self.vae.config.scaling_factor
        texts = ["" if draws.happens(empty) else text for text in videos.prompts]
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=models.PROMPT_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids.to(self.device)
        picture = latents[:, 0] + spread * draws.normal(*spread.shape)
        return Sample(latents[:, 1:].transpose(1, 2), picture, videos.masks, tokens, places, videos, num_frames)

    def _timesteps(self, count: int) -> torch.Tensor:
        most = len(self.signal)
        anywhere = self.draws.integers(most, count)
        late = most - 1 - self.draws.integers(2 * most // 5, count)
        timesteps = torch.where(self.draws.chance(0.3, count), late, anywhere)
        timesteps = torch.where(self.draws.chance(self.phase.first_step, count), most - 1, timesteps)
        if not self.phase.late:
            return timesteps
        return torch.where(self.draws.chance(self.phase.late, count), self.draws.integers(LATE, count), timesteps)

    def _kept(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The share of the latents' power at the timesteps [n], as [n, 1, 1, 1, 1]."""
        return self.signal[timesteps].view(-1, 1, 1, 1, 1)

    def _noisy(self, sample: Sample, timesteps: torch.Tensor) -> torch.Tensor:
        """The latents at the timesteps, with noise; some late ones as the model itself samples them."""
        noise = self.draws.normal(*sample.latents.shape)
        keep = self._kept(timesteps)
        noisy = keep.sqrt() * sample.latents + (1 - keep).sqrt() * noise
        if not self.phase.own:
            return noisy
        own = (self.draws.chance(self.phase.own, len(timesteps)) & (timesteps < LATE)).nonzero()[:, 0]
        if len(own):
            noisy[own] = self._sampled(_part(sample, own), timesteps[own], noise[own])
        return noisy

    @torch.no_grad()
    def _sampled(self, sample: Sample, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the model makes of its latents and the noise, from OWN_STEPS before the timesteps up to them."""
        at = timesteps + OWN_STEPS * STEP
        keep = self._kept(at)
        noisy = keep.sqrt() * sample.latents + (1 - keep).sqrt() * noise
        for _ in range(OWN_STEPS):
            velocity = self._predict(0, self.model, noisy, at, sample)
            found = keep.sqrt() * noisy - (1 - keep).sqrt() * velocity
            left = keep.sqrt() * velocity + (1 - keep).sqrt() * noisy
            at = at - STEP
            keep = self._kept(at)
            noisy = keep.sqrt() * found + (1 - keep).sqrt() * left
        return noisy

    def _predict(
        self, which: int, module: Any, noisy: torch.Tensor, timesteps: torch.Tensor, sample: Sample
    ) -> torch.Tensor:
        self.chosen[which].places = sample.places
        frames, height, width = noisy.shape[2:]
        mask = sample.masks[:, None, :, None, None].expand(-1, -1, -1, height, width)
        picture = sample.picture[:, :, None].expand(-1, -1, frames, -1, -1)
        embeddings = module["text"](sample.tokens).last_hidden_state.repeat_interleave(frames, 0)
        inputs = torch.cat([noisy, mask, picture], 1)  # [n, 9, k, h, w]
        velocity = module["unet"](inputs, timesteps, encoder_hidden_states=embeddings, return_dict=False)[0]
        return torch.as_tensor(velocity).float()


def detailed_error(difference: torch.Tensor, detail: float) -> torch.Tensor:
    """Mean square [n] of differences [n, C, T, H, W], and `detail` times that of what is finer than three latents."""
    return difference.square().mean((1, 2, 3, 4)) + detail * _fine(difference).square().mean((1, 2, 3, 4))


def _part(sample: Sample, which: torch.Tensor) -> Sample:
    """The videos at these places of a sample."""
    parts = {name: getattr(sample, name)[which] for name in ("latents", "picture", "masks", "tokens")}
    return replace(sample, **parts)


def texture_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean square [n] of how much less or more fine detail there is in squares of four latents, wherever it lies."""
    has, should = (F.avg_pool2d(_fine(each).square().mean(1), 4).add(1e-4).sqrt() for each in (found, wanted))
    return (has - should).square().mean((1, 2, 3))


def _fine(latents: torch.Tensor) -> torch.Tensor:
    """What of latents [n, C, T, H, W] is finer than three of them."""
    flat = latents.flatten(0, 2)[:, None]
    return (flat - F.avg_pool2d(flat, 3, 1, 1, count_include_pad=False)).view_as(latents)


def train(training: Training, phase: str, out: Path, *, minutes: float, every: int, save_every: int = 50) -> None:
    """Steps until the phase is done or the time is up; saves the state now and then and at the end."""
    started = time.monotonic()
    means: dict[str, float] = {}
    while training.done < training.phase.steps and not any(
        processes.gathered(time.monotonic() - started > minutes * 60)
    ):
        for name, loss in training.step().items():
            means[name] = 0.97 * means.get(name, loss) + 0.03 * loss
        if training.done % save_every == 0:
            save(training, phase, out)
        if training.done % every == 0 and processes.rank() == 0:
            line = {"phase": phase, "step": training.done, **means, "rate": training.rate()}
            line |= {"wall_s": time.monotonic() - started, "cpu_s": time.process_time()}
            if training.done % (5 * every) == 0:
                line |= {"error_64": {name: round(value, 3) for name, value in training.validate().items()}}
                large = training.validate(size=128, videos=1)
                line |= {"error_128": sum(large.values()) / len(large)}
            checkpoints.write_line(out / "unet.jsonl", line)
    save(training, phase, out)


def save(training: Training, phase: str, out: Path) -> None:
    """Writes the state of all processes."""
    state = training.state(phase)
    if processes.rank() == 0:
        checkpoints.save(state, out / "unet.pt")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.unet", description=__doc__)
    parser.add_argument("--phase", choices=PHASES, required=True)
    parser.add_argument("--model", type=Path, required=True, help="model folder with vae/, and unet/ to train on from")
    parser.add_argument("--out", type=Path, required=True, help="folder of the state, the worlds and the log")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--steps", type=int, help="steps of the phase; default: the phase's own")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop, to be resumed, after this time")
    parser.add_argument("--weights", default="", help='change weights of motions: "waves=3,zoom in=1"')
    parser.add_argument("--rate", type=float, help="learning rate; default: the phase's own")
    parser.add_argument("--pixels", type=int, default=147_456, help="pixels of a process's step: 36 frames of 64 x 64")
    parser.add_argument("--worlds", type=int, default=1200)
    parser.add_argument("--every", type=int, default=50, help="steps between lines of the log")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    settings = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    processes.join(settings.device)
    phase = PHASES[settings.phase]
    changed = dict(zip(MOTIONS, phase.weights, strict=True))
    for pair in filter(None, settings.weights.split(",")):
        name, _, weight = pair.partition("=")
        if name not in changed:
            parser.error(f"no motion is called {name!r}; there are: {', '.join(MOTIONS)}")
        changed[name] = float(weight)
    phase = replace(
        phase,
        weights=tuple(changed.values()),
        steps=settings.steps or phase.steps,
        rate=settings.rate or phase.rate,
    )
    worlds = kept_worlds(settings.out, settings.worlds, seed=settings.seed, device=settings.device)
    training = Training(
        phase, settings.model, worlds, seed=settings.seed, device=settings.device, pixels=settings.pixels
    )
    if settings.resume:
        training.restore(checkpoints.load(settings.out / "unet.pt", settings.device), settings.phase)
    train(training, settings.phase, settings.out, minutes=settings.minutes, every=settings.every)
    processes.leave()


if __name__ == "__main__":
    main()

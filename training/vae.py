"""Trains the autoencoder on views of worlds: `python -m training.vae --out build/demo`.

`--decoder-of MODEL` trains only the decoder of a finished model: latents, and so the UNet, stay as they are.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F

from training import checkpoints, models
from training.draws import Draws
from training.optimizer import Optimizer
from training.worlds import Worlds, kept_worlds, views

SIZES: Final = {32: 0.35, 64: 0.35, 96: 0.2, 128: 0.1}
"""Edges of the views, with their weights. Small ones are cheap and hold enough of the world's detail."""

PIXELS: Final = 24 * 32 * 32
"""Pixels of a step at the least; larger views come in smaller batches."""

NOISE: Final = 0.25
"""Most noise on the latents that are decoded, in their deviations: what the UNet leaves of it shall not be seen."""

WARPED: Final = 0.3
"""Weight of the loss of warped latents."""


class Training:
    """A run: the autoencoder, its average, optimizer and random numbers."""

    def __init__(self, vae: Any, worlds: Worlds, *, steps: int, rate: float, decoder: bool, seed: int) -> None:
        self.device = worlds.pictures.device
        self.vae = vae.to(self.device, memory_format=torch.channels_last)
        self.worlds, self.steps, self.rate, self.decoder = worlds, steps, rate, decoder
        if decoder:
            for part in (self.vae.encoder, self.vae.quant_conv):
                part.requires_grad_(False)
        self.draws = Draws(seed, self.device)
        trained = [(name, each) for name, each in self.vae.named_parameters() if each.requires_grad]
        self.parameters = [each for _, each in trained]
        self.optimizer = Optimizer(trained)
        self.average = checkpoints.Average(self.vae, memory=0.998)
        self.done = 0

    def step(self) -> float:
        """Takes one step and gives its loss."""
        size = self.draws.words.choices(list(SIZES), list(SIZES.values()))[0]
        pictures = views(self.worlds, max(2, 2 * PIXELS // size**2), size, size, self.draws)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(pictures).latent_dist
        latents = posterior.mean + posterior.std * self.draws.normal(*posterior.mean.shape)
        spread = NOISE * latents.detach().std((0, 2, 3), keepdim=True) * self.draws.uniform(len(latents), 1, 1, 1)
        seen = self.vae.decode(latents + spread * self.draws.normal(*latents.shape)).sample
        loss = picture_loss(seen, pictures)
        if not self.decoder:
            loss = loss + WARPED * self._warped(latents, pictures)
            loss = loss + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        part = self.done / max(1, self.steps)
        fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))
        self.optimizer.step(self.rate * min(1.0, (self.done + 1) / 60) * fall, decay=0.0 if self.decoder else 0.01)
        self.done += 1
        self.average.follow(self.vae, self.done)
        return float(loss.detach())

    def _warped(self, latents: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        """How far pictures from warped latents are from warped pictures: the UNet moves latents."""
        count = len(latents)
        size, turn = self.draws.uniform(count, low=0.6, high=0.95), self.draws.uniform(count, low=-0.4, high=0.4)
        place = self.draws.uniform(count, 2, low=-0.1, high=0.1)
        cos, sin = size * torch.cos(turn), size * torch.sin(turn)
        maps = torch.stack([cos, -sin, place[:, 0], sin, cos, place[:, 1]], 1).view(count, 2, 3)
        moved, wanted = (
            F.grid_sample(
                each,
                F.affine_grid(maps, list(each.shape), align_corners=False),
                mode="bicubic",
                padding_mode="reflection",
                align_corners=False,
            )
            for each in (latents, pictures)
        )
        return picture_loss(self.vae.decode(moved).sample, wanted)

    @torch.no_grad()
    def validate(self, size: int) -> float:
        """Mean PSNR of the averaged autoencoder on fixed views of its worlds, in dB."""
        pictures = views(self.worlds, 32, size, size, Draws(4242, self.device))
        vae = self.average.module
        seen = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
        return float((-10 * torch.log10((seen - pictures).square().mean((1, 2, 3)) / 4)).mean())

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs."""
        return {
            "done": self.done,
            "model": self.vae.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": self.optimizer.state(),
            "draws": self.draws.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on exactly where the state was taken."""
        self.vae.load_state_dict(state["model"])
        self.average.module.load_state_dict(state["average"])
        self.optimizer.restore(state["optimizer"])
        self.draws.restore(state["draws"])
        self.done = state["done"]


def picture_loss(seen: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Pixels, edges and the large picture: blur costs less than misplaced colour in each alone, not in all."""
    difference = seen - pictures
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    coarse = F.avg_pool2d(difference, 4).abs().mean()
    return difference.abs().mean() + 2 * difference.square().mean() + 0.5 * edges + 0.5 * coarse


@torch.no_grad()
def standardize(vae: Any, worlds: Worlds, seed: int) -> None:
    """Gives every latent channel mean 0 and deviation 1, exactly, by way of the convolutions around the latents.

    The UNet then needs no scaling factor, and what the autoencoder shows does not change.
    """
    draws = Draws(seed, worlds.pictures.device)
    latents = torch.cat([vae.encode(views(worlds, 64, 64, 64, draws)).latent_dist.mean for _ in range(6)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    inner, outer = vae.quant_conv, vae.post_quant_conv
    inner.weight[:channels] /= deviation[:, None, None, None]
    inner.bias[:channels] = (inner.bias[:channels] - mean) / deviation
    inner.bias[channels:] -= 2 * deviation.log()  # the posterior's log variances
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight *= deviation[None, :, None, None]


def train(training: Training, out: Path, *, minutes: float, every: int, save_every: int = 200) -> None:
    """Steps until all are done or the time is up; saves the state now and then and at the end."""
    started = time.monotonic()
    mean_loss = None
    while training.done < training.steps and time.monotonic() - started < minutes * 60:
        loss = training.step()
        mean_loss = loss if mean_loss is None else 0.95 * mean_loss + 0.05 * loss
        if training.done % save_every == 0:
            checkpoints.save(training.state(), out / "vae.pt")
        if training.done % every == 0:
            line: dict[str, Any] = {"step": training.done, "loss": mean_loss}
            line |= {"wall_s": time.monotonic() - started, "cpu_s": time.process_time()}
            line |= {f"db_{size}": training.validate(size) for size in (64, 128)}
            checkpoints.write_line(out / "vae.jsonl", line)
    checkpoints.save(training.state(), out / "vae.pt")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.vae", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the state, the worlds, the log and vae/")
    parser.add_argument("--decoder-of", type=Path, metavar="MODEL", help="train only the decoder of this model folder")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop, to be resumed, after this time")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate at its highest")
    parser.add_argument("--worlds", type=int, default=1200)
    parser.add_argument("--every", type=int, default=100, help="steps between lines of the log")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    settings = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(settings.seed)  # of the initial weights
    decoder = settings.decoder_of is not None
    vae = models.load_vae(settings.decoder_of) if decoder else models.make_vae()
    worlds = kept_worlds(settings.out, settings.worlds, seed=settings.seed, device=settings.device)
    training = Training(vae, worlds, steps=settings.steps, rate=settings.rate, decoder=decoder, seed=settings.seed)
    if settings.resume:
        training.restore(checkpoints.load(settings.out / "vae.pt", settings.device))
    train(training, settings.out, minutes=settings.minutes, every=settings.every)
    finished: Any = training.average.module
    if not decoder:
        standardize(finished, worlds, settings.seed)
    finished.save_pretrained(settings.out / "vae")


if __name__ == "__main__":
    main()

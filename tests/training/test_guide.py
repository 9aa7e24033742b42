"""The guide of the UNet's training knows each pixel's source and lowers its losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from training.draws import Draws
from training.guide import Guide, cells_about, shares, sources
from training.models import make_unet
from training.motions import Videos, render
from training.prompts import MOTIONS
from training.worlds import Worlds, make_worlds, mesh

FRAMES = torch.tensor([5, 15])


@pytest.fixture(scope="module")
def worlds() -> Worlds:
    return make_worlds(4, Draws(1), side=160, together=4)


def videos_of(worlds: Worlds, motion: str, *, height: int = 32, width: int = 48) -> Videos:
    motions = torch.tensor([MOTIONS.index(motion)] * 2)
    return render(worlds, Draws(5), motions=motions, frames=FRAMES, num_frames=16, height=height, width=width)


def test_the_source_of_a_cell_of_a_still_video_is_the_cell(worlds):
    source = sources(videos_of(worlds, "still"), FRAMES, 16, 8, 12)
    y, x = mesh(8, 12, source.device)
    own = torch.stack([x.expand(8, 12), y.expand(8, 12)], -1).flatten(0, 1)
    assert torch.allclose(source, own.expand_as(source), atol=1e-6)
    assert torch.allclose(shares(source.flatten(0, 1), 8, 12), torch.eye(96).expand(4, -1, -1), atol=1e-4)


def test_a_frame_of_a_camera_motion_is_the_picture_taken_from_the_sources(worlds):
    videos = videos_of(worlds, "zoom in", height=32, width=32)
    source = sources(videos, FRAMES, 16, 32, 32).flatten(0, 1)
    picture, frames = videos.frames[:, 0], videos.frames[:, 1:].flatten(0, 1)
    taken = shares(source, 32, 32) @ picture.repeat_interleave(2, 0).flatten(2).mT
    assert (taken.mT.reshape_as(frames) - frames).square().mean() < 0.3 * (
        picture.repeat_interleave(2, 0) - frames
    ).square().mean()


def test_the_shares_of_a_source_inside_the_picture_sum_to_one():
    source = torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    assert torch.allclose(shares(source, 8, 10).sum(-1), torch.ones(2, 50), atol=1e-5)


def test_attention_that_points_at_the_sources_has_no_loss_and_gradients_lower_that_of_another(worlds):
    torch.manual_seed(0)
    unet = make_unet((8, 16, 16, 32))
    guide, videos = Guide(unet), videos_of(worlds, "pan left")
    inputs = torch.randn(2, 9, 2, 16, 24)
    text = torch.zeros(4, 3, 96)
    optimizer = torch.optim.Adam([*unet.parameters(), *guide.places.parameters()], lr=3e-3)
    losses = []
    for _ in range(6):
        unet(inputs, torch.tensor([9, 9]), encoder_hidden_states=text)
        pointing, placing = guide.loss(videos, FRAMES, 16)
        losses.append((pointing.item(), placing.item()))
        optimizer.zero_grad()
        (pointing + placing).backward()
        optimizer.step()
    assert losses[-1][0] < losses[0][0] and losses[-1][1] < losses[0][1]
    for place, pointing in enumerate(guide.pointing):
        height, width = (8, 12) if pointing.seen.shape[1] == 96 else (4, 6) if pointing.seen.shape[1] == 24 else (2, 3)
        source = sources(videos, FRAMES, 16, height, width).flatten(0, 1)
        wanted = shares(source, height, width)[:, None].expand(-1, 4, -1, -1)
        if place == guide.four:
            wanted = F.one_hot(cells_about(source, height, width), height * width)
        pointing.logs = wanted.float().clamp_min(1e-30).log()
    assert guide.loss(videos, FRAMES, 16)[0].abs() < 1e-5


def test_the_cells_about_a_source_are_those_between_which_it_lies_one_of_each_parity():
    source = torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    cells = cells_about(source, 8, 10)  # [2, 4, 50]
    rows, columns = cells // 10, cells % 10
    assert ((rows % 2) * 2 + columns % 2).eq(torch.arange(4)[:, None]).all()
    assert shares(source, 8, 10).gather(-1, cells.mT).sum(-1).allclose(torch.ones(2, 50), atol=1e-5)


def test_the_cells_about_a_source_outside_are_inside_the_picture():
    cells = cells_about(torch.tensor([[[-3.0, -3.0], [3.0, 3.0]]]), 5, 4)
    assert cells.min() >= 0 and cells.max() < 20

"""The guide of the UNet's training knows each pixel's source and lowers its losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from training.draws import Draws
from training.guide import CODE, HARMONICS, Guide, cells_about, cells_between, codes, sources
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


def shares(source: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """How much each cell of the picture is the source of each cell, bilinearly: [N, S, cells]."""
    cells, parts = cells_between(source, height, width)
    return torch.zeros(*source.shape[:2], height * width).scatter_add_(-1, cells, parts)


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
    edges = {384: (16, 24), 96: (8, 12), 24: (4, 6), 6: (2, 3)}  # by the number of cells
    for place, pointing in enumerate(guide.pointing):
        height, width = edges[pointing.seen.shape[1]]
        source = sources(videos, FRAMES, 16, height, width).flatten(0, 1)[:, pointing.asked]
        wanted = shares(source, height, width)
        if place == guide.last:
            wanted = wanted.square() / wanted.square().sum(-1, keepdim=True)
        wanted = wanted[:, None].expand(-1, pointing.heads, -1, -1)
        if place == guide.four:
            wanted = F.one_hot(cells_about(source, height, width), height * width)
        pointing.logs = wanted.float().clamp_min(1e-30).log()
    assert guide.loss(videos, FRAMES, 16)[0].abs() < 1e-5


def test_the_cells_that_are_asked_are_of_every_column_and_row():
    unet = make_unet((8, 16, 16, 32))
    guide = Guide(unet)
    unet(torch.randn(1, 9, 2, 32, 48), torch.tensor([9]), encoder_hidden_states=torch.zeros(2, 3, 96))
    finest = guide.pointing[guide.last]
    assert finest.logs.shape == (2, 1, len(finest.asked), 32 * 48)
    assert set((finest.asked % 48).tolist()) == set(range(48)) and set((finest.asked // 48).tolist()) == set(range(32))
    assert finest.logs.exp().sum(-1).allclose(torch.ones(()), atol=1e-5)


def test_products_of_codes_are_largest_where_the_places_are_the_same():
    places = torch.stack(torch.meshgrid(*[(torch.arange(32) + 0.5) / 16 - 1] * 2, indexing="xy"), -1).flatten(0, 1)
    coded = codes(places)
    assert coded.shape == (1024, CODE) and len(HARMONICS) == 2
    products = coded @ coded.T
    assert products.argmax(-1).equal(torch.arange(1024))
    assert products.diagonal().allclose(torch.full((), CODE / 2))


def test_the_cells_about_a_source_are_those_between_which_it_lies_one_of_each_parity():
    source = torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    cells = cells_about(source, 8, 10)  # [2, 4, 50]
    rows, columns = cells // 10, cells % 10
    assert ((rows % 2) * 2 + columns % 2).eq(torch.arange(4)[:, None]).all()
    assert shares(source, 8, 10).gather(-1, cells.mT).sum(-1).allclose(torch.ones(2, 50), atol=1e-5)


def test_the_cells_about_a_source_outside_are_inside_the_picture():
    cells = cells_about(torch.tensor([[[-3.0, -3.0], [3.0, 3.0]]]), 5, 4)
    assert cells.min() >= 0 and cells.max() < 20

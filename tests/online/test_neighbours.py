"""The bundled model behind the HTTP interface: a video is the same alone and among others that denoise with it."""

from __future__ import annotations

import asyncio
import io
from contextlib import aclosing

import httpx2
import numpy as np
import pytest
from PIL import Image

from pia_ray.config.knobs import AnimationParams
from pia_ray.config.serve import ServeConfig
from pia_ray.online.app import create_app
from pia_ray.online.rendering.local_renderer import LocalRenderer
from pia_ray.online.rendering.renderer import RenderRequest, StepDone
from pia_ray.pia.animator import Animator
from tests.videos import decode_frames

pytestmark = pytest.mark.heavy

SMALL = {"width": 64, "height": 64, "num_frames": 4}


def picture(shade: int) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).point(lambda v: (v + shade) % 256).convert("RGB").save(out, "PNG")
    return out.getvalue()


async def neighbour(renderer: LocalRenderer, number: int, begun: asyncio.Event) -> None:
    """Denoises for long; tells when it has begun."""
    knobs = {**SMALL, "num_inference_steps": 400, "motion_scale": number, "guidance_scale": 1.0 + number / 2}
    params = AnimationParams(prompt=f"neighbour {number}", **knobs)
    async with aclosing(renderer.render(RenderRequest(f"n{number}", params, picture(60 * number)))) as events:
        async for event in events:
            if isinstance(event, StepDone):
                begun.set()


def test_a_call_gives_the_same_frames_alone_and_among_neighbours():
    config = ServeConfig.model_validate({"batch_size": 4})

    async def work(animator: Animator) -> tuple[list[np.ndarray], int]:
        renderer = LocalRenderer(animator, config)
        transport = httpx2.ASGITransport(create_app(renderer, config))

        async def ask() -> np.ndarray:
            form = {"prompt": "clouds drift", "seed": 7, "num_inference_steps": 6, "format": "webp", **SMALL}
            async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                answer = await client.post(
                    "/v1/animations", data={**form, "motion_scale": 2}, files={"image": picture(0)}, timeout=None
                )
            assert answer.status_code == 200, answer.text
            return decode_frames(answer.content)

        alone = await ask()
        begun = [asyncio.Event() for _ in range(3)]
        others = [asyncio.create_task(neighbour(renderer, number, each)) for number, each in enumerate(begun, 1)]
        for each in begun:
            await each.wait()
        neighbours = await ask()
        still = (await renderer.load()).num_running
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await renderer.close()
        return [alone, neighbours], still

    with Animator(config.models["demo"], styles=config.models, batch_size=4, cpu_threads=1) as animator:
        (alone, neighbours), still = asyncio.run(work(animator))
    assert still == 3  # the neighbours outlasted the call: it had neighbours at each step
    assert alone.shape == neighbours.shape == (4, 64, 64, 3)
    difference = np.abs(alone.astype(int) - neighbours.astype(int))
    assert difference.mean() < 0.1
    assert difference.max() <= 8

"""LocalRenderer through its one door: events in order, refusals, fairness, cancel, deadlines, with a fake animator."""

from __future__ import annotations

import asyncio
import hashlib
import io
import pickle
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pia_ray.config.acceptance import parse_bounds
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.serve import ServeConfig, owner_of_hash
from pia_ray.errors import (
    BadParameter,
    Busy,
    Cancelled,
    ImageTooLarge,
    NonFiniteFrames,
    NotAccepted,
    Timeout,
    UnexpectedError,
    UnsafeContent,
    UnsupportedImage,
    VideoError,
)
from pia_ray.media import video
from pia_ray.online.rendering.local_renderer import LocalRenderer
from pia_ray.online.rendering.renderer import (
    BATCH_LINE,
    INTERACTIVE,
    VIDEO_JOB,
    Event,
    Queued,
    Rendered,
    RenderRequest,
    StepDone,
)
from pia_ray.online.rendering.timing import Tally
from pia_ray.takes import Policy, take_seed
from pia_ray.testing import FakeAnimator
from tests.certificates import make_files
from tests.videos import decode_frames


def png(width: int = 64, height: int = 64) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((width, height), 60).convert("RGB").save(out, "PNG")
    return out.getvalue()


def ask(prompt: str = "a cat", request_id: str = "r", **how: Any) -> RenderRequest:
    knobs = {"num_frames": 4, "num_inference_steps": 3, "width": 64, "height": 64, **how.pop("knobs", {})}
    return RenderRequest(request_id, AnimationParams(prompt=prompt, **knobs), how.pop("image", png()), **how)


def run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await work()

    return asyncio.run(bounded())


@asynccontextmanager
async def renderer(step_s: float = 0.0, **settings: Any) -> AsyncIterator[LocalRenderer]:
    config = ServeConfig.model_validate({"batch_size": 1, **settings})
    animator = FakeAnimator(
        config.models[config.default_model],
        styles=config.models,
        batch_size=config.batch_size,
        seconds_per_step=step_s,
    )
    made = LocalRenderer(animator, config)
    try:
        yield made
    finally:
        await made.close()


async def events_of(made: LocalRenderer, request: RenderRequest) -> list[Event]:
    return [event async for event in made.render(request)]


async def until(condition: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    while not await condition():
        await asyncio.sleep(0.01)


def test_a_request_yields_its_steps_and_ends_with_a_video_that_plays():
    async def work() -> list[Event]:
        async with renderer() as made:
            return await events_of(made, ask())

    events = run(work)
    assert events[:-1] == [StepDone(1, 3), StepDone(2, 3), StepDone(3, 3)]
    rendered = events[-1]
    assert isinstance(rendered, Rendered)
    facts = video.probe(rendered.content)
    assert (facts.format, facts.num_frames, facts.width, facts.height) == ("mp4", 4, 64, 64)
    assert facts.provenance["params"]["prompt"] == "a cat"
    assert video.probe(rendered.thumbnail).num_frames == 4
    with Image.open(io.BytesIO(rendered.spritesheet)) as sheet:
        assert sheet.size == (128, 128)
    assert rendered.video.params.seed is not None
    assert pickle.loads(pickle.dumps(events)) == events


def test_a_public_video_tells_the_model_and_not_the_prompt():
    async def work() -> list[Event]:
        async with renderer(provenance="public") as made:
            return await events_of(made, ask())

    rendered = run(work)[-1]
    assert video.probe(rendered.content).provenance == {"model": rendered.video.model_version}
    assert b"a cat" not in rendered.content


def test_an_endpoint_with_a_certificate_signs_and_refuses_the_format_that_holds_no_manifest(tmp_path: Path):
    files = make_files(tmp_path)
    signing = {"c2pa_certificate": str(files.certificate), "c2pa_key": str(files.key)}

    async def work() -> bytes:
        async with renderer(**signing) as made:
            with pytest.raises(BadParameter, match="webm has no place for a C2PA manifest"):
                await events_of(made, ask(format="webm"))
            return (await events_of(made, ask()))[-1].content

    assert b"c2pa.created" in run(work)


def test_an_endpoint_flags_or_refuses_a_video_that_is_not_safe():
    model = {"base": "embedded", "safety_checker": "checker"}

    async def work() -> bool | None:
        async with renderer(models={"demo": model}, safety="fail") as made:
            assert (await events_of(made, ask()))[-1].video.nsfw is False
            with pytest.raises(UnsafeContent) as caught:
                await events_of(made, ask(prompt="a nsfw cat"))
            assert (caught.value.code, caught.value.http_status) == ("content_policy_violation", 400)
        async with renderer(models={"demo": model}, safety="flag") as made:
            return (await events_of(made, ask(prompt="a nsfw cat")))[-1].video.nsfw

    assert run(work) is True


def test_a_video_is_finished_as_its_request_asks():
    async def work() -> list[Event]:
        async with renderer() as made:
            finishing = {"playback_fps": 24, "repeat": 2, "aspect": "1:2", "fit": "blur", "poster": "webp"}
            knobs = {"num_frames": 4, "num_inference_steps": 3, "width": 64, "height": None, **finishing}
            return await events_of(made, ask(knobs=knobs, image=png(64, 64)))

    rendered = run(work)[-1]
    assert isinstance(rendered, Rendered)
    facts = video.probe(rendered.content)
    assert (facts.num_frames, facts.width, facts.height, round(facts.fps)) == (24, 64, 128, 24)
    made = rendered.video
    assert (made.num_frames, made.width, made.height, made.fps) == (24, 64, 128, 24)
    assert rendered.poster is not None
    for picture in (rendered.poster, rendered.thumbnail):
        with Image.open(io.BytesIO(picture)) as shown:
            assert (shown.format, shown.size) == ("WEBP", (64, 128))


@pytest.mark.parametrize("video_format", ["mp4", "gif", "webp", "webm"])
def test_the_video_has_the_requested_format(video_format: Any):
    async def work() -> list[Event]:
        async with renderer() as made:
            return await events_of(made, ask(format=video_format))

    assert video.probe(run(work)[-1].content).format == video_format


def test_models_are_named_by_style_also_the_default_one():
    async def work() -> list[str]:
        async with renderer(models={"plain": "demo", "ink": {"base": "embedded"}}) as made:
            styles = [{}, {"style": "plain"}, {"style": "ink"}]
            return [(await events_of(made, ask(knobs=style)))[-1].video.model_version for style in styles]

    assert run(work) == ["demo@fake", "demo@fake", "ink@fake"]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (ask(image=b"no picture at all"), UnsupportedImage),
        (ask(image=png(300, 300)), ImageTooLarge),
        (ask(knobs={"style": "oil"}), BadParameter),
        (ask(knobs={"width": 72, "num_frames": 4, "fps": 60}, format="gif"), VideoError),
        (ask(inputs={"latents": b"no tensors"}), BadParameter),
        (ask(inputs={"end_image": b"no picture"}), UnsupportedImage),
        (ask("nan"), NonFiniteFrames),
    ],
)
def test_a_request_fails_with_its_own_error_and_leaves_the_queue(request_: RenderRequest, error: type[Exception]):
    async def work() -> int:
        async with renderer(max_image_pixels=250 * 250) as made:
            with pytest.raises(error):
                await events_of(made, request_)
            load = await made.load()
            return load.num_running + load.num_waiting

    assert run(work) == 0


def test_a_bug_is_this_requests_error_alone():
    class Broken(FakeAnimator):
        def submit(self, request: Any, **how: Any) -> Any:
            raise ZeroDivisionError("a bug")

    async def work() -> None:
        config = ServeConfig.model_validate({})
        made = LocalRenderer(Broken(config.models["demo"]), config)
        with pytest.raises(UnexpectedError, match="a bug"):
            await events_of(made, ask())
        await made.close()

    run(work)


def test_pictures_that_knobs_refer_to_reach_the_model():
    async def work() -> None:
        async with renderer() as made:
            end = {"end_image": "upload"}
            with pytest.raises(BadParameter, match="end_image"):
                await events_of(made, ask(knobs=end))
            assert isinstance((await events_of(made, ask(knobs=end, inputs={"end_image": png()})))[-1], Rendered)

    run(work)


def test_a_full_queue_refuses_and_says_when_to_come_again():
    async def work() -> None:
        async with renderer(step_s=0.02, batch_size=2, max_waiting=2) as made:
            await events_of(made, ask())
            running = [asyncio.create_task(events_of(made, ask(request_id=str(number)))) for number in range(4)]
            await asyncio.sleep(0)
            with pytest.raises(Busy) as refused:
                await events_of(made, ask())
            assert 1 <= refused.value.retry_after_s <= 60
            assert all(isinstance(events[-1], Rendered) for events in await asyncio.gather(*running))
            assert isinstance((await events_of(made, ask()))[-1], Rendered)

    run(work)


def test_half_of_the_queue_is_for_synchronous_calls_alone():
    async def work() -> None:
        async with renderer(step_s=0.02, max_waiting=2) as made:
            jobs = [asyncio.create_task(events_of(made, ask(priority=VIDEO_JOB))) for _ in range(2)]
            await asyncio.sleep(0)
            for priority in (VIDEO_JOB, BATCH_LINE):
                with pytest.raises(Busy):
                    await events_of(made, ask(priority=priority))
            assert isinstance((await events_of(made, ask(priority=INTERACTIVE)))[-1], Rendered)
            await asyncio.gather(*jobs)

    run(work)


def test_urgent_requests_start_first_and_positions_show_it():
    order: list[str] = []

    async def follow(made: LocalRenderer, request: RenderRequest) -> list[Event]:
        events = []
        async for event in made.render(request):
            if event == StepDone(1, 3):
                order.append(request.id)
            events.append(event)
        return events

    async def work() -> list[list[Event]]:
        async with renderer(step_s=0.1, max_waiting=8) as made:
            asked = []
            for name, priority in [("first", 0), ("line", BATCH_LINE), ("job", VIDEO_JOB), ("call", INTERACTIVE)]:
                asked.append(asyncio.create_task(follow(made, ask(request_id=name, priority=priority))))
                await asyncio.sleep(0.04)  # decoding runs on threads: each is to be in line before the next comes
            return await asyncio.gather(*asked)

    first, line, job, call = run(work)
    assert order == ["first", "call", "job", "line"]
    positions = [[event.position for event in events if isinstance(event, Queued)] for events in (first, call)]
    assert positions[0] == []
    assert positions[1][0] == 1
    line_positions = [event.position for event in line if isinstance(event, Queued)]
    assert line_positions[0] == 1
    assert max(line_positions) == 3
    assert isinstance(job[-1], Rendered)


def test_closing_the_iterator_frees_the_engine_at_its_next_step():
    async def work() -> float:
        async with renderer(step_s=0.05) as made:
            async with aclosing(made.render(ask(knobs={"num_inference_steps": 900}))) as events:
                assert await anext(events) == StepDone(1, 900)
            started = time.monotonic()
            assert isinstance((await events_of(made, ask()))[-1], Rendered)
            return time.monotonic() - started

    assert run(work) < 20  # and not the 45 s of the other's steps


def test_a_cancelled_task_takes_its_request_back_wherever_it_is():
    async def work() -> None:
        async with renderer(step_s=0.05, max_waiting=3) as made:
            tasks = [asyncio.create_task(events_of(made, ask("hang", str(number)))) for number in range(4)]
            for pause_s, task in zip((0.0, 0.01, 0.05, 0.2), tasks, strict=True):
                await asyncio.sleep(pause_s)
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            load = await made.load()
            assert (load.num_running, load.num_waiting) == (0, 0)
            assert isinstance((await events_of(made, ask()))[-1], Rendered)

    run(work)


def test_a_request_that_waits_or_hangs_ends_at_its_deadline():
    async def work() -> None:
        async with renderer() as made:
            hanging = asyncio.create_task(events_of(made, ask("hang", deadline_s=2)))
            await asyncio.sleep(0.05)
            with pytest.raises(Timeout):
                await events_of(made, ask(deadline_s=0.1))
            with pytest.raises(Timeout):
                await hanging
            assert isinstance((await events_of(made, ask(deadline_s=30)))[-1], Rendered)

    run(work)


def test_load_counts_running_and_waiting_requests_and_times_a_step():
    async def work() -> None:
        async with renderer(step_s=0.05, models="plain=demo,other=demo", default_model="other", max_waiting=5) as made:
            empty = await made.load()
            assert (empty.num_running, empty.num_waiting, empty.step_s) == (0, 0, None)
            assert [(model.name, model.default) for model in empty.models] == [("other", True), ("plain", False)]
            assert empty.models[0].version.startswith("demo@")
            knobs = {"num_inference_steps": 40}
            tasks = [asyncio.create_task(events_of(made, ask(request_id=str(n), knobs=knobs))) for n in range(3)]

            async def in_progress() -> bool:
                return (await made.load()).step_s is not None

            await until(in_progress)
            busy = await made.load()
            assert (busy.num_running, busy.num_waiting) == (1, 2)
            assert 0.04 < busy.step_s < 2
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(work)


def test_a_renderer_without_steps_counts_as_stalled_only_while_it_has_requests():
    async def work() -> None:
        async with renderer() as made:
            await asyncio.sleep(0.2)
            assert made.stalled_s == 0
            hanging = asyncio.create_task(events_of(made, ask("hang")))

            async def stalls() -> bool:
                return made.stalled_s > 0.3

            await until(stalls)
            hanging.cancel()
            await asyncio.gather(hanging, return_exceptions=True)
            assert made.stalled_s == 0
            await events_of(made, ask())
            assert made.stalled_s == 0

    run(work)


def test_callers_who_give_up_one_after_the_other_do_not_hide_that_the_device_hangs():
    async def work() -> None:
        async with renderer() as made:

            async def stalls() -> bool:
                return made.stalled_s > 0.5

            first = asyncio.create_task(events_of(made, ask("hang")))
            await until(stalls)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            second = asyncio.create_task(events_of(made, ask("hang")))

            async def waits() -> bool:
                return (await made.load()).num_waiting == 1

            await until(waits)
            assert made.stalled_s > 0.5
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)

    run(work)


def test_the_same_request_makes_the_same_video_alone_and_among_neighbours():
    async def work() -> list[np.ndarray]:
        request = ask(request_id="same")
        async with renderer(batch_size=3) as made:
            alone = await events_of(made, request)
            others = [events_of(made, ask(request_id=str(number))) for number in range(2)]
            neighbours, *_ = await asyncio.gather(events_of(made, request), *others)
        return [decode_frames(events[-1].content) for events in (alone, neighbours)]

    alone, neighbours = run(work)
    assert np.array_equal(alone, neighbours)


def test_a_renderer_that_drains_begins_nothing_more_and_lets_what_denoises_end():
    async def work() -> None:
        async with renderer(step_s=0.1) as made:
            first = asyncio.create_task(events_of(made, ask(request_id="first", knobs={"num_inference_steps": 8})))
            while (await made.load()).num_running < 1:
                await asyncio.sleep(0.01)
            waits = asyncio.create_task(events_of(made, ask(request_id="waits")))
            await asyncio.sleep(0.1)
            draining = asyncio.create_task(made.drain(timeout_s=60))
            with pytest.raises(Cancelled):
                await waits
            assert not first.done()
            with pytest.raises(Cancelled):
                await events_of(made, ask(request_id="late"))
            assert isinstance((await first)[-1], Rendered)
            await draining
            assert made.is_idle

    run(work)


def test_a_renderer_that_drains_takes_back_what_does_not_end_in_time():
    async def work() -> None:
        async with renderer(step_s=0.05) as made:
            long = asyncio.create_task(events_of(made, ask(knobs={"num_inference_steps": 1000})))
            while (await made.load()).num_running < 1:
                await asyncio.sleep(0.01)
            started = time.monotonic()
            await made.drain(timeout_s=0.5)
            with pytest.raises(Cancelled):
                await long
            assert 0.4 < time.monotonic() - started < 20

    run(work)


def uneven(*bounds: str, seed: int | None = 50, retakes: int = 3, **how: Any) -> RenderRequest:
    """A request whose video flickers the more the greater `seed % 61`."""
    knobs = {} if seed is None else {"seed": seed}
    policy = Policy(parse_bounds(bounds), retakes, how.pop("unaccepted", "keep"))
    return ask("uneven", policy=policy, knobs={**knobs, **how.pop("knobs", {})}, **how)


def test_a_video_that_misses_a_bound_is_animated_again_and_the_best_take_is_the_answer() -> None:
    picture = png()

    async def work() -> None:
        async with renderer() as made:
            strict = (await events_of(made, uneven("flicker<=0.0005", image=picture)))[-1]
            again = (await events_of(made, uneven("flicker<=0.0005", image=picture)))[-1]
            eased = (await events_of(made, uneven("flicker<=0.9")))[-1]
        assert isinstance(strict, Rendered)
        assert isinstance(again, Rendered)
        assert isinstance(eased, Rendered)
        takes = strict.video.takes or ()
        assert [take["take"] for take in takes] == [0, 1, 2, 3]
        assert [int(take["seed"]) for take in takes] == [take_seed(50, number) for number in range(4)]
        best = min(takes, key=lambda take: float(take["flicker"]))
        assert (strict.video.accepted, strict.video.take) == (False, best["take"])
        assert (strict.video.params.seed, strict.video.flicker) == (int(best["seed"]), best["flicker"])
        assert strict.video.total_gpu_s == pytest.approx(sum(take["gpu_s"] for take in takes))
        assert again.video.sha256 == strict.video.sha256
        assert (eased.video.accepted, eased.video.take, len(eased.video.takes or ())) == (True, 0, 1)

    run(work)


def test_progress_with_retakes_never_goes_back() -> None:
    async def work() -> list[Event]:
        async with renderer() as made:
            return await events_of(made, uneven("flicker<=0.0005"))

    steps = [event for event in run(work) if isinstance(event, StepDone)]
    assert {step.total for step in steps} == {12}
    assert [step.done for step in steps] == sorted({step.done for step in steps})
    assert steps[-1].done == 12


def test_without_bounds_a_video_has_no_verdict() -> None:
    async def work() -> Event:
        async with renderer() as made:
            return (await events_of(made, ask()))[-1]

    rendered = run(work)
    assert (rendered.video.accepted, rendered.video.take, rendered.video.takes) == (None, None, None)


def test_with_unaccepted_fail_a_request_whose_takes_all_miss_fails() -> None:
    async def work() -> None:
        async with renderer() as made:
            await events_of(made, uneven("flicker<=0.0005", retakes=1, unaccepted="fail"))

    with pytest.raises(NotAccepted, match=r"of 2 takes none meets flicker<=0\.0005; the best has flicker 0\.1"):
        run(work)


def test_a_deadline_ends_the_retakes_and_the_best_take_so_far_is_the_answer() -> None:
    async def work() -> Rendered:
        async with renderer(step_s=0.2) as made:  # 0.6 s a take
            rendered = (await events_of(made, uneven("flicker<=0.0005", retakes=16, deadline_s=2)))[-1]
            assert isinstance(rendered, Rendered)
            return rendered

    rendered = run(work)
    assert rendered.video.accepted is False
    assert 1 <= len(rendered.video.takes or ()) < 6


def test_a_cancel_between_takes_frees_the_engine() -> None:
    async def work() -> None:
        async with renderer(step_s=0.02) as made:
            events = made.render(uneven("flicker<=0.0005", retakes=16))
            async for event in events:
                if isinstance(event, StepDone) and event.done > 4:
                    break
            await events.aclose()
            assert made.is_idle
            assert isinstance((await events_of(made, ask(request_id="next")))[-1], Rendered)

    run(work)


def test_calls_of_owners_begin_in_turn_and_those_of_one_in_order() -> None:
    async def work() -> list[str]:
        begun: list[str] = []

        async def call(made: LocalRenderer, name: str) -> None:
            async with aclosing(made.render(ask(request_id=name, owner=name[0]))) as events:
                async for event in events:
                    if isinstance(event, StepDone) and name not in begun:
                        begun.append(name)

        async with renderer(step_s=0.1, max_waiting=32) as made:  # all wait before the first has ended
            calls = []
            for name in ("a0", "a1", "a2", "a3", "a4", "a5", "b0", "b1", "c0"):
                calls.append(asyncio.create_task(call(made, name)))
                await asyncio.sleep(0.002)
            await asyncio.gather(*calls)
        return begun

    begun = run(work)
    assert set(begun[:4]) >= {"a0", "b0", "c0"}
    for owner in "ab":
        own = [name for name in begun if name[0] == owner]
        assert own == sorted(own)


def test_of_two_owners_that_wait_one_with_a_greater_weight_begins_more_calls_first() -> None:
    keys = {name: hashlib.sha256(name.encode()) for name in "ab"}
    owners = {name: owner_of_hash(key.digest()) for name, key in keys.items()}

    async def work() -> list[str]:
        begun: list[str] = []

        async def call(made: LocalRenderer, name: str) -> None:
            async with aclosing(made.render(ask(request_id=name, owner=owners[name[0]]))) as events:
                async for event in events:
                    if isinstance(event, StepDone) and name not in begun:
                        begun.append(name)

        async with renderer(step_s=0.1, max_waiting=32, key_weights={keys["b"].hexdigest(): 4.0}) as made:
            calls = []
            for name in ("a0", "a1", "a2", "a3", "b0", "b1", "b2"):
                calls.append(asyncio.create_task(call(made, name)))
                await asyncio.sleep(0.001)
            await asyncio.gather(*calls)
        return begun

    assert {"b0", "b1", "b2"} <= set(run(work)[:5])


def test_the_last_places_are_for_callers_that_wait_for_nothing_else() -> None:
    async def work() -> None:
        async with renderer(step_s=0.02, max_waiting=4) as made:
            waiting = [made.render(ask(request_id=f"a{number}", owner="a")) for number in range(4)]
            begun = [asyncio.ensure_future(anext(each)) for each in waiting]
            await asyncio.sleep(0.01)
            with pytest.raises(Busy):
                await anext(made.render(ask(request_id="a5", owner="a")))
            other = made.render(ask(request_id="b", owner="b"))
            assert isinstance(await anext(other), Queued | StepDone)
            await asyncio.gather(*begun)
            for each in (*waiting, other):
                await each.aclose()

    run(work)


def test_refused_callers_are_told_to_come_one_after_the_other() -> None:
    tally = Tally()
    for number in range(3):
        tally.count("r", StepDone(number + 1, 3))
        time.sleep(0.01)
    tally.end("r")
    quick = [tally.seconds_until_free(1, "a") for _ in range(100)]
    assert quick == sorted(quick)
    assert quick[0] == 1.0
    assert quick[-1] > 2
    assert tally.seconds_until_free(1, "b") == 1.0, "an owner does not wait for the refused requests of another"
    unknown = [Tally().seconds_until_free(1, "a")]
    assert unknown == [5.0]

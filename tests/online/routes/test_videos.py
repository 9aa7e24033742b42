"""/v1/videos with the real openai client, on a local disk and on S3."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from openai.types import Video
from PIL import Image

from pia_ray.config.knobs import REFERENCE_KNOBS
from pia_ray.media import video
from pia_ray.online.requests.aliases import IMAGE_FIELDS
from tests.online.video_server import QUICK, VideoServer, data_url, hash_of, png, serve_videos
from tests.s3_server import s3, s3_server

__all__ = ["s3", "s3_server"]  # fixtures

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VideoServer]:
    keys = [hash_of(key) for key in ("ann", "bob", "list", "many")]
    storage = str(tmp_path_factory.mktemp("serve"))
    with serve_videos(storage, step_s=0.02, api_keys=keys, max_jobs_per_key=60, requests_per_minute=6000) as up:
        yield up


@pytest.fixture
def client(server: VideoServer) -> OpenAI:
    return server.client("ann")


def make(client: OpenAI, prompt: str = "waves", *, picture: object = None, **more: Any) -> Video:
    body = {**QUICK, **more.pop("extra_body", {})}
    if isinstance(picture, dict):  # the client's own argument takes files alone, though its type says otherwise
        return client.videos.create(prompt=prompt, extra_body={**body, "input_reference": picture}, **more)
    return client.videos.create(prompt=prompt, input_reference=picture or png(), extra_body=body, **more)


def make_and_wait(client: OpenAI, prompt: str = "waves", **more: Any) -> Video:
    return client.videos.poll(make(client, prompt, **more).id)


def refusal(call: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    error = caught.value
    assert set(error.response.json()["error"]) == {"message", "type", "param", "code"}
    assert error.response.headers["x-request-id"]
    return error


def test_a_video_is_made_polled_downloaded_and_deleted(client: OpenAI, tmp_path: Path):
    made = client.videos.create_and_poll(
        prompt="waves",
        input_reference=png(),
        size="64x48",
        model="demo",
        extra_body={**QUICK, "width": None, "height": None},
    )
    assert (made.status, made.progress, made.error) == ("completed", 100, None)
    assert (made.size, made.seconds, made.model, made.prompt) == ("64x48", "1", "demo", "waves")
    assert made.created_at <= made.completed_at < made.expires_at
    client.videos.download_content(made.id).write_to_file(tmp_path / "made.mp4")
    facts = video.probe((tmp_path / "made.mp4").read_bytes())
    assert (facts.width, facts.height, facts.num_frames) == (64, 48, 4)
    assert made.sha256 and made.size_bytes == (tmp_path / "made.mp4").stat().st_size
    for variant in ("thumbnail", "spritesheet"):
        answer = client.videos.download_content(made.id, variant=variant)
        assert answer.response.headers["content-type"] == "image/webp"
        assert answer.content[8:12] == b"WEBP"
    assert refusal(lambda: client.videos.download_content(made.id, variant="poster")).status_code == 409
    gone = client.videos.delete(made.id)
    assert (gone.id, gone.object, gone.deleted) == (made.id, "video.deleted", True)
    assert refusal(lambda: client.videos.retrieve(made.id)).status_code == 404


def test_a_finished_video_has_the_size_and_seconds_that_its_object_promised_and_a_poster(client: OpenAI):
    finishing = {"playback_fps": 24, "repeat": 3, "aspect": "1:2", "fit": "pad", "poster": "jpg"}
    asked = client.videos.create(
        prompt="waves", input_reference=png(), extra_body={**QUICK, "height": None, **finishing}
    )
    made = client.videos.poll(asked.id)
    assert made.status == "completed"
    assert (made.size, made.seconds) == (asked.size, asked.seconds)
    facts = video.probe(client.videos.download_content(made.id).content)
    assert made.size == f"{facts.width}x{facts.height}"
    assert float(made.seconds) == pytest.approx(facts.num_frames / facts.fps, abs=1e-3)
    answer = client.videos.download_content(made.id, variant="poster")
    assert answer.response.headers["content-type"] == "image/jpeg"
    with Image.open(io.BytesIO(answer.content)) as poster:
        assert f"{poster.width}x{poster.height}" == made.size


def test_on_s3_the_client_does_the_same_and_downloads_by_a_link_that_shows_no_key(s3: str, tmp_path: Path):
    with serve_videos(f"{s3}/serve") as up:
        client = up.client("secret-key")
        made = make_and_wait(client)
        answer = client.videos.download_content(made.id)
        answer.write_to_file(tmp_path / "made.mp4")
        assert video.probe((tmp_path / "made.mp4").read_bytes()).num_frames == 4
        asked = answer.response.request
        assert asked.url.host == "127.0.0.1" and f":{asked.url.port}" not in up.url
        assert "secret-key" not in str(asked.url) + str(asked.headers)
        passed_on = httpx2.get(f"{up.url}/v1/videos/{made.id}/content?redirect=0")
        assert (passed_on.status_code, passed_on.content) == (200, answer.content)
        assert passed_on.headers["content-type"] == "video/mp4"
        head = httpx2.head(f"{up.url}/v1/videos/{made.id}/content")
        assert (head.status_code, head.headers["content-length"]) == (200, str(len(answer.content)))
        failed = make_and_wait(client, "nan")
        assert (failed.status, failed.error.code) == ("failed", "nan_frames")
        hanging = make(client, "hang")
        client.post(f"/videos/{hanging.id}/cancel", cast_to=Video)
        assert client.videos.poll(hanging.id).error.code == "cancelled"
        assert [each.id for each in client.videos.list(limit=1)] == [hanging.id, failed.id, made.id]
        assert client.videos.delete(made.id).deleted
        assert refusal(lambda: client.videos.retrieve(made.id)).status_code == 404


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_any_replica_answers_for_any_video(request: pytest.FixtureRequest, tmp_path: Path, place: str):
    storage = str(tmp_path) if place == "disk" else f"{request.getfixturevalue('s3')}/serve"
    with serve_videos(storage) as one, serve_videos(storage) as other:
        first, second = one.client(), other.client()
        made = make(first)
        assert second.videos.poll(made.id).status == "completed"
        assert video.probe(second.videos.download_content(made.id).content).num_frames == 4
        hanging = make(first, "hang")
        second.post(f"/videos/{hanging.id}/cancel", cast_to=Video)
        assert first.videos.poll(hanging.id).error.code == "cancelled"
        assert [each.id for each in second.videos.list()] == [hanging.id, made.id]
        assert second.videos.delete(made.id).deleted
        assert refusal(lambda: first.videos.retrieve(made.id)).status_code == 404


def test_what_is_too_large_is_refused_with_413(tmp_path: Path):
    with serve_videos(str(tmp_path), max_body_bytes=100_000, max_image_bytes=50_000, max_image_pixels=100_000) as up:
        client = up.client()
        for picture, code in (
            (png() + bytes(60_000), "image_too_large"),
            (png(400, 400), "image_too_large"),
            (png() + bytes(110_000), "body_too_large"),
        ):
            error = refusal(lambda picture=picture: make(client, picture=picture))
            assert (error.status_code, error.code) == (413, code)
        assert make_and_wait(client).status == "completed"


def test_a_list_of_fifty_is_read_page_by_page_in_both_orders(server: VideoServer):
    client = server.client("list")
    picture = data_url(png())

    def create(number: int) -> str:
        body = {"num_inference_steps": 1, "num_frames": 1}
        return make(client, f"video {number}", picture={"image_url": picture}, extra_body=body).id

    ids = [create(number) for number in range(51)]
    assert [each.id for each in client.videos.list(limit=20)] == ids[::-1]
    assert [each.id for each in client.videos.list(limit=7, order="asc")] == ids
    first = client.videos.list(limit=20)
    assert (len(first.data), first.has_more, first.last_id) == (20, True, ids[31])
    assert refusal(lambda: client.videos.list(limit=0)).status_code == 422


def test_a_query_that_a_route_does_not_know_is_refused(client: OpenAI):
    def fault_of(path: str, **params: object) -> str | None:
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.get(path, cast_to=object, options={"params": params})
        return refused.value.param

    for path in ("/videos", "/files", "/batches"):
        assert fault_of(path, limit=5, colour="red") == "colour"
        assert fault_of(f"{path}?limit=5&limit=6") == "limit"
        with pytest.raises(openai.NotFoundError):
            client.get(f"{path}?after=x", cast_to=object)
    for path in ("/models", "/videos/x/content", "/files/x/content", "/files/x"):
        assert fault_of(path, colour="red") == "colour"


def test_progress_position_and_time_left_are_shown_while_a_video_is_made(server: VideoServer):
    client = server.client("many")
    made = [make(client, f"number {n}", extra_body={"num_inference_steps": 100}) for n in range(6)]
    assert max(each.queue_position for each in made if each.status == "queued") >= 3
    seen = []
    while True:
        raw = client.videos.with_raw_response.retrieve(made[0].id)
        now = raw.parse()
        if now.status in ("completed", "failed"):
            break
        assert 250 <= int(raw.headers["openai-poll-after-ms"]) <= 10_000
        seen.append(now.progress)
        time.sleep(0.1)
    assert seen == sorted(seen)
    assert any(0 < progress < 100 for progress in seen)
    assert "openai-poll-after-ms" not in raw.headers
    for each in made[1:]:
        client.videos.delete(each.id)


def test_a_cancelled_video_has_failed_and_leaves_the_engine(client: OpenAI):
    hanging = [make(client, "hang") for _ in range(2)]  # as many as denoise together: nothing else gets on
    waits = make(client, "waves", extra_body={"seed": 5})
    for each in hanging:
        body = client.post(f"/videos/{each.id}/cancel", cast_to=Video)
        assert (body.status, body.error.code) == ("failed", "cancelled")
    assert client.videos.poll(waits.id).status == "completed"
    assert client.videos.poll(hanging[0].id).error.code == "cancelled"
    again = client.post(f"/videos/{hanging[0].id}/cancel", cast_to=Video)
    assert again.error.code == "cancelled"
    assert refusal(lambda: client.post(f"/videos/{waits.id}/cancel", cast_to=Video)).status_code == 409
    assert refusal(lambda: client.videos.download_content(hanging[0].id)).code == "conflict"


def test_a_failed_video_says_why_and_answers_200(client: OpenAI):
    failed = make_and_wait(client, "nan")
    assert (failed.status, failed.error.code) == ("failed", "nan_frames")


def test_a_remix_keeps_picture_seed_and_knobs_and_names_its_source(client: OpenAI):
    first = make_and_wait(client, "waves", extra_body={"motion_scale": 2})
    second = client.videos.poll(client.videos.remix(first.id, prompt="a storm").id)
    assert (second.prompt, second.remixed_from_video_id) == ("a storm", first.id)
    for knob in ("seed", "motion_scale", "num_frames", "width", "height"):
        assert second.params[knob] == first.params[knob]
    same = client.videos.download_content(first.id).content
    assert client.videos.download_content(second.id).content != same
    hanging = make(client, "hang")
    assert refusal(lambda: client.videos.remix(hanging.id, prompt="x")).status_code == 409
    client.videos.delete(hanging.id)


def test_another_key_sees_nothing_of_a_video(server: VideoServer, client: OpenAI):
    made, other = make_and_wait(client), server.client("bob")
    for call in (
        lambda: other.videos.retrieve(made.id),
        lambda: other.videos.download_content(made.id),
        lambda: other.videos.delete(made.id),
        lambda: other.videos.remix(made.id, prompt="mine"),
        lambda: other.post(f"/videos/{made.id}/cancel", cast_to=Video),
    ):
        assert refusal(call).status_code == 404
    assert made.id not in [each.id for each in other.videos.list()]
    assert client.videos.retrieve(made.id).status == "completed"
    assert isinstance(refusal(server.client("nobody").videos.list), openai.AuthenticationError)


def test_one_idempotency_key_makes_one_video_also_at_the_same_time(client: OpenAI):
    headers = {"Idempotency-Key": "only once"}
    with ThreadPoolExecutor(4) as calls:
        ids = {each.id for each in calls.map(lambda _: make(client, extra_headers=headers), range(4))}
    assert len(ids) == 1
    assert refusal(lambda: make(client, "another", extra_headers=headers)).status_code == 409
    assert make(client).id not in ids


def test_the_clients_own_retry_of_a_lost_answer_makes_no_second_video(server: VideoServer):
    lost: list[httpx2.Response] = []

    class LosesFirstAnswer(httpx2.HTTPTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            answer = super().handle_request(request)
            if not lost:
                answer.read()
                lost.append(answer)
                raise httpx2.ReadError("the answer was lost")
            return answer

    picture = png(shade=77)
    with httpx2.Client(transport=LosesFirstAnswer()) as http:
        client = server.client("bob", http_client=http, max_retries=2)
        made = make(client, "made once", picture=picture)
    assert lost[0].json()["id"] == made.id
    assert [each.prompt for each in server.client("bob").videos.list()].count("made once") == 1


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"picture": b"no picture"}, 400, "unsupported_image", None),
        ({"picture": png()[:-40]}, 400, "image_truncated", None),
        ({"extra_body": {"motion_scale": 11}}, 400, "bad_parameter", "motion_scale"),
        ({"extra_body": {"output_path": "/etc/passwd"}}, 400, "bad_parameter", "output_path"),
        ({"extra_body": {"webhook_url": "https://example.com/"}}, 400, "bad_parameter", "webhook_url"),
        ({"extra_body": {"num_inference_steps": 999}}, 400, "bad_parameter", "num_inference_steps"),
        ({"picture": {"image_url": "https://127.0.0.1/x.png"}}, 400, "address_refused", None),
        ({"picture": {"file_id": "file_x"}}, 404, "not_found", None),
        ({"model": "sora-2"}, 400, "bad_parameter", "model"),
    ],
)
def test_what_cannot_be_made_is_refused_at_once(
    client: OpenAI, fields: dict[str, Any], status: int, code: str, param: str | None
):
    error = refusal(lambda: make(client, **fields))
    assert (error.status_code, error.code) == (status, code)
    if param is not None:
        assert error.param == param


def test_the_document_has_each_picture_by_its_file_once(server: VideoServer):
    document = httpx2.get(f"{server.url}/openapi.json", headers={"Authorization": "Bearer ann"}).json()
    for body in document["paths"]["/v1/videos"]["post"]["requestBody"]["content"].values():
        for name in (*IMAGE_FIELDS, *REFERENCE_KNOBS):
            options = body["schema"]["properties"][name]["anyOf"]
            assert [option.get("required") for option in options].count(["file_id"]) == 1, name


def test_a_video_is_served_in_ranges_and_not_before_it_is_done(server: VideoServer, client: OpenAI):
    made = make_and_wait(client)
    whole = client.videos.download_content(made.id).content
    url, key = f"{server.url}/v1/videos/{made.id}/content", {"authorization": "Bearer ann"}
    head = httpx2.head(url, headers=key)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(whole)), b"")
    assert head.headers["content-type"] == "video/mp4"
    part = httpx2.get(url, headers={**key, "range": "bytes=4-11"})
    assert (part.status_code, part.content) == (206, whole[4:12])
    assert part.headers["content-range"] == f"bytes 4-11/{len(whole)}"
    assert part.headers["content-type"] == "video/mp4"
    assert httpx2.get(url, headers={**key, "range": f"bytes={len(whole)}-"}).status_code == 416
    assert httpx2.get(url, headers=key, params={"variant": "cover"}).status_code == 422
    waits = make(client, "hang")
    assert refusal(lambda: client.videos.download_content(waits.id)).status_code == 409
    assert httpx2.head(url.replace(made.id, waits.id), headers=key).status_code == 409
    client.videos.delete(waits.id)


def test_a_key_may_have_so_many_open_videos_and_finished_ones_do_not_count(tmp_path: Path):
    with serve_videos(str(tmp_path), max_jobs_per_key=2) as up:
        client = up.client()
        assert [make_and_wait(client).status for _ in range(3)] == ["completed"] * 3
        hanging = [make(client, "hang"), make(client, "hang", extra_body={"seed": 1})]
        error = refusal(lambda: make(client))
        assert (error.status_code, error.code) == (429, "busy")
        assert int(error.response.headers["retry-after"]) >= 1
        for each in hanging:
            client.videos.delete(each.id)
        assert make_and_wait(client).status == "completed"


def test_a_restart_loses_no_video(tmp_path: Path):
    with serve_videos(str(tmp_path), step_s=0.05) as up:
        client = up.client()
        made = [make(client, f"number {n}", extra_body={"num_inference_steps": 20}) for n in range(4)]
    with serve_videos(str(tmp_path)) as up:
        client = up.client()
        assert [client.videos.poll(each.id).status for each in made] == ["completed"] * 4


def test_the_example_of_the_guide_works_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = (Path(__file__).parents[3] / "docs" / "endpoint.md").read_text("utf-8")
    (example,) = [each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "from openai" in each]
    monkeypatch.chdir(tmp_path)
    Path("picture.png").write_bytes(png())
    with serve_videos(str(tmp_path / "serve")) as up:
        names: dict[str, Any] = {}
        exec(example.replace("http://127.0.0.1:8000", up.url), names)
        names["client"].close()
    assert video.probe(Path("video.mp4").read_bytes()).num_frames == 16

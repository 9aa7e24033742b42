"""Whatever the endpoint's schema allows or forbids is answered as it says, and never by a fault of ours."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, settings
from PIL import Image
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from pia_ray.config.serve import ServeConfig
from pia_ray.online.rendering.local_renderer import LocalRenderer
from pia_ray.online.requests.aliases import IMAGE_FIELDS
from pia_ray.online.requests.request_reader import FormReader
from pia_ray.online.service import create_endpoint
from pia_ray.online.video_jobs import JobStore
from pia_ray.testing import FakeAnimator

pytestmark = pytest.mark.heavy

KEY = "sk-fuzz"
HEADERS = {"Authorization": f"Bearer {KEY}", "Host": "127.0.0.1"}
ANIMATIONS, VIDEOS = "/v1/animations", "/v1/videos"
SAME_KNOBS = [ANIMATIONS, "/v1/videos/{video_id}/remix"]

# Beside the examples that are drawn, each operation has one for each bound of each knob: thousands for a new video.
FEW = settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
FEW_DRAWN = settings(FEW, phases=[Phase.generate])
MANY = settings(FEW, max_examples=300, derandomize=False, database=None)


def png(*_: object) -> bytes:
    """Stands at every https:// URL, so that requests get as far as the engine."""
    out = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 40, 90)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """The endpoint, on a fake."""
    config = ServeConfig.model_validate(
        {
            "api_keys": (hashlib.sha256(KEY.encode()).hexdigest(),),
            "requests_per_minute": 1_000_000,
            "max_frames": 4,
            "batch_size": 1,
            "storage": str(tmp_path_factory.mktemp("fuzz")),
        }
    )
    return create_endpoint(
        LocalRenderer(FakeAnimator(config.models["demo"], styles=config.models), config),
        JobStore(config.storage, job_ttl_s=config.job_ttl_s),
        config,
        forms=FormReader(config, fetch_url=png),
    )


@pytest.fixture(scope="module")
def any_requests(app: FastAPI) -> BaseSchema:
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers=HEADERS)


@pytest.fixture(scope="module")
def requests_of_one_picture(app: FastAPI) -> BaseSchema:
    """The schema with the picture under its first name only: the bounds of knobs come once, not for each name."""
    found = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HEADERS)
    for body in bodies_of_videos(found):
        del body["anyOf"][1:]
    return found


@pytest.fixture(scope="module")
def requests_of_pictures(app: FastAPI) -> BaseSchema:
    """The schema whose bodies have a prompt and the picture under any of its names, and no knobs."""
    found = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HEADERS)
    for body in bodies_of_videos(found):
        body["properties"] = {name: body["properties"][name] for name in ("prompt", *IMAGE_FIELDS)}
    return found


def bodies_of_videos(schema: BaseSchema) -> list[dict[str, Any]]:
    """The schemas of a new video's bodies, in each media type."""
    content = schema.raw_schema["paths"][VIDEOS]["post"]["requestBody"]["content"]
    return [each["schema"] for each in content.values()]


@pytest.fixture(scope="module")
def likely_requests(app: FastAPI) -> BaseSchema:
    found = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HEADERS)
    found.hook(map_body)
    return found


def map_body(_: schemathesis.HookContext, body: object) -> object:
    """Leaves out what no schema can say is wrong, so that most bodies get as far as the engine."""
    if not isinstance(body, dict):
        return body
    unlikely = {"model", "style", "lora", "free_u", "affinity", "size", "seconds", "seam", "condition_frame"}
    unlikely |= {"input_reference", "image_url", "latents", "end_image"}
    kept = {name: value for name, value in body.items() if name not in unlikely and not name.endswith("_embeds")}
    return {**kept, "image": "https://example.com/a.png", "num_frames": 2}


# From fixtures, so that thousands of cases are made where the tests run, and not in each process that collects them.
# The knobs of a call and of a remix are those of a new video, whose examples have their bounds.
any_schema = schemathesis.pytest.from_fixture("any_requests")
schema = schemathesis.pytest.from_fixture("requests_of_one_picture").exclude(path=SAME_KNOBS)
pictures = schemathesis.pytest.from_fixture("requests_of_pictures").include(path=VIDEOS, method="POST")
same_knobs = any_schema.include(path=SAME_KNOBS)
likely = schemathesis.pytest.from_fixture("likely_requests").include(path=ANIMATIONS)


def check(case: schemathesis.Case) -> None:
    """Sends it, and asserts that the answer is one that the schema has for it."""
    # What knobs allow together (a seam for loops only, frames by seconds) no JSON schema can say. A forbidden parameter
    # of a query may have no value and so vanish on the wire: that others are refused is in test_videos.
    excluded = [positive_data_acceptance, *([negative_data_rejection] if case.method == "GET" else [])]
    case.call_and_validate(headers=HEADERS, excluded_checks=excluded)


@schema.parametrize()
@FEW
def test_every_operation_keeps_to_its_schema(case: schemathesis.Case):
    check(case)


@pictures.parametrize()
@FEW
def test_a_picture_under_each_of_its_names_keeps_to_the_schema(case: schemathesis.Case):
    check(case)


@same_knobs.parametrize()
@FEW_DRAWN
def test_calls_and_remixes_keep_to_their_schemas(case: schemathesis.Case):
    check(case)


@pytest.mark.soak
@any_schema.parametrize()
@MANY
def test_every_operation_keeps_to_its_schema_whatever_is_drawn(case: schemathesis.Case):
    check(case)


@likely.parametrize()
@settings(FEW_DRAWN, max_examples=60)  # `map_body` does not see the others
def test_likely_requests_are_animated_or_refused_as_the_schema_says(case: schemathesis.Case):
    case.call_and_validate(headers=HEADERS, excluded_checks=[positive_data_acceptance, negative_data_rejection])

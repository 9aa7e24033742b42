from __future__ import annotations

import io
import json
from pathlib import Path

import c2pa
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from PIL import Image

from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.errors import BadParameter, ConfigError, FetchUnavailable
from pia_ray.media import image as pictures
from pia_ray.media import video
from pia_ray.media.marking import DIGITAL_SOURCE_TYPE, check_signing, is_marked, signer_of, strip_provenance
from pia_ray.media.marking.signing import MIME_OF_SIGNED
from tests.certificates import Files, make_files
from tests.videos import decode_frames

FRAMES = np.random.default_rng(0).integers(0, 255, (3, 48, 64, 3), dtype=np.uint8)
PICTURE = pictures.thumbnail(Image.fromarray(FRAMES[0]))


def configured(files: Files, **settings) -> CatalogConfig:
    values = {"manifest": "m.csv", "output": "out", "model": "demo"}
    signing = {"c2pa_certificate": str(files.certificate), "c2pa_key": str(files.key)}
    return build(CatalogConfig, {**values, **signing, **settings})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("certificates"))


def signed(files: Files, video_format="mp4", **settings):
    encoded = video.encode(FRAMES, fps=8, format=video_format, provenance={"model": "demo@1", "work_key": "ab"})
    signer = signer_of(configured(files, **settings))
    assert signer is not None
    made = signer.sign(encoded, picture=PICTURE, model="demo@1")
    video.verify(made)
    return encoded, made


def read(content: bytes, mime: str) -> tuple[str, dict]:
    found = json.loads(c2pa.Reader(mime, io.BytesIO(content)).json())
    return found["validation_state"], found["manifests"][found["active_manifest"]]


@pytest.mark.parametrize("video_format", list(MIME_OF_SIGNED))
def test_a_reader_verifies_who_made_the_video_with_what_from_which_picture(files: Files, video_format):
    encoded, made = signed(files, video_format)
    state, manifest = read(made.content, MIME_OF_SIGNED[video_format])
    assert state == "Valid"
    (actions,) = (each["data"]["actions"] for each in manifest["assertions"] if each["label"] == "c2pa.actions.v2")
    assert [(each["action"], each["digitalSourceType"]) for each in actions] == [("c2pa.created", DIGITAL_SOURCE_TYPE)]
    assert actions[0]["softwareAgent"] == {"name": "demo", "version": "1"}
    assert manifest["signature_info"]["common_name"] == "Shop"
    assert manifest["claim_generator_info"][0]["name"] == "pia-ray"
    (ingredient,) = manifest["ingredients"]
    assert (ingredient["relationship"], ingredient["thumbnail"]["format"]) == ("inputTo", "image/webp")
    assert PICTURE in made.content or video_format == "gif"  # its blocks cut the manifest in pieces
    assert is_marked(made.content, video_format)
    assert np.array_equal(decode_frames(made.content), decode_frames(encoded.content))


@pytest.mark.parametrize("video_format", list(MIME_OF_SIGNED))
def test_a_file_that_is_reduced_loses_the_manifest_that_would_not_fit(files: Files, video_format):
    encoded, made = signed(files, video_format)
    assert strip_provenance(made.content, video_format, "public") is made.content
    bare = strip_provenance(made.content, video_format, "none")
    assert bare == strip_provenance(encoded.content, video_format, "none")


def test_a_changed_frame_is_found(files: Files):
    content = bytearray(signed(files)[1].content)
    content[-10] ^= 1
    assert read(bytes(content), "video/mp4")[0] == "Invalid"


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(public_exponent=65537, key_size=2048),
    ],
    ids=["P-384", "Ed25519", "RSA"],
)
def test_other_kinds_of_keys_sign(tmp_path: Path, key):
    files = make_files(tmp_path, key=key)
    check_signing(configured(files))
    assert read(signed(files)[1].content, "video/mp4")[0] == "Valid"


def test_a_key_that_does_not_fit_is_refused(tmp_path: Path, files: Files):
    other = make_files(tmp_path)
    with pytest.raises(ConfigError, match="does not fit the first certificate"):
        check_signing(configured(Files(files.certificate, other.key)))


@pytest.mark.parametrize(("days", "message"), [((-30, -1), "has expired on"), ((1, 30), "is valid from .* only")])
def test_a_certificate_out_of_its_time_is_refused(tmp_path: Path, days, message):
    with pytest.raises(ConfigError, match=message):
        check_signing(configured(make_files(tmp_path, days=days)))


def test_a_certificate_that_is_not_for_signing_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"c2pa_certificate .* cannot sign"):
        check_signing(configured(make_files(tmp_path, for_signing=False)))


def test_files_that_cannot_be_read_are_refused_and_never_quoted(tmp_path: Path, files: Files):
    with pytest.raises(ConfigError, match=r"c2pa_key: .*missing\.pem"):
        check_signing(configured(Files(files.certificate, tmp_path / "missing.pem")))
    with pytest.raises(ConfigError, match="is not a chain of PEM certificates"):
        check_signing(configured(Files(files.key, files.key)))
    locked = tmp_path / "locked.pem"
    secret = ec.generate_private_key(ec.SECP256R1())
    locked.write_bytes(secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")))
    for wrong in (locked, files.certificate):
        with pytest.raises(ConfigError, match="is not a private key in PEM without a password") as caught:
            check_signing(configured(Files(files.certificate, wrong)))
        assert "BEGIN" not in str(caught.value)
    assert files.key.read_text() not in repr(signer_of(configured(files)))


def test_webm_has_no_place_for_a_manifest(files: Files):
    with pytest.raises(ConfigError, match="webm has no place for a C2PA manifest: use mp4, webp, gif"):
        check_signing(configured(files, format="webm"), format="webm")
    with pytest.raises(BadParameter):
        signed(files, "webm")


def test_a_server_of_time_stamps_that_does_not_answer_is_named(files: Files):
    with pytest.raises(ConfigError, match=r"no time stamp from http://127\.0\.0\.1:9/"):
        check_signing(configured(files, c2pa_timestamp_url="http://127.0.0.1:9/"))
    with pytest.raises(FetchUnavailable):
        signed(files, c2pa_timestamp_url="http://127.0.0.1:9/")


@pytest.mark.parametrize(
    "settings", [{"c2pa_key": None}, {"c2pa_certificate": None}, {"c2pa_timestamp_url": "ftp://stamps.example/"}]
)
def test_half_of_the_settings_is_refused(files: Files, settings):
    with pytest.raises(ConfigError, match="c2pa"):
        configured(files, **settings)

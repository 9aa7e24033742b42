"""Certificates of an authority of their own, as C2PA asks for them, made for one test run."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


class Files(NamedTuple):
    """PEM files of a certificate, with its chain, and of its key."""

    certificate: Path
    key: Path


def make_files(folder: Path, *, key=None, days: tuple[int, int] = (-1, 30), for_signing: bool = True) -> Files:
    """A certificate of its own authority, with the chain, and its key."""
    root_key, key = ec.generate_private_key(ec.SECP256R1()), key or ec.generate_private_key(ec.SECP256R1())
    root = _certificate("Root", root_key, issuer="Root", issuer_key=root_key, days=days, is_root=True)
    own = _certificate("Shop", key, issuer="Root", issuer_key=root_key, days=days, is_root=not for_signing)
    folder.mkdir(exist_ok=True)
    files = Files(folder / "chain.pem", folder / "key.pem")
    files.certificate.write_bytes(own.public_bytes(Encoding.PEM) + root.public_bytes(Encoding.PEM))
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


def _certificate(name: str, key, *, issuer: str, issuer_key, days: tuple[int, int], is_root: bool) -> x509.Certificate:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(each, text) for each in (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME)])

    now = datetime.now(UTC)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    made = (
        x509.CertificateBuilder(named(issuer), named(name), key.public_key(), x509.random_serial_number())
        .not_valid_before(now + timedelta(days[0]))
        .not_valid_after(now + timedelta(days[1]))
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_root, key_cert_sign=is_root, crl_sign=is_root, decipher_only=False, **usage
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not is_root:
        made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return made.sign(issuer_key, hashes.SHA256())

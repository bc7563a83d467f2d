"""Signs PNGs with C2PA manifests, by a certificate and key that were tried before."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sdtrain.errors import UserError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
_OTHERS_MAY = 0o077
# Extended key usages that C2PA 2 allows: emailProtection, documentSigning, and its own for claims.
_USAGES = "1.3.6.1.5.5.7.3.4\n1.3.6.1.5.5.7.3.36\n1.3.6.1.4.1.62558.2.1"
_SETTINGS = {
    # The image is its own thumbnail; and nothing is fetched from where a start image or a certificate points to.
    "builder": {"thumbnail": {"enabled": False}},
    "trust": {"trust_config": _USAGES},
    "verify": {"ocsp_fetch": False, "remote_manifest_fetch": False},
}


@dataclass(frozen=True)
class SignerFiles:
    """Where a signer's files are.

    Attributes:
        certificate: PEM, the signer's own certificate first, then those that lead to its root.
        key: its private key, PEM without a password, which nobody else may read.
        timestamps: URL of a time-stamping authority (RFC 3161) that every signature is sent to; None asks nobody.
    """

    certificate: Path
    key: Path
    timestamps: str | None = None


@dataclass(frozen=True)
class Ingredient:
    """A file that an image was made from; `described` is C2PA's JSON of it."""

    described: Mapping[str, Any]
    content: bytes
    mime_type: str


@dataclass(frozen=True)
class Signer:
    """A certificate chain and its key that fit; see `open_signer`."""

    algorithm: str
    chain: bytes
    key: bytes = field(repr=False)
    timestamps: str | None = None

    def sign(
        self,
        png: bytes,
        manifest: Mapping[str, Any],
        resources: Mapping[str, bytes] | None = None,
        ingredients: Iterable[Ingredient] = (),
    ) -> bytes:
        """Returns the PNG with a signed manifest that covers all its other bytes; UserError if it cannot be signed.

        Two signatures of the same image differ: the library salts every part of a manifest.

        Args:
            png: the file.
            manifest: C2PA's JSON.
            resources: contents of what the manifest names by identifier.
            ingredients: files that the image was made from.
        """
        import c2pa  # late: few need it

        signed = io.BytesIO()
        try:
            with (
                c2pa.Signer.from_info(
                    c2pa.C2paSignerInfo(self.algorithm, self.chain, self.key, self.timestamps)
                ) as signer,
                c2pa.Context.from_dict(_SETTINGS) as context,
                c2pa.Builder(json.dumps(manifest), context=context) as builder,
            ):
                for name, content in (resources or {}).items():
                    builder.add_resource(name, io.BytesIO(content))
                for part in ingredients:
                    builder.add_ingredient(json.dumps(part.described), part.mime_type, io.BytesIO(part.content))
                builder.sign(signer, "image/png", io.BytesIO(png), signed)
        except c2pa.C2paError as error:
            raise UserError(f"{manifest.get('title', 'An image')} cannot be signed: {error}") from error
        return signed.getvalue()


def open_signer(files: SignerFiles) -> Signer:
    """Reads a signer's files and signs a trial image.

    UserError if the package is missing, a file cannot be read, the key may be read by others or does not belong to the
    certificate, a certificate is not valid now, or C2PA does not accept it.
    """
    try:
        import c2pa
    except ImportError as error:
        raise UserError("Content credentials need the package c2pa-python: install sdtrain[credentials].") from error
    chain, (algorithm, key) = _read_chain(files.certificate), _read_key(files)
    signer = Signer(algorithm, chain, key, files.timestamps)
    try:
        signed = signer.sign(trial_png(), {"claim_generator_info": [{"name": "trial"}], "assertions": [_CREATED]})
        with (
            c2pa.Context.from_dict(_SETTINGS) as context,
            c2pa.Reader("image/png", io.BytesIO(signed), context=context) as reader,
        ):
            state, found = reader.get_validation_state(), json.loads(reader.json()).get("validation_status", [])
    except (UserError, c2pa.C2paError) as error:
        raise UserError(
            f"{files.certificate} and {files.key} cannot sign content credentials: {error}. C2PA asks for a "
            "certificate that another one issued, with the key usage digitalSignature alone and the extended key usage "
            "emailProtection, documentSigning or C2PA's own."
        ) from error
    if state == "Invalid":
        reasons = "; ".join(f"{one['code']}, {one.get('explanation', '')}" for one in found)
        raise UserError(f"C2PA does not accept what {files.certificate} signs: {reasons}.")
    return signer


_CREATED = {
    "label": "c2pa.actions.v2",
    "data": {
        "actions": [
            {
                "action": "c2pa.created",
                "digitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCreation",
            }
        ]
    },
}


def trial_png() -> bytes:
    """A small image to try a signature on."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def _read_chain(path: Path) -> bytes:
    from cryptography.x509 import load_pem_x509_certificates

    content = _read(path, "certificate chain")
    try:
        certificates = load_pem_x509_certificates(content)
    except ValueError as error:
        raise UserError(f"{path} holds no certificates in PEM form: {error}") from error
    for certificate in certificates:
        _require_valid_now(certificate, path)
    return content


def _require_valid_now(certificate: Certificate, path: Path) -> None:
    first, last, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, datetime.now(UTC)
    if not first <= now <= last:
        raise UserError(
            f"The certificate of {certificate.subject.rfc4514_string()} in {path} is valid from {first:%Y-%m-%d %H:%M} "
            f"to {last:%Y-%m-%d %H:%M} UTC, and now it is {now:%Y-%m-%d %H:%M}. Get a new one."
        )


def _read_key(files: SignerFiles) -> tuple[str, bytes]:
    """The algorithm that the key signs with, and the key in the form that the library reads."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.x509 import load_pem_x509_certificates

    content = _read(files.key, "key")
    if files.key.stat().st_mode & _OTHERS_MAY:
        raise UserError(f"{files.key} can be read or written by others than its owner. Run chmod 600 on it first.")
    try:
        key = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # whose text could quote the file
        kind = "has a password" if isinstance(error, TypeError) else "holds no private key in PEM form"
        raise UserError(f"{files.key} {kind}. Give an unencrypted PEM file (PKCS #8).") from None
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    owner = load_pem_x509_certificates(_read(files.certificate, "certificate chain"))[0]
    if owner.public_key().public_bytes(*form) != key.public_key().public_bytes(*form):
        raise UserError(
            f"{files.key} is not the key of the first certificate in {files.certificate}, "
            f"{owner.subject.rfc4514_string()}. Name the pair that belongs together, the signer's certificate first."
        )
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return _algorithm(key, files.key), key.private_bytes(pem, pkcs8, serialization.NoEncryption())


def _algorithm(key: object, path: Path) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
        return _CURVES[key.curve.name]
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
        return "ps256"
    raise UserError(f"{path}: C2PA signs with Ed25519, with EC on P-256, P-384 or P-521, or RSA from 2048 bits on.")


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"The {what} {path} cannot be read: {error.strerror}.") from error

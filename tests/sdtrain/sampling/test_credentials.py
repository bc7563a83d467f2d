"""The library's own reader verifies what `sdtrain sample` signs, and one changed pixel breaks it."""

import datetime
import io
import json
import struct
import zlib

import c2pa
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.errors import UserError
from sdtrain.evaluation.models import identify
from sdtrain.evaluation.protocol import Protocol
from sdtrain.formats.export import export_model
from sdtrain.sampling.batch import Job, Model
from sdtrain.sampling.credentials import Credentials, Origin, describe_model
from sdtrain.sampling.output_folder import SampleFolder, Writer
from sdtrain.sampling.sampler import SampleSettings
from sdtrain.sampling.signer import Signer, SignerFiles, open_signer
from sdtrain.sampling.start_image import open_start_image
from tests.training_fixtures import write_run

EMAIL = ExtendedKeyUsageOID.EMAIL_PROTECTION
KEYS = {
    "es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "ps256": lambda: rsa.generate_private_key(65537, 2048),
}


def certificate(subject, key, issuer, issuer_key, days=(-1, 30), usages=(EMAIL,)):
    """A certificate as C2PA wants it: of an authority where subject and issuer are one, else of a signer."""
    is_root, now = subject == issuer, datetime.datetime.now(datetime.UTC)
    first, last = (now + datetime.timedelta(days=number) for number in days)
    names = [
        x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests"), x509.NameAttribute(NameOID.COMMON_NAME, n)])
        for n in (subject, issuer)
    ]
    kinds = [True, False, False, False, False, False, False, False, False]
    if is_root:
        kinds[5:7] = [True, True]
    builder = (
        x509.CertificateBuilder(names[1], names[0], key.public_key(), x509.random_serial_number(), first, last)
        .add_extension(x509.BasicConstraints(is_root, None), critical=True)
        .add_extension(x509.KeyUsage(*kinds), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if not is_root and usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def pem_of(certificate):
    return certificate.public_bytes(serialization.Encoding.PEM)


def write_signer(folder, kind="es256", password=None, **changes):
    """A root, a signer's chain and its key."""
    folder.mkdir(exist_ok=True)
    root_key, key = KEYS["es256"](), KEYS[kind]()
    root = pem_of(certificate("root", root_key, "root", root_key))
    (folder / "root.pem").write_bytes(root)
    (folder / "chain.pem").write_bytes(pem_of(certificate("signer", key, "root", root_key, **changes)) + root)
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, hidden))
    (folder / "key.pem").chmod(0o600)
    return SignerFiles(folder / "chain.pem", folder / "key.pem")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_signer(tmp_path_factory.mktemp("signer"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), ema_offset=0.02)


def sample(run, output, files, *options, keys=True):
    arguments = ["sample", str(run), "--output", str(output), "--guidance", "2", "--steps", "2", "--width", "64"]
    if keys:
        arguments += ["--content-credentials", "--credentials-certificate", str(files.certificate)]
        arguments += ["--credentials-key", str(files.key)]
    result = CliRunner().invoke(app, [*arguments, *options])
    if result.exception is not None:
        raise result.exception
    return result.output


def read(content, root=None):
    """The reader's verdict, its reasons, and the active manifest."""
    trust = {"trust": {"trust_anchors": root}, "verify": {"verify_trust": True}} if root else {}
    reader = c2pa.Reader("image/png", io.BytesIO(content), context=c2pa.Context.from_dict(trust))
    found = [one["code"] for one in json.loads(reader.json()).get("validation_status", [])]
    return reader.get_validation_state(), found, reader.get_active_manifest()


def assertion(manifest, label):
    return next(one["data"] for one in manifest["assertions"] if one["label"] == label)


def resource(content, identifier):
    file = io.BytesIO()
    c2pa.Reader("image/png", io.BytesIO(content)).resource_to_stream(identifier, file)
    return file.getvalue()


def chunks(png):
    place = 8
    while place < len(png):
        (size,) = struct.unpack(">I", png[place : place + 4])
        yield png[place + 4 : place + 8], png[place + 8 : place + 8 + size]
        place += 12 + size


def with_chunk(png, name, change):
    """The PNG with other contents in its chunks of this name; all checksums are right."""
    parts = [(kind, change(content) if kind == name else content) for kind, content in chunks(png)]
    return png[:8] + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )


def change_pixel(data):
    """The compressed rows with the lowest bit of one pixel's blue changed."""
    rows = bytearray(zlib.decompress(data))
    rows[30] ^= 1
    return zlib.compress(bytes(rows))


def test_the_command_signs_who_made_the_image_and_one_changed_pixel_shows(run, files, tmp_path):
    sample(run, tmp_path, files, "a red circle", "--grid")
    content, root = (tmp_path / "00000.png").read_bytes(), (files.certificate.parent / "root.pem").read_text()
    state, reasons, manifest = read(content, root)
    assert (state, reasons) == ("Trusted", [])
    (made,) = assertion(manifest, "c2pa.actions.v2")["actions"]
    assert made["action"] == "c2pa.created"
    assert made["digitalSourceType"].endswith("/digitalsourcetype/trainedAlgorithmicMedia")
    assert made["softwareAgent"]["name"] == "sdtrain"
    generation = assertion(manifest, "sdtrain.generation")
    assert (generation["run"], generation["step"], generation["weights"]) == ("run", 5, "ema")
    assert generation["data_digest"] == "d"
    protocol = Protocol(prompts="x", reference="x")
    assert generation["model_sha256"] == identify(run, protocol).digest
    assert not manifest.get("ingredients")
    # The record stays where it was, and the signature covers it.
    record = json.loads(Image.open(io.BytesIO(content)).text["sdtrain"])
    assert (record["prompt"], record["content_credentials"]) == ("a red circle", "model")
    for changed in (
        with_chunk(content, b"IDAT", change_pixel),
        with_chunk(content, b"iTXt", lambda text: text.replace(b"a red circle", b"a red square")),
    ):
        Image.open(io.BytesIO(changed)).load()
        state, reasons, _ = read(changed, root)
        assert (state, reasons) == ("Invalid", ["assertion.dataHash.mismatch"])
    assert read((tmp_path / "grid.png").read_bytes(), root)[0] == "Trusted"


def test_the_prompt_is_signed_only_if_asked(run, files, tmp_path):
    sample(run, tmp_path, files, "ein Bär", "--credentials-prompt")
    content = (tmp_path / "00000.png").read_bytes()
    state, _, manifest = read(content)
    assert state == "Valid"
    (prompt,) = manifest["ingredients"]
    assert (prompt["relationship"], prompt["format"]) == ("inputTo", "text/plain")
    assert resource(content, prompt["data"]["identifier"]).decode() == "ein Bär"
    (made,) = assertion(manifest, "c2pa.actions.v2")["actions"]
    assert len(made["parameters"]["ingredients"]) == 1


def test_an_image_without_credentials_is_not_replaced_and_one_that_lost_them_is_drawn_again(run, files, tmp_path):
    sample(run, tmp_path, files, "a", keys=False)
    plain = (tmp_path / "00000.png").read_bytes()
    assert "1 images drawn" in sample(run, tmp_path, files, "a")
    assert (tmp_path / "00000.png").read_bytes() == plain
    assert read((tmp_path / "00001.png").read_bytes())[0] == "Valid"
    assert "0 images drawn, 1 kept" in sample(run, tmp_path, files, "a")
    signed = (tmp_path / "00001.png").read_bytes()
    lost = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks(signed)
        if kind != b"caBX"
    )
    (tmp_path / "00001.png").write_bytes(signed[:8] + lost)
    assert "1 images drawn" in sample(run, tmp_path, files, "a")
    assert read((tmp_path / "00001.png").read_bytes())[0] == "Valid"


def credentials_of(files, **changes):
    return Credentials(open_signer(files), {"model": "tiny"}, **changes)


def a_png():
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF"])
def test_the_start_image_is_what_was_opened(files, tmp_path, kind):
    path = tmp_path / f"photo.{kind.lower()}"
    Image.new("RGB", (16, 16), "blue").save(path, kind)
    signed = credentials_of(files).sign(a_png(), Origin("0.png", "a", open_start_image(path, 0.5)))
    state, _, manifest = read(signed)
    assert state == "Valid"
    opened, made = assertion(manifest, "c2pa.actions.v2")["actions"]
    assert (opened["action"], made["action"]) == ("c2pa.opened", "c2pa.edited")
    assert made["digitalSourceType"].endswith("trainedAlgorithmicMedia")
    (ingredient,) = manifest["ingredients"]
    assert (ingredient["title"], ingredient["relationship"]) == (path.name, "parentOf")
    assert len(opened["parameters"]["ingredients"]) == 1
    assert assertion(manifest, "sdtrain.generation")["strength"] == 0.5


def test_a_start_image_brings_its_own_credentials_and_may_not_change_meanwhile(files, tmp_path):
    path, credentials = tmp_path / "start.png", credentials_of(files, with_prompt=True)
    path.write_bytes(credentials.sign(a_png(), Origin("start.png", "first")))
    start = open_start_image(path)
    signed = credentials.sign(a_png(), Origin("0.png", "second", start))
    reader = c2pa.Reader("image/png", io.BytesIO(signed))
    assert reader.get_validation_state() == "Valid"
    assert len(json.loads(reader.json())["manifests"]) == 2
    path.write_bytes(a_png())
    with pytest.raises(UserError, match=r"start\.png was changed"):
        credentials.sign(a_png(), Origin("0.png", "second", start))


def test_a_black_image_says_that_the_checker_blackened_it(files):
    signed = credentials_of(files).sign(a_png(), Origin("0.png", "a", is_blackened=True))
    actions = assertion(read(signed)[2], "c2pa.actions.v2")["actions"]
    assert [one["action"] for one in actions] == ["c2pa.created", "c2pa.edited"]
    assert "safety checker" in actions[1]["description"]


@pytest.mark.parametrize("usage", ["1.3.6.1.5.5.7.3.36", "1.3.6.1.4.1.62558.2.1"])
def test_certificates_to_sign_documents_or_claims_will_do(tmp_path, usage):
    assert open_signer(write_signer(tmp_path, usages=(x509.ObjectIdentifier(usage),))).algorithm == "es256"


@pytest.mark.parametrize("kind", sorted(KEYS))
def test_each_kind_of_key_signs_and_no_two_signatures_are_alike(tmp_path, kind):
    signer = open_signer(write_signer(tmp_path, kind))
    assert signer.algorithm == kind
    first, second = (Credentials(signer, {"model": "tiny"}).sign(a_png(), Origin("0.png")) for _ in range(2))
    assert read(first)[0] == read(second)[0] == "Valid"
    assert first != second  # as docs/sampling.md says; the library salts what it hashes


def test_images_are_signed_in_the_writers_threads(files, tmp_path):
    folder = SampleFolder(tmp_path / "out", Model(tmp_path), SampleSettings(), credentials=credentials_of(files))
    with Writer(folder) as writer:
        for seed in range(12):
            writer.save(Job("a", seed), Image.new("RGB", (16, 16), (seed, 0, 0)), flagged=False)
    assert {read(path.read_bytes())[0] for path in folder.folder.glob("*.png")} == {"Valid"}
    assert len(list(folder.folder.iterdir())) == 12


def test_a_model_is_the_same_wherever_it_is_stored(run, tmp_path):
    ours, theirs = describe_model(Model(run)), describe_model(Model(export_model(run, tmp_path / "folder")))
    assert ours["model_sha256"] == theirs["model_sha256"]
    assert (theirs["model"], "run" in theirs) == ("folder", False)


def test_the_key_is_in_no_text(files):
    signer = open_signer(files)
    assert "PRIVATE" in signer.key.decode()
    assert "PRIVATE" not in repr(signer)
    assert "PRIVATE" not in repr(Credentials(signer, {}))


def spoil(folder, how):
    files = write_signer(folder, **({"password": b"secret"} if how == "password" else {}))
    if how == "expired":
        files = write_signer(folder, days=(-30, -1))
    elif how == "not yet":
        files = write_signer(folder, days=(1, 30))
    elif how == "usage":
        files = write_signer(folder, usages=(ExtendedKeyUsageOID.SERVER_AUTH,))
    elif how == "no usage":
        files = write_signer(folder, usages=())
    elif how == "mode":
        files.key.chmod(0o640)
    elif how == "other key":
        key, mode = write_signer(folder.parent / "other").key, 0o600
        files.key.write_bytes(key.read_bytes())
        files.key.chmod(mode)
    elif how == "order":
        (leaf, root) = x509.load_pem_x509_certificates(files.certificate.read_bytes())
        files.certificate.write_bytes(pem_of(root) + pem_of(leaf))
    elif how == "self-signed":
        key = serialization.load_pem_private_key(files.key.read_bytes(), None)
        files.certificate.write_bytes(pem_of(certificate("me", key, "me", key)))
    elif how == "no key":
        files.key.unlink()
    elif how == "no certificate":
        files.certificate.write_text("nothing")
    elif how == "swapped":
        files = SignerFiles(files.certificate, files.certificate)
        files.key.chmod(0o600)
    return files


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("expired", r"valid from .* and now it is .*Get a new one"),
        ("not yet", r"CN=signer.* in .*chain\.pem is valid from"),
        ("usage", r"cannot sign|does not accept"),
        ("no usage", r"cannot sign|does not accept"),
        ("self-signed", r"cannot sign|does not accept"),
        ("mode", r"key\.pem can be read or written by others.*chmod 600"),
        ("other key", r"key\.pem is not the key of the first certificate"),
        ("order", r"the signer's certificate first"),
        ("password", r"key\.pem has a password"),
        ("no key", r"The key .*key\.pem cannot be read: No such file"),
        ("no certificate", r"chain\.pem holds no certificates"),
        ("swapped", r"holds no private key"),
    ],
)
def test_what_cannot_sign_is_refused_before_an_image_is_drawn(tmp_path, how, message):
    with pytest.raises(UserError, match=message) as raised:
        open_signer(spoil(tmp_path / "signer", how))
    assert "PRIVATE" not in str(raised.value)


def test_the_command_refuses_before_the_networks_are_loaded(run, tmp_path, monkeypatch):
    files = spoil(tmp_path / "signer", "expired")
    monkeypatch.setattr("sdtrain.sampling.batch.draw_batches", lambda *_: pytest.fail("an image was drawn"))
    with pytest.raises(UserError, match="valid from"):
        sample(run, tmp_path / "out", files, "a")
    with pytest.raises(UserError, match="--credentials-certificate FILE"):
        sample(run, tmp_path / "out", files, "a", "--content-credentials", keys=False)
    with pytest.raises(UserError, match="add that"):
        sample(run, tmp_path / "out", files, "a", "--credentials-prompt", keys=False)
    monkeypatch.setitem(__import__("sys").modules, "c2pa", None)
    with pytest.raises(UserError, match=r"sdtrain\[credentials\]"):
        sample(run, tmp_path / "out", files, "a")
    assert not (tmp_path / "out").exists()


def test_no_authority_is_asked_unless_named(files, tmp_path):
    signer = open_signer(files)
    assert signer.timestamps is None
    nowhere = SignerFiles(files.certificate, files.key, "http://127.0.0.1:1/")
    with pytest.raises(UserError, match="cannot sign"):
        open_signer(nowhere)


def test_an_image_that_cannot_be_signed_is_not_written(files, tmp_path):
    signer = open_signer(files)
    wrong = Signer("ed25519", signer.chain, signer.key)
    folder = SampleFolder(tmp_path, Model(tmp_path), SampleSettings(), credentials=Credentials(wrong, {"model": "a"}))
    with pytest.raises(UserError, match=r"00007\.png cannot be signed"):
        folder.save(Job("a", 7), Image.new("RGB", (8, 8)))
    assert list(tmp_path.iterdir()) == []

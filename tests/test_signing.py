"""Signatures: of whoever holds the key, over the manifest, in a form that openssl checks."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tiny_artifact import tiny_artifact

from m2dexport.cli import cli
from m2dexport.errors import BundleError, FormatError, UsageError
from m2dexport.runtime.archive import SIGNATURE
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.manifest import MANIFEST as NAME
from m2dexport.runtime.signing import Signature, fingerprint_of, require_signed, sign

MANIFEST = b'{"format": 2}\n'
PLAIN = forms.NoEncryption()
#: Of a private key and of a public one.
FORMS = {
    "pem": (
        (forms.Encoding.PEM, forms.PrivateFormat.PKCS8),
        (forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo),
    ),
    "ssh": (
        (forms.Encoding.PEM, forms.PrivateFormat.OpenSSH),
        (forms.Encoding.OpenSSH, forms.PublicFormat.OpenSSH),
    ),
}


def checked(manifest: bytes, signature: bytes | None, key: Path) -> Signature:
    entries = {NAME: manifest, **({SIGNATURE: signature} if signature is not None else {})}
    return require_signed(entries, key, "edge.m2d")


def keys(folder: Path, form: str = "pem", seed: bytes = b"1" * 32) -> tuple[Path, Path]:
    """Return the files of a private key and of its public one."""
    key = Ed25519PrivateKey.from_private_bytes(seed)
    private, public = FORMS[form]
    (folder / "key").write_bytes(key.private_bytes(*private, PLAIN))
    (folder / "key.pub").write_bytes(key.public_key().public_bytes(*public))
    return folder / "key", folder / "key.pub"


@pytest.mark.parametrize("form", FORMS)
def test_what_one_signs_the_public_key_checks(tmp_path: Path, form: str) -> None:
    private, public = keys(tmp_path, form)
    signed = sign(MANIFEST, private)
    assert signed == sign(MANIFEST, private)
    found = checked(MANIFEST, signed, public)
    assert found.fingerprint == fingerprint_of(bytes.fromhex(found.public_key))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_openssl_checks_a_signature(tmp_path: Path) -> None:
    private, public = keys(tmp_path)
    stored = json.loads(sign(MANIFEST, private))
    (tmp_path / "signature").write_bytes(bytes.fromhex(stored["signature"]))
    (tmp_path / "manifest.json").write_bytes(MANIFEST)
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", public.name]
    command += ["-sigfile", "signature", "-in", "manifest.json"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


def test_what_was_not_signed_by_the_key_is_refused(tmp_path: Path) -> None:
    private, public = keys(tmp_path)
    signed = sign(MANIFEST, private)
    with pytest.raises(BundleError, match="is not signed"):
        checked(MANIFEST, None, public)
    with pytest.raises(BundleError, match="was changed after it was signed"):
        checked(MANIFEST + b" ", signed, public)
    (tmp_path / "other").mkdir()
    _, other = keys(tmp_path / "other", seed=b"2" * 32)
    with pytest.raises(BundleError, match=r"is signed by the key [0-9a-f]{16}, and .* holds"):
        checked(MANIFEST, signed, other)
    # Another's key beside the maker's signature: whoever changes one changes the other.
    forged = {
        **json.loads(signed),
        "public_key": json.loads(sign(MANIFEST, other.with_suffix("")))["public_key"],
    }
    with pytest.raises(BundleError, match="was changed after it was signed"):
        checked(MANIFEST, json.dumps(forged).encode(), other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "the content is"),
        (b'{"format": 9}', "has format 9 and this version reads format 1"),
        (b'{"format": "1"}', "has format '1' and"),
        (b'{"format": null}', "has format None and"),
        (b'{"format": 1}', "algorithm is missing"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_a_signature_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    _, public = keys(tmp_path)
    kind = FormatError if b"9" in content else BundleError
    with pytest.raises(kind, match=message):
        checked(MANIFEST, content, public)


def test_files_that_hold_no_such_key_are_refused(tmp_path: Path) -> None:
    private, public = keys(tmp_path)
    (tmp_path / "text").write_text("no key")
    (tmp_path / "empty").touch()
    curve = ec.generate_private_key(ec.SECP256R1())
    pem = forms.Encoding.PEM
    (tmp_path / "ec").write_bytes(curve.private_bytes(pem, forms.PrivateFormat.PKCS8, PLAIN))
    (tmp_path / "ec.pub").write_bytes(
        curve.public_key().public_bytes(pem, forms.PublicFormat.SubjectPublicKeyInfo)
    )
    locked = forms.BestAvailableEncryption(b"secret")
    key = Ed25519PrivateKey.from_private_bytes(b"1" * 32)
    (tmp_path / "locked").write_bytes(key.private_bytes(pem, forms.PrivateFormat.PKCS8, locked))
    for name, message in {
        "text": "holds no ed25519 private key",
        "ec": "a key of another kind",
        "locked": "locked by a passphrase",
        "none": "is not a file",
        public.name: "holds no ed25519 private key",
    }.items():
        with pytest.raises(UsageError, match=message):
            sign(MANIFEST, tmp_path / name)
    signed = sign(MANIFEST, private)
    for name, message in {
        "text": "holds no ed25519 public key",
        "empty": "OpenSSH's form; name the file of one.$",
        "ec.pub": "a key of another kind",
        private.name: "is a private key; checking takes the public one",
    }.items():
        with pytest.raises(UsageError, match=message):
            checked(MANIFEST, signed, tmp_path / name)


def test_a_bundle_is_signed_and_verified_on_the_command_line(tmp_path: Path) -> None:
    private, public = keys(tmp_path)
    write_bundle(tiny_artifact(tmp_path / "artifact"), tmp_path / "edge.m2d")
    bundle, signed = tmp_path / "edge.m2d", tmp_path / "signed.m2d"

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    assert run("bundle", "sign", bundle, "--key", private, "--out", signed).exit_code == 0
    verified = run("verify", signed, "--key", public)
    assert verified.exit_code == 0
    assert "signed by the key" in verified.stdout
    assert run("verify", signed).exit_code == 0
    assert "signed by the key" in run("bundle", "show", signed).stdout
    unsigned = run("verify", bundle, "--key", public)
    assert (unsigned.exit_code, unsigned.stdout) == (BundleError.exit_code, "")
    assert "is not signed" in unsigned.stderr
    # What is signed again is signed by one key, and the same inputs make the same bytes.
    again = tmp_path / "again.m2d"
    assert run("bundle", "sign", signed, "--key", private, "--out", again).exit_code == 0
    assert again.read_bytes() == signed.read_bytes()
    assert "--key needs a bundle" in run("verify", tmp_path / "artifact", "--key", public).stderr

"""Signatures of bundles: ed25519 over the bytes of manifest.json.

The manifest holds the sha256 of every other file, so its signature covers the bundle. It is over
the plain bytes, without a prefix of its own: ``openssl pkeyutl -verify -rawin`` checks it, too. A
checksum detects damage; a signature says who made a bundle, to whoever has the maker's public key
from elsewhere. The key in a bundle is there for messages alone: it proves nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from m2dexport.errors import BundleError, MissingExtra, UsageError
from m2dexport.files import atomic_file, require_file
from m2dexport.runtime.archive import SIGNATURE, open_bundle, write_archive
from m2dexport.runtime.manifest import MANIFEST
from m2dexport.strict import Matching, parse_json, read_value, require_format

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

FORMAT = 1
_MOST_KEY = 1 << 14  # bytes of a key's file


@dataclass(frozen=True)
class Signature:
    """The content of signature.json."""

    format: int
    algorithm: Literal["ed25519"]
    public_key: Annotated[str, Matching("[0-9a-f]{64}", "a public key of 32 bytes in hex")]
    signature: Annotated[str, Matching("[0-9a-f]{128}", "a signature of 64 bytes in hex")]

    @property
    def fingerprint(self) -> str:
        """The first 16 hex digits of the public key's sha256, to tell keys apart in messages."""
        return fingerprint_of(bytes.fromhex(self.public_key))


def fingerprint_of(public_key: bytes) -> str:
    """Return the first 16 hex digits of the sha256 of a public key's 32 bytes."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def sign_bundle(path: Path, key: Path, out: Path, *, force: bool = False) -> Signature:
    """Write a bundle with the signature of a key, in the place of one that it may have.

    Args:
        path: the bundle, whose every byte is checked first.
        key: as for ``sign``.
        out: the file to write; ``path`` itself may be replaced.
        force: whether a file that is there is replaced.

    Raises:
        UsageError: when there is no such bundle or key, or ``out`` exists and may not be replaced.
        BundleError: when the bundle is damaged.
        MissingExtra: when cryptography is not installed.
    """
    require_file(out, force=force)
    entries = open_bundle(path)
    signature = sign(entries[MANIFEST], key)
    with atomic_file(out, force=force) as temporary:
        write_archive(temporary, {**entries, SIGNATURE: signature})
    return read_signature(signature, out)


def sign(manifest: bytes, key: Path) -> bytes:
    """Return the content of signature.json; the same manifest and key make the same bytes.

    Args:
        manifest: the content of manifest.json.
        key: a file with an ed25519 private key without a passphrase, in PEM (as ``openssl genpkey
            -algorithm ed25519`` writes it) or in OpenSSH's form (``ssh-keygen -t ed25519``).

    Raises:
        UsageError: when the file holds no such key.
        MissingExtra: when cryptography is not installed.
    """
    private = _private_key(key)
    public = private.public_key().public_bytes_raw()
    made = Signature(FORMAT, "ed25519", public.hex(), private.sign(manifest).hex())
    return (json.dumps(asdict(made), indent=2, sort_keys=True) + "\n").encode()


def read_signature(content: bytes, where: object) -> Signature:
    """Return the content of signature.json, which is not yet checked.

    Raises:
        BundleError: when it is not one.
        FormatError: when it is of a later format.
    """
    stored = parse_json(content, where, BundleError)
    require_format(stored, FORMAT, where, BundleError)
    return read_value(Signature, stored, where, BundleError)


def require_signed(entries: Mapping[str, bytes], key: Path, path: object) -> Signature:
    """Refuse a bundle that was not signed by the owner of a key.

    Args:
        entries: of the bundle, name to content.
        key: a file with the ed25519 public key, in PEM or in OpenSSH's form (``id_ed25519.pub``).
        path: the bundle, for messages.

    Raises:
        UsageError: when the file holds no such key.
        BundleError: when there is no signature, or another key or other content was signed.
        MissingExtra: when cryptography is not installed.
    """
    public = _public_key(key)
    if SIGNATURE not in entries:
        raise BundleError(f"{path} is not signed; get it from its maker again.")
    found = read_signature(entries[SIGNATURE], f"{path}: {SIGNATURE}")
    from cryptography.exceptions import InvalidSignature

    wanted = public.public_bytes_raw()
    if found.public_key != wanted.hex():
        raise BundleError(
            f"{path} is signed by the key {found.fingerprint}, and {key} holds "
            f"{fingerprint_of(wanted)}; get the bundle, or the key, from its maker again."
        )
    try:
        public.verify(bytes.fromhex(found.signature), entries[MANIFEST])
    except InvalidSignature as error:
        raise BundleError(
            f"{path} was changed after it was signed; get it from its maker again."
        ) from error
    return found


def _private_key(path: Path) -> Ed25519PrivateKey:
    content = _key_file(path)
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        load_pem_private_key,
        load_ssh_private_key,
    )

    ssh = b"OPENSSH PRIVATE KEY" in content
    try:
        key = (load_ssh_private_key if ssh else load_pem_private_key)(content, None)
    except TypeError as error:
        raise UsageError(
            f"{path} is locked by a passphrase; write the key without one for this step."
        ) from error
    except Exception as error:  # ValueError, UnsupportedAlgorithm, and what the parsers raise
        raise _no_key(path, "private") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} holds a key of another kind; bundles are signed by ed25519 keys.")
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    content = _key_file(path)
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import (
        load_pem_public_key,
        load_ssh_public_key,
    )

    if b"PRIVATE KEY" in content:
        raise UsageError(f"{path} is a private key; checking takes the public one.")
    ssh = content.startswith((b"ssh-", b"ecdsa-", b"sk-"))
    try:
        key = load_ssh_public_key(content) if ssh else load_pem_public_key(content)
    except Exception as error:  # as above
        raise _no_key(path, "public") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{path} holds a key of another kind; bundles are signed by ed25519 keys.")
    return key


def _key_file(path: Path) -> bytes:
    try:
        import cryptography  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra("A signature", "cryptography", "sign") from error
    if not path.is_file():
        raise UsageError(f"{path} is not a file; name the file of a key.")
    with path.open("rb") as stream:
        return stream.read(_MOST_KEY)


def _no_key(path: Path, kind: str) -> UsageError:
    return UsageError(
        f"{path} holds no ed25519 {kind} key in PEM or OpenSSH's form; name the file of one."
    )

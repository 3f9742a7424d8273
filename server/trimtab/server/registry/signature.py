"""Who vouches for a bundle: signatures of the OpenSSF model-signing format, made and checked offline with elliptic-curve keys.

    sign      trimtab registry sign calm.tt --key private.pem       writes calm.tt.sig, to be uploaded with the file
    check     at upload, and again by every replica before it loads the bytes: the database is not trusted for this

What is signed is the file alone, whatever its name: `python -m model_signing verify key` checks it as well.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.server.errors import InvalidBundle, Unsupported

__all__ = ["Signatures", "sign"]

MAX_SIGNATURE_BYTES = 64 << 10


@dataclass(frozen=True)
class Signatures:
    """What a server asks of signatures."""

    policy: Literal["optional", "strict"] = "optional"
    """`strict` refuses a bundle without a valid signature. A signature that is there must be valid under both."""
    trusted: Sequence[Path] = ()
    """Public keys, PEM; a valid signature is by one of them."""

    def require_keys(self) -> None:
        """Nothing, if the policy can be carried out.

        Raises:
            Unsupported: strict, and no key is trusted; or a key cannot be read.
        """
        if self.policy == "strict" and not self.trusted:
            raise Unsupported("strict signatures need a public key to trust; give one with --trusted-key FILE.pem")
        for path in self.trusted:
            if not path.is_file():
                raise Unsupported(f"the trusted key {path} is no file; give a PEM public key")
        if self.trusted:
            _library()

    def check(self, reference: str, data: bytes, signature: str | None) -> Path | None:
        """The trusted key that signed these bytes; None if they are unsigned and may be, or if no key is trusted.

        Raises:
            InvalidBundle: unsigned under `strict`, or signed by none of the trusted keys.
        """
        if signature is None:
            if self.policy == "strict":
                raise InvalidBundle(
                    f"{reference} is not signed, and this server loads signed bundles only; `trimtab registry sign` signs one",
                    field="signature",
                )
            return None
        if not self.trusted:
            return None
        for path in self.trusted:
            if _verifies(data, signature, path):
                return path
        keys = ", ".join(path.name for path in self.trusted)
        raise InvalidBundle(f"{reference} is not signed by a key that this server trusts ({keys})", field="signature")


def sign(data: bytes, key: Path, password: str | None = None) -> str:
    """The signature of a bundle's bytes by a private key.

    Raises:
        Unsupported: the library is not installed, or the key cannot be read.
    """
    library = _library()
    with tempfile.TemporaryDirectory() as folder:
        file, signature = _laid(Path(folder), data)
        try:
            library.signing.Config().use_elliptic_key_signer(private_key=key, password=password).sign(file, signature)
        except (OSError, TypeError, ValueError) as e:
            raise Unsupported(f"{key} does not sign ({e}); give an elliptic-curve private key, PEM") from e
        return signature.read_text()


def _verifies(data: bytes, signature: str, key: Path) -> bool:
    if len(signature) > MAX_SIGNATURE_BYTES:
        return False
    with tempfile.TemporaryDirectory() as folder:
        file, path = _laid(Path(folder), data)
        path.write_text(signature)
        try:
            _library().verifying.Config().use_elliptic_key_verifier(public_key=key).verify(file, path)
        except Unsupported:
            raise
        except Exception:  # noqa: BLE001 — whatever the library finds wrong with it, the caller is told that it is not valid.
            return False
        return True


def _laid(folder: Path, data: bytes) -> tuple[Path, Path]:
    """The bytes as the file that is signed, and where its signature goes."""
    file = folder / "bundle"
    file.write_bytes(data)
    return file, folder / "bundle.sig"


def _library() -> Any:
    try:
        import model_signing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as e:
        raise Unsupported(f"signatures need {e.name}: pip install 'trimtab[signing]'") from e
    return model_signing

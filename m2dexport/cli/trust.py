"""Commands about where a bundle comes from and what is in it: bundle sign, bundle sbom."""

from __future__ import annotations

from pathlib import Path

import click

from m2dexport.cli.bundles import bundle
from m2dexport.cli.options import PATH, force_option


@bundle.command()
@click.argument("path", type=PATH, metavar="FILE.m2d")
@click.option(
    "--key",
    type=PATH,
    required=True,
    metavar="FILE",
    help="An ed25519 private key.",
)
@click.option("--out", type=PATH, required=True, metavar="FILE.m2d", help="Bundle to write.")
@force_option
def sign(path: Path, key: Path, out: Path, force: bool) -> None:
    """Sign a bundle, so that verify --key can tell whose it is.

    \b
    Example:
      openssl genpkey -algorithm ed25519 -out maker.pem
      openssl pkey -in maker.pem -pubout -out maker.pub
      m2dexport bundle sign edge.m2d --key maker.pem --out signed.m2d
      m2dexport verify signed.m2d --key maker.pub
    """
    from m2dexport.runtime.signing import sign_bundle

    signature = sign_bundle(path, key, out, force=force)
    click.echo(f"{out}: signed by the key {signature.fingerprint}")


@bundle.command()
@click.argument("path", type=PATH, metavar="FILE.m2d")
@click.option("--out", type=PATH, metavar="FILE", help="JSON to write.  [default: stdout]")
@force_option
def sbom(path: Path, out: Path | None, force: bool) -> None:
    """Print a bundle's bill of materials: files, tools, needed packages, licences (CycloneDX 1.6).

    \b
    Example:
      m2dexport bundle sbom edge.m2d --out edge.cdx.json
    """
    from m2dexport.files import atomic_file, require_file
    from m2dexport.runtime.sbom import sbom_of

    if out is None:
        click.echo(sbom_of(path), nl=False)
        return
    require_file(out, force=force)
    text = sbom_of(path)
    with atomic_file(out, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")
    click.echo(f"Wrote {out}")

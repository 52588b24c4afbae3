"""The command that answers over the network: serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from m2dexport.cli.group import cli
from m2dexport.cli.options import PATH, Finite, cell_option, device_options
from m2dexport.errors import MissingExtra

#: What the extra ``serve`` installs, as imported.
_PACKAGES = ("prometheus_client", "starlette", "uvicorn")


@cli.command()
@click.argument("bundle_path", type=PATH, metavar="BUNDLE|ARTIFACT")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="0: any that is free.",
)
@click.option("--reload", "watch", is_flag=True, help="Load the bundle again when it is replaced.")
@click.option(
    "--allow-new-space",
    is_flag=True,
    help="Let a reload bring vectors that must not be compared with the old ones.",
)
@click.option("--max-body-mb", type=Finite(0, min_open=True), default=4, show_default=True)
@click.option("--max-texts", type=click.IntRange(1), default=2048, show_default=True)
@click.option("--max-tokens", type=click.IntRange(1), default=300_000, show_default=True)
@click.option(
    "--max-queue",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Requests at work at once; more get status 429.",
)
@click.option(
    "--stop-within",
    "stop_within_s",
    type=Finite(0),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="What a stop gives to the requests at work.",
)
@click.option("--access-log", is_flag=True, help="A line on stderr for every request.")
@cell_option
@device_options
@click.option("--json", "as_json", is_flag=True, help="Print the first line as JSON.")
def serve(bundle_path: Path, as_json: bool, **options: Any) -> None:
    """Answer OpenAI's embeddings API with a BUNDLE's vectors.

    POST /v1/embeddings, GET /v1/models, /healthz and /metrics. SIGTERM stops it once all that came
    is answered; SIGHUP loads the bundle again. It needs the extra "serve".

    \b
    Examples:
      m2dexport serve edge.m2d
      m2dexport serve edge.m2d --host 0.0.0.0 --port 9000 --threads 4 --reload
      m2dexport serve nested.m2d --cell 2x128-int8-int8
    """
    try:
        from m2dexport.serve.messages import Limits
        from m2dexport.serve.server import Listening, Settings
        from m2dexport.serve.server import serve as run
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        raise MissingExtra("The command serve", error.name, "serve") from error
    from m2dexport.engines import Device

    def ready(listening: Listening) -> None:
        served = listening.served
        facts = {"url": listening.url, "model": served.name, **served.facts()}
        line = "{model} at {url}, vectors={vectors}, space {space_id}".format_map(facts)
        click.echo(json.dumps(facts) if as_json else line)

    limits = Limits(
        body_bytes=int(options.pop("max_body_mb") * 1e6),
        texts=options.pop("max_texts"),
        tokens=options.pop("max_tokens"),
        requests=options.pop("max_queue"),
    )
    device = Device(options.pop("provider"), options.pop("threads"))
    settings = Settings(limits=limits, **options)
    run(bundle_path, device, settings, ready, lambda news: click.echo(news, err=True))

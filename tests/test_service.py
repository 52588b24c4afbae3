"""The routes and the reload of a server, called in this process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
from numpy.typing import NDArray
from tiny_artifact import tiny_artifact, tiny_spec

from m2dexport.engines import Device
from m2dexport.errors import M2DError, UsageError
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.encoder import Encoder
from m2dexport.runtime.packing import write_nested
from m2dexport.serve import app, reloading
from m2dexport.serve import served as served_module
from m2dexport.serve.app import Service, make_app
from m2dexport.serve.messages import Limits, Refusal, prepare, render
from m2dexport.serve.reloading import Reloading
from m2dexport.serve.served import Served, open_served
from m2dexport.vectors.codecs import normalize

ONE_THREAD = Device(threads=1)


def bundle(folder: Path, name: str = "edge", seed: int = 0, **options: Any) -> Path:
    path = folder / f"{name}.m2d"
    write_bundle(tiny_artifact(folder / name, tiny_spec(**options), seed=seed), path)
    return path


class Caller:
    """Calls an application's route for embeddings; it can go away before the answer."""

    def __init__(self, service: Service) -> None:
        self.app = make_app(service)
        self.gone = asyncio.Event()

    async def ask(self, text: str, *, whole: bool = True) -> tuple[int, dict[str, str], Any]:
        body = json.dumps({"model": "edge", "input": text}).encode()
        unread = [{"type": "http.request", "body": body, "more_body": not whole}]

        async def receive() -> dict[str, Any]:
            if unread:
                return unread.pop()
            await self.gone.wait()
            return {"type": "http.disconnect"}

        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": []}
        await self.app(scope | {"query_string": b"", "root_path": ""}, receive, send)
        content = b"".join(each.get("body", b"") for each in sent[1:])
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], headers, json.loads(content) if content else None


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return open_served(bundle(tmp_path), ONE_THREAD)


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What encoders wait for before they run."""
    free, encode = threading.Event(), Encoder.encode_ids

    def held(encoder: Encoder, ids: Sequence[Sequence[int]], **asked: int) -> NDArray[Any]:
        if not asked:  # by the server, and not by what verifies a bundle
            free.wait(10)
        return encode(encoder, ids, **asked)

    monkeypatch.setattr(Encoder, "encode_ids", held)
    return free


def test_a_full_queue_is_said_with_the_time_to_come_back(served, hold) -> None:
    async def scene() -> None:
        service = Service(served, Limits(requests=2))
        working = asyncio.ensure_future(service.batcher.work())
        caller = Caller(service)
        asked = [asyncio.ensure_future(caller.ask("a guitar")) for _ in range(2)]
        await asyncio.sleep(0.01)
        status, headers, body = await caller.ask("one too many")
        assert (status, headers["retry-after"]) == (429, "1")
        assert (body["error"]["type"], body["error"]["code"]) == ("rate_limit_error", "queue_full")
        hold.set()
        assert [answer[0] for answer in await asyncio.gather(*asked)] == [200, 200]
        assert (await caller.ask("again"))[0] == 200
        working.cancel()

    asyncio.run(scene())


def test_work_for_a_client_that_went_away_is_dropped(served, hold) -> None:
    async def scene() -> None:
        service = Service(served, Limits())
        working = asyncio.ensure_future(service.batcher.work())
        stays, goes = Caller(service), Caller(service)
        first = asyncio.ensure_future(stays.ask("a"))
        await asyncio.sleep(0.01)
        second = asyncio.ensure_future(goes.ask("b"))
        await asyncio.sleep(0.01)
        assert service.batcher.waiting == 1
        goes.gone.set()
        assert (await second)[0] == 499
        assert service.at_work == {first}
        hold.set()
        assert (await first)[0] == 200
        assert b"m2dexport_batch_texts_sum 1.0" in service.metrics.page()
        working.cancel()

    asyncio.run(scene())


def test_a_body_that_does_not_end_is_not_waited_for(served, monkeypatch) -> None:
    monkeypatch.setattr(app, "_BODY_WITHIN_S", 0.01)

    async def scene() -> None:
        service = Service(served, Limits())
        assert (await Caller(service).ask("a", whole=False))[0] == 408
        assert not service.at_work

    asyncio.run(scene())


def test_a_model_that_fails_is_an_error_of_the_server(served, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise M2DError("the graph failed.")

    async def scene() -> None:
        service = Service(served, Limits())
        working = asyncio.ensure_future(service.batcher.work())
        status, _, body = await Caller(service).ask("a")
        assert (status, body["error"]["type"]) == (500, "server_error")
        assert body["error"]["message"] == "the graph failed."
        working.cancel()

    monkeypatch.setattr(Encoder, "encode_ids", fails)
    asyncio.run(scene())


@pytest.mark.parametrize(
    ("replaced_by", "allowed", "said", "changes"),
    [
        ("same", False, "was loaded again, space m2d1-", True),
        ("other", False, "the old one stays: it is of space m2d1-", False),
        ("other", True, "was loaded again, space m2d1-", True),
        ("damaged", False, "the old one stays: ", False),
        ("nothing", False, "the old one stays: ", False),
    ],
)
def test_a_reload_takes_what_verifies_and_is_of_the_space(
    tmp_path: Path, replaced_by: str, allowed: bool, said: str, changes: bool
) -> None:
    path = bundle(tmp_path)
    other = bundle(tmp_path, "other", seed=1)
    copyfile(path, tmp_path / "same.m2d")
    (tmp_path / "damaged.m2d").write_bytes(other.read_bytes()[:-100])
    old = open_served(path, ONE_THREAD)
    service = Service(old, Limits())
    news: list[str] = []
    if replaced_by == "nothing":
        path.unlink()
    else:
        (tmp_path / f"{replaced_by}.m2d").replace(path)
    asyncio.run(
        Reloading(
            service, path, lambda: open_served(path, ONE_THREAD), allowed, news.append
        ).reload()
    )
    assert len(news) == 1
    assert said in news[0]
    assert (service.served is not old) == changes
    result = "loaded" if changes else "refused"
    assert f'm2dexport_reloads_total{{result="{result}"}} 1.0'.encode() in service.metrics.page()
    assert service.served.space_id.encode() in service.metrics.page()


def test_a_file_that_is_replaced_is_loaded_once(tmp_path: Path, monkeypatch) -> None:
    path = bundle(tmp_path)
    copyfile(path, tmp_path / "same.m2d")
    monkeypatch.setattr(reloading, "_LOOK_EVERY_S", 0.01)

    async def scene() -> None:
        service = Service(open_served(path, ONE_THREAD), Limits())
        news: list[str] = []
        watching = asyncio.ensure_future(
            Reloading(
                service, path, lambda: open_served(path, ONE_THREAD), False, news.append
            ).watch()
        )
        await asyncio.sleep(0.1)
        assert news == []
        (tmp_path / "same.m2d").replace(path)
        while not news:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert len(news) == 1
        watching.cancel()

    asyncio.run(scene())


def test_what_is_served_is_what_was_verified(tmp_path: Path, monkeypatch) -> None:
    path, other = bundle(tmp_path), bundle(tmp_path, "other", seed=1)
    verified = served_module.verify_opened

    def replaced_meanwhile(*arguments: Any, **options: Any) -> Any:
        report = verified(*arguments, **options)
        other.replace(path)
        return report

    expected = open_served(path, ONE_THREAD)
    monkeypatch.setattr(served_module, "verify_opened", replaced_meanwhile)
    served = open_served(path, ONE_THREAD)
    assert (served.space_id, served.identity) == (expected.space_id, expected.identity)
    assert served_module.identity_of(path) != served.identity  # so that a reload is due


def test_requests_in_the_queue_are_answered_by_the_bundle_that_they_came_to(
    tmp_path: Path, hold
) -> None:
    old, new = (
        open_served(bundle(tmp_path, name, seed), ONE_THREAD)
        for name, seed in (("edge", 0), ("new", 1))
    )

    async def scene() -> None:
        service = Service(old, Limits())
        working = asyncio.ensure_future(service.batcher.work())
        caller = Caller(service)
        asked = [asyncio.ensure_future(caller.ask("a")) for _ in range(3)]
        await asyncio.sleep(0.01)
        service.serve(new)
        hold.set()
        answers = await asyncio.gather(*asked)
        assert {body["space_id"] for _, _, body in answers} == {old.space_id}
        working.cancel()

    asyncio.run(scene())


def dimensions(served: Served, wanted: int) -> int:
    body = json.dumps({"model": served.name, "input": "a", "dimensions": wanted}).encode()
    prepared = prepare(body, served, Limits())
    answer = json.loads(render(prepared, served.encoder.encode_ids(prepared.ids)))
    return len(answer["data"][0]["embedding"])


@pytest.mark.parametrize(
    ("stated", "allowed", "refused", "named"),
    [
        (None, (1, 7, 12), (), ""),  # unknown, as of models that others trained
        ("4,8,12", (4, 8, 12), (1, 7), "12 or one of the trained ones below it: 4, 8."),
        ("none", (12,), (4,), "12 or one of the trained ones below it: none."),
    ],
)
def test_vectors_are_cut_to_trained_dims_where_these_are_known(
    tmp_path: Path, stated, allowed, refused, named
) -> None:
    spec = tiny_spec()
    spec.provenance.update({} if stated is None else {"trained_dims": stated})
    served = open_served(tiny_artifact(tmp_path / "edge", spec), ONE_THREAD)
    assert [dimensions(served, wanted) for wanted in allowed] == [*allowed]
    for wanted in refused:
        with pytest.raises(Refusal) as raised:
            dimensions(served, wanted)
        assert str(raised.value).endswith(named)
        assert (raised.value.status, raised.value.param) == (400, "dimensions")


@pytest.mark.parametrize("vectors", ["float32", "int4", "int8-symmetric", "ubinary", "binary"])
def test_every_vector_precision_is_given_as_floats_of_length_1(tmp_path: Path, vectors) -> None:
    served = open_served(tiny_artifact(tmp_path / "edge", tiny_spec(vectors=vectors)), ONE_THREAD)
    encoder = served.encoder
    prepared = prepare(b'{"model": "edge", "input": "a guitar"}', served, Limits())
    codes = encoder.encode_ids(prepared.ids)
    answer = json.loads(render(prepared, codes))
    expected = normalize(encoder.codec.decode(encoder.encode(["a guitar"])))
    assert answer["data"][0]["embedding"] == pytest.approx(expected[0].tolist(), abs=1e-6)
    assert (answer["vectors"], answer["dimensions"]) == (vectors, 12)


def test_a_model_without_a_prompt_for_the_type_of_input_takes_none(tmp_path: Path) -> None:
    spec = tiny_spec(prompts={"query": "find: "}, default_prompt="query")
    served = open_served(tiny_artifact(tmp_path / "edge", spec), ONE_THREAD)
    lengths = [
        prepare(json.dumps({"model": "edge", "input": "a", **fields}).encode(), served, Limits())
        for fields in ({}, {"input_type": "query"}, {"input_type": "document"})
    ]
    assert [each.tokens for each in lengths] == [5, 5, 3]


def test_a_cell_of_a_nested_bundle_is_served(tmp_path: Path) -> None:
    folders = [tiny_artifact(tmp_path / f"{dim}", tiny_spec(dim=dim)) for dim in (12, 8)]
    path = write_nested(folders, tmp_path / "edge.m2d").path
    assert open_served(path, ONE_THREAD).encoder.spec.dim == 12
    assert open_served(path, ONE_THREAD, "1x8-fp32-float32").encoder.spec.dim == 8
    with pytest.raises(UsageError, match="has no cell 'x'; it has"):
        open_served(path, ONE_THREAD, "x")

"""serve: a server as OpenAI's clients want it, over the loopback interface."""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from shutil import copyfile

import numpy as np
import openai
import pytest
from command_line import m2d
from live_server import Live, live
from numpy.typing import NDArray
from tiny_artifact import tiny_artifact, tiny_spec

import m2dexport
from m2dexport.runtime.bundle import write_bundle
from m2dexport.vectors.codecs import cosines, normalize

TEXTS = ["a guitar", "find", "", "今日は", "the man is playing a guitar in the rain"]
LIMITS = ("--max-body-mb", 0.1, "--max-texts", 300, "--max-tokens", 2000, "--threads", 1)


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle of int8 vectors; read only."""
    folder = tmp_path_factory.mktemp("served")
    return packed(folder / "edge.m2d", seed=0)


@pytest.fixture(scope="module")
def encoder(edge: Path) -> m2dexport.Encoder:
    return m2dexport.load(edge)


@pytest.fixture(scope="module")
def server(edge: Path) -> Live:
    with live(edge, *LIMITS) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


def packed(path: Path, *, seed: int) -> Path:
    folder = tiny_artifact(path.with_suffix(".artifact"), tiny_spec(vectors="int8"), seed=seed)
    write_bundle(folder, path)
    return path


def floats(encoder: m2dexport.Encoder, texts: list[str], **options: str) -> NDArray[np.float32]:
    """What a client must get: what the codes of ``encode`` stand for, of length 1."""
    return normalize(encoder.codec.decode(encoder.encode(texts, **options)))


def test_the_openai_client_gets_what_encode_gives(client, server, encoder) -> None:
    found = client.embeddings.create(model="edge", input=TEXTS)
    assert [each.index for each in found.data] == [*range(len(TEXTS))]
    vectors = np.array([each.embedding for each in found.data], dtype=np.float32)
    np.testing.assert_allclose(vectors, floats(encoder, TEXTS), atol=1e-6)
    tokens = encoder.tokenize(TEXTS)
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, tokens))
    assert (found.model, found.space_id, found.vectors) == ("edge", encoder.spec.space_id, "int8")
    assert found.truncated == 1


def test_numbers_and_base64_are_the_same_vector(client) -> None:
    as_float, as_base64 = (
        client.embeddings.create(model="edge", input="a guitar", encoding_format=encoding)
        for encoding in ("float", "base64")
    )
    raw = base64.b64decode(as_base64.data[0].embedding)
    stored = np.frombuffer(raw, "<f4")
    assert np.array_equal(stored, np.array(as_float.data[0].embedding, np.float32))


def test_token_ids_give_the_vector_of_their_text(server, encoder) -> None:
    expected = server.embed(TEXTS).body["data"]
    ids = encoder.tokenize(TEXTS)
    found = server.embed(ids).body
    for each, other in zip(found["data"], expected, strict=True):
        np.testing.assert_allclose(each["embedding"], other["embedding"], atol=1e-6)
    assert server.embed(ids[0]).body["data"][0] == {**found["data"][0], "index": 0}


def test_dimensions_cut_and_normalise(client, encoder) -> None:
    found = client.embeddings.create(model="edge", input=TEXTS, dimensions=5)
    vectors = np.array([each.embedding for each in found.data], dtype=np.float32)
    np.testing.assert_allclose(vectors, normalize(floats(encoder, TEXTS)[:, :5]), atol=1e-6)
    assert found.dimensions == 5
    with pytest.raises(openai.BadRequestError, match="dimensions is 13 and the vectors have 12"):
        client.embeddings.create(model="edge", input="a", dimensions=13)


@pytest.mark.parametrize("field", ["prompt", "input_type"])
def test_queries_get_their_prompt(client, encoder, field) -> None:
    found = client.embeddings.create(model="edge", input="guitar", extra_body={field: "query"})
    expected = floats(encoder, ["guitar"], prompt="query")[0]
    np.testing.assert_allclose(found.data[0].embedding, expected, atol=1e-6)


def test_codes_are_given_as_they_are_stored(server, encoder) -> None:
    codes = encoder.encode(TEXTS)
    found = server.embed(TEXTS, output_dtype="int8").body
    assert [each["embedding"] for each in found["data"]] == codes.tolist()
    raw = server.embed("a guitar", output_dtype="int8", encoding_format="base64").body
    assert base64.b64decode(raw["data"][0]["embedding"]) == codes[0].tobytes()


def test_every_answer_names_the_space(server, client, encoder) -> None:
    answer = server.embed("a")
    assert answer.headers["x-m2dexport-space"] == answer.body["space_id"] == server.space_id
    by_space = client.embeddings.create(model=server.space_id, input="a")
    assert by_space.model == "edge"
    (listed,) = client.models.list().data
    assert (listed.id, listed.space_id, listed.dimensions) == ("edge", encoder.spec.space_id, 12)
    assert client.models.retrieve("edge") == listed


def test_an_unknown_model_is_not_found(client) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.embeddings.create(model="text-embedding-3-small", input="a")
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


@pytest.mark.parametrize(
    ("body", "sentence", "param"),
    [
        (b"", "Expecting value", None),
        (b"no JSON", "Expecting value", None),
        (b"\xff", "not UTF-8", None),
        (b"[]", "the body is []", None),
        (b"[" * 50_000, "nested too deeply", None),
        (b'{"input": "a"}', "model is missing", "model"),
        (b'{"model": 1, "input": "a"}', "model is 1 where text is needed", "model"),
        (b'{"model": "edge"}', "input is None", "input"),
        (b'{"model": "edge", "input": []}', "input is []", "input"),
        (b'{"model": "edge", "input": {"a": 1}}', "input is {'a': 1}", "input"),
        (b'{"model": "edge", "input": ["a", 1]}', "item 1 of input is 1", "input"),
        (b'{"model": "edge", "input": [[1], "a"]}', "item 0 of input is [1]", "input"),
        (b'{"model": "edge", "input": [true]}', "item 0 of input is True", "input"),
        (b'{"model": "edge", "input": [1.5]}', "item 0 of input is 1.5", "input"),
        (b'{"model": "edge", "input": "\\ud83d"}', "half of a surrogate pair", "input"),
        (b'{"model": "edge", "input": [[]]}', "has 0 token ids", "input"),
        (b'{"model": "edge", "input": [-1]}', "has the token -1", "input"),
        (b'{"model": "edge", "input": [2, 9999]}', "has the token 9999", "input"),
        (b'{"model": "edge", "input": [' + b"1," * 20 + b"1]}", "has 21 token ids", "input"),
        (b'{"model": "edge", "input": "a", "input": "b"}', "'input' is there twice", None),
        (b'{"model": "edge", "input": "a", "dimensions": NaN}', "NaN is not JSON", None),
        (b'{"model": "edge", "input": "a", "dimensions": 0}', "dimensions is 0", "dimensions"),
        (b'{"model": "edge", "input": "a", "dimensions": "4"}', "dimensions is '4'", "dimensions"),
        (
            b'{"model": "edge", "input": "a", "encoding_format": "hex"}',
            "one of float, base64",
            "encoding_format",
        ),
        (b'{"model": "edge", "input": "a", "dimension": 4}', "'dimension' is unknown", None),
        (b'{"model": "edge", "input": "a", "prompt": "x"}', "no prompt named 'x'", "prompt"),
        (
            b'{"model": "edge", "input": "a", "prompt": "query", "input_type": "query"}',
            "both name",
            None,
        ),
        (b'{"model": "edge", "input": [1], "prompt": "query"}', "go with texts", "prompt"),
        (
            b'{"model": "edge", "input": "a", "output_dtype": "ubinary"}',
            "gives float and int8",
            "output_dtype",
        ),
        (
            b'{"model": "edge", "input": "a", "output_dtype": "int8", "dimensions": 4}',
            "int8 codes cannot be cut to 4 dimensions",
            "dimensions",
        ),
    ],
)
def test_a_bad_body_gets_one_sentence(server, body, sentence, param) -> None:
    answer = server.request("/v1/embeddings", body)
    assert answer.status == 400
    error = answer.body["error"]
    assert sentence in error["message"]
    assert re.fullmatch(r"[^\n]{1,400}\.", error["message"])
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_what_is_too_much_is_refused(server) -> None:
    assert server.embed(["a"] * 301).status == 400
    assert server.embed(["a"] * 300).status == 200
    tokens = server.embed(["abcdefghijklmn"] * 126)
    assert tokens.status == 400
    assert "the texts have 2,016 tokens, more than 2,000" in tokens.body["error"]["message"]
    large = server.embed("a" * 100_000)
    assert large.status == 413
    assert "larger than 100,000 bytes" in large.body["error"]["message"]


def test_a_body_without_a_length_is_cut_off_at_the_limit(server) -> None:
    place = server.url.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(place, timeout=30)
    connection.request("POST", "/v1/embeddings", iter([b"a" * 60_000] * 2), encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_other_paths_and_methods_are_refused_in_the_same_shape(server) -> None:
    assert server.request("/v1/chat/completions", b"{}").status == 404
    answer = server.request("/v1/embeddings")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert answer.body["error"]["message"].startswith("GET /v1/embeddings is not served here")


def test_many_clients_at_once_get_their_own_vectors(server, client, encoder) -> None:
    texts = [f"text {number} of {'a guitar ' * (number % 5)}" for number in range(120)]
    expected = floats(encoder, texts)

    def embed(number: int) -> list[float]:
        return client.embeddings.create(model="edge", input=texts[number]).data[0].embedding

    with ThreadPoolExecutor(24) as threads:
        found = np.array(list(threads.map(embed, range(len(texts)))), dtype=np.float32)
    # A rounding in another batch may move a value to the next code.
    assert cosines(found, expected).min() > 0.99999


def test_health_and_metrics_say_what_happened(server) -> None:
    assert server.request("/healthz").body == {"status": "ready"}

    def metrics() -> dict[str, float]:
        lines = server.request("/metrics").content.decode().splitlines()
        return {k: float(v) for k, _, v in (x.rpartition(" ") for x in lines if x[0] != "#")}

    before = metrics()
    server.embed(["a" * 40, "b"])
    server.embed([])
    after = metrics()
    changed = {name: after[name] - before.get(name, 0) for name in after}
    assert changed['m2dexport_requests_total{status="200"}'] == 1
    assert changed['m2dexport_requests_total{status="400"}'] == 1
    assert changed["m2dexport_texts_total"] == changed["m2dexport_batch_texts_sum"] == 2
    assert changed["m2dexport_tokens_total"] == 16 + 3
    assert changed["m2dexport_truncated_texts_total"] == 1
    assert changed["m2dexport_request_seconds_count"] == 2
    assert after["m2dexport_queue_texts"] == after["m2dexport_requests_at_work"] == 0
    assert after[f'm2dexport_bundle{{model="edge",space_id="{server.space_id}"}}'] == 1


def test_a_port_in_use_is_one_sentence(edge) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = m2d("serve", edge, "--port", port)
    assert said.exit_code == 2
    assert re.fullmatch(rf"Error: port {port} of 127.0.0.1 cannot be had: [^\n]+\.\n", said.stderr)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_of_another_machine_is_one_sentence(edge, host) -> None:
    said = m2d("serve", edge, "--port", 0, "--host", host)
    assert said.exit_code == 2
    assert re.fullmatch(r"Error: [^\n]+\.\n", said.stderr)


def test_what_is_no_bundle_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    (tmp_path / "edge.m2d").write_bytes(b"no bundle")
    for path in (tmp_path / "edge.m2d", tmp_path / "nothing.m2d"):
        said = m2d("serve", path, "--port", 0)
        assert said.exit_code in (1, 2, 4)
        assert said.stdout == ""
        assert re.fullmatch(r"Error: [^\n]+\.\n", said.stderr)


def test_a_missing_package_is_named_with_its_install_line(edge, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("m2dexport.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    said = m2d("serve", edge)
    assert said.exit_code == 1
    assert said.stderr == (
        "Error: The command serve needs the prometheus_client package; run: pip install "
        '"m2dexport[serve]".\n'
    )


def test_a_server_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "pydantic", "onnx", "huggingface_hub"}
    code = f"import sys, m2dexport.serve.server\nprint(*{heavy} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "\n"


def test_a_reload_and_a_stop_lose_nothing(edge: Path, tmp_path: Path) -> None:
    """Clients go on as a bundle is replaced by itself, by another one, and as the server stops."""
    bundle = Path(copyfile(edge, tmp_path / "edge.m2d"))
    other = packed(tmp_path / "other.m2d", seed=1)
    lost: list[object] = []
    spaces: set[str] = set()
    with live(bundle, "--threads", 1) as server, ThreadPoolExecutor(9) as threads:
        long = threads.submit(server.embed, ["the man is playing a guitar " * 4] * 1000)
        clients = [threads.submit(ask_until_it_closes, server, lost, spaces) for _ in range(8)]
        server.signal("SIGHUP")
        assert f"was loaded again, space {server.space_id}" in server.news()
        other.replace(bundle)
        server.signal("SIGHUP")
        refused = server.news()
        assert "was not loaded, and the old one stays: it is of space" in refused
        assert "--allow-new-space" in refused
        server.signal("SIGTERM")
        assert server.process.wait(20) == 0
        answered = [each.result() for each in clients]
        assert (long.result().status, len(long.result().body["data"])) == (200, 1000)
        assert server.process.stderr.read() == ""
    assert lost == []
    assert min(answered) > 0
    assert spaces == {server.space_id}


def ask_until_it_closes(server: Live, lost: list[object], spaces: set[str]) -> int:
    """Ask on one connection after the other until none can be had; return how often it answered."""
    place = server.url.removeprefix("http://").removesuffix("/v1")
    body = json.dumps({"model": server.model, "input": "a guitar"})
    total = 0
    while True:
        connection, answered = http.client.HTTPConnection(place, timeout=30), 0
        try:
            connection.connect()
        except ConnectionRefusedError:
            return total
        try:
            while connection.sock is not None:  # until an answer said that it closes
                connection.request("POST", "/v1/embeddings", body)
                answer = connection.getresponse()
                found = json.loads(answer.read())
                if answer.status != 200:
                    lost.append(found)
                spaces.add(found["space_id"])
                answered += 1
        except OSError as error:
            if answered:  # else the port closed before the server had the connection
                lost.append(error)
        finally:
            connection.close()
        total += answered


def test_a_stop_does_not_wait_longer_than_it_may(edge: Path) -> None:
    options = ("--stop-within", 0, "--threads", 1, "--access-log")
    with live(edge, *options) as server, closing(server.at_work()) as asking:
        server.signal("SIGTERM")
        assert server.process.wait(20) == 1
        assert asking.getresponse().status == 503
        *log, error = server.process.stderr.read().splitlines()
    assert any(line.endswith('"POST /v1/embeddings HTTP/1.1" 503') for line in log)
    assert all("HTTP/1.1" in line for line in log)
    assert re.fullmatch(r"Error: 1 request was not done 0 s [^\n]+--stop-within\.", error)

"""`launch serve`: a real server, real requests; the answers are those of `launch predict`."""

from __future__ import annotations

import base64
import contextlib
import errno
import http.client
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
import zlib
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

import launcher
from launcher import cli
from launcher.system import processes
from launcher.tools.serving.server import take_no_more
from tests import chromium, odd_images
from tests.served import ROOT, WAIT_S, serving

JSON = {"Content-Type": "application/json"}
LONG = ("--max-wait-ms", "600000", "--timeout-s", "600")
"""An image alone waits without end for a batch to fill: its request is under way for as long as a test wants."""


def png(colour="red", size=(40, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def form(files):
    """A multipart body, and its headers."""
    boundary = uuid.uuid4().hex
    body = b""
    for name, content in files.items():
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def as_json(contents):
    return json.dumps({"images": [base64.b64encode(content).decode() for content in contents]}).encode()


# --- answers


@pytest.fixture(scope="module")
def odd(tmp_path_factory, model):
    """Files that programs read differently, and what `launch predict` says of each."""
    paths = odd_images.write(tmp_path_factory.mktemp("odd"))
    found = launcher.load(model).predict(paths.values())
    top = [[{"class": name, "probability": probability} for name, probability in one.top] for one in found]
    return paths, dict(zip(paths, top, strict=True))


@pytest.mark.parametrize("way", ["raw", "form", "json"])
def test_odd_files_are_answered_as_predict_answers_them(way, odd, server):
    paths, expected = odd
    contents = {name: path.read_bytes() for name, path in paths.items()}
    if way == "raw":
        rows = [server.ask("/predict", content).json["predictions"][0] for content in contents.values()]
    elif way == "form":
        rows = server.ask("/predict", *form(contents)).json["predictions"]
        assert [row["image"] for row in rows] == list(contents)
    else:
        rows = server.ask("/predict", as_json(contents.values()), JSON).json["predictions"]
        assert [row["image"] for row in rows] == [str(number) for number in range(len(contents))]
    assert {name: row["top"] for name, row in zip(contents, rows, strict=True)} == expected
    assert {row["problem"] for row in rows} == {None}


def test_an_answer_is_worded_as_predicts_json(server, tmp_path, capsys, model):
    file = tmp_path / "a.png"
    file.write_bytes(png())
    assert cli.main(["predict", str(model), str(file), "--json", "--top", "2"]) == 0
    said = json.loads(capsys.readouterr().out) | {"image": "0"}
    assert server.ask("/predict?top=2", png()).json == {"predictions": [said]}


def test_one_image_as_base64_or_as_a_data_url(server):
    encoded = base64.encodebytes(png("blue")).decode()
    for image in (encoded, f"data:image/png;base64,{encoded}"):
        answer = server.ask("/predict?top=1", json.dumps({"image": image}).encode(), JSON)
        assert answer.json["predictions"][0]["top"][0]["class"] == "blue"


def test_a_broken_file_costs_no_other_one(server):
    answer = server.ask("/predict?top=1", *form({"red.png": png(), "broken.jpg": b"no image", "empty.png": b""}))
    assert answer.code == 200
    red, broken, empty = answer.json["predictions"]
    assert red["top"][0]["class"] == "red"
    assert (broken["top"], broken["problem"]) == ([], "cannot identify image file")
    assert empty["problem"] == "empty: 0 bytes"


# --- bodies that are refused


def noise_jpeg():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def bomb(width, height):
    """A PNG file whose header speaks of more pixels than it has."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) print\n%%EOF\n"
BOUNDARY = {"Content-Type": "multipart/form-data; boundary=x"}
FIELD = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nred.png\r\n--x--\r\n'
REFUSED = {
    "empty": (b"", {}, 400, "empty body"),
    "garbage": (b"no image", {}, 422, "cannot identify image file"),
    "truncated": (noise_jpeg()[:-500], {}, 422, "truncated"),
    "bomb": (bomb(1100, 1000), {}, 413, "1100 x 1000 has too many pixels; valid: up to 1 million"),
    "huge bomb": (bomb(60000, 60000), {}, 413, "the image has too many pixels; valid: up to 1 million"),
    "another program's format": (EPS, {}, 422, "EPS files cannot be decoded"),
    "large": (b"0" * 2_000_001, {}, 413, "larger than 2 MB"),
    "compressed": (png(), {"Content-Encoding": "gzip"}, 415, "Content-Encoding"),
    "no json": (b"{", JSON, 400, "not JSON"),
    "deep json": (b"[" * 100_000, JSON, 400, "not JSON"),
    "other json": (b'{"a": 1}', JSON, 400, "JSON without images"),
    "no images": (b'{"images": []}', JSON, 400, "JSON without images"),
    "numbers": (b'{"images": [1]}', JSON, 400, "JSON without images"),
    "no base64": (b'{"images": ["*"]}', JSON, 400, "image 0: not base64"),
    "empty image": (b'{"images": [""]}', JSON, 422, "empty: 0 bytes"),
    "no utf-8": (b'{"image": "\xff"}', JSON, 400, "not JSON"),
    "no boundary": (b"x", {"Content-Type": "multipart/form-data"}, 400, "boundary"),
    "another boundary": (b"--y\r\n\r\n--y--", BOUNDARY, 400, "multipart"),
    "a field": (FIELD, BOUNDARY, 400, "without a file"),
    "empty form": (b"--x--\r\n", BOUNDARY, 400, "multipart"),
    "many": (as_json([b"a"] * 300), JSON, 413, "300 images; a request may have 256"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_body_that_is_no_image_is_refused_in_words(name, server):
    body, headers, code, words = REFUSED[name]
    answer = server.ask("/predict", body, headers)
    assert answer.code == code
    assert words in answer.json["error"]
    assert server.ask("/predict", png()).code == 200


@pytest.mark.parametrize("top", ["0", "-1", "many", "1.5", "²", "9" * 5000])
def test_a_number_of_classes_that_is_none_is_refused(top, server):
    answer = server.ask(f"/predict?top={quote(top)}", png())
    assert (answer.code, answer.json["error"]) == (400, f"top={top}: valid: a whole number >= 1")


def test_a_body_without_a_length_is_cut_off_where_it_is_too_large(server):
    def chunks():
        for _ in range(40):
            yield b"0" * 100_000

    connection = http.client.HTTPConnection(*server.address, timeout=WAIT_S)
    connection.request("POST", "/predict", body=chunks(), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
    assert connection.getresponse().status == 413


def test_other_addresses_and_methods_are_answered_as_json(server):
    assert server.ask("/nowhere").code == 404
    assert "POST /predict" in server.ask("/predict").json["error"]
    assert server.ask("/predict").headers["Allow"] == "POST"


def test_random_bodies_never_make_the_server_fail(server):
    rng = np.random.default_rng(0)
    kinds = [JSON, BOUNDARY, {}]
    for number in range(60):
        body = bytearray(form({"a.jpg": noise_jpeg()})[0] if number % 2 else noise_jpeg())
        for place in rng.integers(0, len(body), 30):
            body[place] = rng.integers(256)
        boundary = bytes(body[2:34]).decode("latin-1")
        headers = (
            {"Content-Type": f'multipart/form-data; boundary="{boundary}"'} if number % 4 == 1 else kinds[number % 3]
        )
        try:
            answer = server.ask("/predict", bytes(body), headers)
        except (ValueError, http.client.HTTPException):  # a header that the client itself refuses
            continue
        assert answer.code == 200 or (400 <= answer.code < 500 and answer.json["error"])


# --- what is told


def test_it_is_alive_ready_and_counted_without_torch(server):
    before = server.count("launch_requests_total")
    assert server.ask("/health").json == {"status": "alive"}
    assert server.ask("/ready").json == {"status": "ready", "model": "model.onnx"}
    server.ask("/predict", b"")
    assert server.count("launch_requests_total") == before + 4  # one of them for the first count
    text = server.ask("/metrics").body.decode()
    assert 'launch_requests_total{code="400",path="/predict"}' in text
    for name in ("launch_request_seconds_bucket", "launch_batch_images_bucket", "launch_queue_images"):
        assert name in text
    assert "torch" not in Path(f"/proc/{server.process.pid}/maps").read_text()


# --- batches, limits


def test_requests_at_the_same_time_are_computed_together(model):
    with serving(model, "--max-batch", "4", *LONG) as server:
        futures = server.ask_many(8, png("green"))
        assert [future.result().json["predictions"][0]["top"][0]["class"] for future in futures] == ["green"] * 8
        assert (server.count("launch_batch_images_count"), server.count("launch_batch_images_sum")) == (2, 8)


def test_a_full_queue_refuses_and_what_was_accepted_is_answered(model):
    with serving(model, "--max-queue", "3", "--max-batch", "3", *LONG) as server:
        futures = server.ask_many(2, png())
        server.wait_for("launch_queue_images", 2)
        refused = server.ask("/predict", as_json([png()] * 2), JSON)
        assert (refused.code, refused.headers["Retry-After"]) == (503, "1")
        assert "waiting; try again" in refused.json["error"]
        assert server.ask("/predict", png()).code == 200  # the batch is full
        assert [future.result().code for future in futures] == [200, 200]
        server.wait_for("launch_queue_images", 0)


def test_a_request_that_takes_too_long_is_answered_and_leaves_the_queue(model):
    with serving(model, *LONG, "--timeout-s", "2", "--max-batch", "2") as server:
        answer = server.ask("/predict", png())
        assert (answer.code, answer.json["error"]) == (504, "not answered within 2 s; the server is busy")
        assert server.count("launch_queue_images") == 0
        with socket.create_connection(server.address, WAIT_S) as slow:
            slow.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")


# --- the end


def test_stopped_it_answers_what_it_has_accepted_and_says_it_is_not_ready(model):
    with serving(model, "--drain-s", "5", "--max-batch", "3", *LONG) as server:
        futures = server.ask_many(2, png())
        server.wait_for("launch_queue_images", 2)
        server.process.terminate()
        end = time.monotonic() + WAIT_S
        while server.ask("/ready").code != 503:
            assert time.monotonic() < end
        assert server.ask("/ready").json == {"status": "stopping"}
        assert server.ask("/ready").headers["Connection"] == "close"
        assert server.ask("/predict", png()).code == 200  # on its way as the signal came: the batch is full
        assert [future.result().code for future in futures] == [200, 200]
        assert server.process.wait(WAIT_S) == 0
        assert server.process.stderr.read() == ""


def test_a_stopping_server_takes_no_new_connection_while_it_answers_the_rest(model):
    with serving(model, "--drain-s", "0", "--max-batch", "3", *LONG) as server:
        futures, body = server.ask_many(2, png()), png()
        server.wait_for("launch_queue_images", 2)
        with socket.create_connection(server.address, WAIT_S) as last:
            last.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body))
            server.wait_for("launch_queue_images", 3)  # so its request was begun
            server.process.terminate()
            end = time.monotonic() + WAIT_S
            while connect_error(server.address) != errno.ECONNREFUSED:
                assert time.monotonic() < end
            last.sendall(body)  # the batch is full
            assert last.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert [future.result().code for future in futures] == [200, 200]
        assert server.process.wait(WAIT_S) == 0


def test_of_a_socket_that_takes_no_more_those_that_were_made_are_taken():
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as early, socket.socket() as late:
        address = listening.getsockname()
        early.connect(address)
        take_no_more(listening)
        late.settimeout(0.3)
        with pytest.raises(TimeoutError):
            late.connect(address)
        early.sendall(b"x")
        with listening.accept()[0] as taken:
            assert taken.recv(1) == b"x"
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.accept()


def test_a_connection_whose_request_takes_its_time_is_not_cut_off(model):
    with serving(model, "--drain-s", "0") as server, socket.create_connection(server.address, WAIT_S) as slow:
        server.ask("/health")  # so that the one before it was taken
        server.process.terminate()
        end = time.monotonic() + WAIT_S
        while connect_error(server.address) != errno.ECONNREFUSED:
            assert time.monotonic() < end
        time.sleep(0.6)
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert slow.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert server.process.wait(WAIT_S) == 0


def connect_error(address):
    with socket.socket() as one:
        return one.connect_ex(address)


@pytest.mark.parametrize("workers", [1, 2])
def test_stopped_under_load_no_accepted_request_is_lost(workers, model):
    with serving(model, "--workers", workers) as server:
        codes, lost, stopping = [], [], threading.Event()

        def client():
            while True:
                try:
                    codes.append(server.ask("/predict", png()).code)
                except OSError as error:
                    if not (stopping.is_set() and is_refused(error)):
                        lost.append(error)
                    return

        clients = [threading.Thread(target=client) for _ in range(8)]
        for thread in clients:
            thread.start()
        end = time.monotonic() + WAIT_S
        while len(codes) < 50:
            assert time.monotonic() < end
            time.sleep(0.01)
        stopping.set()
        assert server.stop() == 0
        for thread in clients:
            thread.join(WAIT_S)
        assert lost == []
        assert set(codes) == {200}


def is_refused(error):
    """No connection was made: nobody has accepted anything."""
    return isinstance(getattr(error, "reason", error), ConnectionRefusedError)


def test_a_second_signal_ends_it_at_once(model):
    with serving(model, "--drain-s", "600", *LONG) as server:
        server.ask_many(1, png())[0].add_done_callback(lambda future: future.exception())
        server.wait_for("launch_queue_images", 1)
        server.process.send_signal(signal.SIGTERM)
        while server.ask("/ready").code != 503:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(WAIT_S) == 128 + signal.SIGTERM
        assert "dropped" in server.process.stderr.read()


# --- several processes


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_several_processes_share_the_port_and_a_lost_one_is_replaced(number, model):
    with serving(model, "--workers", "2") as server:
        first = processes.children(server.process.pid)
        assert len(first) == 2
        assert {future.result().code for future in server.ask_many(8, png())} == {200}
        assert server.count("launch_batch_images_sum") == 8
        os.kill(first[0], number)
        end = time.monotonic() + WAIT_S
        while len(now := processes.children(server.process.pid)) < 2 or first[0] in now:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert server.ask("/predict", png()).code == 200
        assert server.stop() == 0
        assert [pid for pid in {*first, *now} if processes.start_time(pid)] == []
        code = -number if number == signal.SIGKILL else 0
        assert f"a process was lost (exit code {code})" in server.process.stderr.read()


# --- refusals before anything is started


def run(*arguments, code="import sys; from launcher import cli; sys.exit(cli.main(sys.argv[1:]))"):
    command = [sys.executable, "-c", code, "serve", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=WAIT_S)


def test_a_port_that_is_taken_is_refused_with_the_cure(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for workers in (1, 2):
            done = run(model, "--port", port, "--workers", workers)
            assert done.returncode == 2
            assert f"127.0.0.1:{port}: Address already in use" in done.stderr
            assert "choose another one with --port (0: any that is free)" in done.stderr


def test_everything_that_is_wrong_is_said_at_once(model):
    done = run(model, "--port", "70000", "--workers", "0", "--timeout-s", "nan")
    assert done.returncode == 2
    for words in ("--port 70000: ports end at 65535", "--workers 0: give more than 0", "--timeout-s nan"):
        assert words in done.stderr
    for arguments, words in [
        (("none.onnx",), "none.onnx: no such file"),
        (("nowhere",), "nowhere: not a run directory"),
        ((model, "--host", "192.0.2.1"), "--host takes an address of this machine"),
        ((ROOT / "README.md",), "cannot be opened as ONNX"),
    ]:
        done = run(*arguments)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_is_no_model_ends_it(workers, tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"no model")
    done = run(file, "--port", "0", "--workers", workers)
    assert done.returncode == 2
    assert "cannot be opened as ONNX" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_its_extra_it_says_what_to_install(model):
    code = "import sys; sys.modules['uvicorn'] = None; from launcher import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = run(model, code=code)
    assert done.returncode == 2
    assert done.stderr == 'error: launch serve needs its extra: pip install "finetune-launcher[serve]"\n'


# --- the page


def test_the_page_asks_nobody_else(server):
    answer = server.ask("/")
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert b"http" not in answer.body


@chromium.needed
def test_images_that_are_dropped_on_the_page_are_classified(server, tmp_path):
    files = [tmp_path / "green.png", tmp_path / "broken.png"]
    files[0].write_bytes(png("green"))
    files[1].write_bytes(b"no image")
    with contextlib.closing(chromium.Chromium(tmp_path / "profile")) as page:
        page.open(f"{server.url}/", 900)
        page.drop(200, 150, files[0])
        page.wait_for("document.getElementById('status').textContent === 'done: green'")
        assert page.run("document.querySelector('figcaption').textContent") == "green.png"
        shown = page.run("[...document.querySelectorAll('li')].map((row) => row.innerText)")
        assert len(shown) == 3
        assert shown[0].startswith("green")
        assert (
            page.wait_for("document.querySelector('img').complete && document.querySelector('img').naturalWidth") == 40
        )
        page.drop(200, 150, *files)
        page.wait_for("document.querySelectorAll('figure').length === 2")
        assert (
            page.run("document.querySelector('.problem').textContent") == "cannot be read: cannot identify image file"
        )
        page.drop(200, 150, files[1])
        page.wait_for("document.getElementById('status').textContent.startsWith('no image can be read')")
        colours = {}
        for scheme in ("light", "dark"):
            page.scheme(scheme)
            colours[scheme] = page.run("getComputedStyle(document.body).backgroundColor")
        assert colours["light"] != colours["dark"]
        names = [
            node["name"]["value"] for node in page.call("Accessibility.getFullAXTree")["nodes"] if node.get("name")
        ]
        assert any("choose them" in name for name in names)

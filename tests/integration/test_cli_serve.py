"""`fastav serve`: what it refuses before the model loads, and a server from start to SIGTERM."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from fastav.cli import main


def failure(capsys, *arguments: str) -> str:
    assert main(["serve", *arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_other_machines_need_a_key(capsys, monkeypatch):
    monkeypatch.delenv("FASTAV_API_KEY", raising=False)
    assert "it has no API key" in failure(capsys, "tiny", "--host", "0.0.0.0")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tinny"], "did you mean"),
        (["tiny", "--plan", "fastavv"], "did you mean"),
        (["tiny", "--port", "70000"], "65535"),
        (["tiny", "--media-root", "no/such/folder"], "is not a folder"),
        (["tiny", "--api-key", "a b"], "must be ASCII without spaces"),
        (["tiny", "--allow-domains", "http://a.com/"], "is not the name of a host"),
        (["tiny", "--queue", "0"], "--queue"),
        (["tiny", "--timeout", "0"], "--timeout"),
    ],
)
def test_wrong_options_are_told(capsys, arguments, says):
    assert says in failure(capsys, *arguments)


def test_a_port_that_is_taken_is_told(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "choose another --port" in failure(capsys, "tiny", "--port", str(taken.getsockname()[1]))


def test_a_missing_package_is_told():
    program = (
        "import sys; sys.modules['uvicorn'] = None; from fastav.cli import main; sys.exit(main(['serve', 'tiny']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "the server needs uvicorn, which is not installed" in " ".join(done.stderr.split())
    assert "[serve]'" in done.stderr


def test_a_server_starts_answers_and_ends():
    command = [sys.executable, "-m", "fastav", "serve", "tiny", "--port", "0", "--api-key", "secret"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as server:
        assert server.stderr is not None
        said = ""
        for line in server.stderr:
            said += line
            if found := re.search(r"http://127\.0\.0\.1:\d+", said):
                break
        url = found[0]  # pyright: ignore[reportPossiblyUnboundVariable, reportOptionalSubscript]
        assert "tiny with the plan fastav" in said
        body = {
            "model": "tiny",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "file", "file": {"file_id": "example-knock"}},
                        {"type": "text", "text": "which color moves?"},
                    ],
                }
            ],
        }
        headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        assert answer["choices"][0]["message"]["content"] == "yellow"
        server.send_signal(signal.SIGTERM)
        rest = server.stderr.read()
        assert server.wait(30) in (0, -signal.SIGTERM), rest
        assert "Traceback" not in rest

"""A server that acts vLLM's part, by the environment's PART: it answers, ends, sleeps, or will not stop.

Questions are numbered; those from 101 on are answered badly. It has a child, as vLLM has.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

METRICS = """vllm:num_requests_running{engine="0"} 0.0
vllm:num_requests_waiting{engine="0"} 0.0
vllm:kv_cache_usage_perc{engine="0"} 0.0
vllm:num_preemptions_total{engine="0"} 0.0
"""


class Actor(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(METRICS.encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        number = int(re.search(r"Question (\d+):", body)[1])
        self.send_response(500 if number == 101 else 200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if number == 101:
            return
        if number == 103:
            time.sleep(30)
        for tokens in ([number],) if number == 102 else ([number], [7, 8]):
            time.sleep(0.05)
            self.say({"choices": [{"index": 0, "delta": {"content": "x"}, "token_ids": tokens}]})
        self.say({"choices": [], "usage": {"prompt_tokens": 40, "completion_tokens": 3, "total_tokens": 43}})
        self.wfile.write(b"data: [DONE]\n\n")

    def say(self, more):
        chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "load", **more}
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, format, *args):
        """Say nothing."""


def main():
    part = os.environ["PART"]
    if part == "end":
        print("there is no model", flush=True)
        sys.exit(3)
    if part == "sleep":
        time.sleep(60)
    if part == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Actor).serve_forever()


if __name__ == "__main__":
    main()

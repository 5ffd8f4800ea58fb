"""A chat server for the judge to ask, over a real socket."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Replies as an OpenAI chat server does: `replies` maps a word of the model's answer to what is said to it."""

    def __init__(self, replies, failures=()):
        self.requests, self.replies, self.failures = [], replies, list(failures)
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers, body))
            status = self.server.failures.pop(0) if self.server.failures else 200
        text = body["messages"][-1]["content"]
        said = next((reply for word, reply in self.server.replies.items() if f"Model's answer: {word}" in text), "")
        message = {"role": "assistant", "content": said}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                  "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}  # fmt: skip
        sent = json.dumps(answer if status == 200 else {"error": {"message": "not now"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Retry-After-Ms", "1")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_):
        pass

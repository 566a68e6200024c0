"""A small HTTP server in a thread, for what sends messages: quick, slow, failing, or one that never answers."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Notes what it got in `received` as (path, headers, body), and answers with the next of `answers`, then 200."""

    daemon_threads = True

    def __init__(self, answers=(), delay=0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received, self.answers, self.delay = [], list(answers), delay
        self.url = f"http://127.0.0.1:{self.server_port}"

    @property
    def texts(self):
        return [body["text"] for _, _, body in self.received]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(self.server.delay)
        self.server.received.append((self.path, dict(self.headers), body))
        code = self.server.answers.pop(0) if self.server.answers else 200
        with contextlib.suppress(OSError):  # the client has given up
            self.send_response(code)
            if code == 302:
                self.send_header("Location", self.server.url + "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(answers=(), delay=0.0):
    server = Server(answers, delay)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

"""A chat server on the loopback device, which does what a test says."""

import contextlib
import http.server
import json
import threading
import time


class Stub:
    """A chat server on the loopback device.

    Args:
        turns: what it does with request 1, 2, ...: (status, headers, body), or "sleep" or "hang
            up"; afterwards it answers every message by `good`.
        good: the same of the body of a request; by default, it answers by the last word.
    """

    def __init__(self, *turns, good=None):
        self.requests, self.most_at_once, self._at_once = [], 0, 0
        turns, lock, stub = list(turns), threading.Lock(), self
        self.good = good or self.good

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    stub.requests.append((self.path, headers, body))
                    stub._at_once += 1
                    stub.most_at_once = max(stub.most_at_once, stub._at_once)
                    turn = turns.pop(0) if turns else stub.good(body)
                with contextlib.suppress(OSError):
                    self.take(turn)
                with lock:
                    stub._at_once -= 1

            def take(self, turn):
                if turn == "hang up":
                    self.connection.close()
                    return
                if turn == "sleep":
                    stub.closing.wait(5)
                    return
                status, headers, text = turn
                time.sleep(0.01)  # so that requests can meet
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.closing = threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @staticmethod
    def good(body):
        content = body["messages"][-1]["content"].split()[-1]
        reply = {"choices": [{"message": {"role": "assistant", "content": f"[{content}]"}}]}
        return 200, {}, json.dumps(reply)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

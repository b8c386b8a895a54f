"""A server in a thread, for tests, and a client that asks it."""

import base64
import contextlib
import http.client
import json
import threading
import time

from data_prep import serve

# In the page, as JavaScript: all answers are written; their number.
WRITTEN = (
    "!document.getElementById('go').disabled && !document.querySelector('.writing') && "
    "document.querySelectorAll('.answer').length"
)


class Client:
    """Asks a server on this machine."""

    def __init__(self, port):
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def __call__(self, path, body=None, method=None, **headers):
        """Status, headers and content of a response; JSON as it is parsed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            if not isinstance(body, bytes | None):
                body = json.dumps(body).encode()
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
            response = connection.getresponse()
            content = response.read()
            if "json" in response.headers.get("content-type", ""):
                content = json.loads(content)
            return response.status, response.headers, content
        finally:
            connection.close()

    def chat(self, *parts, **keys):
        """Status and content of an answer about a clip."""
        content = [part if isinstance(part, dict) else text(part) for part in parts]
        body = {"messages": [{"role": "user", "content": content}], **keys}
        status, _, found = self("/v1/chat/completions", body)
        return status, found


def record(name):
    return {"type": "record", "name": name}


def text(question):
    return {"type": "text", "text": question}


def video(content):
    url = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
    return {"type": "video_url", "video_url": {"url": url}}


def events(content):
    """The events of a stream, as they are parsed."""
    lines = [part.removeprefix("data: ") for part in content.decode().split("\n\n") if part]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@contextlib.contextmanager
def serving(service, hosts=()):
    """A server in a thread."""
    server = serve.make_server(service, hosts)
    listening = serve.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield Client(listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()

"""A visitor without a browser, who sends the app whatever they like."""

import json

import pytest

from .browser import PATIENCE, httpx
from .hostile_files import encoded, picture

JSON = {"content-type": "application/json"}


class Refused(Exception):
    """What the app answered instead of a result."""


class Stranger:
    """A visitor without a browser.

    heard: all that the app has answered to calls, but for the addresses of files, which are the visitor's own.
    """

    def __init__(self, app):
        self.http = httpx.Client(base_url=app.url, timeout=PATIENCE)
        self.http.get("config")
        self.heard = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.close()

    def upload(self, name: str, content: bytes) -> dict:
        """The file as it is given to a function."""
        answer = self.http.post("gradio_api/upload", files={"files": (name, content)})
        if answer.status_code != 200:
            raise Refused(f"{answer.status_code}: {answer.text}")
        return {"path": answer.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def call(self, function: str, *data):
        """The last answer of a function; raises Refused with its sentence."""
        begun = self.http.post(f"gradio_api/call/{function}", content=json.dumps({"data": list(data)}), headers=JSON)
        if begun.status_code != 200:
            self.heard += begun.text
            raise Refused(begun.text)
        address = f"gradio_api/call/{function}/{begun.json()['event_id']}"
        kind = value = None
        with self.http.stream("GET", address) as answer:
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    kind = line[7:]
                elif line.startswith("data: ") and kind in ("complete", "error"):
                    value = line[6:]
        if kind == "complete":
            state, *outputs = json.loads(value)
            assert state is None  # it stays on the server
            return outputs
        self.heard += str(value)
        raise Refused(str(value))

    def refusal(self, function: str, *data) -> str:
        """The sentence with which a call is refused."""
        with pytest.raises(Refused) as refused:
            self.call(function, *data)
        sentence = json.loads(str(refused.value))
        sentence = sentence.get("error") or sentence.get("detail") if isinstance(sentence, dict) else sentence
        assert isinstance(sentence, str) and 10 < len(sentence) < 500, sentence
        assert "<" not in sentence
        return sentence

    def inspect(self, file, part="Any part", preset="fast") -> dict:
        """The result for a file of a name and content."""
        return self.call("inspect", self.upload(*file), part, preset)[0]

    def batch(self, *files) -> list[dict]:
        """The rows of a batch."""
        answer = self.call("batch", [self.upload(*file) for file in files], "Any part", "fast")
        self.heard += json.dumps(answer[0])
        return answer[0]["rows"]

    def teach(self, name="nut") -> dict:
        """A part taught from two pictures."""
        given = [self.upload(f"{i}.png", encoded(picture(seed=i))) for i in range(2)]
        return self.call("teach", name, given, "", "", "quick", 0.05, 0)[0]


def joined(visitor, function: int, data: list, page: str = "guessed", event_data: dict | None = None):
    """A call as a page makes it, under the number of a page; what it ends with."""
    body = {"data": data, "fn_index": function, "session_hash": page, "event_data": event_data}
    event = visitor.http.post("gradio_api/queue/join", json=body).json()["event_id"]
    with visitor.http.stream("GET", f"gradio_api/queue/data?session_hash={page}") as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                message = json.loads(line[6:])
                if message["msg"] == "process_completed" and message["event_id"] == event:
                    return message
    raise AssertionError("no answer")

"""Chat streams of the `openai` package that read on by themselves when a server dies.

    from izar_streams import Streams

    streams = Streams(["https://c1:8443/v1", "https://c2:8443/v1"], api_key="sk-izar-…", http_client=…)
    for chunk in streams.chat(model="m", messages=[{"role": "user", "content": "Hello"}]):
        print(chunk.choices[0].delta.content or "", end="")

Takes what `openai.OpenAI` and `chat.completions.create` take and gives the package's own chunks, each exactly once. When
a connection breaks off, the request is repeated at the next controller with the id of the last event, until `patience_s`
is over; then the last exception is raised. What a server refuses for good (a status below 500) is raised at once.
Needs Python 3.9 and `openai` 2.
"""

import json
import time

import httpx
import openai
from openai.types.chat import ChatCompletionChunk


class BrokenOff(Exception):
    """The stream ended before its end."""


# What may be better at another controller or a little later.
PASSING = (BrokenOff, openai.APIConnectionError, openai.InternalServerError, httpx.TransportError)


class Streams:
    def __init__(self, base_urls, patience_s=60.0, pause_s=0.2, **options):
        options = {"max_retries": 0, **options}
        self.clients = [openai.OpenAI(base_url=url, **options) for url in base_urls]
        self.patience_s, self.pause_s = patience_s, pause_s

    def chat(self, **request):
        """Yields the chunks of an answer."""
        place, begun, tries = Place(), time.monotonic(), 0
        while True:
            try:
                yield from place.read(self.clients[tries % len(self.clients)], request)
                return
            except PASSING:
                tries += 1
                if time.monotonic() - begun > self.patience_s:
                    raise
                time.sleep(self.pause_s)


class Place:
    """Where a reader is in its stream."""

    def __init__(self):
        self.last_id = None

    def read(self, client, request):
        """Yields the chunks from here on; raises BrokenOff if the stream ends before its end."""
        headers = dict(request.get("extra_headers") or {})
        if self.last_id is not None:
            headers["Last-Event-ID"] = self.last_id
        request = {**request, "stream": True, "extra_headers": headers}
        # Before the first event with an id the whole answer may come again: these wait for it.
        waiting = []
        with client.chat.completions.with_streaming_response.create(**request) as response:
            for event_id, data in events(response.iter_lines()):
                if data == "[DONE]":
                    yield from waiting
                    return
                event = json.loads(data)
                if "error" in event:
                    raise BrokenOff(event["error"].get("message"))
                waiting.append(ChatCompletionChunk.model_validate(event))
                self.last_id = event_id or self.last_id
                if self.last_id is not None:
                    yield from waiting
                    waiting = []
        raise BrokenOff("the connection ended in the middle of the answer")


def events(lines):
    """The events of a stream of lines: (id or None, data)."""
    event_id, data = None, []
    for line in lines:
        if line.startswith("id:"):
            event_id = line[3:].strip()
        elif line.startswith("data:"):
            data.append(line[5:].strip())
        elif not line and data:
            yield event_id, "\n".join(data)
            event_id, data = None, []

"""Mixed traffic against a running `izar dev` for a long time, and what must not have happened afterwards.

    target/release/izar dev --ready-file ready.json &
    python3 tests/compare/soak.py ready.json --minutes 30

Clients ask short and long prompts, some that begin alike, streamed and not, at temperature 0 and 1, and some leave in
the middle. Four things must hold at the end, else the exit status is 1: no request failed (one that is told to come
again later has not failed); what was asked twice at temperature 0 was answered alike; the workers hold no more memory
than early on and no block of the cache that nobody uses; and at rest they need less than 1 % of a core.
Needs Python 3.9, nothing else, and Linux for /proc.
"""

import argparse
import collections
import http.client
import json
import os
import pathlib
import random
import ssl
import sys
import threading
import time
import urllib.parse

# Growth after the mark that is put down to the allocator; a leak of 30 minutes' traffic is far larger.
GROWTH_SHARE, GROWTH_BYTES = 0.03, 16 << 20

# Share of a core that a worker may need at rest, how long it is watched, and how long it may take to come to rest.
REST_SHARE, REST_WATCH_S, REST_WAIT_S = 0.01, 20, 10

# A request that takes longer has failed.
TIMEOUT_S = 180

# Refusals that tell the client to come again.
LATER = (429, 503)

WORDS = (
    "river stone paper window engine garden letter winter signal harbour copper ladder morning bridge ticket forest "
    "candle market summer doctor planet silver basket thunder village mirror number island shadow blanket"
).split()

QUESTIONS = [
    "What is a river?",
    "Name three colours.",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "What is 12 times 12?",
    "Who wrote Hamlet?",
    "Explain what a compiler does.",
    "Give me a short poem about winter.",
]


def words(generator, count):
    return " ".join(generator.choice(WORDS) for _ in range(count))


class Tally:
    """What came of the requests. Shared by all clients."""

    def __init__(self):
        self.lock = threading.Lock()
        self.outcomes = collections.Counter()
        self.kinds = collections.Counter()
        self.examples = {}
        self.tokens = 0
        self.answers = {}
        self.differing = []

    def add(self, outcome):
        with self.lock:
            self.outcomes[outcome] += 1

    def example(self, outcome, text):
        """Keeps the words of the first failure of a kind."""
        with self.lock:
            self.examples.setdefault(outcome, text[:300])

    def answer(self, asked, text, tokens):
        """Notes an answer; what was asked at temperature 0 (`asked`) must always be answered alike."""
        with self.lock:
            self.tokens += tokens
            if asked is not None:
                first = self.answers.setdefault(asked, text)
                if first != text:
                    self.differing.append({"asked": asked[-200:], "first": first[-200:], "now": text[-200:]})


class Client(threading.Thread):
    def __init__(self, number, ready, context, until, tally, options):
        super().__init__(daemon=True)
        self.generator = random.Random(options.seed * 1000 + number)
        self.ready, self.context, self.until, self.tally = ready, context, until, tally
        self.url = urllib.parse.urlsplit(ready["endpoint"])
        # The beginning that some requests share: it is the same for all clients.
        self.shared = words(random.Random(options.seed), 400)

    def run(self):
        while time.monotonic() < self.until:
            outcome = self.one()
            if outcome == "later":
                time.sleep(self.generator.uniform(0.2, 1.0))
            elif self.generator.random() < 0.2:
                time.sleep(self.generator.uniform(0, 0.5))

    def body(self):
        g = self.generator
        kind = g.choices(["short", "long", "shared", "known"], [4, 1, 3, 3])[0]
        if kind == "short":
            text = f"{g.choice(QUESTIONS)} {words(g, g.randint(1, 12))}"
        elif kind == "long":
            text = f"Summarize this: {words(g, g.randint(600, 1500))}"
        elif kind == "shared":
            text = f"{self.shared}\n{g.choice(QUESTIONS)} {words(g, 3)}"
        else:
            text = g.choice(QUESTIONS)
        known = kind == "known"
        body = {
            "model": self.ready["model"],
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 48 if known else g.choice([1, 8, 32, 128]),
            "temperature": 0 if known else g.choice([0, 1]),
            "stream": g.random() < 0.6,
        }
        if body["temperature"]:
            body["seed"] = g.randrange(1 << 30)
        return kind, body

    def one(self):
        g = self.generator
        kind, body = self.body()
        leaves = g.random() < 0.15
        with self.tally.lock:
            self.tally.kinds[f"{kind}{', streamed' if body['stream'] else ''}{', leaves' if leaves else ''}"] += 1
        if self.url.scheme == "https":
            connection = http.client.HTTPSConnection(self.url.netloc, timeout=TIMEOUT_S, context=self.context)
        else:
            connection = http.client.HTTPConnection(self.url.netloc, timeout=TIMEOUT_S)
        try:
            outcome = self.ask(connection, body, leaves)
        except (OSError, http.client.HTTPException, ValueError) as error:
            outcome = f"failed: {type(error).__name__}"
            self.tally.example(outcome, str(error))
        finally:
            connection.close()
        self.tally.add(outcome)
        return outcome

    def ask(self, connection, body, leaves):
        headers = {"Authorization": f"Bearer {self.ready['key']}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        if leaves and not body["stream"]:
            # Until the answer has been begun, as a rule.
            time.sleep(self.generator.uniform(0, 1.5))
            return "left"
        response = connection.getresponse()
        if response.status != 200:
            text = response.read().decode(errors="replace")
            if response.status in LATER:
                return "later"
            self.tally.example(f"failed: status {response.status}", text)
            return f"failed: status {response.status}"
        asked = json.dumps([body["messages"], body["max_tokens"]]) if body["temperature"] == 0 else None
        if not body["stream"]:
            answer = json.loads(response.read())
            choice = answer["choices"][0]
            if not choice.get("finish_reason"):
                return "failed: no finish"
            self.tally.answer(asked, choice["message"]["content"], answer["usage"]["completion_tokens"])
            return "answered"
        return self.stream(response, asked, self.generator.randint(0, 20) if leaves else None)

    def stream(self, response, asked, leave_after):
        text, finished, events = "", False, 0
        for line in response:
            if not line.startswith(b"data: "):
                continue
            data = line[6:].strip()
            if data == b"[DONE]":
                if not finished:
                    return "failed: no finish"
                self.tally.answer(asked, text, events)
                return "answered"
            event = json.loads(data)
            if "error" in event:
                self.tally.example("failed: error in a stream", json.dumps(event))
                return "failed: error in a stream"
            for choice in event.get("choices", []):
                text += choice.get("delta", {}).get("content") or ""
                finished = finished or bool(choice.get("finish_reason"))
            events += 1
            if leave_after is not None and events > leave_after:
                return "left"
        return "failed: a stream broke off"


def processes(path):
    """The cluster's processes now: name, role, pid."""
    return [(p["id"], p["role"], p["pid"]) for p in json.loads(path.read_text())["processes"]]


def resident(pid):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(path):
    """Resident bytes of every process; one that is being started again is left out."""
    out = {}
    for name, role, pid in processes(path):
        try:
            out[name] = {"role": role, "pid": pid, "bytes": resident(pid)}
        except OSError:
            pass
    return out


def rest(path):
    """Share of a core that every process needs now."""
    begun = {name: (pid, cpu_seconds(pid)) for name, _, pid in processes(path)}
    time.sleep(REST_WATCH_S)
    return {name: (cpu_seconds(pid) - before) / REST_WATCH_S for name, (pid, before) in begun.items()}


def metrics(ready, context):
    """The controller's figures about load and blocks of caches, by name."""
    url = urllib.parse.urlsplit(ready["endpoint"])
    if url.scheme == "https":
        connection = http.client.HTTPSConnection(url.netloc, timeout=30, context=context)
    else:
        connection = http.client.HTTPConnection(url.netloc, timeout=30)
    try:
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {ready['key']}"})
        response = connection.getresponse()
        text = response.read().decode()
        if response.status != 200:
            return {}
    finally:
        connection.close()
    figures = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if not line.startswith("#") and any(word in name for word in ("block", "running", "waiting")):
            figures[name] = float(value)
    return figures


def leaked(figures):
    """Blocks in use although nothing runs: (sum, known). A worker reports the blocks that sequences hold; those that
    the cache keeps for later prefixes are free, for they can be taken at any time."""
    used = {name: value for name, value in figures.items() if "blocks" in name and "used" in name}
    return sum(used.values()), bool(used)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ready_file", type=pathlib.Path, help="what `izar dev --ready-file` wrote")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main():
    options = arguments()
    ready = json.loads(options.ready_file.read_text())
    context = ssl.create_default_context(cafile=ready["ca"])
    seconds = options.minutes * 60
    # What grows until now is caches that fill; what grows later is a leak.
    mark_s = min(300, seconds / 3)
    before, tally = memory(options.ready_file), Tally()
    begun = time.monotonic()
    clients = [Client(n, ready, context, begun + seconds, tally, options) for n in range(options.clients)]
    for client in clients:
        client.start()
    marked, told = None, begun
    while any(client.is_alive() for client in clients):
        time.sleep(0.5)
        now = time.monotonic()
        if marked is None and now - begun >= mark_s:
            marked = memory(options.ready_file)
        if now - told >= 60:
            told = now
            print(f"{(now - begun) / 60:.0f} min: {dict(tally.outcomes)}", file=sys.stderr)
    minutes = (time.monotonic() - begun) / 60
    time.sleep(REST_WAIT_S)
    after = memory(options.ready_file)
    at_rest = rest(options.ready_file)
    figures = metrics(ready, context)
    blocks, blocks_known = leaked(figures)
    problems = []
    failed = {k: n for k, n in tally.outcomes.items() if k.startswith("failed")}
    if failed:
        problems.append(f"requests failed: {failed}")
    if tally.differing:
        problems.append(f"{len(tally.differing)} answers differ from earlier ones at temperature 0")
    for name, then in (marked or {}).items():
        now = after.get(name)
        if now is None or now["pid"] != then["pid"]:
            problems.append(f"{name} was started again")
        elif then["role"] == "worker" and now["bytes"] > then["bytes"] * (1 + GROWTH_SHARE) + GROWTH_BYTES:
            problems.append(f"{name} grew from {then['bytes'] / 1e6:.0f} to {now['bytes'] / 1e6:.0f} MB")
    for name, share in at_rest.items():
        if after.get(name, {}).get("role") == "worker" and share >= REST_SHARE:
            problems.append(f"{name} needs {share * 100:.1f} % of a core at rest")
    if blocks:
        problems.append(f"{blocks:.0f} blocks are in use at rest")
    result = {
        "minutes": minutes,
        "clients": options.clients,
        "requests": sum(tally.kinds.values()),
        "outcomes": dict(tally.outcomes),
        "kinds": dict(tally.kinds),
        "examples": tally.examples,
        "tokens": tally.tokens,
        "asked_twice": len(tally.answers),
        "differing": tally.differing[:5],
        "memory_bytes": {"before": before, "mark_s": mark_s, "at_mark": marked, "after": after},
        "cpu_at_rest": at_rest,
        "metrics": figures,
        "leaked_blocks": blocks if blocks_known else None,
        "problems": problems,
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{result['requests']} requests in {minutes:.1f} min: {result['outcomes']}")
        for name, now in after.items():
            sizes = [b[name]["bytes"] / 1e6 if name in b else float("nan") for b in (before, marked or {}, after)]
            memory_text = f"{sizes[0]:.1f} MB before, {sizes[1]:.1f} after {mark_s:.0f} s, {sizes[2]:.1f} at the end"
            print(f"{name:<20} {memory_text}; {at_rest.get(name, 0) * 100:.2f} % of a core at rest")
        print(f"blocks in use at rest: {blocks:.0f}" if blocks_known else "the workers report no blocks")
        print("\n".join(problems) or "no failure, no growth, nothing left over")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()

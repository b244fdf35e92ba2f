"""What a request costs in a gateway: Izar beside `smg` and LiteLLM, all of them in one sitting.

    cargo build --release && python3 -m venv V && V/bin/pip install smg 'litellm[proxy]' && V/bin/python tests/compare/gateways.py [SECONDS]

The peers stand before a program that answers at once with 16 words; Izar's model `echo` answers at once in a worker of
its own. The peers record nothing and replicate nothing, smg checks no key and LiteLLM a fixed one; Izar does all of it (one controller; three with a
quorum's fsync, asked through the leader or not as it comes). `izar bench api` asks, over plain HTTP, at one connection
and at 64. Shown: latency beyond that of asking the program itself (Izar: beyond the 5 ms that its worker takes), and
requests for each second of processor time that the gateway's own processes took. Nothing is asserted.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

PROGRAMS = Path(__file__).resolve().parents[2] / "target" / "release"
PEERS = Path(sys.executable).parent
MODEL = "echo"
WORDS = 16
# What the worker of `izar dev --model echo` takes for an answer.
ECHO_MS = 5
# LiteLLM does not start without one.
FIXED_KEY = "sk-0123456789abcdef0123456789abcdef"


def answer():
    """A whole answer, as bytes of HTTP."""
    text = " ".join(f"word{i}" for i in range(WORDS))
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
    usage = {"prompt_tokens": 32, "completion_tokens": WORDS, "total_tokens": 32 + WORDS}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice], "usage": usage}
    return response(body)


def response(body):
    body = json.dumps(body).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


CHAT = answer()
MODELS = response({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "x"}]})
FACTS = response({"status": "ok", "model_path": MODEL, "served_model_name": MODEL, "is_generation": True})


class Upstream(asyncio.Protocol):
    """Answers every request on a connection, in order."""

    def connection_made(self, transport):
        self.transport, self.rest = transport, b""

    def data_received(self, data):
        self.rest += data
        while (end := self.rest.find(b"\r\n\r\n")) >= 0:
            head = self.rest[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.rest) < end + 4 + length:
                return
            self.rest = self.rest[end + 4 + length :]
            path = head.split(b" ", 2)[1]
            self.transport.write(CHAT if b"completions" in path else MODELS if b"/models" in path else FACTS)


async def serve(port):
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port)
    await server.serve_forever()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def family(pid):
    """A process and all that it started."""
    found, parents = [pid], {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(stat.read_text().rsplit(")", 1)[1].split()[1]), []).append(int(stat.parent.name))
        except OSError:
            continue
    for one in found:
        found.extend(parents.get(one, []))
    return found


class Program:
    """A process that is stopped at the end, with all that it started."""

    def __init__(self, name, line, folder):
        self.name = name
        self.log = folder / f"{name}.log"
        self.process = subprocess.Popen(
            [str(word) for word in line], stdout=open(self.log, "wb"), stderr=subprocess.STDOUT, cwd=folder,
            env={**os.environ, "LITELLM_MASTER_KEY": FIXED_KEY},
        )

    def wait(self, ready, seconds=120):
        end = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                sys.exit(f"{self.name} does not answer:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.2)

    def stop(self):
        pids = family(self.process.pid)
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self.process.wait()


def answers(endpoint):
    """Says whether a whole answer comes."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": WORDS}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {FIXED_KEY}"}
    request = urllib.request.Request(f"{endpoint}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        return urllib.request.urlopen(request, timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def bench(endpoint, connections, seconds, key, pids):
    """One closed loop of `izar bench api`."""
    line = [PROGRAMS / "izar", "bench", "api", "--json", "--endpoint", endpoint, "--model", MODEL, "--key", key]
    line += ["--concurrency", connections, "--duration", seconds, "--warmup", 2]
    line += [word for pid in pids for word in ("--pids", pid)]
    done = subprocess.run([str(word) for word in line], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"izar bench api: {done.stderr}")
    report = json.loads(done.stdout)
    if report["errors"]:
        print(f"  errors: {report['errors']}", file=sys.stderr)
    cpu = sum(used["cpu_s"] or 0 for used in report["cpu"])
    return {
        "p50": report["latency_ms"]["p50"],
        "p99": report["latency_ms"]["p99"],
        "rate": report["requests_per_s"],
        "per_core": report["requests"] / cpu if cpu else None,
    }


def measure(name, endpoint, seconds, key, pids, base):
    """Measures at one connection and at 64, and prints a line of the table."""
    one, many = (bench(endpoint, connections, seconds, key, pids) for connections in (1, 64))
    less = base["p50"] if base else 0
    core = f"{many['per_core']:,.0f}" if many["per_core"] else ""
    cells = [name, f"{one['p50'] - less:.2f}", f"{one['p99']:.2f}", f"{one['rate']:,.0f}", f"{many['rate']:,.0f}", core]
    print("| " + " | ".join(cells) + " |", flush=True)
    return one


def izar(folder, controllers, seconds):
    """Measures Izar itself."""
    ready = folder / f"ready{controllers}.json"
    line = [PROGRAMS / "izar", "dev", "--model", MODEL, "--controllers", controllers, "--ready-file", ready]
    program = Program(f"izar{controllers}", line, folder)
    try:
        program.wait(ready.exists)
        told = json.loads(ready.read_text())
        pids = [p for p in family(program.process.pid) if "izar-controller" in Path(f"/proc/{p}/comm").read_text()]
        name = f"Izar, {controllers} controller{'s' if controllers > 1 else ''}, everything on"
        measure(name, told["plaintext_endpoint"], seconds, told["key"], pids, {"p50": ECHO_MS})
    finally:
        program.stop()


def main():
    if sys.argv[1:2] == ["--upstream"]:
        asyncio.run(serve(int(sys.argv[2])))
        return
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        port = free_port()
        upstream = Program("upstream", [sys.executable, __file__, "--upstream", port], folder)
        behind = f"http://127.0.0.1:{port}"
        peers = {}
        port = free_port()
        smg = [PEERS / "smg", "launch", "--host", "127.0.0.1", "--port", port, "--worker-urls", behind]
        smg += ["--backend", "openai", "--prometheus-port", free_port(), "--log-level", "error"]
        peers["smg"] = (smg, f"http://127.0.0.1:{port}")
        config = folder / "litellm.yaml"
        model = {"model": f"openai/{MODEL}", "api_base": f"{behind}/v1", "api_key": "none"}
        # YAML reads JSON.
        config.write_text(json.dumps({"model_list": [{"model_name": MODEL, "litellm_params": model}]}))
        port = free_port()
        litellm = [PEERS / "litellm", "--config", config, "--host", "127.0.0.1", "--port", port]
        peers["LiteLLM"] = (litellm, f"http://127.0.0.1:{port}")
        try:
            upstream.wait(lambda: answers(behind))
            print("| | added at 1 connection, p50 ms | whole p99 ms | requests/s at 1 | at 64 | for each CPU second |")
            print("| --- | --- | --- | --- | --- | --- |")
            base = measure("the program asked itself", behind, seconds, FIXED_KEY, [upstream.process.pid], None)
            for name, (line, endpoint) in peers.items():
                program = Program(name, line, folder)
                try:
                    program.wait(lambda: answers(endpoint))
                    measure(name, endpoint, seconds, FIXED_KEY, family(program.process.pid), base)
                finally:
                    program.stop()
        finally:
            upstream.stop()
        izar(folder, 1, seconds)
        izar(folder, 3, seconds)


if __name__ == "__main__":
    main()

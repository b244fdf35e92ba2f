"""Servers: containers with a real systemd on two networks of their own, and what is done to them.

The networks are internal, so that a test's traffic stays among its containers: one carries what nodes tell each other
and SSH, the other is where clients reach the API. Addresses are those that RFC 2544 sets aside for such tests.
"""

import json
import pathlib
import subprocess
import time

from engine import docker

CLUSTER, CLIENTS = "izar-cluster", "izar-clients"
SUBNETS = {CLUSTER: "198.18.1", CLIENTS: "198.18.2"}
# The control node, controllers and agents, and the last part of their addresses.
CONTROL = "control"
CONTROLLERS = {"c1": 11, "c2": 12, "c3": 13}
AGENTS = {"a1": 21, "a2": 22, "a3": 23}
# A server boots in a few seconds; on a busy machine in some more.
BOOT_S = 90
# A command that takes longer hangs.
COMMAND_S = 600


class Failed(Exception):
    """A command in a server failed; says what it said."""


def address(node, network=CLUSTER):
    last = {CONTROL: 2, **CONTROLLERS, **AGENTS}[node]
    return f"{SUBNETS[network]}.{last}"


def name(node):
    return f"izar-{node}"


def until(what, look, limit_s=BOOT_S):
    """Waits until `look` gives something true; says at the end what it saw last."""
    end, seen = time.monotonic() + limit_s, None
    while time.monotonic() < end:
        try:
            if seen := look():
                return seen
        except (Failed, RuntimeError, ValueError, KeyError) as error:
            seen = error
        time.sleep(0.2)
    raise Failed(f"{what}: not after {limit_s} s; last: {seen}")


class Servers:
    """The containers of one run. `shared`: a folder of this machine that the control node sees as /srv/site."""

    def __init__(self, image, shared):
        self.image, self.shared = image, shared

    def __enter__(self):
        self.clear()
        for network, subnet in SUBNETS.items():
            docker("network", "create", "--internal", "--subnet", f"{subnet}.0/24", network)
        return self

    def __exit__(self, *_):
        self.clear()

    def clear(self):
        """Removes what a run left, this one or one that was killed."""
        for node in (CONTROL, *CONTROLLERS, *AGENTS):
            docker("rm", "--force", "--volumes", name(node), check=False)
        for network in SUBNETS:
            docker("network", "rm", network, check=False)

    def start(self):
        """Starts all servers, makes the operator's key known to them, and waits until they take it."""
        for node in (CONTROL, *CONTROLLERS, *AGENTS):
            self.create(node)
        key = pathlib.Path(self.shared) / "ssh-key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        for node in (*CONTROLLERS, *AGENTS):
            self.admit(node)

    def create(self, node):
        mounts = ["--volume", f"{self.shared}:/srv/site"] if node == CONTROL else []
        # mount --make-rshared: without it credentials are empty. SYS_PTRACE: PrivateUsers with ProtectProc needs it.
        docker(
            *("run", "--detach", "--name", name(node), "--hostname", node, "--stop-signal", "SIGRTMIN+3"),
            *("--cap-add", "SYS_ADMIN", "--cap-add", "SYS_PTRACE", "--security-opt", "seccomp=unconfined"),
            *("--security-opt", "apparmor=unconfined", "--tmpfs", "/run:exec", "--tmpfs", "/run/lock"),
            *("--cgroupns=host", "--volume", "/sys/fs/cgroup:/sys/fs/cgroup:rw", *mounts),
            *("--network", CLUSTER, "--ip", address(node), self.image),
            *("/bin/sh", "-c", "mount --make-rshared / && exec /lib/systemd/systemd"),
        )
        if node not in AGENTS:
            docker("network", "connect", "--ip", address(node, CLIENTS), CLIENTS, name(node))

    def admit(self, node):
        """Lets the control node in by SSH, as an installer would with a preseeded key."""
        public = (pathlib.Path(self.shared) / "ssh-key.pub").read_text()
        until(f"{node} boots", lambda: self.sh(node, "systemctl is-active ssh"))
        self.sh(node, "install -d -m 700 /root/.ssh && cat > /root/.ssh/authorized_keys", stdin=public)
        known = f"ssh-keyscan -T 5 {address(node)} 2>/dev/null | grep . >> /srv/site/known_hosts"
        until(f"{node} listens", lambda: self.sh(CONTROL, known) is not None)

    def replace(self, node):
        """Takes a server away with its disk, and puts a bare one in its place."""
        docker("rm", "--force", "--volumes", name(node))
        self.create(node)
        self.sh(CONTROL, f"sed -i '/^{address(node)} /d' /srv/site/known_hosts")
        self.admit(node)

    def sh(self, node, command, stdin=None, limit_s=COMMAND_S):
        """Runs a shell command on a server; gives what it printed."""
        done = subprocess.run(
            ["docker", "exec", "--interactive", "--env", "LC_ALL=C.UTF-8", name(node), "bash", "-c", command],
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
        )
        if done.returncode:
            raise Failed(f"{node}: {command}: status {done.returncode}\n{done.stdout[-6000:]}{done.stderr[-3000:]}")
        return done.stdout.strip()

    def json(self, node, command):
        return json.loads(self.sh(node, command))

    def begin(self, node, command):
        """Starts a shell command on a server; gives the process, its output in pipes."""
        whole = ["docker", "exec", "--env", "LC_ALL=C.UTF-8", name(node), "bash", "-c", command]
        return subprocess.Popen(whole, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def power_cut(self, node):
        """What pulls the plug: nothing in it hears of it."""
        docker("kill", name(node))

    def power_on(self, node):
        docker("start", name(node))

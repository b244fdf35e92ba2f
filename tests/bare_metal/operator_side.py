"""The operator's side: a release unpacked on the control node, an inventory, playbooks, and load while they run."""

import json
import re
import threading

from servers import AGENTS, CLIENTS, CONTROL, CONTROLLERS, SUBNETS, Failed, address, until

CLUSTER_ID, SITE = "proof", "lab"
INVENTORY = "/srv/site/hosts.json"
PKI = "/srv/site/pki"
# Load comes in pieces of so many streams, some seconds, so that it can be ended soon. A number and not a time: all of them
# are waited for and counted, those too that go on elsewhere long after.
PIECE = 42
# As many as a controller lists: more than any load asks for.
TURNS = 20_000
# Where the generator leaves the request ids of what was answered, on the control node.
IDS = "/tmp/load-ids"
# A playbook that takes longer hangs.
PLAYBOOK_S = 540


def inventory(change=lambda hosts: None):
    """The inventory of all servers as JSON, which is YAML. `change`: what makes it a wrong one."""
    networks = [f"{subnet}.0/24" for subnet in SUBNETS.values()]
    controllers = {
        node: {
            "ansible_host": address(node),
            "controller_member": number,
            "controller_api_address": "0.0.0.0",
            "controller_networks": networks,
            "pki_api_hosts": [address(node, CLIENTS), node],
        }
        for number, node in enumerate(CONTROLLERS, 1)
    }
    agents = {node: {"ansible_host": address(node), "agent_networks": networks} for node in AGENTS}
    change({**controllers, **agents})
    variables = {
        "ansible_user": "root",
        "ansible_ssh_private_key_file": "/srv/site/ssh-key",
        "ansible_ssh_common_args": "-o UserKnownHostsFile=/srv/site/known_hosts",
        "cluster_id": CLUSTER_ID,
        "cluster_site": SITE,
        "agent_within_s": 5,
    }
    groups = {"controllers": {"hosts": controllers}, "agents": {"hosts": agents}}
    monitoring = {"hosts": {next(iter(CONTROLLERS)): {}}}
    return json.dumps({"all": {"vars": variables, "children": {**groups, "monitoring": monitoring}}}, indent=1)


class Run:
    """What a playbook came to."""

    def __init__(self, output):
        self.output = output
        rows = re.findall(r"^(\S+)\s*: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", output, re.MULTILINE)
        self.changed = {host: int(changed) for host, _, changed, _, _ in rows if int(changed)}
        self.hosts = [host for host, *_ in rows]

    def names(self):
        """The tasks that changed something, for a message."""
        task, found = "", []
        for line in self.output.splitlines():
            task = line if line.startswith(("TASK", "RUNNING HANDLER")) else task
            if line.startswith("changed:"):
                found.append(f"{task.strip(' *')}: {line}")
        return found


class Operator:
    """Plays on the control node. `release`: the folder that a tarball was unpacked to."""

    def __init__(self, servers, release):
        self.servers, self.release = servers, release

    def unpack(self, tarball):
        self.servers.sh(CONTROL, f"tar -C /srv -xzf /srv/site/{tarball}")
        self.release = f"/srv/{tarball.removesuffix('.tar.gz')}"

    def command(self, playbook, *arguments, inventory=INVENTORY):
        tarball = f"/srv/site/{self.release.rpartition('/')[2]}.tar.gz"
        words = ["exec ansible-playbook", "-i", inventory, f"-e cluster_release={tarball}", *arguments]
        return f"cd {self.release}/ansible && {' '.join(words)} playbooks/{playbook}.yml"

    def play(self, playbook, *arguments, environment="", **options):
        command = self.command(playbook, *arguments, **options)
        command = f"export {environment}; {command}" if environment else command
        return Run(self.servers.sh(CONTROL, command, limit_s=PLAYBOOK_S))

    def refused(self, playbook, *arguments, **options):
        """What a playbook says that must not go through."""
        try:
            run = self.play(playbook, *arguments, **options)
        except Failed as error:
            return re.sub(r"\s+", " ", str(error).replace("\\n", " "))
        raise Failed(f"{playbook} went through: {run.output[-2000:]}")

    def endpoints(self):
        return ",".join(f"https://{address(node, CLIENTS)}:8443" for node in CONTROLLERS)


class Load:
    """Streams from clients that know every controller, until the block ends.

    Every one must be answered whole, and every controller must have the finished turn of each afterwards. Where one
    `dies`, it may take ends along that it was just recording, and those turns are closed as abandoned. The block begins
    when streams run on all `nodes`.
    """

    def __init__(self, operator, nodes=tuple(CONTROLLERS), model="echo", dies=False):
        self.operator, self.servers, self.nodes, self.model = operator, operator.servers, nodes, model
        self.dies, self.abandoned = dies, set()
        # A key of its own: its turns are the load's.
        self.key = self.servers.json(nodes[0], "izar --json keys create --note load")
        self.ended = threading.Event()
        self.reports, self.answered, self.trouble = [], [], None

    def piece(self):
        """One piece. The generator begins on all endpoints or not at all; one that is down is left out, as by a client."""
        endpoints = self.operator.endpoints().split(",")
        while True:
            try:
                report = self.servers.json(CONTROL, self.command(endpoints))
                self.answered += self.servers.sh(CONTROL, f"cat {IDS}").split()
                return report
            except Failed as error:
                down = re.search(r"^izar: (?:connect to |TLS with )?([0-9.]+:[0-9]+)", str(error), re.MULTILINE)
                if not down or len(endpoints) == 1:
                    raise
                endpoints.remove(f"https://{down.group(1)}")

    def command(self, endpoints):
        return (
            f"{self.operator.release}/bin/izar --json bench api --stream --endpoint {','.join(endpoints)} "
            f"--ca {PKI}/ca.pem --key {self.key['key']} --model {self.model} --prompt-tokens 40 --max-tokens 40 "
            f"--concurrency 6 --warmup 0 --requests {PIECE} --ids {IDS}"
        )

    def run(self):
        try:
            # A piece that has failed is enough to fail; a load of refusals would only take the servers' cores.
            while not self.ended.is_set() and not any(report["errors"] for report in self.reports):
                self.reports.append(self.piece())
        except (Failed, ValueError) as error:
            self.trouble = error

    def __enter__(self):
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        try:
            until("streams run", lambda: all(self.running(node) for node in self.nodes))
        except Failed:
            self.ended.set()
            raise
        return self

    def running(self, node):
        """How many requests run on a controller."""
        if self.trouble:
            raise self.trouble
        return self.servers.json(node, "izar --json status")["running"]

    def __exit__(self, kind, *_):
        self.ended.set()
        self.thread.join()
        if kind is None:
            self.check()

    def check(self):
        if self.trouble:
            raise self.trouble
        errors = [report["errors"] for report in self.reports if report["errors"]]
        different = sum(report["read_on"]["different"] for report in self.reports)
        if errors or different or not self.requests():
            raise Failed(f"under load: {self.requests()} answers, errors {errors}, {different} that went on otherwise")
        if len(set(self.answered)) != self.requests():
            raise Failed(f"{self.requests()} answers have {len(set(self.answered))} request ids")
        allowed = ("finished", "abandoned") if self.dies else ("finished",)
        for node in self.nodes:
            turns = self.servers.json(node, f"izar --json turns list --limit {TURNS}")["turns"]
            outcomes = {turn["turn"]: turn["outcome"] for turn in turns}
            wrong = {turn: outcomes.get(turn) for turn in self.answered if outcomes.get(turn) not in allowed}
            if wrong:
                raise Failed(f"{len(self.answered)} were answered, and of {len(wrong)} {node} has this: {wrong}")
            self.abandoned |= {turn for turn in self.answered if outcomes[turn] == "abandoned"}

    def __str__(self):
        abandoned = f", {len(self.abandoned)} on record as abandoned" if self.abandoned else ""
        return f"{self.requests()} answers, {self.read_on()} of them read on elsewhere{abandoned}"

    def requests(self):
        return sum(report["requests"] for report in self.reports)

    def read_on(self):
        return sum(sum(report["read_on"].values()) for report in self.reports)

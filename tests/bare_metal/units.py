"""Stories of the units themselves, as docs/systemd.md tells them: by an operator's hand on one server, without Ansible.

Each leaves the server as it was, which the second run of site.yml then proves.
"""

from operator_side import PKI, Load
from servers import CONTROL, CONTROLLERS, until

JOURNAL = "journalctl --namespace=izar -u izar-controller -o cat --no-pager -n 50"
BOTH = "izar-controller.socket izar-controller.service"
# Asks root's hand for a GPU, as an agent does.
HAND = (
    "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect('/run/izar/gpu.sock'); "
    "s.sendall(sys.argv[1].encode() + b'\\n'); print(s.makefile().read())"
)


def follower(proof):
    leader = proof.status()["leader"]
    return next(node for node in CONTROLLERS if node != leader)


def a_unit_that_misses_a_credential_says_what_to_do(proof):
    node, sealed, away = follower(proof), "/etc/credstore.encrypted/izar.master-key", "/root/izar.master-key"
    proof.servers.sh(node, f"systemctl stop {BOTH} && mv {sealed} {away} && ! systemctl start izar-controller")
    words = "the credential master-key is missing: make it with"
    until("it says what it misses", lambda: words in proof.servers.sh(node, JOURNAL))
    # One of another server's, say, lies there and does not open.
    said = proof.servers.sh(node, f"echo bm9uZQ== > {sealed}; izar doctor || true; rm {sealed}")
    proof.need("izar.master-key, but does not open" in said, said)
    # It is tried again by itself meanwhile.
    proof.servers.sh(node, f"systemctl stop {BOTH}; mv {away} {sealed} && systemctl reset-failed && systemctl start {BOTH}")
    until("it is back", lambda: proof.at(node, connected=3))


def operators_use_the_socket_and_nobody_else(proof):
    node, sh = follower(proof), proof.servers.sh
    sh(node, "useradd alice && useradd bob && usermod -aG izar-admin alice")
    said = sh(node, "runuser -u alice -- izar status")
    proof.need("members c1 c2 c3" in said, said)
    said = sh(node, "runuser -u bob -- izar status 2>&1 || true")
    proof.need("Permission denied" in said, said)
    said = sh(node, "runuser -u bob -- izar doctor")
    proof.need("configuration: /etc/izar/controller.toml was not read: Permission denied" in said, said)
    said = sh(node, "runuser -u izar-controller -- izar doctor || true")
    proof.need("controller: was not asked: " in said and "api.listen" not in said, said)
    said = sh(node, "izar doctor || true")
    proof.need(said.count("and opens") == 4 and "controller: " + node in said, said)
    sh(node, "userdel alice && userdel bob")
    said = sh(node, "cat /proc/$(systemctl show -P MainPID izar-controller)/status")
    proof.need("Seccomp:\t2" in said, "the controller's system calls are not filtered")
    said = sh(node, "journalctl --namespace=izar -x --no-pager MESSAGE='the leader changed'")
    proof.need("What to do" in said, said)


def a_reload_takes_all_certificates_or_none(proof):
    node, sh = follower(proof), proof.servers.sh
    other = next(name for name in CONTROLLERS if name != node)
    sh(node, "systemctl reload izar-controller")
    until("certificates are read anew", lambda: "certificates are read anew" in sh(node, JOURNAL))
    # Another one's certificate does not fit the key; what lay there comes back as old as it was.
    sh(node, "cd /etc/izar/pki && cp -p api.pem .kept && cat > api.pem", stdin=sh(CONTROL, f"cat {PKI}/api/{other}.pem"))
    sh(node, "! systemctl reload izar-controller")
    until("it says why not", lambda: "keys may not be consistent" in sh(node, JOURNAL))
    sh(node, "systemctl kill --kill-who=main --signal=HUP izar-controller")
    until("the daemon refuses it as well", lambda: "a reload is refused" in sh(node, JOURNAL))
    sh(node, "cd /etc/izar/pki && mv .kept api.pem && systemctl reload izar-controller")
    proof.verify("echo")


def the_helper_takes_its_verbs_from_the_agent_alone(proof):
    def asked(user, request):
        return proof.servers.sh("a3", f'runuser -u {user} -- python3 -c "{HAND}" "{request}" 2>&1 || true')

    proof.servers.sh("a3", "systemctl start izar-gpu.socket && useradd bob")
    reset = "reset GPU-5f2a1c3e-0b1d-4c5e-9f80-aabbccddeeff"
    said = asked("izar-agent", reset)
    proof.need("may not ask, only the main one of izar-agent.service" in said, f"a worker could ask: {said}")
    said = asked("root", reset)
    proof.need("failed: start /usr/bin/nvidia-smi" in said, f"nvidia-smi is not here: {said}")
    for question in ("may-reboot", "idle"):
        said = asked("root", question)
        proof.need(said.strip() == "ok", said)
    said = asked("root", "reset all")
    proof.need("refused: " in said, said)
    said = asked("bob", "reboot")
    proof.need("PermissionError" in said, said)
    # A controller's server is not restarted; any unit of its name will do.
    proof.servers.sh("a3", "systemd-run --quiet --unit=izar-controller sleep 600")
    for request in ("reboot", "may-reboot"):
        said = asked("root", request)
        proof.need("refused: a controller works on this server" in said, said)
    proof.servers.sh("a3", "systemctl stop izar-controller")
    proof.servers.sh("a3", "systemctl stop izar-gpu.socket && userdel bob")


def a_stop_of_an_agent_is_a_drain(proof):
    agents = proof.servers.json("c1", "izar --json agents list")["agents"]
    node = next(agent["agent"] for agent in agents if agent["planned"])
    with Load(proof.operator) as load:
        proof.servers.sh(node, "systemctl stop izar-agent")
        result = proof.servers.sh(node, "systemctl show -P Result izar-agent")
        proof.need(result == "success", f"{node}: {result}")
        proof.servers.sh(node, "systemctl start izar-agent")
        until("all agents serve", lambda: proof.at("c1", connected=3))
    return load


STORIES = (
    a_unit_that_misses_a_credential_says_what_to_do,
    operators_use_the_socket_and_nobody_else,
    a_reload_takes_all_certificates_or_none,
    the_helper_takes_its_verbs_from_the_agent_alone,
    a_stop_of_an_agent_is_a_drain,
)

"""Stories of what the playbooks do to a site that serves, besides its upgrades: what is no longer wanted goes, what is lost
stops nobody, another authority takes over."""

from operator_side import CLUSTER_ID, PKI, SITE, Load
from servers import AGENTS, CLIENTS, CONTROL, CONTROLLERS, address, until

OTHER = "/srv/site/other"


def what_the_inventory_does_not_want_goes(proof):
    proof.servers.sh("a3", "systemctl enable --quiet --now izar-gpu.socket")
    proof.servers.sh("c2", "install -m 600 /dev/stdin /etc/izar/backup.env", stdin="AWS_SECRET_ACCESS_KEY=old\n")
    run = proof.operator.play("site")
    proof.need(run.changed == {"a3": 1, "c2": 1}, f"changed: {run.names()}")
    said = proof.servers.sh("a3", "systemctl is-enabled izar-gpu.socket; systemctl is-active izar-gpu.socket; true")
    proof.need(said.split() == ["disabled", "inactive"], said)
    proof.servers.sh("c2", "! test -e /etc/izar/backup.env")


def secrets_that_the_cluster_does_not_work_with_are_refused(proof):
    sh, kept = proof.servers.sh, f"{PKI}.kept"
    sh(CONTROL, f"cp -a {PKI} {kept} && tr 0-9 1-90 < {kept}/pepper > {PKI}/pepper")
    said = proof.operator.refused("site", "--check", "--limit c3")
    proof.need("what is sealed (c3:pepper, c1:pepper, c2:pepper) is not what" in said, said)
    # A folder that came back without them: none are made in their place.
    sh(CONTROL, f"rm {PKI}/pepper {PKI}/master-key")
    said = proof.operator.refused("site", "--limit controllers")
    proof.need("pepper and master-key would be made anew, but there is one on c1, c2, c3 already" in said, said)
    sh(CONTROL, f"! test -e {PKI}/pepper && rm -r {PKI} && mv {kept} {PKI}")


def what_a_broken_run_has_left_undone_is_done(proof):
    # Files were copied, and nobody told of them.
    sh = proof.servers.sh
    sh("a3", "gpasswd --delete izar-agent izar && touch /usr/lib/systemd/catalog/izar.catalog")
    sh("c3", "echo '# old' >> /etc/systemd/system/izar-controller.socket && systemctl daemon-reload && sleep 1")
    sh("c3", "sed -i '$d' /etc/systemd/system/izar-controller.socket")
    proof.need(sh("c3", "systemctl show -P NeedDaemonReload izar-controller.socket") == "yes", "systemd has seen the unit")
    run = proof.operator.play("site")
    proof.need(run.changed.get("a3") == 2 and "izar" in sh("a3", "id -nG izar-agent").split(), f"changed: {run.names()}")
    proof.need("c3" in run.changed, f"changed: {run.names()}")
    proof.need(sh("c3", "systemctl show -P NeedDaemonReload izar-controller.socket") == "no", "systemd has not seen the unit")


def a_lost_gpu_is_named_and_stops_nobody(proof):
    # The agents serve; that they should have GPUs is what the inventory says from now on.
    said = proof.operator.play("site", "--check", "-e gpu_expected=2").output
    for node in AGENTS:
        proof.need(f"WARNING {node}: NVIDIA's driver is not loaded" in said, f"{node} is not named: {said[-3000:]}")


def an_agent_is_renewed_while_the_first_controller_is_down(proof):
    with Load(proof.operator, dies=True) as load:
        proof.servers.power_cut("c1")
        until("another one leads", lambda: proof.status("c2")["leader"] in ("c2", "c3"))
        before = proof.servers.sh("a1", "sha256sum /etc/izar/pki/node.pem")
        proof.operator.play("rotate_certs", "--limit a1")
        proof.need(proof.servers.sh("a1", "sha256sum /etc/izar/pki/node.pem") != before, "a1 has its old certificate")
        # Without c2 no majority would be left.
        said = proof.operator.refused("rotate_certs", "--limit c2")
        proof.need("c2: it is not taken down" in said and "c3 knows a leader, and c1 does not" in said, said)
        proof.servers.power_on("c1")
        until("c1 is back", lambda: proof.at("c1", connected=3))
        proof.operator.play("rotate_certs", "--limit c2")
    return load


def certificates_of_another_authority_are_taken(proof):
    """From our CA to another one's under load: both are trusted, then the other signs, then it alone is trusted.

    The last story: the site is the other authority's afterwards.
    """
    sh, play = proof.servers.sh, proof.operator.play
    sh(CONTROL, authority())
    external = (f"-e cluster_pki_dir={OTHER}", "-e pki_external=true")
    both, alone = (f"-e pki_ca_file={OTHER}/{file}" for file in ("both.pem", "other.pem"))
    said = proof.operator.refused("rotate_certs", *external, alone)
    proof.need("other.pem has no CA that this host trusts now" in said, said)
    sh(CONTROL, f"mv {OTHER}/agent/a3.key /tmp/")
    said = proof.operator.refused("rotate_certs", *external, both)
    proof.need(f"a3: pki_external is set, and {OTHER}/agent/a3.key is not on the control node" in said, said)
    sh(CONTROL, f"mv /tmp/a3.key {OTHER}/agent/ && cp {OTHER}/both.pem {PKI}/ca.pem")
    with Load(proof.operator) as load:
        play("rotate_certs", "-e pki_external=true")
        said = proof.operator.refused("rotate_certs", *external, alone)
        proof.need(f": {OTHER}/other.pem lacks a CA that this host trusts now" in said, said)
        play("rotate_certs", *external, both)
        play("rotate_certs", *external, alone)
    for node in (*CONTROLLERS, *AGENTS):
        role = "controller" if node in CONTROLLERS else "agent"
        used, made = sh(node, "cat /etc/izar/pki/node.pem"), sh(CONTROL, f"cat {OTHER}/{role}/{node}.pem")
        proof.need(used == made, f"{node} has another certificate")
    run = play("site", *external, alone)
    proof.need(not run.changed, f"changed: {run.names()}")
    proof.verify("echo")
    return load


def authority():
    """Makes a CA and what it signs as another organisation would: with openssl, in files where pki_external looks for them."""
    new = "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    lines = [
        f"set -e; mkdir -m 700 {OTHER}; cd {OTHER}; mkdir controller agent api; cp {PKI}/pepper {PKI}/master-key .",
        f"{new} -x509 -days 30 -subj /CN=other -keyout ca.key -out other.pem",
        f"cat {PKI}/ca.pem other.pem > both.pem",
        f'issue() {{ {new} -subj "/CN=$2" -keyout "$1/$2.key" -out csr',
        'printf "subjectAltName=%s\\nextendedKeyUsage=serverAuth,clientAuth\\n" "$3" > extensions',
        "openssl x509 -req -in csr -CA other.pem -CAkey ca.key -CAcreateserial -days 10 -extfile extensions -out \"$1/$2.pem\"; }",
    ]
    for role, nodes in (("controller", CONTROLLERS), ("agent", AGENTS)):
        lines += [f"issue {role} {node} URI:izar://{CLUSTER_ID}/{SITE}/{role}/{node}" for node in nodes]
    lines += [f"issue api {node} IP:{address(node, CLIENTS)},DNS:{node}" for node in CONTROLLERS]
    return "\n".join(lines)

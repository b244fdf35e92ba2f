"""What the playbooks decide, without a server: plays on this machine that change nothing but a folder of the test's.

    PATH=<ansible's>:$PATH python3 -m unittest discover -s tests/playbooks

How hosts become a cluster is `tests/bare_metal/prove`'s business.
"""

import importlib.machinery
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import unittest

sys.dont_write_bytecode = True
ANSIBLE = pathlib.Path(__file__).resolve().parents[2] / "ansible"
loader = importlib.machinery.SourceFileLoader("build", str(ANSIBLE / "release/build"))
build = importlib.util.module_from_spec(importlib.util.spec_from_loader("build", loader))
loader.exec_module(build)
LOCAL = {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}
# Nobody listens there.
DOWN = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}


def inventory(controllers, agents, **variables):
    """An inventory as JSON, which is YAML; all of it is this machine, unless a host says otherwise."""
    whole = {"cluster_id": "test", "cluster_site": "here", **LOCAL, **variables}
    groups = {"controllers": {"hosts": controllers}, "agents": {"hosts": agents}}
    return {"all": {"vars": whole, "children": groups}}


class Playbooks(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def play(self, hosts, *words):
        """Runs ansible-playbook; gives its status and what it said, on one line."""
        (self.folder / "hosts.json").write_text(json.dumps(hosts))
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "PATH": f"{self.folder}:{os.environ['PATH']}"}
        command = ["ansible-playbook", "-i", self.folder / "hosts.json", *words]
        done = subprocess.run(command, cwd=ANSIBLE, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, re.sub(r"\s+", " ", (done.stdout + done.stderr).replace("\\n", " "))

    def role(self, hosts, pattern, *tasks, roles=(), words=()):
        """Plays tasks on hosts of an inventory."""
        play = {"hosts": pattern, "gather_facts": False, "any_errors_fatal": True, "roles": list(roles), "tasks": list(tasks)}
        (self.folder / "play.json").write_text(json.dumps([play]))
        return self.play(hosts, *words, self.folder / "play.json")

    def template(self, hosts, host, role, name):
        """Writes a role's template for a host into the folder, by itself: the role's tasks would change the host."""
        source = {"src": f"{ANSIBLE}/roles/{role}/templates/{name}.j2", "dest": f"{self.folder}/{name}", "mode": "0600"}
        return self.role(hosts, host, {"ansible.builtin.template": source}, roles=["cluster"])

    def rendered(self, hosts, host, role, name):
        status, said = self.template(hosts, host, role, name)
        self.assertEqual(status, 0, said)
        return (self.folder / name).read_text()

    def test_a_host_that_fails_stops_every_play_wherever_it_is_started(self):
        for file in sorted((ANSIBLE / "playbooks").glob("*.yml")):
            for play in re.split(r"(?m)^(?=- name: )", file.read_text())[1:]:
                if "hosts: localhost" not in play:
                    self.assertIn("\n  any_errors_fatal: true\n", play, file.name)

    def test_an_agent_told_to_act_still_knows_how_many_gpus_it_has(self):
        hosts = inventory({"c1": {}}, {"a1": {"gpu_expected": 8, "agent_settings": {"gpu": {"mode": "act"}}}})
        hosts["all"]["vars"].update(agent_log_level="info", agent_labels={}, agent_certificate="node.pem")
        said = self.rendered(hosts, "a1", "agent", "agent.toml")
        self.assertIn('[gpu]\nexpected = 8\nmode = "act"\n', said)
        self.assertEqual(said.count("[gpu]"), 1)

    def test_tables_within_tables_are_what_they_were(self):
        gpu = {"mode": "act", "limits": {"hot_celsius": 85, "note": 'a "word"', "deep": {"on": True, "list": [1, 2]}}}
        hosts = inventory({"c1": {"controller_member": 1}}, {"a1": {}}, agent_settings={"gpu": gpu}, controller_settings={"x": gpu})
        known = {"agent_log_level": "info", "agent_labels": {}, "agent_certificate": "node.pem", "controller_log_level": "info"}
        known.update(controller_api_address="192.0.2.1", controller_api_port=8443, controller_quic_address="192.0.2.1")
        hosts["all"]["vars"].update(known)
        self.assertEqual(tomllib.loads(self.rendered(hosts, "a1", "agent", "agent.toml"))["gpu"], gpu)
        self.assertEqual(tomllib.loads(self.rendered(hosts, "c1", "controller", "controller.toml"))["x"], gpu)

    def program(self, name, script):
        """A stand-in for a program of the release, in a folder that `cluster_files` names."""
        (self.folder / "bin").mkdir(exist_ok=True)
        self.izar(script, name=f"bin/{name}")

    def test_a_setting_that_a_daemon_would_refuse_is_named_before_any_host_is_asked(self):
        hosts = inventory({"c1": {**DOWN, "controller_member": 1}}, {"a1": {**DOWN, "agent_settings": {"gpu": {"mood": "act"}}}})
        hosts["all"]["vars"]["cluster_files"] = str(self.folder)
        for role, host in (("controller", "c1"), ("agent", "a1")):
            # It reads what it is given, and says what is wrong as the daemons do.
            self.program(f"izar-{role}", f"! grep mood $3 || {{ echo 'izar-{role}: '$3: unknown field >&2; exit 1; }}")
            look = {"ansible.builtin.include_role": {"name": role, "tasks_from": "preflight"}}
            status, said = self.role(hosts, host, look)
            self.assertEqual(status == 0, role == "controller", said)
        self.assertIn("a1: its agent.toml would be refused, so correct agent_settings", said)
        self.assertIn("izar-agent: agent.toml: unknown field", said)
        # One that cannot be run here says nothing of the configuration.
        self.program("izar-agent", "exit 126")
        status, said = self.role(hosts, "a1", look)
        self.assertEqual(status, 0, said)

    def test_prometheus_asks_controllers_where_clients_reach_them(self):
        reached = {"c1": ["198.51.100.1", "vip.example.org"], "c2": ["{{ ansible_host }}", "vip.example.org"]}
        controllers = {name: {"pki_api_hosts": names, "controller_api_address": "0.0.0.0"} for name, names in reached.items()}
        controllers["c2"]["ansible_host"] = "198.51.100.2"
        controllers["c3"] = {"ansible_host": "2001:db8::3"}
        targets = json.loads(self.rendered(inventory(controllers, {}), "c1", "monitoring", "targets.json"))
        asked = [target for group in targets for target in group["targets"]]
        self.assertEqual(asked, ["198.51.100.1:8443", "198.51.100.2:8443", "[2001:db8::3]:8443"])

    def test_an_address_that_prometheus_could_not_know_is_named(self):
        hosts = inventory({"c1": {"pki_api_hosts": ["{{ cluster_address }}"]}}, {})
        status, said = self.template(hosts, "c1", "monitoring", "targets.json")
        self.assertNotEqual(status, 0, said)
        self.assertIn("c1: pki_api_hosts must refer to what the inventory says", said)

    def test_controllers_that_are_reached_at_one_address_are_named(self):
        vip = ["vip.example.org", "{{ ansible_host }}"]
        controllers = {
            f"c{n}": {"ansible_host": f"192.0.2.{n}", "cluster_address": f"192.0.2.{n}", "controller_member": n, "pki_api_hosts": vip}
            for n in (1, 2, 3)
        }
        status, said = self.play(inventory(controllers, {}), "--check", "playbooks/site.yml")
        self.assertNotEqual(status, 0, said)
        self.assertIn("c1 and c2, c3 are reached at one address (vip.example.org)", said)

    def test_a_host_that_is_another_one_is_named_whichever_of_them_the_run_is_about(self):
        look = {"ansible.builtin.include_role": {"name": "base", "tasks_from": "preflight"}}

        def said(**second):
            agents = {"a1": {"ansible_host": "192.0.2.1"}, "a2": {"ansible_host": "192.0.2.2", **second}, "c1": {}}
            _, said = self.role(inventory({"c1": {"ansible_host": "192.0.2.3", "controller_member": 1}}, agents), "a2", look)
            return said

        self.assertIn("a2 and a1 have one name or address (a1, 192.0.2.2)", said(cluster_node="a1"))
        self.assertIn("a2 and a1 have one name or address (a2, 192.0.2.1)", said(cluster_address="192.0.2.1"))
        self.assertIn("a2 and c1 have one name or address (a2, 192.0.2.3)", said(ansible_host="192.0.2.3"))
        self.assertNotIn("have one name or address", said(), "a host in both groups is one")

    def test_ports_are_looked_at_where_no_controller_runs(self):
        release = self.release()
        look = {"ansible.builtin.include_role": {"name": "base", "tasks_from": "preflight"}}

        def taken(state):
            lines = ["clock 0", "machine x86_64 systemd", "systemd 252", f"unit izar-controller {state}"]
            lines += ["api LISTEN 0 5 0.0.0.0:8443 0.0.0.0:*", "version "]
            # What this host says of itself, which only this outranks.
            found = json.dumps({"base_host": {"stdout": "\n".join(lines), "stdout_lines": lines}})
            status, said = self.role(inventory({"c1": {}}, {}, **release), "c1", look, words=["-e", found])
            named = "c1: something else listens on 0.0.0.0:8443" in said
            self.assertEqual(status != 0, named, said)
            return named

        self.assertEqual([taken(state) for state in ("inactive", "failed", "active", "activating")], [True, True, False, False])

    def izar(self, script, name="izar"):
        """Puts a stand-in for a program into the path."""
        izar = self.folder / name
        izar.write_text(f"#!/bin/sh\n{script}\n")
        izar.chmod(0o755)

    def majority(self, controllers, leader='"c1"', here='"c1"', **variables):
        """Whether c1 may be taken down; what the controllers, but those that are DOWN, say of the leader, and c1 itself."""
        # The first question is c1's own.
        self.izar(f'[ -e {self.folder}/asked ] && leads=\'{leader}\' || leads=\'{here}\'; > {self.folder}/asked; echo "{{\\"leader\\": $leads}}"')
        (self.folder / "asked").unlink(missing_ok=True)
        known = {f"c{n}": {"controller_member": n, **state} for n, state in enumerate(controllers, 1)}
        include = {"ansible.builtin.include_role": {"name": "controller", "tasks_from": "majority"}}
        status, said = self.role(inventory(known, {}, **variables), "c1", include)
        return said if status else None

    def test_a_controller_is_not_taken_down_where_no_majority_would_be_left(self):
        self.assertIsNone(self.majority([{}, {}, {}]))
        said = self.majority([{}, DOWN, {}])
        self.assertIn("c1: it is not taken down", str(said))
        self.assertIn("of the 2 others that are needed, c3 knows a leader, and c2 does not", str(said))
        self.assertIsNone(self.majority([{}, {}, {}, {}, DOWN]), "of five, three are left")
        self.assertIsNotNone(self.majority([{}, {}, {}, DOWN, DOWN]))
        self.assertIsNone(self.majority([{}]), "one alone has no others")
        self.assertIsNone(self.majority([{}, DOWN, {}], here="null"), "one that knows no leader is missed by nobody")
        self.assertIsNone(self.majority([{}, DOWN, {}], controller_without_majority=True))

    def secrets(self, sealed, given, *words, **variables):
        """What c1 is told of the secrets that controllers have `sealed` and those on the control node: of a host, name and digits."""
        pki = self.folder / "pki"
        for folder, secrets in [(pki, given), *((self.folder / f"sealed-{host}", names) for host, names in sealed.items())]:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name, digits in secrets.items():
                (folder / (name if folder == pki else f"izar.{name}")).write_text(digits)
        # decrypt --name=NAME FILE -: one that holds nothing does not open.
        self.izar('[ -s "$3" ] && cat "$3"', name="systemd-creds")
        known = {"pki_credstore": f"{self.folder}/sealed-{{{{ item }}}}"}
        look = {"ansible.builtin.include_role": {"name": "pki", "tasks_from": "secrets"}, "vars": known}
        hosts = inventory({host: {} for host in sealed}, {}, cluster_pki_dir=str(pki), pki_role="controller", **variables)
        status, said = self.role(hosts, "controllers", look, words=words)
        self.assertNotIn("a" * 16, said, "a secret is shown")
        return said if status else None

    def test_secrets_that_the_cluster_does_not_work_with_are_refused(self):
        ours, others = {"pepper": "ab" * 32 + "\n", "master-key": "cd" * 32 + "\n"}, "a" * 64
        bare, both = {"c1": {}, "c2": {}}, {"c1": ours, "c2": ours}
        self.assertIsNone(self.secrets(bare, {}), "they are made")
        self.assertIsNone(self.secrets(both, ours))
        self.assertIsNone(self.secrets(both, {}, pki_pepper="AB" * 32, pki_master_key="cd" * 32), "the same digits")
        self.assertIsNone(self.secrets({"c1": {**ours, "pepper": ""}, "c2": ours}, ours), "what does not open is sealed anew")
        said = str(self.secrets(both, {**ours, "pepper": others}))
        self.assertIn("c2: what is sealed (c2:pepper) is not what pki_pepper, pki_master_key or", said)
        self.assertIsNone(self.secrets(both, {**ours, "pepper": others}, "-e", "pki_replace_secrets=true"))
        said = str(self.secrets(both, ours, pki_master_key=others))
        self.assertIn("c1: what is sealed (c1:master-key) is not what", said)
        # A new server in the place of c1, whatever this run is about.
        said = str(self.secrets({"c1": {}, "c2": ours}, {**ours, "pepper": others}, "--limit=c1"))
        self.assertIn("c1: what is sealed (c2:pepper) is not what", said)
        said = str(self.secrets({"c1": {}, "c2": ours}, {"pepper": ours["pepper"]}))
        self.assertIn("c1: master-key would be made anew, but there is one on c2 already", said)
        self.assertIn("--name=master-key /etc/credstore.encrypted/izar.master-key", said)
        said = str(self.secrets({"c1": {}, "c2": ours}, {}, "--limit=c1", "-e", "pki_replace_secrets=true"))
        self.assertIn("c1: pepper and master-key would be made anew, but there is one on c2 already", said)

    def test_secrets_that_no_controller_takes_are_named(self):
        said = str(self.secrets({"c1": {}}, {"pepper": "abc", "master-key": "cd" * 32}))
        self.assertIn("c1: pepper must be 64 hexadecimal digits", said)
        said = str(self.secrets({"c1": {}}, {}, pki_pepper="cd" * 32, pki_master_key="xy" * 32))
        self.assertIn("c1: master-key must be 64 hexadecimal digits", said)

    def test_secrets_of_a_vault_are_made_nowhere(self):
        make = {"ansible.builtin.include_role": {"name": "pki", "tasks_from": "authority"}}
        hosts = inventory({"c1": {}}, {}, cluster_pki_dir=str(self.folder / "pki"), pki_external=True, pki_pepper="ab" * 32)
        for _ in range(2):
            status, said = self.role(hosts, "c1", make)
            self.assertEqual(status, 0, said)
        self.assertIn("changed=0", said)
        self.assertEqual([path.name for path in (self.folder / "pki").iterdir()], ["master-key"])
        self.assertRegex((self.folder / "pki/master-key").read_text(), "^[0-9a-f]{64}\n$")

    def test_a_ca_goes_only_when_nobody_shows_what_it_has_signed(self):
        old, new, shown = (f"-----BEGIN CERTIFICATE-----{name}-----END CERTIFICATE-----" for name in ("old", "new", "shown"))
        for file, text in (("ca.pem", new), ("node.pem", shown)):
            (self.folder / file).write_text(text)
        files = {"pki_ca_file": f"{self.folder}/ca.pem", "pki_node_cert_file": f"{self.folder}/node.pem", "pki_role": "agent"}
        look = {"ansible.builtin.include_role": {"name": "pki", "tasks_from": "preflight"}}

        def looked(trusts, shows, late=()):
            # What hosts say of themselves, which only this outranks.
            showing = [{"item": host, "stdout": "izar-agent" if host in late else ""} for host in ("a1", "a2")]
            found = {"pki_host": {"stdout": f"{trusts}=shows={shows}"}, "pki_showing": {"results": showing}}
            hosts = inventory({}, {"a1": {}, "a2": DOWN}, **files)
            status, said = self.role(hosts, "a1", look, words=["-e", json.dumps(found)])
            return said if status else None

        self.assertIn("ca.pem has no CA that this host trusts now", str(looked(old, shown)))
        self.assertIn("ca.pem lacks a CA that this host trusts now", str(looked(old + new, old)))
        self.assertIsNone(looked(old + new, shown))
        self.assertIsNone(looked(new, old, late=["a2"]), "no CA goes")
        self.assertIn("and on a2 a daemon runs that was started before", str(looked(old + new, shown, late=["a2"])))

    def speaker(self, controllers, leader):
        self.izar(f"echo '{json.dumps({'leader': leader})}'")
        find = {"ansible.builtin.include_role": {"name": "agent", "tasks_from": "speaker"}}
        say = {"ansible.builtin.debug": {"msg": "asks {{ agent_speaker }}"}}
        return self.role(inventory(controllers, {"a1": {}}), "a1", find, say)

    def test_agents_are_spoken_of_with_the_first_controller_that_answers(self):
        status, said = self.speaker({"c1": DOWN, "c2": {}, "c3": {}}, "c3")
        self.assertEqual(status, 0, said)
        self.assertIn("asks c2", said)

    def test_a_site_in_which_nobody_answers_is_named(self):
        for controllers, leader in (({"c1": DOWN}, "c1"), ({"c1": {}, "c2": {}}, None)):
            status, said = self.speaker(controllers, leader)
            self.assertNotEqual(status, 0, said)
            self.assertIn("a1: no controller of site here answers and knows a leader", said)

    def drained(self, refusal="", planned=0, **variables):
        """How a drain of a1 ends, and what controllers were asked for."""
        agents = json.dumps({"agents": [{"agent": "a1", "planned": planned}]})
        self.izar(f"""echo "$*" >> {self.folder}/asked
            case "$*" in *drain*) [ -z "{refusal}" ] || {{ echo "{refusal}" >&2; exit 1; }};; *agents\\ list) echo '{agents}';; esac""")
        (self.folder / "asked").unlink(missing_ok=True)
        known = {"agent_speaker": "c1", "agent_drain_s": 1, **variables}
        drain = {"ansible.builtin.include_role": {"name": "agent", "tasks_from": "drain"}, "vars": known}
        status, said = self.role(inventory({"c1": {}}, {"a1": {}}), "a1", drain)
        asked = (self.folder / "asked").read_text().splitlines()
        return status == 0, [words for words in asked if "list" not in words], said

    def test_a_drain_that_does_not_end_leaves_an_agent_as_it_was(self):
        ask = "--json agents drain --no-wait --within 30 a1"
        self.assertEqual(self.drained()[:2], (True, [ask]))
        ended, asked, said = self.drained(planned=1)
        self.assertEqual((ended, asked), (False, [ask, "agents uncordon a1"]), said)
        self.assertIn("a1: it is not empty after 1 s, so it still works", said)
        self.assertEqual(self.drained(planned=1, agent_takes_back="cordon")[1], [ask, "agents cordon a1"])
        self.assertEqual(self.drained(planned=1, agent_waits=True)[:2], (False, []), "an operator's is waited for")

    def test_an_agent_that_nobody_knows_is_empty(self):
        ended, _, said = self.drained(refusal="izar: there is no agent a1; see: izar agents list")
        self.assertTrue(ended, said)
        ended, _, said = self.drained(refusal="izar: no quorum")
        self.assertFalse(ended, said)

    def test_a_new_server_without_its_gpus_is_refused_with_all_that_is_wrong(self):
        hosts = inventory({"c1": {}}, {"a1": {"gpu_expected": 99}})
        status, said = self.role(hosts, "a1", {"ansible.builtin.include_role": {"name": "gpu"}})
        self.assertNotEqual(status, 0, said)
        self.assertIn("99 GPUs are expected; the driver and /dev have cards", said)

    def test_what_another_authority_has_not_made_is_named(self):
        look = {"ansible.builtin.include_role": {"name": "pki", "tasks_from": "preflight"}}
        (self.folder / "ca.pem").write_text("")
        status, said = self.role(inventory({"c1": {}}, {}, pki_external=True, cluster_pki_dir=str(self.folder)), "c1", look)
        self.assertNotEqual(status, 0, said)
        files = ("controller/c1.pem", "controller/c1.key", "api/c1.pem", "api/c1.key")
        self.assertIn(f"set, and {', '.join(f'{self.folder}/{file}' for file in files)} is not on the control node", said)

    def test_sites_are_upgraded_one_after_the_other(self):
        hosts = inventory({"b1": {}, "m1": {"cluster_site": "munich"}}, {})
        status, said = self.play(hosts, "--check", "playbooks/upgrade.yml")
        self.assertNotEqual(status, 0, said)
        self.assertIn("sites here and munich would be upgraded together", said)
        # Of one, it goes on to what it looks at next.
        status, said = self.play(hosts, "--check", "--limit=m1", "playbooks/upgrade.yml")
        self.assertNotEqual(status, 0, said)
        self.assertNotIn("would be upgraded together", said)
        self.assertIn("is no address", said)

    def life(self, answered=None, noted=None, data=(), least=0):
        """What the new life of a backup of life 2 is numbered; `noted` on c2, `data` on c1."""
        state = {name: self.folder / "state" / name for name in ("c1", "c2")}
        for folder in state.values():
            folder.mkdir(parents=True, exist_ok=True)
        if noted:
            (state["c2"] / "life").write_text(f"{noted}\n")
        for name in data:
            (state["c1"] / name).mkdir(parents=True, exist_ok=True)
        self.izar(f"echo '{json.dumps({'incarnation': answered})}'" if answered else "exit 1")
        # The role's own variable, which only this outranks; each host has its folder.
        folder = f"{self.folder}/state/{{{{ inventory_hostname }}}}"
        known = {"controller_state": folder, "controller_verified": {"stdout": '{"incarnation": 2}'}}
        known["controller_restore_incarnation"] = least
        find = {"ansible.builtin.include_role": {"name": "controller", "tasks_from": "life"}, "vars": known}
        say = {"ansible.builtin.debug": {"msg": "life {{ controller_new_life }}."}}
        controllers = {f"c{n}": {"controller_member": n} for n in (1, 2)}
        status, said = self.role(inventory(controllers, {}), "controllers", find, say)
        lives = set(re.findall(r"life (\d+)\.", said))
        self.assertEqual(status == 0, len(lives) == 1, said)
        return int(lives.pop()) if status == 0 else said

    def test_a_new_life_is_numbered_above_every_one_that_was_used(self):
        self.assertEqual(self.life(), 3, "bare servers know of none but the backup's")
        self.assertEqual(self.life(answered=4), 5)
        self.assertEqual(self.life(noted=6, data=["controller"]), 7, "a run that broke off, when nobody answers any more")
        self.assertEqual(self.life(noted=6, answered=9), 10)
        self.assertEqual(self.life(noted=6, least=12), 12)
        self.assertEqual(self.life(noted=12, least=12), 13, "the same run, repeated")

    def test_data_of_which_no_life_is_known_needs_a_number(self):
        for data in ("controller/state", "controller.20260101T000000Z"):
            said = self.life(data=[data])
            self.assertIn("but there is data on c1: start the controllers that can be started, or give a number", str(said))
        self.assertEqual(self.life(least=8), 8)

    def keep(self):
        """What a new data directory holds of the old ones; the folder is one host's."""
        known = {"controller_state": str(self.folder), "controller_member": 1}
        include = {"ansible.builtin.include_role": {"name": "controller", "tasks_from": "keep"}, "vars": known}
        status, said = self.role(inventory({"c1": {}}, {}), "c1", include)
        self.assertEqual(status, 0, said)
        return said

    def test_a_repeated_restore_finds_model_files_and_waiting_turns_where_they_are(self):
        # The oldest life has both; the next one has emptied its notes; one run broke off with its room made, the next before.
        for name in ("controller.2", "controller.1", "controller.3", "controller"):
            (self.folder / name).mkdir()
            if name in ("controller.1", "controller.2"):
                (self.folder / name / "provisional.log").write_text("" if name == "controller.1" else "old")
                (self.folder / name / "blobs").mkdir()
                (self.folder / name / "blobs" / "weights").write_text(name)
            time.sleep(0.01)
        self.keep()
        self.assertEqual((self.folder / "controller/provisional.log").read_text(), "")
        weights = [self.folder / name / "blobs/weights" for name in ("controller", "controller.1")]
        self.assertTrue(weights[0].samefile(weights[1]))
        self.assertEqual({path.name for path in (self.folder / "controller").iterdir()}, {"blobs", "provisional.log"})
        self.assertIn("changed=0", self.keep())

    def test_turns_that_wait_are_copied_with_their_owner(self):
        for name in ("controller.1", "controller"):
            (self.folder / name).mkdir()
        old, new = (self.folder / name / "provisional.log" for name in ("controller.1", "controller"))
        old.write_text("turns")
        old.chmod(0o640)
        if os.geteuid() == 0:
            os.chown(old, 12345, 12346)
        self.keep()
        self.assertEqual(new.read_text(), "turns")
        self.assertFalse(new.samefile(old), "the new life empties it")
        kept, was = new.stat(), old.stat()
        self.assertEqual((kept.st_uid, kept.st_gid, kept.st_mode), (was.st_uid, was.st_gid, was.st_mode))

    def release(self, unit="[Unit]\n"):
        """A signed release with one unit, unpacked beside its tarball; variables that tell of it."""
        name = "izar-0.0.1-x86_64-unknown-linux-gnu"
        key, tarball = self.folder / "release-key", self.folder / f"{name}.tar.gz"
        if not key.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
            public = key.with_suffix(".pub").read_text()
            (self.folder / "allowed_signers").write_text(f'izar-release namespaces="izar-release" {public}')
        verify = ("ansible/release/verify", (ANSIBLE / "release/verify").read_bytes(), True)
        tarball.write_bytes(build.pack(name, [verify, ("systemd/izar-agent.service", unit.encode(), False)], 0))
        build.sign(tarball, key)
        subprocess.run(["tar", "-C", self.folder, "-xzf", tarball], check=True)
        return {"cluster_files": str(self.folder / name), "cluster_address": "192.0.2.1", "controller_member": 1}

    def looked_at(self, release):
        """What a look at a host says that does not answer: of the release, before it is asked anything."""
        look = {"ansible.builtin.include_role": {"name": "base", "tasks_from": "preflight"}}
        status, said = self.role(inventory({"c1": DOWN}, {}, **release), "c1", look)
        self.assertNotEqual(status, 0, said)
        return said

    def test_a_release_s_folder_that_was_changed_is_refused_before_any_host_is_asked(self):
        release = self.release()
        self.assertIn("UNREACHABLE", self.looked_at(release), "a whole one is passed")
        unit = self.folder / release["cluster_files"] / "systemd/izar-agent.service"
        unit.write_text("[Unit]\nDescription=other\n")
        for _ in range(2):
            said = self.looked_at(release)
            self.assertIn(f"{unit}: missing, or not what was signed; unpack {release['cluster_files']}.tar.gz again", said)
            self.assertNotIn("UNREACHABLE", said)
            unit.unlink(missing_ok=True)

    def test_a_release_s_folder_that_fits_its_own_sums_alone_is_refused(self):
        release, sums = self.release(), "SHA256SUMS"
        folder = pathlib.Path(release["cluster_files"])
        (folder / "systemd/izar-agent.service").write_text("other")
        (folder / sums).write_text(self.sums(folder))
        said = self.looked_at(release)
        self.assertIn(f"{folder}/{sums}: not the one in {folder}.tar.gz, so the folder is not what was signed", said)
        self.assertNotIn("UNREACHABLE", said)

    def sums(self, folder):
        named = ["ansible/release/verify", "systemd/izar-agent.service"]
        return subprocess.run(["sha256sum", *named], cwd=folder, check=True, capture_output=True, text=True).stdout

    def test_another_build_of_the_same_version_is_not_taken_for_what_lies_there(self):
        release, installed = self.release(), self.folder / "installed"
        subprocess.run(["cp", "-a", release["cluster_files"], installed], check=True)
        look = {"ansible.builtin.command": {"argv": ["sh", "-c", f"cd {installed} && {{{{ cluster_compare }}}}"]}}

        def compared(release):
            return self.role(inventory({"c1": {}}, {}, **release), "c1", look, roles=["cluster"])

        status, said = compared(release)
        self.assertEqual(status, 0, said)
        status, said = compared(self.release(unit="[Unit]\nDescription=built again\n"))
        self.assertNotEqual(status, 0, said)
        self.assertIn("SHA256SUMS: FAILED", said)
        # What it fits is the other folder, whole.
        subprocess.run(["cp", "-aT", release["cluster_files"], installed], check=True)
        status, said = compared(release)
        self.assertEqual(status, 0, said)
        (installed / "systemd/izar-agent.service").write_text("broken")
        status, said = compared(release)
        self.assertNotEqual(status, 0, said)
        self.assertIn("izar-agent.service: FAILED", said)

    def test_a_check_asks_for_nothing_that_a_command_would_have_said(self):
        self.izar("""echo '{"leader": "c1"}'""")
        hosts = inventory({"c1": {"controller_member": 1}}, {"a1": {}})
        status, said = self.play(hosts, "--check", "-e", "backup_to=/nowhere", "playbooks/backup.yml")
        self.assertEqual(status, 0, said)
        leaves = [{"ansible.builtin.include_role": {"name": "agent", "tasks_from": tasks}} for tasks in ("speaker", "drain")]
        status, said = self.role(hosts, "a1", *leaves, words=["--check"])
        self.assertEqual(status, 0, said)


if __name__ == "__main__":
    unittest.main()

"""A release is what was signed, the same whoever builds it, and says what it is made of.

    python3 -m unittest discover -s ansible/release

With stand-ins for the programs: what is tested is the packing, not the compiler. Needs cargo, git and OpenSSH.
"""

import hashlib
import importlib.machinery
import importlib.util
import io
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import unittest

sys.dont_write_bytecode = True
HERE = pathlib.Path(__file__).resolve().parent
loader = importlib.machinery.SourceFileLoader("build", str(HERE / "build"))
build = importlib.util.module_from_spec(importlib.util.spec_from_loader("build", loader))
loader.exec_module(build)


def make_key(folder, name):
    key = folder / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", key], check=True)
    signers = folder / f"{name}.signers"
    signers.write_text(f'izar-release namespaces="izar-release" {key.with_suffix(".pub").read_text()}')
    return key, signers


class Release(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.folder = pathlib.Path(cls.temporary.name)
        cls.programs = cls.folder / "bin"
        cls.programs.mkdir()
        for name in build.PROGRAMS:
            (cls.programs / name).write_text(f"#!/bin/sh\necho {name}\n")
            (cls.programs / name).chmod(0o755)
        cls.key, cls.signers = make_key(cls.folder, "release-key")
        cls.tarball = build.release(cls.programs, cls.folder / "one", cls.key)

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def verify(self, tarball, signers):
        return subprocess.run([HERE / "verify", tarball, signers], capture_output=True, text=True, check=False)

    def refused(self, tarball, signers, why):
        said = self.verify(tarball, signers)
        self.assertEqual(said.returncode, 1, said)
        self.assertIn(why, said.stderr)

    def copy(self, name, change=lambda content: content):
        """The tarball and its signature under another folder, its content changed."""
        folder = self.folder / name
        folder.mkdir()
        copy = folder / self.tarball.name
        copy.write_bytes(change(self.tarball.read_bytes()))
        signature = self.tarball.name + ".sig"
        (folder / signature).write_bytes((self.tarball.parent / signature).read_bytes())
        return copy

    def member(self, name):
        with tarfile.open(self.tarball) as tar:
            return tar.extractfile(f"{self.tarball.name.removesuffix('.tar.gz')}/{name}").read()

    def test_what_was_signed_is_accepted(self):
        said = self.verify(self.tarball, self.signers)
        self.assertEqual(said.returncode, 0, said)

    def test_any_changed_byte_is_noticed(self):
        size = self.tarball.stat().st_size
        for at in (0, 9, size // 2, size - 1):

            def flip(content, at=at):
                return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

            self.refused(self.copy(f"flipped-{at}", flip), self.signers, "changed since")

    def test_what_is_cut_short_or_grown_is_noticed(self):
        self.refused(self.copy("short", lambda content: content[:-1]), self.signers, "changed since")
        self.refused(self.copy("grown", lambda content: content + b"\0"), self.signers, "changed since")

    def test_a_stranger_s_signature_is_no_release(self):
        stranger, _ = make_key(self.folder, "stranger")
        copy = self.copy("signed-by-a-stranger")
        build.sign(copy, stranger)
        self.refused(copy, self.signers, "not signed by a key in")

    def test_a_signature_of_the_right_key_for_another_purpose_is_no_release(self):
        copy = self.copy("signed-as-mail")
        signature = copy.with_name(copy.name + ".sig")
        signature.unlink()
        subprocess.run(
            ["ssh-keygen", "-q", "-Y", "sign", "-f", self.key, "-n", "email", copy], check=True, capture_output=True
        )
        self.refused(copy, self.signers, "not signed by a key in")

    def test_a_missing_signature_says_what_is_needed(self):
        copy = self.copy("unsigned")
        copy.with_name(copy.name + ".sig").unlink()
        self.refused(copy, self.signers, "allowed signers")

    def test_the_same_inputs_give_the_same_bytes(self):
        again = build.release(self.programs, self.folder / "two", self.key)
        self.assertEqual(self.tarball.read_bytes(), again.read_bytes())

    def test_every_file_has_its_sum_and_an_owner_of_zero(self):
        sums = dict(reversed(line.split("  ")) for line in self.member("SHA256SUMS").decode().splitlines())
        with tarfile.open(self.tarball) as tar:
            for info in tar:
                self.assertEqual((info.uid, info.gid), (0, 0), info.name)
                self.assertIn(info.mode, (0o644, 0o755), info.name)
                name = info.name.partition("/")[2]
                if info.isfile() and name != "SHA256SUMS":
                    self.assertEqual(sums.pop(name), hashlib.sha256(tar.extractfile(info).read()).hexdigest())
        self.assertEqual(sums, {})

    def test_a_release_carries_what_it_takes_to_install_it(self):
        for name in ("bin/izar", "bin/izar-controller", "bin/izar-agent", "ansible/release/verify", "LICENSE"):
            self.assertTrue(self.member(name), name)

    def test_the_bill_of_materials_is_whole(self):
        bill = json.load(io.BytesIO(self.member("sbom.cdx.json")))
        self.assertEqual((bill["bomFormat"], bill["specVersion"]), ("CycloneDX", "1.5"))
        self.assertRegex(bill["serialNumber"], r"^urn:uuid:[0-9a-f-]{36}$")
        components = {component["bom-ref"]: component for component in bill["components"]}
        self.assertEqual(len(components), len(bill["components"]), "no component stands twice")
        for component in components.values():
            self.assertTrue(component.get("licenses"), component)
        bare = {name for name, component in components.items() if "hashes" not in component}
        local = {f"pkg:cargo/{name}" for name in ("izar-agent", "izar-common", "izar-controller", "cubecl-llvm")}
        self.assertEqual({name.partition("@")[0] for name in bare}, local, "what comes from a registry has its sum")
        names = {component["name"] for component in components.values()}
        self.assertLessEqual({"tokio", "raft", "redb", "quinn", "rustls", "burn-flex", "izar-common"}, names)
        self.assertFalse(names & {"izar-tests", "windows-sys", "proptest"}, "only what the programs here are made of")
        main = bill["metadata"]["component"]["bom-ref"]
        for dependency in bill["dependencies"]:
            self.assertIn(dependency["ref"], {main, *components})
            self.assertLessEqual(set(dependency["dependsOn"]), set(components))

    def test_a_program_that_was_not_built_is_named(self):
        empty = self.folder / "empty"
        empty.mkdir()
        with self.assertRaisesRegex(build.Refused, "izar is not there; build everything first"):
            build.release(empty, self.folder / "three", self.key)

    def test_a_missing_key_says_how_to_make_one(self):
        with self.assertRaisesRegex(build.Refused, "ssh-keygen -t ed25519"):
            build.release(self.programs, self.folder / "four", self.folder / "nowhere")


if __name__ == "__main__":
    unittest.main()

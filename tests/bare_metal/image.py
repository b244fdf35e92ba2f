"""The image of a bare server: Debian with systemd, SSH and Python, as an installer leaves it, and nothing of Izar.

Made by debootstrap and kept as a tarball in the user's cache folder, under a name of its recipe, so that a change of the
recipe makes a new one and a fresh engine needs no network. Ansible is in it for the one host that plays the control node:
Debian's own, the oldest that the roles promise to work with.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile

from engine import docker, install

SUITE = "bookworm"
PACKAGES = "systemd,systemd-sysv,dbus,python3,openssh-server,sudo,iproute2,ca-certificates"
# By apt, since debootstrap does not resolve what they need.
CONTROL = ("ansible-core", "openssh-client")
# What wants hardware, a console or a login; none is in a container.
MASKED = ("getty.target", "console-getty.service", "systemd-logind.service", "systemd-udevd.service")


def cache():
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(base) / "izar" / "bare-metal"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def name():
    recipe = "\n".join((SUITE, PACKAGES, *CONTROL, *MASKED))
    return "izar/host:" + hashlib.sha256(recipe.encode()).hexdigest()[:12]


def ensure():
    """Gives the image's name; makes it where it is missing."""
    image = name()
    if docker("images", "--quiet", image):
        return image
    tarball = cache() / f"host-{image.rpartition(':')[2]}.tar"
    if not tarball.exists():
        build(tarball)
    docker("import", "-c", "ENV container=docker", "-c", 'CMD ["/lib/systemd/systemd"]', tarball, image)
    return image


def build(tarball):
    if not shutil.which("debootstrap"):
        install("debootstrap")
    with tempfile.TemporaryDirectory(prefix="izar-host-") as folder:
        root = pathlib.Path(folder) / "root"
        quiet = {"check": True, "stdout": subprocess.DEVNULL}
        subprocess.run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, root], **quiet)
        apt = ["chroot", root, "apt-get", "install", "-q", "-y", "--no-install-recommends", *CONTROL]
        subprocess.run(apt, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, stderr=subprocess.DEVNULL, **quiet)
        subprocess.run(["chroot", root, "systemctl", "mask", *MASKED], stderr=subprocess.DEVNULL, **quiet)
        # Each server makes its own.
        (root / "etc/machine-id").write_text("")
        for archive in (root / "var/cache/apt/archives").glob("*.deb"):
            archive.unlink()
        part = tarball.with_suffix(".part")
        subprocess.run(["tar", "-C", root, "-c", "-f", part, "."], check=True)
        part.rename(tarball)

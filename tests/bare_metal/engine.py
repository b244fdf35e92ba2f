"""The container engine: Debian's docker.io, installed and started by hand where no init does it.

Whether it can run is found out, never assumed: a machine that may not mount, or has no bridge, is told apart from a
test that fails (`Unavailable`).
"""

import os
import pathlib
import shutil
import subprocess
import time

# dockerd is ready in about 5 s; one that is not after this is not coming.
READY_S = 60
LOG = pathlib.Path("/var/log/izar-dockerd.log")


class Unavailable(Exception):
    """This machine cannot run the engine; says why."""


def docker(*arguments, check=True, **options):
    """Runs docker; gives what it printed."""
    options = {"text": True, "capture_output": True, **options}
    done = subprocess.run(["docker", *map(str, arguments)], check=False, **options)
    if check and done.returncode:
        said = done.stderr if isinstance(done.stderr, str) else (done.stderr or b"").decode(errors="replace")
        raise RuntimeError(f"docker {' '.join(map(str, arguments))}: {said.strip()}")
    return done.stdout.strip() if options["text"] and done.stdout else done.stdout


def answers():
    try:
        return subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def install(*packages):
    """Installs Debian packages."""
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
    subprocess.run(["apt-get", "update", "-q"], **quiet)
    subprocess.run(["apt-get", "install", "-q", "-y", "--no-install-recommends", *packages], **quiet)


def ensure():
    """Makes sure that an engine answers."""
    if answers():
        return
    if os.geteuid() != 0:
        raise Unavailable("no container engine answers, and starting one needs root")
    missing = [("dockerd", "docker.io"), ("iptables", "iptables"), ("debootstrap", "debootstrap")]
    missing = [package for program, package in missing if not shutil.which(program)]
    if missing:
        install(*missing)
    with LOG.open("ab") as log:
        # A session of its own: it outlives this run, so that the next one finds it and its images.
        daemon = subprocess.Popen(["dockerd"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        if answers():
            return
        if daemon.poll() is not None:
            break
        time.sleep(0.2)
    last = LOG.read_text(errors="replace").strip().splitlines()[-1:]
    raise Unavailable(f"dockerd does not run here ({' '.join(last)}; {LOG})")

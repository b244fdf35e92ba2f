"""What a release is made of: a CycloneDX 1.5 document from `cargo metadata` and Cargo.lock.

Pure. Only what ends up in the programs, or builds them: crates for tests and for other platforms are left out, since a
finding in one of those would be a false alarm at every site. The document is the same for the same inputs: its serial
number is a name of its content, its time that of the commit.
"""

import hashlib
import json
import time
import tomllib
import uuid

# The packages whose programs a release carries.
ROOTS = ("izar-controller", "izar-agent")


def document(metadata, lock, target, version, when):
    """The document as a dictionary. `metadata`: what `cargo metadata --filter-platform` says for `target`; `lock`: the
    text of Cargo.lock; `when`: Unix seconds."""
    packages = {package["id"]: package for package in metadata["packages"]}
    edges = needed(metadata)
    sums = {(p["name"], p["version"]): p.get("checksum") for p in tomllib.loads(lock)["package"]}
    main = f"pkg:generic/izar@{version}"
    roots = sorted(purl(packages[root]) for root in edges if packages[root]["name"] in ROOTS)
    body = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when)),
            "component": {
                "type": "application",
                "bom-ref": main,
                "name": "izar",
                "version": version,
                "purl": main,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
                "properties": [{"name": "izar:target", "value": target}],
            },
        },
        "components": sorted(
            (component(packages[identity], sums) for identity in edges), key=lambda entry: entry["bom-ref"]
        ),
        "dependencies": sorted(
            (
                {"ref": purl(packages[identity]), "dependsOn": sorted({purl(packages[to]) for to in others})}
                for identity, others in edges.items()
            ),
            key=lambda entry: entry["ref"],
        )
        + [{"ref": main, "dependsOn": roots}],
    }
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    body["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, 'izar:' + digest)}"
    return body


def needed(metadata):
    """Every package that the roots need, and what it needs itself: {id: [id]}."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    names = {package["id"]: package["name"] for package in metadata["packages"]}
    left = [identity for identity in nodes if names[identity] in ROOTS]
    edges = {}
    while left:
        identity = left.pop()
        if identity in edges:
            continue
        edges[identity] = [
            dependency["pkg"]
            for dependency in nodes[identity]["deps"]
            if any(kind["kind"] != "dev" for kind in dependency["dep_kinds"])
        ]
        left += edges[identity]
    return edges


def component(package, sums):
    entry = {
        "type": "library",
        "bom-ref": purl(package),
        "name": package["name"],
        "version": package["version"],
        "purl": purl(package),
        "scope": "required",
    }
    if package["license"]:
        # Cargo's older form of "or".
        entry["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    elif package["license_file"]:
        entry["licenses"] = [{"license": {"name": f"see {package['license_file']} in the package"}}]
    checksum = sums.get((package["name"], package["version"]))
    if checksum:
        entry["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    return entry


def purl(package):
    return f"pkg:cargo/{package['name']}@{package['version']}"

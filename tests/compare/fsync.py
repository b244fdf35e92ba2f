"""How long the disk takes to keep a page, which bounds every acknowledged write: percentiles of write and fsync.

    python3 tests/compare/fsync.py FOLDER [SECONDS]

A disk for a controller stays under 10 ms at the 99th percentile. It lies here and is no test, because it asserts nothing.
"""

import os
import sys
import tempfile
import time


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    seconds = float(sys.argv[2]) if len(sys.argv) == 3 else 15
    times = []
    with tempfile.TemporaryFile(dir=sys.argv[1]) as file:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            begun = time.perf_counter()
            os.pwrite(file.fileno(), b"x" * 4096, len(times) % 256 * 4096)
            os.fsync(file.fileno())
            times.append((time.perf_counter() - begun) * 1e3)
            # About as often as a controller at 300 requests/s.
            time.sleep(0.002)
    times.sort()
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1}
    found = (f"{name} {times[min(len(times) - 1, int(len(times) * share))]:.2f}" for name, share in shares.items())
    print(f"{len(times)} writes, ms: " + ", ".join(found))


if __name__ == "__main__":
    main()

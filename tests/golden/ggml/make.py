"""Makes blocks.json: random blocks of every ggml type that is read, and their values by ggml's own Python package.

Run with the PyPI package `gguf` 0.17 or newer: python make.py > blocks.json
"""

import json
import random
import struct

import gguf
import numpy as np

BLOCKS = 3
# Where a block holds scales in f16; random bits there would make most values huge or not finite.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}

random.seed(20)
out = {}
for name in ["F32", "F16", "BF16", *SCALES]:
    kind = gguf.GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    if name in SCALES:
        data = bytearray(random.randbytes(BLOCKS * size))
        for block in range(BLOCKS):
            for at in SCALES[name]:
                struct.pack_into("<e", data, block * size + at, random.uniform(-0.1, 0.1))
    else:
        numbers = [random.uniform(-3, 3) for _ in range(8)] + [0.0, -0.0, 1e-40, 6e-8, 65504.0]
        data = {
            "F32": lambda: struct.pack(f"<{len(numbers)}f", *numbers),
            "F16": lambda: struct.pack(f"<{len(numbers)}e", *numbers),
            "BF16": lambda: b"".join(struct.pack("<f", n)[2:] for n in numbers),
        }[name]()
    values = gguf.dequantize(np.frombuffer(bytes(data), dtype=np.uint8), kind) if name != "F32" else np.frombuffer(data, "<f4")
    values = np.asarray(values, dtype=np.float32).reshape(-1)
    out[name] = {"bytes": bytes(data).hex(), "f32": values.astype("<f4").tobytes().hex()}
print(json.dumps(out, indent=1))

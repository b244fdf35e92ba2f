"""llama.cpp, built for this CPU from its Python binding's source package, and the few of its calls that we measure.

The scripts of this folder begin under any Python 3.9 and call `enter()`, which goes on under an environment of its own
in the user's cache folder (built once, some minutes; `PIP_INDEX_URL` and the like are heeded). The rest of this module
works only there. It speaks to llama.cpp's C interface, because the binding's own loop would be measured otherwise.
"""

import ctypes
import hashlib
import os
import pathlib
import platform
import subprocess
import sys
import time

# The version is fixed, so that figures of two days compare; a new one is a change of this line and of the figures.
PACKAGES = ["llama-cpp-python==0.3.36", "gguf==0.19.0"]

# Its own defaults but for the CPU: every instruction set of this machine, no BLAS (slower for quantized weights).
CMAKE_ARGS = "-DGGML_NATIVE=ON -DGGML_BLAS=OFF -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF"

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache():
    """The folder that `izar` caches in."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(base) / "izar"


def cpu():
    """What a native build depends on: the machine's kind and its instruction sets."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.machine() + flags


def instruction_sets():
    """The vector instructions of this machine that matter for figures."""
    words = cpu().replace(":", " ").split()
    found = [w for w in words if w in ("avx2", "fma", "avx_vnni", "asimd") or w.startswith(("avx512", "amx"))]
    return " ".join(sorted(found)) or "none"


def enter():
    """Goes on in the environment; builds it if it is not there, or was built for another CPU or other versions."""
    key = hashlib.sha256("\n".join([*PACKAGES, CMAKE_ARGS, cpu(), platform.python_version()]).encode()).hexdigest()
    folder = cache() / "compare" / "llama.cpp"
    python, stamp = folder / "bin" / "python", folder / "built-for"
    if pathlib.Path(sys.prefix).resolve() == folder.resolve():
        return
    if not stamp.exists() or stamp.read_text() != key:
        print(f"building llama.cpp in {folder} (once, some minutes)", file=sys.stderr)
        stamp.unlink(missing_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", "--no-binary", "llama-cpp-python"]
        subprocess.run([*pip, *PACKAGES], check=True, env={**os.environ, "CMAKE_ARGS": CMAKE_ARGS})
        stamp.write_text(key)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.execv(python, [str(python), *sys.argv])


def small_model():
    """The small model, where `izar dev` and `izar bench engine` keep it."""
    path = cache() / "models" / MODEL
    if not path.exists():
        sys.exit(f"{path} is not there; `izar bench engine` or `izar dev` fetches it")
    return path


_low = None


def low():
    """The C interface, silent but for errors."""
    global _low
    if _low is None:
        from llama_cpp import llama_cpp

        @llama_cpp.llama_log_callback
        def log(level, text, _data):
            if level == 4:
                sys.stderr.write(text.decode(errors="replace"))

        llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        llama_cpp.kept_log = log
        _low = llama_cpp
    return _low


def system():
    """What llama.cpp says that it was built with."""
    return low().llama_print_system_info().decode().strip()


def quantize(source, kind, pure=False):
    """A copy of a GGUF file in another format, kept in the cache folder and made once."""
    lib = low()
    wanted = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
    source = pathlib.Path(source)
    stem = source.stem.rsplit(".", 1)[0]
    target = cache() / "compare" / f"{stem}.{kind}{'-pure' if pure else ''}.gguf"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        parameters = lib.llama_model_quantize_default_params()
        parameters.ftype, parameters.allow_requantize, parameters.pure = wanted, True, pure
        if lib.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(parameters)) != 0:
            sys.exit(f"llama.cpp could not quantize {source} to {kind}")
        part.rename(target)
    return target


class Model:
    """A loaded model. `load_s` is the time it took."""

    def __init__(self, path):
        lib = low()
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        begun = time.perf_counter()
        self.handle = lib.llama_model_load_from_file(str(path).encode(), parameters)
        self.load_s = time.perf_counter() - begun
        if not self.handle:
            sys.exit(f"llama.cpp cannot load {path}")
        self.vocab = lib.llama_model_get_vocab(self.handle)
        self.vocabulary = lib.llama_vocab_n_tokens(self.vocab)
        self.bytes = lib.llama_model_size(self.handle)

    def tokenize(self, text):
        """Tokens of a plain prompt; special tokens that are written out count as such."""
        lib, data = low(), text.encode()
        out = (lib.llama_token * (len(data) + 8))()
        count = lib.llama_tokenize(self.vocab, data, len(data), out, len(out), True, True)
        return list(out[:count])

    def ends(self, token):
        return low().llama_vocab_is_eog(self.vocab, token)

    def close(self):
        low().llama_model_free(self.handle)


class Context:
    """A context for some sequences, with a batch that is filled again for each call."""

    def __init__(self, model, sequences, each, threads, flash, unified):
        lib = low()
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = -(-each // 256) * 256 * sequences
        parameters.n_batch = 2048
        parameters.n_ubatch = 512
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = 1 if flash else 0
        parameters.kv_unified = unified
        parameters.no_perf = True
        self.model = model
        self.handle = lib.llama_init_from_model(model.handle, parameters)
        if not self.handle:
            sys.exit("llama.cpp cannot make a context")
        self.room = 2048
        self.batch = lib.llama_batch_init(self.room, 0, 1)
        self.memory = lib.llama_get_memory(self.handle)

    def decode(self, rows):
        """Computes rows of (token, position, sequence, logits wanted); returns the seconds that llama.cpp took."""
        lib, batch = low(), self.batch
        if len(rows) > self.room:
            raise ValueError("more rows than a batch holds")
        for at, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0], batch.logits[at] = sequence, wanted
        batch.n_tokens = len(rows)
        begun = time.perf_counter()
        answer = lib.llama_decode(self.handle, batch)
        lib.llama_synchronize(self.handle)
        seconds = time.perf_counter() - begun
        if answer != 0:
            sys.exit(f"llama.cpp cannot decode: {answer}")
        return seconds

    def logits(self, row):
        """The logits of a row of the last call that wanted them."""
        import numpy

        pointer = low().llama_get_logits_ith(self.handle, row)
        return numpy.ctypeslib.as_array(pointer, shape=(self.model.vocabulary,))

    def forget(self, sequence=None, start=0):
        """Forgets a sequence from a position on, or everything."""
        if sequence is None:
            low().llama_memory_clear(self.memory, False)
        else:
            low().llama_memory_seq_rm(self.memory, sequence, start, -1)

    def close(self):
        low().llama_batch_free(self.batch)
        low().llama_free(self.handle)

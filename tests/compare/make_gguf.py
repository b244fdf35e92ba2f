"""Makes a GGUF file of Qwen2-1.5B's shape with random weights: for speed alone, where memory bandwidth rules.

    python3 tests/compare/make_gguf.py /tmp/qwen2-1.5b-shape.Q4_0.gguf     # 870 MB; Q8_0: 1.65 GB

The same options give the same bytes. All matrices are in the one format (llama.cpp's `--pure`), embeddings and head are
one table. The tokenizer is valid and means nothing: bytes and merges of bytes.
"""

import argparse
import pathlib

import llamacpp

# Qwen2-1.5B's config.json.
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY = 1536, 28, 12, 2, 128, 8960, 151936
CONTEXT = 32768

# Elements of a block, and the spread of weights: that of trained ones.
BLOCK, SPREAD = 32, 0.02


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--format", choices=["Q4_0", "Q8_0"], default="Q4_0")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer make a smaller file of the same kind")
    return parser.parse_args()


def matrix(random, rows, columns, form):
    """Random blocks of a format: a scale in half precision, then the quants."""
    import numpy

    blocks = rows * columns // BLOCK
    quants, deviation = (16, 4.6) if form == "Q4_0" else (32, 73.9)
    out = numpy.empty((blocks, 2 + quants), dtype=numpy.uint8)
    scales = random.normal(SPREAD / deviation, SPREAD / deviation / 8, blocks).astype(numpy.float16)
    out[:, :2] = scales.view(numpy.uint8).reshape(blocks, 2)
    out[:, 2:] = random.integers(0, 256, (blocks, quants), dtype=numpy.uint8)
    return out.reshape(rows, -1)


def byte_letters():
    """How GPT-2's tokenizer writes the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, extra = {}, 256
    for byte in range(256):
        letters[byte] = chr(byte) if byte in plain else chr(extra)
        extra += byte not in plain
    return [letters[b] for b in range(256)]


def tokenizer(writer, gguf):
    letters = byte_letters()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens, merges = list(letters), []
    wanted = VOCABULARY - len(special)
    # Pairs of bytes, then pairs with one more byte.
    for left in [*letters, *(a + b for a in letters for b in letters)]:
        for right in letters:
            if len(tokens) < wanted:
                tokens.append(left + right)
                merges.append(f"{left} {right}")
    types = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * len(special)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens + special)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(VOCABULARY - 1)
    writer.add_bos_token_id(VOCABULARY - 3)
    writer.add_add_bos_token(False)


def main():
    llamacpp.enter()
    import gguf
    import numpy

    options = arguments()
    kind = gguf.GGMLQuantizationType[options.format]
    random = numpy.random.Generator(numpy.random.PCG64(1))
    writer = gguf.GGUFWriter(options.file, "qwen2")
    writer.add_name("random weights of Qwen2-1.5B's shape")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{options.format}"])
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(options.layers)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    tokenizer(writer, gguf)
    shapes = [("token_embd.weight", VOCABULARY, HIDDEN), ("output_norm.weight", HIDDEN)]
    for layer in range(options.layers):
        parts = [
            ("attn_norm.weight", HIDDEN),
            ("attn_q.weight", HEADS * HEAD_DIM, HIDDEN),
            ("attn_q.bias", HEADS * HEAD_DIM),
            ("attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN),
            ("attn_k.bias", KV_HEADS * HEAD_DIM),
            ("attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN),
            ("attn_v.bias", KV_HEADS * HEAD_DIM),
            ("attn_output.weight", HIDDEN, HEADS * HEAD_DIM),
            ("ffn_norm.weight", HIDDEN),
            ("ffn_gate.weight", INTERMEDIATE, HIDDEN),
            ("ffn_up.weight", INTERMEDIATE, HIDDEN),
            ("ffn_down.weight", HIDDEN, INTERMEDIATE),
        ]
        shapes += [(f"blk.{layer}.{name}", *shape) for name, *shape in parts]
    # Directory first, then one tensor after another: the file never lies in memory as a whole.
    for name, *shape in shapes:
        if len(shape) == 2:
            stored = gguf.quant_shape_to_byte_shape(shape, kind)
            size = stored[0] * stored[1]
            writer.add_tensor_info(name, stored, numpy.dtype(numpy.uint8), size, raw_dtype=kind)
        else:
            writer.add_tensor_info(name, shape, numpy.dtype(numpy.float32), shape[0] * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, *shape in shapes:
        if len(shape) == 2:
            writer.write_tensor_data(matrix(random, *shape, options.format))
        elif name.endswith("norm.weight"):
            writer.write_tensor_data(numpy.ones(shape, dtype=numpy.float32))
        else:
            writer.write_tensor_data(random.normal(0, SPREAD, shape).astype(numpy.float32))
    writer.close()
    print(f"{options.file}: {options.file.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()

//! Gives what makes a tokenizer of GGUF metadata or of JSON whatever the fuzzer thinks of.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::tokenizer(bytes));

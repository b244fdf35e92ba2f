//! Gives the reader of GGUF files whatever the fuzzer thinks of.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::gguf(bytes));

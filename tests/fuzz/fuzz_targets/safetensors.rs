//! Gives the reader of safetensors files and of their index whatever the fuzzer thinks of.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::safetensors(bytes));

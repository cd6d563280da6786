#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| memferry_fuzz::snapshot_mappings(data));

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| migrate_proto_fuzz::hello(data));

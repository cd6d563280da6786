#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| memferry_fuzz::nbd_words(data));

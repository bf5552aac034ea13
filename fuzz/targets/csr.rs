#![no_main]

// Certificate signing requests: read or refused.
libfuzzer_sys::fuzz_target!(|input: &[u8]| drop(weft_control::ca::signer::proved_key(input)));

//! A tokenizer of a stranger: refused by name, or it encodes and decodes.
#![no_main]

use std::sync::LazyLock;

use aha_core::tokenizer::{SpecialTokens, Tokenizer};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder for a model"));

fuzz_target!(|bytes: &[u8]| {
    std::fs::write(FOLDER.path().join("tokenizer.json"), bytes).expect("a writable folder");
    let Ok(tokenizer) = Tokenizer::load(FOLDER.path()) else { return };
    if let Ok(tokens) = tokenizer.encode("numbers: 3 7 target: 21 \u{1f600}") {
        drop(tokenizer.decode(&tokens, SpecialTokens::Skip));
    }
});

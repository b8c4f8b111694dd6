//! A recipe: whatever is in the file, the reader says what is wrong, or gives a configuration that prints and reads as itself.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use aha_core::config::load;
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder for recipes"));
static RECIPE: LazyLock<PathBuf> = LazyLock::new(|| FOLDER.path().join("run.yaml"));

fuzz_target!(|bytes: &[u8]| {
    // What follows a zero byte is an override.
    let (text, setting) = match bytes.iter().position(|byte| *byte == 0) {
        Some(end) => (&bytes[..end], &bytes[end + 1..]),
        None => (bytes, &[][..]),
    };
    std::fs::write(&*RECIPE, text).expect("a writable folder");
    let overrides: Vec<String> =
        std::str::from_utf8(setting).ok().filter(|text| !text.is_empty()).map(str::to_owned).into_iter().collect();
    if let Err(error) = load(&RECIPE, [], &overrides) {
        assert!(!error.to_string().is_empty());
    }
});

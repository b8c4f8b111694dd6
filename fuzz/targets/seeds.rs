//! First inputs that are made when a target starts, because they follow from the code.

use std::path::Path;

/// Writes inputs into the folder that `AHA_FUZZ_SEEDS` names, if it does; libFuzzer reads it afterwards.
pub fn write(seeds: impl Iterator<Item = (String, Vec<u8>)>) {
    let Some(folder) = std::env::var_os("AHA_FUZZ_SEEDS") else { return };
    for (name, bytes) in seeds {
        std::fs::write(Path::new(&folder).join(name), bytes).expect("a writable folder");
    }
}

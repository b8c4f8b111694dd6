//! Which libtorch this process has loaded.

use std::path::PathBuf;

use crate::shim::{self, aha_torch_config};

/// The library by whose name libtorch is found among what a process has mapped.
const LIBRARY: &str = "/libtorch_cpu.so";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Libtorch {
    /// Such as 2.11.0.
    pub version: String,
    /// The CUDA version that it was built for; none for a CPU build.
    pub cuda: Option<String>,
    /// The loaded `libtorch_cpu.so`, where the system tells.
    pub path: Option<PathBuf>,
}

/// What libtorch says of itself.
#[must_use]
pub fn libtorch() -> Libtorch {
    // SAFETY: the shim returned the text just now; it is never null, and reads as a message.
    let config = unsafe { shim::check(aha_torch_config()) }.err().unwrap_or_default();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    Libtorch {
        version: setting(&config, "TORCH_VERSION").unwrap_or_else(|| "unknown".to_owned()),
        cuda: setting(&config, "CUDA_VERSION"),
        path: mapped(&maps),
    }
}

/// `NAME=value` of the build settings, which commas separate.
fn setting(config: &str, name: &str) -> Option<String> {
    let settings = config.split(',').filter_map(|setting| setting.trim().split_once('='));
    let mut values = settings.filter(|(key, _)| key.rsplit(' ').next() == Some(name)).map(|(_, value)| value.trim());
    values.next().filter(|value| !value.is_empty()).map(str::to_owned)
}

/// The file of the library, of lines as `/proc/self/maps` has them.
fn mapped(maps: &str) -> Option<PathBuf> {
    let paths = maps.lines().filter_map(|line| line.find('/').map(|start| &line[start..]));
    paths.into_iter().find(|path| path.contains(LIBRARY)).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaded_libtorch_has_a_version_and_a_place() {
        let libtorch = libtorch();
        assert!(libtorch.version.starts_with("2."), "{libtorch:?}");
        assert!(libtorch.path.is_some_and(|path| path.is_file()));
        assert_eq!(libtorch.cuda.is_some(), crate::comm::nccl_built());
    }

    #[test]
    fn settings_are_read_by_their_whole_names() {
        let config = "PyTorch built with:\n  - GCC 13.3\n  - Build settings: BUILD_TYPE=Release, CUDA_VERSION=13.0, \
                      TORCH_VERSION=2.11.0, MY_TORCH_VERSION=1, USE_CUDA=ON, \n";
        assert_eq!(setting(config, "TORCH_VERSION").as_deref(), Some("2.11.0"));
        assert_eq!(setting(config, "CUDA_VERSION").as_deref(), Some("13.0"));
        assert_eq!(setting(config, "BUILD_TYPE").as_deref(), Some("Release"));
        assert_eq!(setting(config, "VERSION"), None);
    }
}

//! Every recipe in configs/ is read and validated.

use aha_core::config;
use aha_tests::golden::workspace;

#[test]
fn every_recipe_is_valid() {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(workspace().join("configs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            let config = config::load(&path, [], &[]).unwrap_or_else(|error| panic!("{error}"));
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            assert_eq!(config.run.name, name, "a run is called like its recipe");
            names.push(name);
        }
    }
    for expected in [
        "countdown-tiny",
        "smollm2-135m-countdown",
        "qwen2.5-0.5b-countdown",
        "qwen2.5-1.5b-countdown",
        "qwen2.5-3b-countdown",
        "qwen2.5-3b-countdown-lora",
    ] {
        assert!(names.iter().any(|name| name == expected), "{expected} is missing among {names:?}");
    }
}

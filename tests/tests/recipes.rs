//! Every recipe in configs/ is read and validated, fits the GPUs that it names, and can be launched; what docs/recipes.md
//! tells to run does run.

use aha_core::config::{self, DeviceKind, RunConfig};
use aha_tests::binary::{check_refused, check_runs};
use aha_tests::golden::workspace;
use serde_json::Value;

fn recipes() -> Vec<(String, RunConfig)> {
    let mut recipes = Vec::new();
    for entry in std::fs::read_dir(workspace().join("configs")).expect("configs/ can be read") {
        let path = entry.expect("configs/ can be read").path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            let config = config::load(&path, [], &[]).unwrap_or_else(|error| panic!("{error}"));
            let name = path.file_stem().and_then(|stem| stem.to_str()).expect("a recipe has a name").to_owned();
            assert_eq!(config.run.name, name, "a run is called like its recipe");
            recipes.push((name, config));
        }
    }
    recipes
}

#[test]
fn every_recipe_is_valid() {
    let recipes = recipes();
    for expected in [
        "countdown-qlora-2gpu",
        "countdown-tiny",
        "gsm8k-smollm2",
        "gsm8k-smollm2-sft",
        "mini-r1-countdown",
        "oat-zero-1.5b",
        "oat-zero-7b",
        "qwen2.5-0.5b-countdown",
        "qwen2.5-1.5b-countdown",
        "qwen2.5-3b-countdown",
        "qwen2.5-3b-countdown-lora",
        "r1-zero-0.5b",
        "r1-zero-1.5b",
        "smollm2-135m-countdown",
        "tinyzero-countdown",
    ] {
        assert!(recipes.iter().any(|(name, _)| name == expected), "{expected} is missing");
    }
}

#[test]
fn every_recipe_fits_the_gpus_that_it_names() {
    let mut planned = 0;
    for (name, config) in recipes() {
        let Some(memory) = config.launch.device_memory_gib else { continue };
        let path = format!("configs/{name}.yaml");
        let said = check_runs(&workspace(), &["plan", &path]);
        let verdicts: Vec<&str> = said.lines().filter(|line| line.contains(&format!(" fits {memory} GiB"))).collect();
        assert_eq!(verdicts.len(), if config.launch.colocate { 1 } else { 2 }, "{name}: {said}");
        let of_a_tenth = (memory / 10.0).to_string();
        check_refused(&workspace(), &["plan", &path, "--device-memory", &of_a_tenth], &["does not fit"]);
        planned += 1;
    }
    assert!(planned >= 7, "{planned} recipes name the memory of their GPUs");
}

#[test]
fn a_dry_run_shows_every_process_of_a_recipe() {
    for (name, config) in recipes().into_iter().filter(|(name, _)| !name.ends_with("-sft")) {
        let said = check_runs(&workspace(), &["launch", &format!("configs/{name}.yaml"), "--dry-run", "--json"]);
        let dry_run: Value = serde_json::from_str(&said).unwrap();
        let expect: Value = serde_json::to_value(&config).unwrap();
        assert_eq!(dry_run["config"]["train"], expect["train"], "{name}");
        let processes = dry_run["processes"].as_array().unwrap();
        let count = |role: &str| {
            let is_role = |process: &&Value| process["name"].as_str().unwrap().starts_with(role);
            processes.iter().filter(is_role).count()
        };
        let num_trainers = config.launch.trainers.max(1);
        let num_generators = if config.launch.colocate { 0 } else { config.launch.generators };
        assert_eq!((count("trainer"), count("generator")), (num_trainers, num_generators), "{name}");
        if config.model.device == DeviceKind::Cuda && num_generators > 0 {
            // Each generator has the GPU after those of the trainers.
            let gpu = &processes[0]["environment"]["CUDA_VISIBLE_DEVICES"];
            assert_eq!(gpu, num_trainers.to_string().as_str(), "{name}");
        }
    }
}

#[test]
fn what_the_page_on_recipes_tells_to_try_works() {
    let page = std::fs::read_to_string(workspace().join("docs/recipes.md")).unwrap();
    let commands =
        page.lines().filter_map(|line| line.strip_prefix("aha ")).map(|line| line.split(" #").next().unwrap());
    let mut tried = 0;
    for command in commands.filter(|command| command.starts_with("plan ") || command.contains("--dry-run")) {
        check_runs(&workspace(), &command.split_whitespace().collect::<Vec<_>>());
        tried += 1;
    }
    assert_eq!(tried, 2, "a plan and a dry run");
    // Every recipe has its lines there.
    for (name, _) in recipes() {
        let family = name.trim_end_matches("-sft");
        let is_told = page.contains(family)
            || name.starts_with("qwen2.5-") && page.contains("`qwen2.5-{0.5b,1.5b,3b}-countdown`");
        assert!(is_told, "docs/recipes.md says nothing of {name}");
    }
}

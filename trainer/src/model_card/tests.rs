use std::path::Path;

use aha_core::config::RewardSpec;
use serde_json::Value;

use super::*;

/// A run's folder with two steps and two evaluations, changed by `change`.
fn run(root: &Path, change: impl FnOnce(&mut RunConfig)) -> PathBuf {
    let mut config = RunConfig::default();
    config.run.name = "test".to_owned();
    config.run.output_dir = root.to_owned();
    config.model.path = "/cache/models--Qwen--Qwen2.5-0.5B/snapshots/ab12".into();
    config.data.prompt.user = "make {{ target }} of {{ nums }}: ```".to_owned();
    config.rewards = vec![RewardSpec::of("equation")];
    change(&mut config);
    let run = config.run_dir();
    std::fs::create_dir_all(run.join("model")).unwrap();
    std::fs::create_dir_all(run.join("checkpoints/step-1")).unwrap();
    std::fs::write(run.join("config.yaml"), serde_saphyr::to_string(&config).unwrap()).unwrap();
    let steps = "{\"step\":1,\"reward\":0.25,\"loss\":0.1,\"step_time\":2,\"num_tokens\":30}\n{\"step\":2,\"reward\":0.75,\
                 \"loss\":null,\"step_time\":3,\"num_tokens\":40}\n{\"step\":3,\"rew";
    std::fs::write(run.join("metrics.jsonl"), steps).unwrap();
    let evaluations = "{\"step\":0,\"accuracy\":0.125,\"prompts\":8,\"mean_length\":9}\n{\"step\":2,\"accuracy\":0.5,\"prompts\":8,\
                       \"mean_length\":9}\n";
    std::fs::write(run.join("evaluations.jsonl"), evaluations).unwrap();
    run
}

fn card(folder: &Path) -> (Value, String) {
    ModelCard::of(folder).unwrap().unwrap().write(folder).unwrap();
    let text = std::fs::read_to_string(folder.join("README.md")).unwrap();
    let (matter, rest) = text.strip_prefix("---\n").unwrap().split_once("\n---\n").unwrap();
    (serde_saphyr::from_str(matter).unwrap(), rest.to_owned())
}

#[test]
fn the_hub_reads_base_tags_and_accuracy() {
    let folder = tempfile::tempdir().unwrap();
    let (matter, _) = card(&run(folder.path(), |_| {}).join("model"));
    assert_eq!(matter["library_name"], "transformers");
    assert_eq!(matter["base_model"], "Qwen/Qwen2.5-0.5B");
    assert_eq!(matter["tags"], serde_json::json!(["aha", "grpo", "reinforcement-learning"]));
    assert_eq!(matter["model-index"][0]["results"][0]["metrics"][0]["value"], 0.5);
    assert!(matter.get("license").is_none() && matter.get("datasets").is_none(), "{matter}");

    let (matter, text) = card(
        &run(folder.path(), |config| {
            config.run.name = "other".to_owned();
            config.model.path = "/home/someone/models/mine".into();
            config.data.source = DataSource::File;
            config.data.path = Some("/cache/datasets--o--d/snapshots/ab12/data".into());
        })
        .join("model"),
    );
    assert!(matter.get("base_model").is_none(), "{matter}");
    assert_eq!(matter["datasets"], serde_json::json!(["o/d"]));
    assert!(text.contains("from `mine`, on o/d."), "{text}");
}

#[test]
fn a_reader_sees_figures_a_curve_and_how_to_load_it() {
    let folder = tempfile::tempdir().unwrap();
    let model = run(folder.path(), |config| config.hub.model_id = Some("me/mine".to_owned())).join("model");
    let (_, text) = card(&model);
    for expect in [
        "| reward, steps 1 and 2 | 0.2500 | 0.7500 |",
        "| accuracy on 8 held-out prompts, after steps 0 and 2 | 12.5 % | 50.0 % |",
        "2 steps, 70 tokens, 5 s.",
        "![reward of every step](curve.svg)",
        "AutoModelForCausalLM.from_pretrained(\"me/mine\")",
        "vllm serve me/mine",
        "\n````yaml\n",
    ] {
        assert!(text.contains(expect), "no {expect:?} in {text}");
    }
    assert!(std::fs::read_to_string(model.join("curve.svg")).unwrap().contains("<polyline"));

    std::fs::write(model.join("adapter_config.json"), "{}").unwrap();
    let (matter, text) = card(&model);
    assert_eq!(matter["library_name"], "peft");
    assert!(text.contains("vllm serve Qwen/Qwen2.5-0.5B --enable-lora --lora-modules trained=me/mine"), "{text}");
}

#[test]
fn the_recipe_says_nothing_of_the_machines() {
    let folder = tempfile::tempdir().unwrap();
    let (_, text) = card(
        &run(folder.path(), |config| {
            config.security.token_file = Some("/etc/secret-token".into());
            config.generator.addresses = vec!["10.1.2.3:50051".to_owned()];
            config.train.learning_rate = 3.5e-5;
        })
        .join("model"),
    );
    for hidden in ["secret-token", "10.1.2.3", "/cache/", &folder.path().display().to_string()] {
        assert!(!text.contains(hidden), "{hidden} is in {text}");
    }
    for shown in ["path: Qwen/Qwen2.5-0.5B", "learning_rate: ", "make {{ target }}"] {
        assert!(text.contains(shown), "no {shown:?} in {text}");
    }
}

#[test]
fn a_checkpoint_is_described_as_of_its_step() {
    let folder = tempfile::tempdir().unwrap();
    let (matter, text) = card(&run(folder.path(), |_| {}).join("checkpoints/step-1"));
    assert!(text.contains("1 steps, 30 tokens") && !text.contains("curve.svg"), "{text}");
    assert_eq!(matter["model-index"][0]["results"][0]["metrics"][0]["value"], 0.125);
    assert!(ModelCard::of(folder.path()).unwrap().is_none(), "no run");
}

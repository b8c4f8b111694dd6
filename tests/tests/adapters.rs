//! Adapters against PEFT, both ways, and through whole runs: what the generator serves is base and adapters merged.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "what is skipped is said")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use aha_core::config::{BaseQuantization, InitLoraWeights, Lora};
use aha_nn::forward;
use aha_nn::lora::{AdapterSpec, Merged, fresh_adapters, peft};
use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::load_weights;
use aha_nn::weights::Weights;
use aha_tests::binary::{check_refused, check_runs};
use aha_tests::golden::{self, GoldenModel, largest_difference, workspace};
use aha_tests::{formula, small_run};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

const CPU: (usize, Device) = (1, Device::Cpu);
/// Of log-probs in fp32.
const TOLERANCE: f32 = 1e-4;

/// Models with adapters that PEFT wrote, and what they are here.
fn peft_s_adapters() -> [(&'static str, Lora); 2] {
    let targets = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    let qwen2 = Lora {
        r: 2,
        lora_alpha: 8.0,
        lora_dropout: 0.1,
        target_modules: targets(&["q_proj", "v_proj"]),
        ..Lora::default()
    };
    let init_lora_weights = InitLoraWeights::Gaussian;
    let llama = Lora { r: 3, lora_alpha: 4.0, use_rslora: true, init_lora_weights, ..Lora::default() };
    [("qwen2", qwen2), ("llama", llama)]
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

#[test]
fn adapters_that_peft_wrote_compute_here_what_they_compute_there() {
    for (name, lora) in peft_s_adapters() {
        let (golden, folder) = (GoldenModel::load(name), golden::folder().join("peft").join(name));
        let opened = peft::open(&folder, &golden.config).unwrap();
        assert_eq!(opened.spec, AdapterSpec::new(&lora).unwrap());
        let (base, adapters) =
            (formula::weights(&golden.config, Device::Cpu), opened.load(&golden.config, CPU).unwrap());
        let merged = Merged { base: &base, spec: &opened.spec, adapters: &adapters };
        let logprobs = forward::score(&golden.config, &merged, &golden.tokens);
        let difference = largest_difference(&logprobs, &numbers(&read(&folder.join("logprobs.json"))));
        assert!(difference < TOLERANCE, "{name}: {difference:e}");
        assert!(largest_difference(&logprobs, &golden.logprobs) > 0.1, "{name}: the adapters change nothing");
    }
}

#[test]
fn what_is_written_here_has_the_fields_that_peft_writes() {
    for (name, lora) in peft_s_adapters() {
        let (golden, theirs) = (GoldenModel::load(name), golden::folder().join("peft").join(name));
        let folder = tempfile::tempdir().unwrap();
        let adapters = peft::open(&theirs, &golden.config).unwrap().load(&golden.config, CPU).unwrap();
        peft::save(folder.path(), &Path::new("models").join(name), &lora, &adapters).unwrap();
        let fields = |folder: &Path| {
            let mut fields = read(&folder.join("adapter_config.json"));
            // A set there.
            let mut targets: Vec<_> = fields["target_modules"].as_array().unwrap().clone();
            targets.sort_by_key(Value::to_string);
            fields["target_modules"] = targets.into();
            fields
        };
        assert_eq!(fields(folder.path()), fields(&theirs), "{name}");
        let tensors = |folder: &Path| {
            let mut tensors = Tensor::read_safetensors(folder.join("adapter_model.safetensors")).unwrap();
            tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
            tensors
        };
        let (ours, theirs) = (tensors(folder.path()), tensors(&theirs));
        assert_eq!(ours.len(), theirs.len());
        for ((our_name, ours), (their_name, theirs)) in ours.iter().zip(&theirs) {
            assert!(our_name == their_name && ours.kind() == theirs.kind() && ours.equal(theirs), "{our_name}");
        }
    }
}

/// The interpreter that has PEFT: of `cargo xtask peers`, or the one that `AHA_PEERS_PYTHON` names.
fn python_with_peft() -> Option<PathBuf> {
    let installed = || workspace().join(".peers/bin/python");
    let python = std::env::var_os("AHA_PEERS_PYTHON").map_or_else(installed, PathBuf::from);
    let found = Command::new(&python).args(["-c", "import peft"]).stderr(Stdio::null()).status();
    if found.is_ok_and(|status| status.success()) {
        return Some(python);
    }
    println!("skipped: {} has no PEFT; `cargo xtask peers` installs it", python.display());
    None
}

#[test]
fn peft_computes_with_our_adapters_what_we_compute() {
    let Some(python) = python_with_peft() else { return };
    for (name, lora) in peft_s_adapters() {
        let golden = GoldenModel::load(name);
        let [model, folder] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        golden.write(model.path());
        let spec = AdapterSpec::new(&lora).unwrap();
        let adapters = fresh_adapters(&golden.config, &spec, (InitLoraWeights::Gaussian, 3), CPU);
        shift(&adapters);
        peft::save(folder.path(), model.path(), &lora, &adapters).unwrap();
        let mut child = Command::new(&python)
            .arg(golden::folder().join("check_peft.py"))
            .args([model.path(), folder.path()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(serde_json::to_string(&golden.tokens).unwrap().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let theirs = numbers(&serde_json::from_slice(&output.stdout).unwrap());
        let base = formula::weights(&golden.config, Device::Cpu);
        let ours =
            forward::score(&golden.config, &Merged { base: &base, spec: &spec, adapters: &adapters }, &golden.tokens);
        let difference = largest_difference(&ours, &theirs);
        println!("{name}: aha against PEFT {difference:e}");
        assert!(difference < TOLERANCE, "{name}: {difference:e}");
        assert!(largest_difference(&ours, &golden.logprobs) > 0.1, "{name}: the adapters change nothing");
    }
}

/// Adds something to every matrix, B too.
fn shift(adapters: &Weights) {
    for unit_idx in 0..adapters.num_units() {
        for mut view in adapters.views(unit_idx) {
            let noise = (Tensor::arange(view.numel() as i64, (Kind::Float, Device::Cpu)) * 0.7).sin();
            tch::no_grad(|| view += noise.view_as(&view) * 0.1);
        }
    }
}

/// A small run on a base that is there. Random completions have no reward to learn from; entropy and lengths move them.
const LORA: [&str; 8] = [
    "model.random_init=false",
    "lora.r=4",
    "lora.lora_alpha=8",
    "train.learning_rate=1e-2",
    "train.beta=0.01",
    "train.entropy_coef=0.05",
    "train.soft_punish_cache=23",
    "train.zero_stage=2",
];

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    small_run::write_base(folder.path());
    folder
}

fn arguments<'a>(command: &'a str, overrides: &[&'a str]) -> Vec<&'a str> {
    let all = LORA.iter().chain(overrides).flat_map(|&text| ["--set", text]);
    [command, "run.yaml"].into_iter().chain(all).collect()
}

fn metrics(folder: &Path) -> Vec<Map<String, Value>> {
    let text = std::fs::read_to_string(folder.join("runs/small/metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn weights(folder: &Path) -> Weights {
    load_weights(folder, &ModelConfig::load(folder).unwrap(), 1, Kind::Float, Device::Cpu).unwrap()
}

#[test]
fn generators_serve_base_and_adapters_merged() {
    for quantization in ["lora.quantization=none", "lora.quantization=nf4"] {
        let folder = folder();
        check_runs(folder.path(), &arguments("launch", &[quantization]));
        let steps = metrics(folder.path());
        assert_eq!(steps.len() as u64, small_run::MAX_STEPS);
        for step in &steps {
            let difference = step["sampling/sampling_logp_difference/max"].as_f64().unwrap();
            assert!(difference < 1e-3, "{quantization}: generator and trainer differ by {difference}");
        }
        // The reference policy is the base: the adapters have moved the policy away from it, and the generator followed.
        let kl = steps[steps.len() - 1]["kl"].as_f64().unwrap();
        assert!(kl > 1e-4, "{quantization}: kl is {kl}");
        check_export(folder.path());
    }
}

/// The newest checkpoint holds adapters, and its export is the run's final model.
fn check_export(folder: &Path) {
    let newest = format!("step-{}", small_run::MAX_STEPS);
    let checkpoint = folder.join("runs/small/checkpoints").join(&newest);
    for name in ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "trainer_state/state.json"] {
        assert!(checkpoint.join(name).is_file(), "{name} is missing");
    }
    assert!(!checkpoint.join("model.safetensors").exists());
    let said = check_runs(folder, &["export", "--run", "runs/small", "--out", "merged"]);
    assert!(said.contains("float32") && said.contains(&newest), "{said}");
    let (exported, model) = (weights(&folder.join("merged")), weights(&folder.join("runs/small/model")));
    for unit_idx in 0..exported.num_units() {
        assert!(exported.flat(unit_idx).equal(model.flat(unit_idx)));
    }
    let base = weights(&folder.join("model"));
    assert!(exported.flat(0).equal(base.flat(0)) && !exported.flat(1).equal(base.flat(1)));
    assert!(folder.join("merged/tokenizer.json").is_file() && !folder.join("merged/trainer_state").exists());

    let path = checkpoint.to_str().unwrap();
    check_runs(folder, &["export", "--checkpoint", path, "--out", "half", "--dtype", "bfloat16"]);
    let half = weights(&folder.join("half"));
    assert!(half.flat(1).equal(&model.flat(1).to_kind(Kind::BFloat16).to_kind(Kind::Float)));
    check_refused(folder, &["export", "--checkpoint", path, "--out", "half"], &["half", "is there already"]);
    std::fs::rename(folder.join("model"), folder.join("moved")).unwrap();
    check_refused(folder, &["export", "--checkpoint", path, "--out", "again"], &["config.json", "--base"]);
    assert!(!folder.join("again").exists());
    check_runs(folder, &["export", "--checkpoint", path, "--out", "again", "--base", "moved"]);
    assert!(weights(&folder.join("again")).flat(1).equal(exported.flat(1)));
}

#[test]
fn a_full_checkpoint_is_exported_without_the_trainers_state() {
    let folder = folder();
    check_runs(folder.path(), &["sft", "run.yaml", "--set", "train.max_steps=2"]);
    check_runs(folder.path(), &["export", "--run", "runs/small", "--out", "out", "--json"]);
    let (exported, model) = (weights(&folder.path().join("out")), weights(&folder.path().join("runs/small/model")));
    assert!((0..model.num_units()).all(|unit_idx| exported.flat(unit_idx).equal(model.flat(unit_idx))));
    assert!(!folder.path().join("out/trainer_state").exists());
    check_refused(folder.path(), &["export", "--run", "absent", "--out", "x"], &["absent", "no checkpoint"]);
}

#[test]
fn supervised_adapters_learn_and_serve_as_a_start() {
    let folder = folder();
    let sft = ["train.max_steps=30", "lora.target_modules=[q_proj,v_proj,up_proj]", "lora.lora_dropout=0.05"];
    check_runs(folder.path(), &arguments("sft", &sft));
    let losses: Vec<f64> = metrics(folder.path()).iter().map(|step| step["loss"].as_f64().unwrap()).collect();
    assert!(losses[29] < 0.8 * losses[0], "{losses:?}");
    let start = ["run.name=next", "train.max_steps=1", "lora.adapter=runs/small/checkpoints/step-30", sft[1]];
    check_runs(folder.path(), &arguments("sft", &start));
    let text = std::fs::read_to_string(folder.path().join("runs/next/metrics.jsonl")).unwrap();
    let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert!(first["loss"].as_f64().unwrap() < 0.8 * losses[0], "{first}");
}

#[test]
fn adapters_that_do_not_fit_are_named_before_anything_is_written() {
    let folder = folder();
    let check =
        |overrides: &[&str], expect: &[&str]| check_refused(folder.path(), &arguments("sft", overrides), expect);
    check(&["lora.target_modules=[q_prj]"], &["lora.target_modules", "q_prj", "did you mean", "q_proj"]);
    check(&["model.random_init=true"], &["model.random_init", "lora.r"]);
    check(&["lora.adapter=absent"], &["absent/adapter_config.json"]);
    let config = ModelConfig::load(&folder.path().join("model")).unwrap();
    let lora = Lora { r: 4, quantization: BaseQuantization::None, ..Lora::default() };
    let adapters = fresh_adapters(&config, &AdapterSpec::new(&lora).unwrap(), (InitLoraWeights::Kaiming, 3), CPU);
    std::fs::create_dir(folder.path().join("adapter")).unwrap();
    peft::save(&folder.path().join("adapter"), Path::new("model"), &lora, &adapters).unwrap();
    let other = ["lora.adapter=adapter", "lora.r=8"];
    check(&other, &["adapter", "lora.r is 8, and there 4", "lora.lora_alpha is 8, and there 32"]);
    assert!(!folder.path().join("runs").exists(), "a refused run wrote a folder");
}

//! Folders of a stranger, models, adapters and checkpoints: refused by name, or read and used; soon, and without taking
//! memory for what a header merely claims.
//!
//! The first byte of an input says which folder it is, and whether its tensors' file comes as it is or as a head, a zero
//! byte and data, to be put together: lengths that contradict each other are noticed at once, and hide what lies behind.
//! In front of that file are the folder's texts, each up to a zero byte.
#![no_main]

mod growth;
mod seeds;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use aha_core::config::{InitLoraWeights, Lora};
use aha_nn::forward;
use aha_nn::lora::{AdapterSpec, Nf4Options, Nf4Weights, fresh_adapters, peft};
use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::{load_weights, save_weights, save_weights_as};
use aha_nn::weights::Weights;
use aha_trainer::checkpoint;
use aha_trainer::export::Export;
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;
use xxhash_rust::xxh3::xxh3_64;

const MODEL: u8 = 0;
const SHARDED: u8 = 1;
const ADAPTER: u8 = 2;
const CHECKPOINT: u8 = 3;
/// The tensors' file is to be put together.
const APART: u8 = 4;
/// `state.json` is the input's own, and does not say what the files are.
const OWN_STATE: u8 = 8;

const FAMILIES: [&str; 3] = [
    include_str!("../../tests/golden/models/qwen2.json"),
    include_str!("../../tests/golden/models/qwen3.json"),
    include_str!("../../tests/golden/models/llama.json"),
];
/// Most that a head can make of its data.
const MAX_DATA: usize = 64 << 10;
const SHARD: &str = "part.safetensors";
const OPTIMIZER: &str = "trainer_state/optimizer-00000-of-00001.safetensors";
const STATE: &str = "trainer_state/state.json";

/// Where folders are made.
static PLACE: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder for folders"));
static BASE: LazyLock<PathBuf> = LazyLock::new(|| {
    let base = folder("base");
    let config = tiny(FAMILIES[0]);
    save_weights(&base, &config, &weights(&config)).expect("a writable folder");
    base
});

fuzz_target!(init: seeds::write(all_seeds()), |bytes: &[u8]| {
    let Some((&kind, rest)) = bytes.split_first() else { return };
    match kind & 3 {
        MODEL => read_model(kind, rest),
        SHARDED => read_sharded(kind, rest),
        ADAPTER => read_adapter(kind, rest),
        _ => read_checkpoint(kind, rest),
    }
    growth::check();
});

fn read_model(kind: u8, input: &[u8]) {
    let (config, tensors) = text(input);
    let model = folder("model");
    write(&model, "config.json", config);
    write(&model, "model.safetensors", &file(kind, tensors));
    use_model(&model);
}

fn read_sharded(kind: u8, input: &[u8]) {
    let (config, rest) = text(input);
    let (index, tensors) = text(rest);
    let model = folder("sharded");
    write(&model, "config.json", config);
    write(&model, "model.safetensors.index.json", index);
    write(&model, SHARD, &file(kind, tensors));
    use_model(&model);
}

fn read_adapter(kind: u8, input: &[u8]) {
    let (config, tensors) = text(input);
    let adapter = folder("adapter");
    write(&adapter, peft::FILES[0], config);
    write(&adapter, peft::FILES[1], &file(kind, tensors));
    drop(named(peft::base_model(&adapter)));
    let merged = PLACE.path().join("merged");
    let export = Export { checkpoint: adapter, base: Some(BASE.clone()), kind: None };
    if named(export.write(&merged)).is_some() {
        use_model(&merged);
        fs::remove_dir_all(&merged).expect("a writable folder");
    }
}

fn read_checkpoint(kind: u8, input: &[u8]) {
    let (state, tensors) = text(input);
    let checkpoint = folder("checkpoints/step-1");
    folder("checkpoints/step-1/trainer_state");
    for name in ["config.json", "model.safetensors"] {
        write(&checkpoint, name, &fs::read(BASE.join(name)).expect("it was written"));
    }
    write(&checkpoint, OPTIMIZER, &file(kind, tensors));
    let records = ["config.json", "model.safetensors", OPTIMIZER].map(|name| {
        let bytes = fs::read(checkpoint.join(name)).expect("it was written");
        (name.to_owned(), json!({"bytes": bytes.len(), "xxh3": format!("{:016x}", xxh3_64(&bytes))}))
    });
    let state = match serde_json::from_slice(state) {
        Ok(Value::Object(mut state)) if kind & OWN_STATE == 0 => {
            state.insert("files".to_owned(), Value::Object(records.into_iter().collect()));
            Value::Object(state).to_string().into_bytes()
        }
        _ => state.to_vec(),
    };
    write(&checkpoint, STATE, &state);
    let Some(found) = named(checkpoint::newest(&PLACE.path().join("checkpoints"))) else { return };
    drop(named(found.optimizer(&tiny(FAMILIES[0]).manifest())));
    drop(named(found.received()));
}

/// What can be loaded can be computed with, whatever its numbers are.
fn use_model(model: &Path) {
    let Some(config) = named(ModelConfig::load(model)) else { return };
    let Some(weights) = named(load_weights(model, &config, 1, Kind::Float, Device::Cpu)) else { return };
    let tokens = [0, config.vocab_size as u32 - 1, 0];
    assert_eq!(forward::score(&config, &weights, &tokens).len(), 2);
    let place = (Kind::Float, Device::Cpu);
    let quantised = Nf4Weights::load(model, &config, Nf4Options { double_quant: true }, place);
    let quantised = quantised.expect("what loads in fp32 loads in 4 bits");
    assert_eq!(forward::score(&config, &quantised, &tokens).len(), 2);
}

/// An error says something.
fn named<T, E: std::fmt::Display>(result: Result<T, E>) -> Option<T> {
    result.inspect_err(|error| assert!(!format!("{error:#}").is_empty())).ok()
}

fn folder(name: &str) -> PathBuf {
    let folder = PLACE.path().join(name);
    fs::create_dir_all(&folder).expect("a writable folder");
    folder
}

fn write(folder: &Path, name: &str, bytes: &[u8]) {
    fs::write(folder.join(name), bytes).expect("a writable folder");
}

/// What comes before a zero byte, and what after it.
fn text(input: &[u8]) -> (&[u8], &[u8]) {
    match input.iter().position(|byte| *byte == 0) {
        Some(end) => (&input[..end], &input[end + 1..]),
        None => (input, &[]),
    }
}

/// A file of tensors, put together where it comes apart: as much data as the head speaks of, within reason.
fn file(kind: u8, input: &[u8]) -> Vec<u8> {
    if kind & APART == 0 {
        return input.to_vec();
    }
    let (head, data) = text(input);
    let claimed = |entry: &Value| entry["data_offsets"][1].as_u64().unwrap_or(0) as usize;
    let parsed: Map<String, Value> = serde_json::from_slice(head).unwrap_or_default();
    let len = parsed.values().map(claimed).max().unwrap_or(0).min(MAX_DATA);
    let data = data.iter().copied().chain(std::iter::repeat(0x3c)).take(len);
    (head.len() as u64).to_le_bytes().into_iter().chain(head.iter().copied()).chain(data).collect()
}

/// The configuration of a golden model, with sizes that are as small as they can be.
fn tiny(golden: &str) -> ModelConfig {
    let golden: Value = serde_json::from_str(golden).expect("golden files are JSON");
    let mut raw = golden["config"].as_object().expect("it has a configuration").clone();
    raw.remove("layer_types");
    for (key, size) in [
        ("hidden_size", 4),
        ("intermediate_size", 4),
        ("num_hidden_layers", 1),
        ("num_attention_heads", 2),
        ("num_key_value_heads", 1),
        ("head_dim", 2),
        ("vocab_size", 5),
    ] {
        raw.insert(key.to_owned(), size.into());
    }
    ModelConfig::from_json(raw).expect("a model that is supported")
}

fn weights(config: &ModelConfig) -> Weights {
    Weights::random(config, 1, 1, Kind::Float, Device::Cpu)
}

fn all_seeds() -> impl Iterator<Item = (String, Vec<u8>)> {
    let models = FAMILIES.iter().enumerate().flat_map(|(index, golden)| model_seeds(index, &tiny(golden)));
    models.chain([("adapter".to_owned(), adapter_seed()), ("checkpoint".to_owned(), checkpoint_seed())]).flat_map(
        |(name, seed)| {
            let apart = came_apart(&seed);
            [(name.clone(), seed), (format!("{name}-apart"), apart)]
        },
    )
}

fn model_seeds(index: usize, config: &ModelConfig) -> Vec<(String, Vec<u8>)> {
    let source = folder("source");
    let kind = if index == 0 { Kind::BFloat16 } else { Kind::Float };
    save_weights_as(kind, &source, config, &weights(config)).expect("a writable folder");
    let read = |name: &str| fs::read(source.join(name)).expect("it was written");
    let (text, tensors) = (read("config.json"), read("model.safetensors"));
    let names = config.manifest().params().map(|param| (param.name.clone(), json!(SHARD))).collect();
    let map = json!({"weight_map": Value::Object(names)}).to_string().into_bytes();
    let (zero, whole, sharded) = (vec![0], vec![MODEL], vec![SHARDED]);
    vec![
        (format!("model-{index}"), [&whole, &text, &zero, &tensors].map(Vec::as_slice).concat()),
        (format!("sharded-{index}"), [&sharded, &text, &zero, &map, &zero, &tensors].map(Vec::as_slice).concat()),
    ]
}

fn adapter_seed() -> Vec<u8> {
    let lora = Lora { r: 2, target_modules: vec!["q_proj".to_owned(), "down_proj".to_owned()], ..Lora::default() };
    let spec = AdapterSpec::new(&lora).expect("known targets");
    let init = (InitLoraWeights::Gaussian, 1);
    let adapters = fresh_adapters(&tiny(FAMILIES[0]), &spec, init, (1, Device::Cpu));
    let source = folder("source");
    peft::save(&source, &BASE, &lora, &adapters).expect("a writable folder");
    let [config, tensors] = peft::FILES.map(|name| fs::read(source.join(name)).expect("it was written"));
    [&[ADAPTER], &config[..], &[0], &tensors].concat()
}

fn checkpoint_seed() -> Vec<u8> {
    let state = json!({"step": 1, "version": 1, "num_updates": 1, "world_size": 1, "seed": 0, "files": {}});
    let tensors = [("layers.0/exp_avg/0", 3), ("layers.0/exp_avg/3", 2), ("head/master/0", 4)]
        .map(|(name, len)| (name, Tensor::ones([len], (Kind::Float, Device::Cpu))));
    let path = PLACE.path().join("optimizer.safetensors");
    Tensor::write_safetensors(&tensors, &path).expect("a writable folder");
    let tensors = fs::read(path).expect("it was written");
    [&[CHECKPOINT], state.to_string().as_bytes(), &[0], &tensors].concat()
}

/// The same input with the tensors' file in two parts.
fn came_apart(seed: &[u8]) -> Vec<u8> {
    // Its length has six zero bytes at its end, before the head's bracket.
    let start = seed.windows(9).position(|window| window[2..] == *b"\0\0\0\0\0\0{").expect("it has a head");
    let (texts, file) = seed.split_at(start);
    let len = u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    let (head, data) = file[8..].split_at(len);
    [&[texts[0] | APART], &texts[1..], head, &[0], data].concat()
}

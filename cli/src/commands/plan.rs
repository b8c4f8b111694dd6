//! `aha plan`: bytes of every process before any is taken.

use std::process::ExitCode;

use aha_core::config::{DeviceKind, Dtype, RunConfig};
use aha_nn::model_config::ModelConfig;
use aha_trainer::memory_plan::{self, Plan, Setting, TrainerPlan};
use anyhow::{Result, ensure};
use clap::ValueEnum;
use serde_json::{Value, json};
use tch::{Device, Kind};

use super::ConfigArgs;
use super::shapes::ModelShape;

const GIB: f64 = (1_u64 << 30) as f64;

/// Predict the memory of trainer ranks and generators, without loading anything.
///
/// What libtorch takes for itself is not counted: about 0.2 GiB of a process, and more on a GPU.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  aha plan configs/mini-r1-countdown.yaml --world-size 4 --device-memory 80")]
pub(crate) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Trainer ranks [default: launch.trainers]
    #[arg(long, value_name = "N")]
    world_size: Option<usize>,
    /// Memory of a device in GiB: tells whether each process fits one of its own [default: launch.device_memory_gib]
    #[arg(long, value_name = "GIB")]
    device_memory: Option<f64>,
    /// Plan for a well-known shape instead of the one in model.path
    #[arg(long, value_enum)]
    model_shape: Option<ModelShape>,
    /// Print one JSON object, in bytes
    #[arg(long)]
    json: bool,
}

/// A process and what it takes of one memory.
pub(super) struct Row {
    pub(super) process: String,
    pub(super) is_generator: bool,
    pub(super) plan: Plan,
    /// Of the device, not of a host beside it.
    pub(super) is_on_device: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let config = args.config.load()?;
    let world_size = args.world_size.unwrap_or(config.launch.trainers.max(1));
    ensure!(world_size > 0, "--world-size: must be at least 1");
    let model = model(&config, args.model_shape)?;
    let rows = rows(&config, &model, world_size);
    if args.json {
        println!("{}", to_json(&rows));
        return Ok(ExitCode::SUCCESS);
    }
    for row in &rows {
        print!("{}", table(row));
    }
    let fits = |row: &&Row, memory: f64| row.plan.total() as f64 <= memory * GIB;
    if let Some(memory) = args.device_memory.or(config.launch.device_memory_gib) {
        for row in rows.iter().filter(|row| row.is_on_device) {
            let share = 100.0 * row.plan.total() as f64 / (memory * GIB);
            let verdict = if fits(&row, memory) { "fits" } else { "does not fit" };
            println!("{} {verdict} {memory} GiB: {share:.0} % of it", row.process);
        }
        if !rows.iter().filter(|row| row.is_on_device).all(|row| fits(&row, memory)) {
            return Ok(ExitCode::FAILURE);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// That of `model.path`, or where the folder is not there yet, what its name says.
fn model(config: &RunConfig, shape: Option<ModelShape>) -> Result<ModelConfig> {
    let path = &config.model.path;
    match shape.or_else(|| if path.join("config.json").exists() { None } else { ModelShape::of_name(path) }) {
        None => Ok(ModelConfig::load(path)?),
        Some(shape) => {
            let name = shape.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
            eprintln!("planned for the shape of {name}, without looking at {}", path.display());
            shape.model_config()
        }
    }
}

/// Where `config` has processes compute. A plan for GPUs is made on machines without one: only `cpu` is not planned for a
/// GPU, and `auto` where there is none.
pub(super) fn device(config: &RunConfig) -> Device {
    match config.model.device {
        DeviceKind::Cuda => Device::Cuda(0),
        DeviceKind::Auto if tch::Cuda::is_available() => Device::Cuda(0),
        DeviceKind::Cpu | DeviceKind::Auto => Device::Cpu,
    }
}

/// Type of a trainer's weights.
pub(super) fn kind(config: &RunConfig) -> Kind {
    match (config.model.dtype, device(config)) {
        (Dtype::Float32, _) | (Dtype::Auto, Device::Cpu) => Kind::Float,
        (Dtype::Bfloat16, _) | (Dtype::Auto, _) => Kind::BFloat16,
    }
}

/// What one process of each kind takes, of each memory.
pub(super) fn rows(config: &RunConfig, model: &ModelConfig, world_size: usize) -> Vec<Row> {
    let (device, kind) = (device(config), kind(config));
    let (num_tokens, num_targets) = memory_plan::largest_micro_batch(config, world_size);
    let (train, lora) = (&config.train, &config.lora);
    let setting = Setting { model, train, lora, kind, device, world_size, num_tokens, num_targets };
    let TrainerPlan { device: mut on_device, host } = memory_plan::trainer(&setting);
    let mut trainer = format!("trainer rank of {world_size}, {num_tokens} tokens at a time");
    let kind = if device == Device::Cpu { Kind::Float } else { kind };
    let generator = memory_plan::generator(config, model, kind);
    if config.launch.colocate {
        let samples = memory_plan::sampling(&setting, &on_device, &generator);
        let is_training = on_device.total() >= samples.total();
        trainer = format!("{trainer}, with its engine, while it {}", if is_training { "trains" } else { "samples" });
        on_device = if is_training { on_device } else { samples };
    }
    let mut rows = vec![Row { process: trainer, is_generator: false, plan: on_device, is_on_device: true }];
    if host.total() > 0 {
        let process = "trainer rank, on the CPU".to_owned();
        rows.push(Row { process, is_generator: false, plan: host, is_on_device: false });
    }
    if !config.launch.colocate {
        rows.push(Row { process: "generator".to_owned(), is_generator: true, plan: generator, is_on_device: true });
    }
    rows
}

fn table(row: &Row) -> String {
    let line = |name: &str, bytes: usize| format!("  {name:<20} {:>9.2} GiB\n", bytes as f64 / GIB);
    let terms: String = row.plan.terms.iter().map(|(name, bytes)| line(name, *bytes)).collect();
    format!("{}\n{terms}{}", row.process, line("total", row.plan.total()))
}

fn to_json(rows: &[Row]) -> Value {
    let row = |row: &Row| {
        let terms: serde_json::Map<String, Value> =
            row.plan.terms.iter().map(|(name, bytes)| ((*name).to_owned(), json!(bytes))).collect();
        json!({"process": row.process, "on_device": row.is_on_device, "bytes": terms, "total": row.plan.total()})
    };
    rows.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_and_its_engine_take_turns() {
        let raw = json!({"model_type": "qwen2", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2});
        let model = ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap();
        let mut config = RunConfig::default();
        config.model.device = DeviceKind::Cpu;
        let total = |config: &RunConfig| {
            let rows = rows(config, &model, 1);
            (rows.len(), rows[0].process.clone(), rows[0].plan.total())
        };
        let (_, _, alone) = total(&config);
        config.launch.colocate = true;
        config.generator.kv_cache_mib = 1;
        let (num_rows, process, bytes) = total(&config);
        assert!(num_rows == 1 && process.ends_with("while it trains"), "{process}");
        assert_eq!(bytes, alone, "on the CPU nothing of the engine stays");
        config.generator.kv_cache_mib = 1 << 20;
        let (_, process, bytes) = total(&config);
        assert!(process.ends_with("while it samples"), "{process}");
        let numel = model.manifest().numel();
        // Weights and two moments, the engine's weights, and the cache in whole blocks.
        let expect = 4 * 4 * numel + (1 << 40);
        assert!(bytes.abs_diff(expect) < 1 << 20, "{bytes} and {expect}");
    }

    #[test]
    fn an_engine_on_a_gpu_reads_the_ranks_weights_where_it_can() {
        let raw = json!({"model_type": "qwen2", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2});
        let model = ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap();
        let mut config = RunConfig::default();
        config.model.device = DeviceKind::Cuda;
        config.launch.colocate = true;
        config.generator.kv_cache_mib = 1 << 20;
        let copied = |config: &RunConfig| {
            let row = &rows(config, &model, 2)[0];
            assert!(row.process.ends_with("while it samples"), "{}", row.process);
            row.plan.terms.iter().find(|(name, _)| *name == "engine's weights").map_or(0, |(_, bytes)| *bytes)
        };
        let whole = 2 * model.manifest().numel();
        config.train.zero_stage = 2;
        assert_eq!(copied(&config), 0);
        config.train.zero_stage = 3;
        assert_eq!(copied(&config), whole, "sharded");
        config.train.zero_stage = 2;
        config.lora.r = 8;
        assert_eq!(copied(&config), whole, "merged");
        config.lora.r = 0;
        config.model.dtype = Dtype::Float32;
        assert_eq!(copied(&config), 2 * whole, "in another type");
    }

    #[test]
    fn the_columns_of_a_table_are_aligned() {
        let terms = vec![("weights", 3 << 30), ("temporary buffers", 1 << 29)];
        let row =
            Row { process: "trainer rank".to_owned(), is_generator: false, plan: Plan { terms }, is_on_device: true };
        let expect = "trainer rank\n  weights                   3.00 GiB\n  temporary buffers         0.50 GiB\n  \
                      total                     3.50 GiB\n";
        assert_eq!(table(&row), expect);
        assert_eq!(to_json(&[row])[0]["bytes"]["weights"], json!(3_u64 << 30));
    }
}

//! What Prometheus is told of a generator.
//!
//! Counters are the engine's own, asked for when someone scrapes; what is observed of samples and pushes is taken by the
//! tasks that follow them. The engine thread does nothing for either.
//!
//! Names, labels and buckets under `vllm:` are those of `vllm/v1/metrics/loggers.py`. A metric that vLLM has and this page
//! has not under its name is one that could not be filled with what vLLM means by it.

mod histogram;
mod observed;
mod server;

use aha_proto::metrics::{Exposition, Value};

use crate::engine::EngineStatus;
use histogram::Histogram;
use observed::FINER_INTER_TOKEN_BOUNDS;
pub(crate) use observed::{Ended, Observed};
pub(crate) use server::EngineMetrics;

/// One metric, and what vLLM calls it.
#[derive(Debug)]
struct Metric {
    name: &'static str,
    vllm_name: Option<&'static str>,
    /// Of a histogram's buckets, the first ones, which vLLM's has not.
    num_finer: usize,
    help: &'static str,
    value: Value,
}

impl Metric {
    fn same(name: &'static str, help: &'static str, value: Value) -> Self {
        Self { name, vllm_name: Some(name), num_finer: 0, help, value }
    }

    fn own(name: &'static str, help: &'static str, value: Value) -> Self {
        Self { vllm_name: None, ..Self::same(name, help, value) }
    }

    fn renamed(name: &'static str, vllm_name: &'static str, help: &'static str, value: Value) -> Self {
        Self { vllm_name: Some(vllm_name), ..Self::same(name, help, value) }
    }

    fn vllm_value(&self) -> Value {
        match &self.value {
            Value::Histogram(snapshot) => Value::Histogram(snapshot.coarser(self.num_finer)),
            other => other.clone(),
        }
    }
}

/// The page of metrics; under vLLM's names too where it is given the model's name, which its dashboards select by.
fn page(status: &EngineStatus, observed: &Observed, vllm_model: Option<&str>) -> String {
    let mut page = Exposition::default();
    let metrics: Vec<Metric> = engine_metrics(status).into_iter().chain(observed_metrics(observed)).collect();
    for Metric { name, help, value, .. } in &metrics {
        page.push(&format!("aha_generator_{name}"), help, &[], value);
    }
    if let Some(model) = vllm_model {
        for metric in &metrics {
            if let Some(name) = metric.vllm_name {
                let labels = [("model_name", model), ("engine", "0")];
                page.push(&format!("vllm:{name}"), metric.help, &labels, &metric.vllm_value());
            }
        }
    }
    page.into_text()
}

fn engine_metrics(status: &EngineStatus) -> Vec<Metric> {
    let gauge = |number: usize| Value::Gauge(number as f64);
    let usage = status.used_blocks as f64 / status.total_blocks as f64;
    let counters = status.counters;
    vec![
        Metric::same("num_requests_running", "Samples that hold blocks of the KV cache.", gauge(status.num_running)),
        Metric::same(
            "num_requests_waiting",
            "Samples that wait for blocks or for a place in the batch.",
            gauge(status.num_waiting),
        ),
        Metric::renamed(
            "kv_cache_usage_ratio",
            "kv_cache_usage_perc",
            "Part of the KV cache that samples hold; 1 is all of it.",
            Value::Gauge(usage),
        ),
        Metric::same(
            "prefix_cache_queries_total",
            "Tokens that samples had when they were given blocks.",
            Value::Counter(counters.prefix_cache_queries),
        ),
        Metric::same(
            "prefix_cache_hits_total",
            "Of those, tokens whose keys and values were in the cache.",
            Value::Counter(counters.prefix_cache_hits),
        ),
        Metric::renamed(
            "preemptions_total",
            "num_preemptions_total",
            "Samples that lost their blocks and were computed again.",
            Value::Counter(counters.preemptions),
        ),
        Metric::own(
            "prompt_tokens_total",
            "Tokens prefilled, those computed again included.",
            Value::Counter(counters.prompt_tokens),
        ),
        Metric::same("generation_tokens_total", "Tokens sampled.", Value::Counter(counters.generation_tokens)),
        Metric::own("steps_total", "Engine steps.", Value::Counter(counters.steps)),
        Metric::own("weight_version", "Version of the weights that serve.", Value::Gauge(status.version.0 as f64)),
    ]
}

fn observed_metrics(observed: &Observed) -> Vec<Metric> {
    let histogram = |histogram: &Histogram| Value::Histogram(histogram.snapshot());
    vec![
        Metric::renamed(
            "whole_prompt_tokens_total",
            "prompt_tokens_total",
            "Tokens in the prompts of samples whose first token has come, computed or found in the cache.",
            Value::Counter(observed.prompt_tokens()),
        ),
        Metric::same(
            "time_to_first_token_seconds",
            "From a request to the first token of each of its samples.",
            histogram(&observed.first_token),
        ),
        Metric {
            num_finer: FINER_INTER_TOKEN_BOUNDS,
            ..Metric::same(
                "inter_token_latency_seconds",
                "Between two tokens of a sample.",
                histogram(&observed.inter_token),
            )
        },
        Metric {
            num_finer: FINER_INTER_TOKEN_BOUNDS,
            ..Metric::same(
                "request_time_per_output_token_seconds",
                "Mean time between two tokens of a sample, over the samples that ended with at least two.",
                histogram(&observed.time_per_token),
            )
        },
        Metric::same(
            "e2e_request_latency_seconds",
            "From a request to the end of each of its samples that was not aborted.",
            histogram(&observed.request),
        ),
        Metric::same(
            "request_decode_time_seconds",
            "From the first to the last token of samples that were not aborted.",
            histogram(&observed.decode),
        ),
        Metric::same(
            "request_prompt_tokens",
            "Tokens in the prompts of samples that were not aborted.",
            histogram(&observed.prompt),
        ),
        Metric::same(
            "request_generation_tokens",
            "Tokens sampled for samples that were not aborted.",
            histogram(&observed.generation),
        ),
        Metric::same(
            "request_success_total",
            "Samples that ended, by the reason.",
            Value::Counters("finished_reason", observed.num_ended()),
        ),
        Metric::own(
            "weight_receive_seconds",
            "To receive, check and pack pushed weights, while decoding went on.",
            histogram(&observed.receive),
        ),
        Metric::own(
            "weight_swap_seconds",
            "For which decoding stood still while pushed weights were put in place.",
            histogram(&observed.swap),
        ),
    ]
}

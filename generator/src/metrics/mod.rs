//! What Prometheus is told of a generator.
//!
//! Counters are the engine's own, asked for when someone scrapes; latencies are taken by the tasks that follow the
//! requests. The engine thread does nothing for either.

mod exposition;
mod histogram;
mod server;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aha_core::rollout::FinishReason;

use crate::engine::EngineStatus;
use exposition::{Exposition, Value};
use histogram::Histogram;
pub(crate) use server::MetricsServer;

// vLLM's buckets, with finer ones between tokens: small models take less than its first.
const FIRST_TOKEN_BOUNDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const INTER_TOKEN_BOUNDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
];
const REQUEST_BOUNDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];

/// How long samples took and how they ended, since the start. A sample is what vLLM calls a request.
#[derive(Debug)]
pub(crate) struct Latencies {
    first_token: Histogram,
    inter_token: Histogram,
    request: Histogram,
    stop: AtomicU64,
    length: AtomicU64,
    aborted: AtomicU64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            first_token: Histogram::new(FIRST_TOKEN_BOUNDS),
            inter_token: Histogram::new(INTER_TOKEN_BOUNDS),
            request: Histogram::new(REQUEST_BOUNDS),
            stop: AtomicU64::new(0),
            length: AtomicU64::new(0),
            aborted: AtomicU64::new(0),
        }
    }
}

impl Latencies {
    /// The first token of a sample came this long after its request.
    pub(crate) fn first_token(&self, after: Duration) {
        self.first_token.observe(after);
    }

    /// Another token came this long after the one before.
    pub(crate) fn next_token(&self, after: Duration) {
        self.inter_token.observe(after);
    }

    /// A sample ended, this long after its request.
    pub(crate) fn finished(&self, reason: FinishReason, after: Duration) {
        self.ended(reason, 1);
        if reason != FinishReason::Aborted {
            self.request.observe(after);
        }
    }

    /// So many samples will not end: their client, the engine, or the time they had is gone.
    pub(crate) fn given_up(&self, num_samples: usize) {
        self.ended(FinishReason::Aborted, num_samples);
    }

    fn ended(&self, reason: FinishReason, num_samples: usize) {
        let count = match reason {
            FinishReason::Stop => &self.stop,
            FinishReason::Length => &self.length,
            FinishReason::Aborted => &self.aborted,
        };
        count.fetch_add(num_samples as u64, Ordering::Relaxed);
    }

    fn num_ended(&self) -> Vec<(&'static str, u64)> {
        let counts = [("stop", &self.stop), ("length", &self.length), ("abort", &self.aborted)];
        counts.map(|(reason, count)| (reason, count.load(Ordering::Relaxed))).to_vec()
    }
}

/// One metric, and what vLLM calls it.
#[derive(Debug)]
struct Metric {
    name: &'static str,
    vllm_name: Option<&'static str>,
    help: &'static str,
    value: Value,
}

/// The page of metrics; under vLLM's names too where it is given the model's name, which its dashboards select by.
fn page(status: &EngineStatus, latencies: &Latencies, vllm_model: Option<&str>) -> String {
    let mut page = Exposition::default();
    let metrics = metrics(status, latencies);
    for Metric { name, help, value, .. } in &metrics {
        page.push(&format!("aha_generator_{name}"), help, &[], value);
    }
    if let Some(model) = vllm_model {
        for Metric { vllm_name, help, value, .. } in &metrics {
            if let Some(name) = vllm_name {
                page.push(&format!("vllm:{name}"), help, &[("model_name", model), ("engine", "0")], value);
            }
        }
    }
    page.into_text()
}

fn metrics(status: &EngineStatus, latencies: &Latencies) -> Vec<Metric> {
    let same = |name, help, value| Metric { name, vllm_name: Some(name), help, value };
    let counters = status.counters;
    let usage = status.used_blocks as f64 / status.total_blocks as f64;
    vec![
        same(
            "num_requests_running",
            "Samples that hold blocks of the KV cache.",
            Value::Gauge(status.num_running as f64),
        ),
        same(
            "num_requests_waiting",
            "Samples that wait for blocks or for a place in the batch.",
            Value::Gauge(status.num_waiting as f64),
        ),
        Metric {
            name: "kv_cache_usage_ratio",
            vllm_name: Some("kv_cache_usage_perc"),
            help: "Part of the KV cache that samples hold; 1 is all of it.",
            value: Value::Gauge(usage),
        },
        same(
            "prefix_cache_queries_total",
            "Tokens that samples had when they were given blocks.",
            Value::Counter(counters.prefix_cache_queries),
        ),
        same(
            "prefix_cache_hits_total",
            "Of those, tokens whose keys and values were in the cache.",
            Value::Counter(counters.prefix_cache_hits),
        ),
        Metric {
            name: "preemptions_total",
            vllm_name: Some("num_preemptions_total"),
            help: "Samples that lost their blocks and were computed again.",
            value: Value::Counter(counters.preemptions),
        },
        same(
            "prompt_tokens_total",
            "Tokens prefilled, those computed again included.",
            Value::Counter(counters.prompt_tokens),
        ),
        same("generation_tokens_total", "Tokens sampled.", Value::Counter(counters.generation_tokens)),
        Metric { name: "steps_total", vllm_name: None, help: "Engine steps.", value: Value::Counter(counters.steps) },
        Metric {
            name: "weight_version",
            vllm_name: None,
            help: "Version of the weights that serve.",
            value: Value::Gauge(status.version.0 as f64),
        },
        same(
            "time_to_first_token_seconds",
            "From a request to the first token of each of its samples.",
            Value::Histogram(latencies.first_token.snapshot()),
        ),
        same(
            "inter_token_latency_seconds",
            "Between two tokens of a sample.",
            Value::Histogram(latencies.inter_token.snapshot()),
        ),
        same(
            "e2e_request_latency_seconds",
            "From a request to the end of each of its samples that was not aborted.",
            Value::Histogram(latencies.request.snapshot()),
        ),
        same(
            "request_success_total",
            "Samples that ended, by the reason.",
            Value::Counters("finished_reason", latencies.num_ended()),
        ),
    ]
}

//! Metrics as Prometheus scrapes them.

use std::collections::BTreeMap;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;

async fn start(vllm_metric_names: bool) -> Server {
    Server::start_with(Tiny::Qwen2, PATIENCE, |options| {
        options.generator.metrics_address = Some("127.0.0.1:0".parse().unwrap());
        options.generator.vllm_metric_names = vllm_metric_names;
    })
    .await
}

/// Status, headers and body of one request over a socket of its own.
async fn ask(server: &Server, method: &str, path: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(server.metrics_address.unwrap()).await.unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let (status, headers) = head.split_once("\r\n").unwrap();
    let status = status.strip_prefix("HTTP/1.1 ").unwrap()[..3].parse().unwrap();
    (status, headers.to_lowercase(), body.to_owned())
}

/// Samples by name and labels, and the type of each metric. Panics at any line that is not of the format.
#[derive(Debug, Default)]
pub(super) struct Page {
    types: BTreeMap<String, String>,
    samples: BTreeMap<String, f64>,
}

impl Page {
    pub(super) async fn scrape(server: &Server) -> Self {
        let (status, headers, body) = ask(server, "GET", "/metrics").await;
        assert_eq!(status, 200);
        assert!(headers.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{headers}");
        assert!(body.ends_with('\n'));
        let mut page = Self::default();
        let mut current = String::new();
        for line in body.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, text) = help.split_once(' ').unwrap();
                assert!(
                    !text.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_:".contains(&byte))
                );
                name.clone_into(&mut current);
            } else if let Some(described) = line.strip_prefix("# TYPE ") {
                let (name, kind) = described.split_once(' ').unwrap();
                assert!(name == current && ["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert_eq!(page.types.insert(name.to_owned(), kind.to_owned()), None, "{name} comes twice");
            } else {
                page.take_sample(line, &current);
            }
        }
        page.types.iter().filter(|(_, kind)| *kind == "histogram").for_each(|(name, _)| page.check_histogram(name));
        page
    }

    fn take_sample(&mut self, line: &str, metric: &str) {
        let (key, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = key.split_once('{').unwrap_or((key, "}"));
        let suffix = name.strip_prefix(metric).unwrap_or_else(|| panic!("{line:?} is not of {metric}"));
        let suffixes: &[&str] = match self.types[metric].as_str() {
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => &[""],
        };
        assert!(suffixes.contains(&suffix), "{line}");
        for label in labels.strip_suffix('}').unwrap().split(',').filter(|label| !label.is_empty()) {
            let (name, value) = label.split_once('=').unwrap();
            assert!(!name.is_empty() && value.len() > 2 && value.starts_with('"') && value.ends_with('"'), "{line}");
        }
        let value: f64 = value.parse().unwrap();
        assert!(value >= 0.0, "{line}");
        assert_eq!(self.samples.insert(key.to_owned(), value), None, "{line} comes twice");
    }

    /// Buckets ascend to the count, with every bound there is.
    fn check_histogram(&self, name: &str) {
        let buckets = self.samples.iter().filter(|(key, _)| key.starts_with(&format!("{name}_bucket{{")));
        let mut buckets: Vec<(f64, f64)> = buckets
            .map(|(key, &count)| {
                let bound = key.split_once("le=\"").unwrap().1.strip_suffix("\"}").unwrap();
                (if bound == "+Inf" { f64::INFINITY } else { bound.parse().unwrap() }, count)
            })
            .collect();
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        assert!(buckets.len() > 10 && buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{buckets:?}");
        assert_eq!(buckets.last().unwrap(), &(f64::INFINITY, self.of(&format!("{name}_count"))));
    }

    /// The sum of all samples of this name.
    pub(super) fn of(&self, name: &str) -> f64 {
        let named = |key: &str| key == name || key.strip_prefix(name).is_some_and(|rest| rest.starts_with('{'));
        let samples: Vec<f64> = self.samples.iter().filter(|(key, _)| named(key)).map(|(_, &value)| value).collect();
        assert!(!samples.is_empty(), "no {name}");
        samples.into_iter().sum()
    }

    #[track_caller]
    pub(super) fn check(&self, name: &str, expect: u64) {
        assert_eq!(self.of(&format!("aha_generator_{name}")), expect as f64, "{name}");
    }

    /// Everything that the status tells too.
    #[track_caller]
    fn check_status(&self, status: &v1::StatusResponse) {
        self.check("num_requests_running", status.running.into());
        self.check("num_requests_waiting", status.waiting.into());
        self.check("prefix_cache_queries_total", status.prefix_cache_queries);
        self.check("prefix_cache_hits_total", status.prefix_cache_hits);
        self.check("preemptions_total", status.preemptions);
        self.check("prompt_tokens_total", status.prompt_tokens);
        self.check("generation_tokens_total", status.generation_tokens);
        self.check("steps_total", status.steps);
        self.check("weight_version", status.version);
        let usage = f64::from(status.used_blocks) / f64::from(status.total_blocks);
        assert_eq!(self.of("aha_generator_kv_cache_usage_ratio"), usage);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrape_agrees_with_the_status_and_with_what_was_sent() {
    let mut server = start(false).await;
    let before = Page::scrape(&server).await;
    before.check_status(&server.status().await);
    assert!(before.samples.keys().all(|key| !key.starts_with("vllm:")));

    let start = std::time::Instant::now();
    let long = server.completions(request("long", 3, 40)).await;
    let mut stopping = request("stop", 2, 40);
    stopping.sampling.as_mut().unwrap().stop_token_ids = vec![long[0].token_ids[7]];
    stopping.sampling.as_mut().unwrap().ignore_eos = false;
    stopping.sample_indices = vec![0];
    let stopped = server.completions(stopping).await;
    assert!(stopped[0].finish_reason() == v1::FinishReason::Stop && stopped[0].token_ids.len() <= 8);
    let elapsed = start.elapsed().as_secs_f64();

    let page = Page::scrape(&server).await;
    page.check_status(&server.status().await);
    let num_tokens = (3 * 40 + stopped[0].token_ids.len()) as u64;
    page.check("generation_tokens_total", num_tokens);
    page.check("time_to_first_token_seconds_count", 4);
    page.check("inter_token_latency_seconds_count", num_tokens - 4);
    for name in ["e2e_request_latency_seconds", "request_decode_time_seconds", "request_time_per_output_token_seconds"]
    {
        page.check(&format!("{name}_count"), 4);
    }
    let prompt = request("long", 1, 1).token_ids.len() as u64;
    page.check("whole_prompt_tokens_total", 4 * prompt);
    for (name, sum) in [("request_prompt_tokens", 4 * prompt), ("request_generation_tokens", num_tokens)] {
        page.check(&format!("{name}_count"), 4);
        page.check(&format!("{name}_sum"), sum);
    }
    for (reason, expect) in [("stop", 1), ("length", 3), ("abort", 0)] {
        page.check(&format!("request_success_total{{finished_reason=\"{reason}\"}}"), expect);
    }
    // The time to the first token and those between the others make up the whole.
    let sum = |name: &str| page.of(&format!("aha_generator_{name}_seconds_sum"));
    let (parts, whole) = (sum("time_to_first_token") + sum("inter_token_latency"), sum("e2e_request_latency"));
    assert!((parts - whole).abs() < 1e-6 && 0.0 < whole && whole < 4.0 * elapsed, "{parts} {whole} {elapsed}");
    assert!((sum("request_decode_time") - sum("inter_token_latency")).abs() < 1e-6);
}

#[tokio::test(flavor = "multi_thread")]
async fn running_samples_and_given_up_ones_are_seen() {
    let mut server = start(false).await;
    let stream = server.generate(request("endless", 3, ENDLESS)).await.unwrap();
    server.wait_until(|status| status.running == 3 && status.generation_tokens > 10).await;
    server.client.pause(v1::PauseRequest {}).await.unwrap();
    let (status, page) = (server.status().await, Page::scrape(&server).await);
    page.check_status(&status);
    page.check("num_requests_running", 3);
    assert!(page.of("aha_generator_kv_cache_usage_ratio") > 0.0);
    page.check("request_success_total", 0);

    drop(stream);
    let given_up = async { while Page::scrape(&server).await.of("aha_generator_request_success_total") < 3.0 {} };
    tokio::time::timeout(PATIENCE, given_up).await.expect("a client that goes away is noticed");
    let page = Page::scrape(&server).await;
    page.check("request_success_total{finished_reason=\"abort\"}", 3);
    page.check("e2e_request_latency_seconds_count", 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn dashboards_of_vllm_find_its_names() {
    let mut server = start(true).await;
    server.completions(request("one", 2, 30)).await;
    let page = Page::scrape(&server).await;
    // Gauges and counters, and the sums of histograms.
    let names = [
        ("num_requests_running", "num_requests_running"),
        ("num_requests_waiting", "num_requests_waiting"),
        ("kv_cache_usage_perc", "kv_cache_usage_ratio"),
        ("prefix_cache_queries_total", "prefix_cache_queries_total"),
        ("prefix_cache_hits_total", "prefix_cache_hits_total"),
        ("num_preemptions_total", "preemptions_total"),
        ("prompt_tokens_total", "whole_prompt_tokens_total"),
        ("generation_tokens_total", "generation_tokens_total"),
        ("request_success_total", "request_success_total"),
        ("request_prompt_tokens_sum", "request_prompt_tokens_sum"),
        ("request_generation_tokens_sum", "request_generation_tokens_sum"),
        ("time_to_first_token_seconds_sum", "time_to_first_token_seconds_sum"),
        ("inter_token_latency_seconds_sum", "inter_token_latency_seconds_sum"),
        ("request_time_per_output_token_seconds_sum", "request_time_per_output_token_seconds_sum"),
        ("e2e_request_latency_seconds_sum", "e2e_request_latency_seconds_sum"),
        ("request_decode_time_seconds_sum", "request_decode_time_seconds_sum"),
    ];
    for (vllm, ours) in names {
        assert_eq!(page.of(&format!("vllm:{vllm}")), page.of(&format!("aha_generator_{ours}")), "{vllm}");
    }
    let described = page.types.keys().filter(|name| name.starts_with("vllm:")).count();
    assert_eq!(described, names.len(), "a name of vLLM's that is not checked here");
    // Its first and last bounds, as the Python client writes them.
    for (name, num_buckets, first, last) in [
        ("time_to_first_token_seconds", 23, "0.001", "2560.0"),
        ("inter_token_latency_seconds", 20, "0.01", "80.0"),
        ("request_time_per_output_token_seconds", 20, "0.01", "80.0"),
        ("e2e_request_latency_seconds", 22, "0.3", "7680.0"),
        ("request_decode_time_seconds", 22, "0.3", "7680.0"),
        ("request_prompt_tokens", 12, "1.0", "2000.0"),
        ("request_generation_tokens", 12, "1.0", "2000.0"),
    ] {
        let buckets = page.samples.keys().filter(|key| key.starts_with(&format!("vllm:{name}_bucket{{")));
        let bounds: Vec<&str> = buckets.map(|key| key.split_once("le=\"").unwrap().1.trim_end_matches("\"}")).collect();
        assert!(
            bounds.len() == num_buckets && [first, last].iter().all(|bound| bounds.contains(bound)),
            "{name}: {bounds:?}"
        );
    }
    let labels = format!("model_name=\"{}\",engine=\"0\"", server.folder.path().display());
    assert_eq!(page.samples[&format!("vllm:generation_tokens_total{{{labels}}}")], 60.0);
    assert_eq!(page.samples[&format!("vllm:request_success_total{{{labels},finished_reason=\"length\"}}")], 2.0);
    assert!(page.samples.keys().filter(|key| key.starts_with("vllm:")).all(|key| key.contains(&labels)));
}

#[tokio::test(flavor = "multi_thread")]
async fn other_paths_and_methods_are_refused_and_so_is_a_taken_address() {
    let server = start(false).await;
    assert_eq!(ask(&server, "GET", "/").await.0, 404);
    assert_eq!(ask(&server, "POST", "/metrics").await.0, 405);

    let folder = tiny_folder(Tiny::Qwen2, 1);
    let mut options = tiny_options(folder.path());
    options.generator.metrics_address = server.metrics_address;
    let error =
        GeneratorServer::bind(&options, "127.0.0.1:0".parse().unwrap(), Credentials::default()).await.unwrap_err();
    let taken = server.metrics_address.unwrap();
    let error = format!("{error:#}");
    assert!(error.starts_with(&format!("generator.metrics_address: listening on {taken}: ")), "{error}");
}

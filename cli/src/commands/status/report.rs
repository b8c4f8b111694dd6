//! What was found, for people and for machines.

use std::fmt;
use std::time::Duration;

use aha_proto::v1;
use aha_trainer::loggers::printable;
use indicatif::HumanDuration;
use serde_json::{Value, json};

use super::ask::{Answer, Look};
use crate::commands::table::Table;

/// Everyone who was asked, in that order.
#[derive(Debug)]
pub(super) struct Report {
    runs: Vec<(String, v1::RunStatusResponse)>,
    generators: Vec<GeneratorRow>,
    silent: Vec<(String, String)>,
}

#[derive(Debug)]
struct GeneratorRow {
    address: String,
    status: v1::StatusResponse,
    /// Versions behind the newest that is known.
    lag: u64,
    /// Sampled between the two looks, or since the start where there is one look alone.
    tokens_per_second: Option<f64>,
}

impl Report {
    pub(super) fn new(looks: &[Look], before: Option<&[Look]>) -> Self {
        let newest = looks.iter().filter_map(|look| match &look.answer {
            Answer::Generator(status) => Some(status.version),
            Answer::Coordinator(run) => Some(run.version),
            Answer::None(_) => None,
        });
        let newest = newest.max().unwrap_or(0);
        let mut report = Self { runs: Vec::new(), generators: Vec::new(), silent: Vec::new() };
        for Look { address, at, answer } in looks {
            let address = address.clone();
            match answer {
                Answer::Coordinator(run) => report.runs.push((address, run.clone())),
                Answer::None(reason) => report.silent.push((address, reason.clone())),
                Answer::Generator(status) => {
                    let earlier = before.into_iter().flatten().find(|look| look.address == address);
                    let tokens_per_second = earlier.and_then(|earlier| match &earlier.answer {
                        // A generator that was started anew counts from 0.
                        Answer::Generator(then) if then.uptime_seconds <= status.uptime_seconds => {
                            let tokens = status.generation_tokens.saturating_sub(then.generation_tokens);
                            Some(tokens as f64 / (*at - earlier.at).as_secs_f64())
                        }
                        _ => None,
                    });
                    let lag = newest - status.version;
                    report.generators.push(GeneratorRow { address, status: status.clone(), lag, tokens_per_second });
                }
            }
        }
        report
    }

    pub(super) fn has_answers(&self) -> bool {
        !self.runs.is_empty() || !self.generators.is_empty()
    }

    pub(super) fn to_json(&self) -> Value {
        let member = |member: &v1::Member| json!({"address": member.address, "heard_seconds": member.heard_seconds, "takes_part": member.takes_part});
        let run = |(address, run): &(String, v1::RunStatusResponse)| {
            json!({"address": address, "run": run.run, "version": run.version, "max_steps": run.max_steps,
                "uptime_seconds": run.uptime_seconds, "members": run.members.iter().map(member).collect::<Value>()})
        };
        let silent = |(address, reason): &(String, String)| json!({"address": address, "reason": reason});
        json!({
            "runs": self.runs.iter().map(run).collect::<Value>(),
            "generators": self.generators.iter().map(GeneratorRow::to_json).collect::<Value>(),
            "unanswered": self.silent.iter().map(silent).collect::<Value>(),
        })
    }
}

impl GeneratorRow {
    fn state(&self) -> &'static str {
        match (self.status.asleep, self.status.paused) {
            (true, _) => "asleep",
            (_, true) => "paused",
            _ if self.status.running + self.status.waiting == 0 => "idle",
            _ => "serving",
        }
    }

    /// Part of the KV cache that sequences hold.
    fn kv_cache_usage(&self) -> f64 {
        f64::from(self.status.used_blocks) / f64::from(self.status.total_blocks.max(1))
    }

    fn to_json(&self) -> Value {
        let Self { address, status, lag, tokens_per_second } = self;
        json!({
            "address": address, "state": self.state(), "model": status.model, "version": status.version, "lag": lag,
            "running": status.running, "waiting": status.waiting, "kv_cache_usage": self.kv_cache_usage(),
            "tokens_per_second": tokens_per_second, "generation_tokens": status.generation_tokens,
            "prompt_tokens": status.prompt_tokens, "preemptions": status.preemptions,
            "max_model_len": status.max_model_len, "manifest_hash": format!("{:016x}", status.manifest_hash),
            "update_group": status.update_group, "gpu": status.gpu, "uptime_seconds": status.uptime_seconds,
        })
    }

    fn cells(&self) -> [String; 10] {
        let status = &self.status;
        [
            self.address.clone(),
            self.state().to_owned(),
            status.version.to_string(),
            self.lag.to_string(),
            status.running.to_string(),
            status.waiting.to_string(),
            format!("{:.0} %", 100.0 * self.kv_cache_usage()),
            self.tokens_per_second.map_or("-".to_owned(), |rate| format!("{rate:.0}")),
            human(status.uptime_seconds),
            status.model.clone(),
        ]
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        for (address, run) in &self.runs {
            let v1::RunStatusResponse { run: name, version, max_steps, uptime_seconds, members } = run;
            let up = human(*uptime_seconds);
            text += &format!("run {name}, coordinator {address}: step {version} of {max_steps}, up {up}\n");
            if members.is_empty() {
                text += "  no generator has registered\n";
            }
            for v1::Member { address, heard_seconds, takes_part } in members {
                let heard = heard_seconds.map_or("named by the recipe".to_owned(), |seconds| {
                    format!("registered, heard of {seconds:.0} s ago")
                });
                let part = if *takes_part { "took the last push" } else { "waits for the next push" };
                text += &format!("  {address}: {heard}; {part}\n");
            }
        }
        if !self.generators.is_empty() {
            let head = ["GENERATOR", "STATE", "VERSION", "LAG", "RUNNING", "WAITING", "KV", "TOKENS/S", "UP", "MODEL"];
            let mut table = Table::new(head);
            self.generators.iter().for_each(|row| table.push(row.cells()));
            text += &table.to_string();
        }
        for (address, reason) in &self.silent {
            text += &format!("{address}  no answer: {reason}\n");
        }
        f.write_str(&printable(&text))
    }
}

fn human(seconds: f64) -> String {
    let duration = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    HumanDuration(Duration::from_secs(duration.as_secs())).to_string()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn generator(version: u64, tokens: u64, uptime_seconds: f64) -> Answer {
        Answer::Generator(v1::StatusResponse {
            version,
            running: 3,
            used_blocks: 12,
            total_blocks: 48,
            generation_tokens: tokens,
            uptime_seconds,
            model: "models/\u{1b}[31mtiny".to_owned(),
            ..v1::StatusResponse::default()
        })
    }

    fn looks(at: Instant, answers: impl IntoIterator<Item = Answer>) -> Vec<Look> {
        let look = |(index, answer)| Look { address: format!("10.0.0.{index}:1"), at, answer };
        answers.into_iter().enumerate().map(look).collect()
    }

    #[test]
    fn rates_are_of_the_time_between_two_looks_and_lag_is_behind_the_newest() {
        let start = Instant::now();
        let before = looks(start, [generator(6, 1000, 60.0), generator(6, 9000, 90.0)]);
        let after = [generator(7, 1500, 62.0), generator(5, 40, 1.0), Answer::None("connection refused".to_owned())];
        let report = Report::new(&looks(start + Duration::from_secs(2), after), Some(&before));
        let json = report.to_json();
        assert_eq!(json["generators"][0]["tokens_per_second"], 250.0);
        assert_eq!(json["generators"][0]["kv_cache_usage"], 0.25);
        assert_eq!((&json["generators"][0]["lag"], &json["generators"][1]["lag"]), (&json!(0), &json!(2)));
        assert_eq!(json["generators"][1]["tokens_per_second"], Value::Null, "it was started anew");
        assert_eq!(json["unanswered"][0], json!({"address": "10.0.0.2:1", "reason": "connection refused"}));
        let text = report.to_string();
        assert!(text.contains("\n10.0.0.0:1  serving  7        0    3        0        25 %  250"), "{text}");
        assert!(text.contains("10.0.0.2:1  no answer: connection refused\n") && text.contains("models/tiny"), "{text}");
        assert!(report.has_answers());
    }

    #[test]
    fn a_coordinator_is_ahead_of_generators_that_have_not_taken_its_push() {
        let run = v1::RunStatusResponse {
            run: "r".to_owned(),
            version: 9,
            max_steps: 100,
            uptime_seconds: 61.0,
            members: vec![v1::Member { address: "b:2".to_owned(), heard_seconds: Some(4.0), takes_part: true }],
        };
        let report = Report::new(&looks(Instant::now(), [Answer::Coordinator(run), generator(8, 0, 5.0)]), None);
        assert_eq!(report.generators[0].lag, 1);
        let text = report.to_string();
        assert!(text.starts_with("run r, coordinator 10.0.0.0:1: step 9 of 100, up 61 seconds\n"), "{text}");
        assert!(text.contains("  b:2: registered, heard of 4 s ago; took the last push\n"), "{text}");
    }

    #[test]
    fn nobody_is_no_answer() {
        let report = Report::new(&looks(Instant::now(), [Answer::None("gone".to_owned())]), None);
        assert!(!report.has_answers());
    }
}

//! Rewards of the user's own: a service or a program that a trainer asks. No generator does: a request that could make
//! one connect somewhere or start a process would be a hole.

use serde::{Deserialize, Serialize};

use super::options::parse;
use super::{RewardError, RewardSpec};

/// The names in configurations.
pub const EXTERNAL: [&str; 2] = ["rewarder", "command"];

/// Of more, batches and calls in flight help nobody.
const MAX_BATCH_SIZE: usize = 4096;
const MAX_IN_FLIGHT: usize = 256;

/// One entry of `rewards` whose function is `rewarder` or `command`.
#[derive(Debug, Clone, PartialEq)]
pub struct ExternalReward {
    /// The name in metrics and in names of files.
    pub name: String,
    pub judge: ExternalJudge,
    pub options: ExternalOptions,
}

/// Who is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExternalJudge {
    /// A gRPC service `aha.v1.Rewarder` at this address, `host:port`.
    Rewarder(String),
    /// A program with its arguments, which takes and gives lines of JSON.
    Command(Vec<String>),
}

/// How it is asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExternalOptions {
    /// `host:port` of a rewarder.
    address: String,
    /// Program and arguments of a command.
    command: Vec<String>,
    /// Time for one try at one batch.
    pub timeout_seconds: f64,
    /// Time for one completion, with its wait for others before it and all tries.
    pub deadline_seconds: f64,
    /// What the first batch of a command that was just started has beside its timeout.
    pub start_seconds: f64,
    /// Tries after the first.
    pub max_retries: u32,
    /// Completions asked for at once.
    pub max_batch_size: usize,
    /// Batches that a rewarder has at once; a command takes one after the other.
    pub max_in_flight: usize,
    /// Most bytes of a request to a rewarder; gRPC servers take 4 MiB where they are not told otherwise.
    pub max_message_bytes: usize,
    /// Scores that are possible, lowest and highest.
    pub range: Option<[f32; 2]>,
}

impl Default for ExternalOptions {
    fn default() -> Self {
        Self {
            address: String::new(),
            command: Vec::new(),
            timeout_seconds: 10.0,
            deadline_seconds: 300.0,
            start_seconds: 60.0,
            max_retries: 2,
            max_batch_size: 32,
            max_in_flight: 4,
            max_message_bytes: 4 << 20,
            range: None,
        }
    }
}

impl ExternalReward {
    /// # Errors
    /// Names the option that there is not, or that cannot be used.
    pub fn new(spec: &RewardSpec) -> Result<Self, RewardError> {
        let bad = |reason| RewardError::Options { function: spec.name().to_owned(), reason };
        let mut options: ExternalOptions = parse(spec.options.clone()).map_err(bad)?;
        let judge = match spec.function.as_str() {
            "rewarder" => ExternalJudge::Rewarder(std::mem::take(&mut options.address)),
            _ => ExternalJudge::Command(std::mem::take(&mut options.command)),
        };
        let reward = Self { name: spec.name().to_owned(), judge, options };
        reward.problem().map_or(Ok(reward), |problem| Err(bad(problem)))
    }

    /// Who is asked, for people.
    #[must_use]
    pub fn asked(&self) -> String {
        match &self.judge {
            ExternalJudge::Rewarder(address) => format!("rewarder {address}"),
            ExternalJudge::Command(command) => format!("command {command:?}"),
        }
    }

    /// The first thing that is wrong.
    fn problem(&self) -> Option<String> {
        let options = &self.options;
        let is_plain = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
        if !is_plain(&self.name) {
            return Some("its name must be of letters, digits, _, - and ., since files are named by it".to_owned());
        }
        match &self.judge {
            ExternalJudge::Rewarder(address) if !is_address(address) => {
                return Some(format!("address: {address:?} is not of the form host:port"));
            }
            ExternalJudge::Command(command) if command.first().is_none_or(String::is_empty) => {
                return Some("command: missing; name a program and its arguments: [python3, reward.py]".to_owned());
            }
            ExternalJudge::Rewarder(_) if !options.command.is_empty() => {
                return Some("command: a rewarder has none; set function to command".to_owned());
            }
            ExternalJudge::Command(_) if !options.address.is_empty() => {
                return Some("address: a command has none; set function to rewarder".to_owned());
            }
            _ => {}
        }
        let [timeout, deadline] = [options.timeout_seconds, options.deadline_seconds];
        let seconds = [("timeout", timeout), ("deadline", deadline), ("start", options.start_seconds)]
            .into_iter()
            .find_map(|(name, seconds)| {
                let is_good = seconds.is_finite() && seconds > 0.0;
                (!is_good).then(|| format!("{name}_seconds: must be over 0, got {seconds}"))
            });
        let bounds = [
            ("max_batch_size", options.max_batch_size, MAX_BATCH_SIZE),
            ("max_in_flight", options.max_in_flight, MAX_IN_FLIGHT),
            ("max_message_bytes", options.max_message_bytes, 1 << 30),
        ];
        let bound = bounds.into_iter().find_map(|(name, value, max)| {
            (!(1..=max).contains(&value)).then(|| format!("{name}: must be 1 to {max}, got {value}"))
        });
        let order = (deadline < timeout)
            .then(|| format!("deadline_seconds: {deadline} is less than the timeout_seconds {timeout} of one try"));
        let range = options.range.and_then(|[low, high]| {
            let is_range = low.is_finite() && high.is_finite() && low < high;
            (!is_range).then(|| format!("range: must be two finite numbers, the lower one first, got [{low}, {high}]"))
        });
        seconds.or(bound).or(order).or(range)
    }
}

fn is_address(address: &str) -> bool {
    address.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && !host.contains(['/', ' ', '@']) && port.parse::<u16>().is_ok_and(|port| port > 0)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::reward::RewardFunction;

    fn parsed(spec: Value) -> Result<ExternalReward, String> {
        let spec: RewardSpec = serde_json::from_value(spec).unwrap();
        assert!(spec.is_external());
        ExternalReward::new(&spec).map_err(|error| error.to_string())
    }

    #[test]
    fn whom_to_ask_is_read() {
        let reward = parsed(json!({"function": "rewarder", "name": "mine", "address": "[::1]:7000"})).unwrap();
        assert_eq!((reward.name.as_str(), reward.asked().as_str()), ("mine", "rewarder [::1]:7000"));
        let reward = parsed(json!({"function": "command", "command": ["sh", "-c", "x"], "range": [0, 1]})).unwrap();
        assert_eq!(reward.judge, ExternalJudge::Command(["sh", "-c", "x"].map(str::to_owned).to_vec()));
        assert_eq!((reward.options.range, reward.options.timeout_seconds), (Some([0.0, 1.0]), 10.0));
    }

    #[test]
    fn mistakes_are_named() {
        let rewarder = |key: &str, value: Value| json!({"function": "rewarder", "address": "h:1", key: value});
        let cases = [
            (json!({"function": "rewarder"}), r#"reward rewarder: address: "" is not of the form host:port"#),
            (rewarder("address", json!("http://h:1")), "address: \"http://h:1\" is not of the form"),
            (rewarder("address", json!("h:70000")), "is not of the form"),
            (json!({"function": "command"}), "command: missing"),
            (json!({"function": "command", "command": [""]}), "command: missing"),
            (json!({"function": "command", "command": "python3 reward.py"}), "command: invalid type: string"),
            (rewarder("command", json!(["x"])), "a rewarder has none"),
            (rewarder("timeout", json!(3)), "no option \"timeout\""),
            (rewarder("timeout_seconds", json!(0)), "timeout_seconds: must be over 0, got 0"),
            (rewarder("deadline_seconds", json!(5)), "deadline_seconds: 5 is less than the timeout_seconds 10"),
            (rewarder("max_batch_size", json!(0)), "max_batch_size: must be 1 to 4096, got 0"),
            (rewarder("range", json!([1, 1])), "range: must be two finite numbers"),
            (rewarder("name", json!("../x")), "its name must be of letters"),
        ];
        for (spec, expect) in cases {
            let error = parsed(spec).unwrap_err();
            assert!(error.contains(expect), "no {expect:?} in {error}");
        }
    }

    #[test]
    fn no_generator_asks_anybody() {
        for function in EXTERNAL {
            let error = RewardFunction::new(&RewardSpec::of(function)).unwrap_err().to_string();
            assert!(error.contains("asked by trainers alone"), "{error}");
        }
    }
}

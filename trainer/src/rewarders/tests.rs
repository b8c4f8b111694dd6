//! Services and programs that lie, fail, hang, die and come back.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aha_core::ids::{PolicyVersion, PromptId};
use aha_core::rollout::{FinishReason, Origin, Span};
use aha_proto::v1;
use aha_proto::v1::rewarder_server::{Rewarder as RewarderService, RewarderServer};
use aha_proto::v1::score_result::Verdict;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use super::*;

/// What becomes of one call; without one every completion is worth its sample index.
enum Answer {
    Results(fn(Vec<v1::ScoreResult>) -> Vec<v1::ScoreResult>),
    Fail(Status),
    Hang,
}

/// A rewarder on its own runtime; gone with all its connections when it is dropped.
struct TestRewarder {
    address: SocketAddr,
    seen: Arc<Mutex<Seen>>,
    _runtime: Runtime,
}

#[derive(Default)]
struct Seen {
    script: VecDeque<Answer>,
    requests: Vec<v1::ScoreBatchRequest>,
    num_in_flight: usize,
    most_in_flight: usize,
}

struct Service(Arc<Mutex<Seen>>);

#[tonic::async_trait]
impl RewarderService for Service {
    async fn score(&self, request: Request<v1::ScoreBatchRequest>) -> Result<Response<v1::ScoreBatchResponse>, Status> {
        let request = request.into_inner();
        let answer = {
            let mut seen = self.0.lock().unwrap();
            seen.num_in_flight += 1;
            seen.most_in_flight = seen.most_in_flight.max(seen.num_in_flight);
            seen.requests.push(request.clone());
            seen.script.pop_front()
        };
        // For others to come meanwhile.
        tokio::time::sleep(Duration::from_millis(20)).await;
        self.0.lock().unwrap().num_in_flight -= 1;
        let results = request.items.iter().map(|item| score(item.sample_index as f32)).collect();
        let results = match answer {
            None => results,
            Some(Answer::Results(change)) => change(results),
            Some(Answer::Fail(status)) => return Err(status),
            Some(Answer::Hang) => std::future::pending().await,
        };
        Ok(Response::new(v1::ScoreBatchResponse { results }))
    }
}

fn score(score: f32) -> v1::ScoreResult {
    v1::ScoreResult { verdict: Some(Verdict::Score(score)), message: None }
}

impl TestRewarder {
    fn start(script: impl IntoIterator<Item = Answer>) -> Self {
        Self::at(SocketAddr::from(([127, 0, 0, 1], 0)), script)
    }

    fn at(address: SocketAddr, script: impl IntoIterator<Item = Answer>) -> Self {
        let runtime = runtime();
        let deadline = Instant::now() + Duration::from_secs(10);
        // The one before may not have let go of it yet.
        let listener = loop {
            match runtime.block_on(TcpListener::bind(address)) {
                Ok(listener) => break listener,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        };
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Seen { script: script.into_iter().collect(), ..Seen::default() }));
        let service = RewarderServer::new(Service(Arc::clone(&seen)));
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        Self { address, seen, _runtime: runtime }
    }

    fn num_calls(&self) -> usize {
        self.seen.lock().unwrap().requests.len()
    }

    fn spec(&self, options: Value) -> RewardSpec {
        spec("rewarder", json!({"address": self.address.to_string()}), options)
    }
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// Called `mine`, patient for a second, and with these options.
fn spec(function: &str, judge: Value, options: Value) -> RewardSpec {
    let mut spec = json!({"function": function, "name": "mine", "timeout_seconds": 1.0, "start_seconds": 4.0});
    for (key, value) in [judge, options].iter().flat_map(|options| options.as_object().unwrap()) {
        spec[key] = value.clone();
    }
    serde_json::from_value(spec).unwrap()
}

fn command(script: &str, options: Value) -> RewardSpec {
    spec("command", json!({"command": ["sh", "-c", script]}), options)
}

fn prompt(id: u64) -> Prompt {
    let columns = [("target".to_owned(), json!(id))].into_iter().collect();
    Prompt { id: PromptId(id), text: format!("prompt {id}\n"), token_ids: vec![1], columns, origin: Origin::default() }
}

fn completions(prompt: &Prompt, count: u32) -> Vec<Completion> {
    let completion = |sample_index| Completion {
        prompt_id: prompt.id,
        sample_index,
        token_ids: vec![1, 2],
        logprobs: vec![-0.5; 2],
        spans: vec![Span { version: PolicyVersion(0), num_tokens: 2 }],
        finish_reason: FinishReason::Stop,
        text: format!("completion \"{sample_index}\""),
        rewards: Vec::new(),
        raw_logprobs: Vec::new(),
        prompt_logprobs: Vec::new(),
    };
    (0..count).map(completion).collect()
}

struct Judged {
    rewarders: Rewarders,
    spec: RewardSpec,
    runtime: Runtime,
}

impl Judged {
    fn by(spec: RewardSpec) -> Self {
        let runtime = runtime();
        let rewarders = Rewarders::start(std::slice::from_ref(&spec), None, runtime.handle()).unwrap();
        Self { rewarders, spec, runtime }
    }

    /// Scores, or what they are not, of so many completions.
    fn outcomes(&self, count: u32) -> Vec<String> {
        let prompt = prompt(5);
        let mut completions = completions(&prompt, count);
        let rewards = std::slice::from_ref(&self.spec);
        self.runtime.block_on(self.rewarders.judge(&prompt, rewards, &mut completions));
        let outcome = |completion: Completion| {
            let [reward] = <[Reward; 1]>::try_from(completion.rewards).unwrap();
            if reward.outcome == "score" { reward.score.to_string() } else { reward.outcome }
        };
        completions.into_iter().map(outcome).collect()
    }

    #[track_caller]
    fn check(&self, expect: &[&str], failure: &str) {
        assert_eq!(self.outcomes(expect.len() as u32), expect);
        let failures = self.rewarders.failures().collect::<Vec<_>>().join("\n");
        assert!(failures.starts_with("reward mine (") && failures.contains(failure), "no {failure:?} in {failures:?}");
    }
}

/// What becomes of three completions when the first call is answered so; the next is answered well.
#[track_caller]
fn check_lie(answer: Answer, expect: [&str; 3], failure: &str) {
    let rewarder = TestRewarder::start([answer]);
    let judged = Judged::by(rewarder.spec(json!({"range": [0, 2], "max_retries": 0})));
    judged.check(&expect, failure);
    assert_eq!(judged.outcomes(2), ["0", "1"], "it is not held against others");
}

#[test]
fn lies_of_a_service_are_no_verdict_and_named() {
    let all = ["crash"; 3];
    check_lie(Answer::Results(|_| Vec::new()), all, "0 results for 3 completions");
    check_lie(Answer::Results(|results| [results.clone(), results].concat()), all, "6 results for 3");
    check_lie(
        Answer::Results(|_| vec![score(0.0), score(f32::NAN), score(f32::INFINITY)]),
        ["0", "crash", "crash"],
        "NaN",
    );
    check_lie(
        Answer::Results(|_| vec![score(-0.1), score(2.0), score(2.1)]),
        ["crash", "2", "crash"],
        "-0.1 is not in its range, 0 to 2",
    );
    let outcomes = |_| {
        let result = |outcome| v1::ScoreResult { verdict: Some(Verdict::Outcome(outcome)), message: None };
        vec![result(1), result(2), result(77)]
    };
    check_lie(Answer::Results(outcomes), ["wrong", "unparsable", "crash"], "outcome 77 is none");
    let unspecified = |_| vec![v1::ScoreResult { verdict: Some(Verdict::Outcome(0)), message: None }; 3];
    check_lie(Answer::Results(unspecified), all, "outcome 0 is none");
    let nothing = |_| vec![v1::ScoreResult { verdict: None, message: Some("out of order".to_owned()) }; 3];
    check_lie(Answer::Results(nothing), all, "neither score nor outcome: out of order");
    let no_verdict = |_| {
        let verdict = Some(Verdict::Outcome(v1::ScoreOutcome::NoVerdict.into()));
        vec![score(1.0), v1::ScoreResult { verdict, message: Some("quota".to_owned()) }, score(0.0)]
    };
    check_lie(Answer::Results(no_verdict), ["1", "crash", "0"], "no verdict: quota");
    let huge = |_| vec![v1::ScoreResult { message: Some("x".repeat(2 << 20)), ..score(1.0) }; 3];
    check_lie(Answer::Results(huge), all, "too large");
    check_lie(Answer::Fail(Status::invalid_argument("what is this?")), all, "what is this?");
    check_lie(Answer::Fail(Status::unknown("Exception calling application: 'target'")), all, "'target'");
}

#[test]
fn a_service_is_asked_in_batches_of_bounded_size_several_at_once_and_gets_all_it_needs() {
    let rewarder = TestRewarder::start([]);
    let judged = Judged::by(rewarder.spec(json!({"max_batch_size": 4, "max_in_flight": 3})));
    let expect: Vec<String> = (0..40).map(|index| index.to_string()).collect();
    assert_eq!(judged.outcomes(40), expect);
    let seen = rewarder.seen.lock().unwrap();
    assert!(seen.requests.iter().all(|request| (1..=4).contains(&request.items.len()) && request.reward == "mine"));
    assert!((2..=3).contains(&seen.most_in_flight), "{} at once", seen.most_in_flight);
    let item = seen.requests.iter().flat_map(|request| &request.items).find(|item| item.sample_index == 7).unwrap();
    assert_eq!(
        *item,
        v1::ScoreItem {
            prompt: "prompt 5\n".to_owned(),
            completion: "completion \"7\"".to_owned(),
            columns: r#"{"target":5}"#.to_owned(),
            num_tokens: 2,
            is_truncated: false,
            prompt_id: 5,
            sample_index: 7,
        }
    );
}

#[test]
fn messages_are_bounded_and_what_fits_in_none_is_named() {
    let rewarder = TestRewarder::start([]);
    // Room for two of 107 bytes each.
    let judged = Judged::by(rewarder.spec(json!({"max_message_bytes": 250})));
    assert_eq!(judged.outcomes(5), ["0", "1", "2", "3", "4"]);
    assert!(rewarder.seen.lock().unwrap().requests.iter().all(|request| request.items.len() <= 2));
    let judged = Judged::by(rewarder.spec(json!({"max_message_bytes": 50})));
    judged.check(&["crash"; 2], "bytes are over max_message_bytes");
}

#[test]
fn what_failed_is_asked_again_and_counts_once() {
    let busy = || Answer::Fail(Status::unavailable("busy"));
    let rewarder = TestRewarder::start([busy(), Answer::Fail(Status::internal("bug"))]);
    let judged = Judged::by(rewarder.spec(json!({})));
    assert_eq!(judged.outcomes(2), ["0", "1"]);
    assert_eq!((rewarder.num_calls(), judged.rewarders.failures().count()), (3, 0));
    let rewarder = TestRewarder::start([busy(), busy(), busy()]);
    Judged::by(rewarder.spec(json!({}))).check(&["crash"; 2], "busy");
    assert_eq!(rewarder.num_calls(), 3, "max_retries is 2");
}

#[test]
fn a_service_that_hangs_is_waited_for_once_and_found_again() {
    let rewarder = TestRewarder::start([Answer::Hang]);
    let judged = Judged::by(rewarder.spec(json!({"timeout_seconds": 0.5, "max_retries": 0})));
    let started = Instant::now();
    judged.check(&["timeout"; 3], "no answer in 0.5 s");
    assert_eq!(judged.outcomes(200), ["timeout"; 200]);
    assert!(started.elapsed() < Duration::from_millis(1400), "{:?}", started.elapsed());
    assert_eq!(rewarder.num_calls(), 1, "nobody else waited for it");
    comes_back(&judged);
}

/// Within a pause or two.
#[track_caller]
fn comes_back(judged: &Judged) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while judged.outcomes(1) != ["0"] {
        assert!(Instant::now() < deadline, "it was not found again");
        std::thread::park_timeout(Duration::from_millis(50));
    }
}

#[test]
fn a_service_that_dies_is_down_until_it_is_back() {
    let rewarder = TestRewarder::start([]);
    let address = rewarder.address;
    let judged = Judged::by(rewarder.spec(json!({})));
    assert_eq!(judged.outcomes(1), ["0"]);
    drop(rewarder);
    judged.check(&["crash"; 2], "");
    let started = Instant::now();
    assert_eq!(judged.outcomes(500), ["crash"; 500]);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    let _back = TestRewarder::at(address, []);
    comes_back(&judged);
}

#[test]
fn whatever_is_slow_ends_at_the_deadline_of_a_completion() {
    let rewarder = TestRewarder::start((0..99).map(|_| Answer::Hang));
    let options = json!({"timeout_seconds": 0.4, "deadline_seconds": 0.6, "max_retries": 99, "max_batch_size": 1, "max_in_flight": 1});
    let judged = Judged::by(rewarder.spec(options));
    let started = Instant::now();
    assert_eq!(judged.outcomes(20), ["timeout"; 20]);
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

/// Answers each line by `scores`, a shell's expression.
fn echo(scores: &str) -> String {
    format!("id=0; while read -r line; do {scores}; id=$((id+1)); done")
}

const GOOD: &str =
    r#"echo "{\"id\": $id, \"scores\": [0.5, {\"outcome\": \"wrong\"}, {\"outcome\": \"unparsable\"}]}""#;

#[test]
fn a_command_answers_line_by_line() {
    let judged = Judged::by(command(&echo(GOOD), json!({})));
    for _ in 0..3 {
        assert_eq!(judged.outcomes(3), ["0.5", "wrong", "unparsable"]);
    }
    // What it is asked is JSON with a row's columns.
    let check = r#"read -r line; case "$line" in *'"completion":"completion \"0\"","columns":{"target":5},"num_tokens":2'*) echo '{"id": 0, "scores": [1]}';; esac"#;
    assert_eq!(Judged::by(command(check, json!({}))).outcomes(1), ["1"]);
}

#[test]
fn lies_of_a_command_are_no_verdict_and_named() {
    let judged = |script: &str| Judged::by(command(script, json!({"max_retries": 0, "range": [0, 1]})));
    let all = ["crash"; 3];
    let answer = |answer: &str| echo(&format!("echo '{answer}'"));
    judged(&answer("I am ready")).check(&all, "\"I am ready\" is no answer: expected value");
    judged(&answer(r#"{"id": 0, "scores": [1, NaN, 1]}"#)).check(&all, "is no answer");
    judged(&answer(r#"{"id": 0, "scores": [1, 1e999, 1]}"#)).check(&all, "is no answer");
    judged(&answer(r#"{"id": 9, "scores": [1, 1, 1]}"#)).check(&all, "an answer to batch 9 where 0 was asked for");
    judged(&answer(r#"{"id": 0, "scores": [1]}"#)).check(&all, "1 scores for 3 completions");
    judged(&answer(r#"{"id": 0, "scores": [1e300, 2, -1]}"#)).check(&all, "score inf is not finite");
    let odd = r#"{"id": 0, "scores": [null, "1", {"outcome": "right"}]}"#;
    judged(&answer(odd)).check(&all, "no verdict");
    judged(&answer(r#"{"id": 0, "scores": [0, "1", true]}"#)).check(&["0", "crash", "crash"], "\"1\" is no score");
    let excused = r#"{"id": 0, "scores": [0, 1, {"outcome": "no_verdict", "message": "quota"}]}"#;
    judged(&answer(excused)).check(&["0", "1", "crash"], "no verdict: quota");
    judged("read -r line; yes | tr -d '\\n'").check(&all, "a line of more than 4194304 bytes");
    judged("exit 3").check(&all, "it ended with exit status: 3");
}

#[test]
fn a_command_that_says_too_much_is_started_again() {
    let twice = format!("{}; {}", GOOD, "echo extra");
    let judged = Judged::by(command(&echo(&twice), json!({"max_retries": 0})));
    assert_eq!(judged.outcomes(3), ["0.5", "wrong", "unparsable"]);
    judged.check(&["crash"; 3], "\"extra\" is no answer");
    // It counts anew, and what it is asked does not.
    judged.check(&["crash"; 3], "an answer to batch 0 where 2 was asked for");
}

#[test]
fn a_command_that_hangs_is_killed_with_all_it_started() {
    let folder = tempfile::tempdir().unwrap();
    let pids = folder.path().join("pids");
    let script = format!(
        "sleep 600 & echo $! >> '{}'; echo $$ >> '{}'; read -r line; sleep 600",
        pids.display(),
        pids.display()
    );
    let judged = Judged::by(command(&script, json!({"timeout_seconds": 0.2, "start_seconds": 0.3, "max_retries": 0})));
    judged.check(&["timeout"; 2], "no answer in 0.5 s");
    let pids: Vec<String> = std::fs::read_to_string(pids).unwrap().lines().map(str::to_owned).collect();
    assert_eq!(pids.len(), 2);
    let is_running = |pid: &String| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        !status.is_empty() && !status.contains(") Z ")
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    while pids.iter().any(is_running) {
        assert!(Instant::now() < deadline, "{pids:?} are still there");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

#[test]
fn a_command_that_reads_nothing_does_not_hold_up_its_deadline() {
    let judged =
        Judged::by(command("exec sleep 600", json!({"timeout_seconds": 0.2, "start_seconds": 0.2, "max_retries": 0})));
    let prompt = Prompt { text: "x".repeat(1 << 20), ..prompt(1) };
    let mut completions = completions(&prompt, 2);
    let started = Instant::now();
    let rewards = std::slice::from_ref(&judged.spec);
    judged.runtime.block_on(judged.rewarders.judge(&prompt, rewards, &mut completions));
    assert!(completions.iter().all(|completion| completion.rewards[0].outcome == "timeout"));
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
}

#[test]
fn a_command_that_died_is_started_again_and_its_messages_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let marker = folder.path().join("was-here");
    // The first one dies at its first question.
    let script = format!(
        "echo started >&2; if [ ! -e '{0}' ]; then touch '{0}'; read -r line; exit 1; fi; read -r line; echo '{{\"id\": 1, \"scores\": [1]}}'; read -r line",
        marker.display()
    );
    let spec = command(&script, json!({}));
    let runtime = runtime();
    let logs = Logs { folder: folder.path().to_owned(), rank: 3 };
    let rewarders = Rewarders::start(std::slice::from_ref(&spec), Some(&logs), runtime.handle()).unwrap();
    let judged = Judged { rewarders, spec, runtime };
    assert_eq!(judged.outcomes(1), ["1"]);
    assert_eq!(std::fs::read_to_string(folder.path().join("reward-mine-3.log")).unwrap(), "started\nstarted\n");
}

#[test]
fn a_command_that_cannot_be_started_is_named_before_a_run() {
    let spec = spec("command", json!({"command": ["/no/such/program"]}), json!({}));
    let error = Rewarders::start(&[spec], None, runtime().handle()).unwrap_err().to_string();
    assert!(error.contains("reward mine: cannot start command [\"/no/such/program\"]"), "{error}");
}

#[test]
fn what_is_there_is_not_asked_for_again_and_rewards_keep_the_recipe_s_order() {
    let rewarder = TestRewarder::start([]);
    let rewards = [rewarder.spec(json!({})), RewardSpec::of("format")];
    let runtime = runtime();
    let rewarders = Rewarders::start(&rewards, None, runtime.handle()).unwrap();
    let prompt = prompt(5);
    let mut completions = completions(&prompt, 3);
    for completion in &mut completions {
        completion.rewards.push(Reward::new("format", Outcome::Score(1.0)));
    }
    completions[1].rewards.insert(0, Reward::new("mine", Outcome::Score(9.0)));
    runtime.block_on(rewarders.judge(&prompt, &rewards, &mut completions));
    let scores: Vec<_> = completions
        .iter()
        .map(|completion| {
            completion.rewards.iter().map(|reward| (reward.function.as_str(), reward.score)).collect::<Vec<_>>()
        })
        .collect();
    let expect = |score| vec![("mine", score), ("format", 1.0)];
    assert_eq!(scores, [expect(0.0), expect(9.0), expect(2.0)]);
    assert_eq!(rewarder.seen.lock().unwrap().requests[0].items.len(), 2);
}

//! A trainer and its generators over a network that fails: what the trainer calls, in this process, and generators as
//! processes of their own, one of them behind a [`ChaosProxy`].

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aha_core::config::{Credentials, RunConfig};
use aha_core::ids::{PolicyVersion, PromptId};
use aha_core::reward::RewardSpec;
use aha_core::rollout::{Group, Origin, Prompt, Sampling};
use aha_nn::comm::ProcessGroup;
use aha_nn::model_config::ModelConfig;
use aha_nn::unit::ModelWeights;
use aha_nn::weights::Weights;
use aha_tests::chaos::{ChaosProxy, Fault};
use aha_tests::small_run;
use aha_trainer::fleet::Fleet;
use aha_trainer::generators::Generators;
use aha_trainer::rollouts::{RolloutError, RolloutRequest};
use serde_json::json;
use tch::{Device, Kind};

use crate::process::{Process, free_address, wait_until};

/// Of `generator.probe_timeout_seconds`.
const PROBE: Duration = Duration::from_secs(1);
/// Deadlines that none of these faults is to run into, as probes find it before.
const PUSH_DEADLINE: Duration = Duration::from_secs(120);
const ROLLOUT_DEADLINE: Duration = Duration::from_secs(120);
/// For processes to start, and generators to take part again, on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(100);

/// One trainer with its policy.
struct Trainer {
    fleet: Fleet,
    group: ProcessGroup,
    policy: Weights,
    version: u64,
}

impl Trainer {
    /// Waits for the generators at `addresses`.
    fn start(folder: &Path, addresses: &[String], change: impl FnOnce(&mut RunConfig)) -> Self {
        let mut config: RunConfig = serde_json::from_value(small_run::recipe()).unwrap();
        config.generator.addresses = addresses.to_vec();
        config.generator.connect_timeout_seconds = PATIENCE.as_secs_f64();
        config.generator.probe_timeout_seconds = PROBE.as_secs_f64();
        config.train.push_timeout_seconds = PUSH_DEADLINE.as_secs_f64();
        config.rollout.deadline_seconds = ROLLOUT_DEADLINE.as_secs_f64();
        change(&mut config);
        let model = ModelConfig::load(&folder.join("model")).unwrap();
        let policy = Weights::random(&model, 1, 1, Kind::Float, Device::Cpu);
        let group = ProcessGroup::solo("trainers", Device::Cpu);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let fleet = Fleet::connect(&config, &group, &policy, Credentials::default(), Arc::new(runtime)).unwrap();
        Self { fleet, group, policy, version: 0 }
    }

    fn publish(&mut self) -> Result<(), String> {
        self.version += 1;
        let published = self.fleet.publish(&self.group, &self.policy, PolicyVersion(self.version));
        published.map(drop).map_err(|error| error.to_string())
    }

    /// Completions of the policy that was published last, without what tells when they were sampled; none for a group that
    /// did not come in time.
    fn roll_out(&mut self) -> Result<Vec<Option<Group>>, RolloutError> {
        let prompt = |id| Prompt {
            id: PromptId(id),
            text: String::new(),
            token_ids: vec![5, 6, 7, 8 + id as u32],
            columns: json!({"nums": [1, 2], "target": 3}).as_object().unwrap().clone(),
            origin: Origin::default(),
        };
        let request = RolloutRequest {
            prompts: (0..6).map(prompt).collect(),
            num_generations: 4,
            sampling: Sampling { max_tokens: 24, ignore_eos: true, ..Sampling::default() },
            seed: 3,
            rewards: vec![RewardSpec::of("format")],
            min_version: PolicyVersion(self.version),
        };
        let policy = (&self.policy as &dyn ModelWeights, PolicyVersion(self.version));
        let mut groups = self.fleet.roll_out(&self.group, policy, &request)?;
        for completion in groups.iter_mut().flatten().flat_map(|group| &mut group.completions) {
            completion.spans.clear();
        }
        Ok(groups)
    }

    /// Publishes until so many generators take part.
    #[track_caller]
    fn gather(&mut self, num_generators: usize) {
        wait_until("every generator", PATIENCE, || {
            self.publish().unwrap();
            self.fleet.num_generators() == num_generators
        });
    }
}

/// `aha generator` on a model of `small_run`.
fn start_generator(folder: &Path, name: &str) -> (Process, String) {
    let address = free_address();
    (Process::start(folder, name, &["generator", "run.yaml", "--listen", &address], &[]), address)
}

/// Faults of every kind, from places all over what a push and a rollout send. A second generator is always well.
#[test]
fn whatever_the_network_does_and_whenever_a_step_goes_on_without_the_generator_behind_it() {
    const PLACES: u64 = 10;
    const FAULTS: [Fault; 5] =
        [Fault::Throttle(1), Fault::Swallow, Fault::Deaf, Fault::Reset, Fault::Delay(Duration::from_millis(200))];
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    let (_well, well) = start_generator(folder.path(), "well");
    let (_behind, behind) = start_generator(folder.path(), "behind");
    let proxy = ChaosProxy::start(&behind).unwrap();
    let mut trainer = Trainer::start(folder.path(), &[well, proxy.address()], |_| {});
    trainer.gather(2);

    let before = proxy.forwarded();
    trainer.publish().unwrap();
    let expect = trainer.roll_out().unwrap();
    assert!(expect.iter().all(Option::is_some));
    let bytes = proxy.forwarded() - before;
    assert!(bytes > 2000, "{bytes} bytes only: the generator behind the proxy was not asked");

    let mut times = Vec::new();
    for place in 0..PLACES {
        let (from, fault) = (bytes * place / PLACES, FAULTS[place as usize % FAULTS.len()]);
        trainer.gather(2);
        let (started, before) = (Instant::now(), proxy.forwarded());
        proxy.set_after(from, fault);
        trainer.publish().unwrap();
        let groups = trainer.roll_out().unwrap();
        let elapsed = started.elapsed();
        println!("{fault:?} from byte {from} of {bytes}: {elapsed:.1?}");
        assert!(groups == expect, "{fault:?} from byte {from} changed the completions");
        assert!(elapsed < PUSH_DEADLINE + ROLLOUT_DEADLINE, "{fault:?} from byte {from} took {elapsed:?}");
        times.push(elapsed);
        assert!(proxy.forwarded() - before >= from, "{fault:?} never began");
        proxy.set(Fault::None);
    }
    // As a rule it is the probes that notice.
    times.sort_unstable();
    assert!(times[times.len() / 2] < ROLLOUT_DEADLINE / 2, "{times:?}");
}

/// What a trainer says whose only generator is behind a network with each of `faults`, all at the same time.
#[track_caller]
fn check_named(faults: &[Fault], act: impl Fn(&mut Trainer, &ChaosProxy, Fault) -> String + Sync) {
    std::thread::scope(|scope| {
        for &fault in faults {
            let act = &act;
            scope.spawn(move || check_one(fault, |trainer, proxy| act(trainer, proxy, fault)));
        }
    });
}

fn check_one(fault: Fault, act: impl Fn(&mut Trainer, &ChaosProxy) -> String) {
    const CONNECT: Duration = Duration::from_secs(3);
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    let (_generator, address) = start_generator(folder.path(), "generator");
    let proxy = ChaosProxy::start(&address).unwrap();
    // Until the generator is there once, and no more.
    drop(Trainer::start(folder.path(), &[proxy.address()], |_| {}));
    let mut trainer = Trainer::start(folder.path(), &[proxy.address()], |config| {
        config.generator.connect_timeout_seconds = CONNECT.as_secs_f64();
    });
    trainer.publish().unwrap();
    trainer.roll_out().unwrap();
    let started = Instant::now();
    let said = act(&mut trainer, &proxy);
    let elapsed = started.elapsed();
    assert!(said.contains("no generator has answered for") && said.contains(&proxy.address()), "{fault:?}: {said}");
    assert!(elapsed < ROLLOUT_DEADLINE, "{fault:?}: {elapsed:?}");
}

#[test]
fn a_push_over_a_network_that_is_down_ends_by_name() {
    check_named(&[Fault::Throttle(1), Fault::Swallow, Fault::Deaf, Fault::Reset], |trainer, proxy, fault| {
        proxy.set(fault);
        trainer.publish().unwrap_err()
    });
}

/// Every prompt is asked for twelve times, each until the connection is given up.
#[test]
fn a_rollout_over_a_network_that_goes_down_ends_by_name() {
    check_named(&[Fault::Throttle(1), Fault::Deaf, Fault::Reset], |trainer, proxy, fault| {
        proxy.set_after(1500, fault);
        trainer.roll_out().unwrap_err().to_string()
    });
}

/// A slow network is not a silent one: what bounds it is the step's own deadline.
#[test]
fn a_rollout_over_a_slow_network_ends_at_its_deadline() {
    const DEADLINE: Duration = Duration::from_secs(4);
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    let (_generator, address) = start_generator(folder.path(), "generator");
    let proxy = ChaosProxy::start(&address).unwrap();
    let mut trainer = Trainer::start(folder.path(), &[proxy.address()], |config| {
        config.rollout.deadline_seconds = DEADLINE.as_secs_f64();
        config.generator.probe_timeout_seconds = PATIENCE.as_secs_f64();
    });
    trainer.publish().unwrap();
    proxy.set(Fault::Throttle(100));
    let started = Instant::now();
    assert!(trainer.roll_out().unwrap().contains(&None), "all came in time over a slow network");
    let elapsed = started.elapsed();
    assert!(elapsed >= DEADLINE && elapsed < DEADLINE + PATIENCE, "{elapsed:?}");
}

/// SIGSTOP at places all over the calls of a push, the transfer itself among them, whose Gloo connections no proxy sees.
#[test]
fn a_generator_stopped_anywhere_in_a_push_is_left_out_and_comes_back() {
    const PLACES: u64 = 6;
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    widen_model(folder.path());
    let (well_process, well) = start_generator(folder.path(), "well");
    let (behind, address) = start_generator(folder.path(), "behind");
    let proxy = ChaosProxy::start(&address).unwrap();
    let mut trainer = Trainer::start(folder.path(), &[well, proxy.address()], |_| {});
    trainer.gather(2);
    let before = proxy.forwarded();
    trainer.publish().unwrap();
    let bytes = proxy.forwarded() - before;
    for place in 0..PLACES {
        trainer.gather(2);
        let before = proxy.forwarded();
        let started = Instant::now();
        std::thread::scope(|scope| {
            let (proxy, behind) = (&proxy, &behind);
            scope.spawn(move || {
                wait_until("the place", PATIENCE, || proxy.forwarded() - before >= bytes * place / PLACES);
                behind.signal("-STOP");
            });
            trainer.publish().unwrap();
        });
        // The push may have been over; the next one is not.
        trainer.publish().unwrap();
        let elapsed = started.elapsed();
        println!("stopped after {} of {bytes} bytes: {elapsed:.1?}", bytes * place / PLACES);
        assert!(trainer.fleet.num_generators() == 1, "a stopped generator has taken a push");
        let said = [&well_process, &behind].map(Process::said);
        assert!(elapsed < PUSH_DEADLINE, "{elapsed:?}, and the generators said {}\n{}", said[0], said[1]);
        behind.signal("-CONT");
    }
    trainer.gather(2);
    trainer.roll_out().unwrap();
}

/// Weights of some 60 MB, so that a push takes longer than its calls.
fn widen_model(folder: &Path) {
    let path = folder.join("model/config.json");
    let mut config: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config["hidden_size"] = json!(512);
    config["intermediate_size"] = json!(4096);
    std::fs::write(&path, config.to_string()).unwrap();
}

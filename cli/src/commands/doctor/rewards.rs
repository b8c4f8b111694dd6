//! Rewards of the user's own: whether who is to be asked is there.

use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::time::Duration;

use aha_core::config::RunConfig;
use aha_core::reward::{ExternalJudge, ExternalReward};

use super::finding::Finding;

const CHECK: &str = "rewards";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// One for each reward that is not built in.
pub(super) fn external(config: &RunConfig) -> Vec<Finding> {
    let specs = config.rewards.iter().filter(|spec| spec.is_external());
    specs.filter_map(|spec| ExternalReward::new(spec).ok()).map(|reward| finding(&reward)).collect()
}

fn finding(reward: &ExternalReward) -> Finding {
    let what = format!("reward {} ({})", reward.name, reward.asked());
    match &reward.judge {
        ExternalJudge::Rewarder(address) => match answers(address) {
            Ok(()) => Finding::ok(CHECK, format!("{what} takes connections")),
            Err(error) => {
                let fix = "start it before the run; completions that nobody judges are not trained on";
                Finding::warning(CHECK, format!("{what} does not: {error}"), fix)
            }
        },
        ExternalJudge::Command(command) => {
            if command.first().is_some_and(|program| is_program(program)) {
                Finding::ok(CHECK, format!("{what} is there"))
            } else {
                let fix = "install the program, or name it with its path";
                Finding::problem(CHECK, format!("{what}: there is no such program"), fix)
            }
        }
    }
}

fn answers(address: &str) -> std::io::Result<()> {
    let mut last = std::io::ErrorKind::NotFound.into();
    for socket in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&socket, CONNECT_TIMEOUT) {
            Ok(_) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Found as a shell finds it.
fn is_program(program: &str) -> bool {
    if program.contains('/') {
        return Path::new(program).is_file();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use aha_core::config::RewardSpec;
    use serde_json::json;

    use super::super::finding::Severity;
    use super::*;

    #[test]
    fn who_is_to_be_asked_is_looked_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let severities = |specs: serde_json::Value| {
            let rewards: Vec<RewardSpec> = serde_json::from_value(specs).unwrap();
            let findings = external(&RunConfig { rewards, ..RunConfig::default() });
            findings.iter().map(|finding| finding.severity).collect::<Vec<_>>()
        };
        let rewarder = json!([{"function": "format"}, {"function": "rewarder", "address": address}]);
        assert_eq!(severities(rewarder.clone()), [Severity::Ok]);
        drop(listener);
        assert_eq!(severities(rewarder), [Severity::Warning]);
        let command = |program| json!([{"function": "command", "command": [program, "x"]}]);
        assert_eq!(severities(command("sh")), [Severity::Ok]);
        assert_eq!(severities(command("no-such-program")), [Severity::Problem]);
    }
}

//! `aha launch --dry-run`: the configuration as it is resolved, and the processes that a launch would start.

use std::process::ExitCode;

use aha_core::config::RunConfig;
use anyhow::Result;
use serde_json::{Value, json};

use super::role::Role;

pub(super) fn print(config: &RunConfig, roles: &[Role], is_json: bool) -> Result<ExitCode> {
    if is_json {
        let processes: Vec<Value> = roles.iter().map(to_json).collect();
        println!("{}", json!({"config": config, "processes": processes}));
        return Ok(ExitCode::SUCCESS);
    }
    println!("# The configuration\n{}", serde_saphyr::to_string(config)?.trim_end());
    println!("\n# The processes");
    for role in roles {
        println!("# {role}\n{}", shell_command(role));
    }
    Ok(ExitCode::SUCCESS)
}

fn to_json(role: &Role) -> Value {
    let environment: serde_json::Map<String, Value> =
        role.environment().iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
    json!({"name": role.to_string(), "environment": environment, "arguments": role.arguments()})
}

/// What a shell would be told to start it.
fn shell_command(role: &Role) -> String {
    let environment = role.environment().iter().map(|(name, value)| format!("{name}={}", quoted(value)));
    let arguments = role.arguments().iter().map(|argument| quoted(argument));
    environment.chain(["aha".to_owned()]).chain(arguments).collect::<Vec<_>>().join(" ")
}

fn quoted(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,@%+".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::role::RoleKind;

    #[test]
    fn a_shell_reads_the_command_as_it_is_meant() {
        let arguments =
            ["trainer", "configs/x.yaml", "--set", "generator.addresses=[\"a:1\"]", "--set", "run.name=it's"];
        let role = Role::new(RoleKind::Trainer, 0, arguments.map(str::to_owned).to_vec()).with_gpu("3");
        let text = format!("printf '%s\\n' {}", shell_command(&role).replace("aha ", ""));
        let output = std::process::Command::new("sh").args(["-c", &text]).output().unwrap();
        let lines: Vec<_> = std::str::from_utf8(&output.stdout).unwrap().lines().collect();
        assert_eq!(lines[2..], arguments, "{text}");
        assert_eq!(lines[..2], ["OMP_WAIT_POLICY=PASSIVE", "CUDA_VISIBLE_DEVICES=3"]);
    }
}

//! `aha sft` as a user runs it: from rows or conversations, judged on rows that it never trains on, and what it leaves is
//! where reinforcement learning begins.

use std::path::Path;

use aha_tests::binary::{check_refused, check_runs};
use aha_tests::small_run;
use serde_json::{Value, json};

/// Steps and held-out losses of the run `name`.
fn losses(folder: &Path, name: &str) -> Vec<(u64, f64)> {
    let path = folder.join("runs").join(name).join("evaluations.jsonl");
    let text = std::fs::read_to_string(path).expect("the run has evaluations");
    let line = |line: &str| {
        let line: Value = serde_json::from_str(line).expect("a line is JSON");
        (line["step"].as_u64().expect("a step"), line["eval_loss"].as_f64().expect("a loss"))
    };
    text.lines().map(line).collect()
}

#[test]
fn the_loss_on_rows_that_are_never_trained_on_falls_and_rewards_go_on_from_there() {
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    let sft =
        ["sft", "run.yaml", "--set", "train.max_steps=20", "--set", "eval.eval_steps=10", "--set", "run.name=warm"];
    let said = check_runs(folder.path(), &sft);
    let losses = losses(folder.path(), "warm");
    assert_eq!(losses.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0, 10, 20]);
    assert!(losses[2].1 < losses[1].1 && losses[1].1 < losses[0].1 - 0.5, "{losses:?}");
    assert!(said.contains("held-out loss after 20 steps: ") && said.contains(" on 8 examples"), "{said}");
    let launch = ["launch", "run.yaml", "--set", "model.path=runs/warm/model", "--set", "model.random_init=false"];
    let short = ["--trainers", "1", "--set", "train.max_steps=1"];
    check_runs(folder.path(), &[launch.as_slice(), &short].concat());
}

#[test]
fn conversations_are_learnt_turn_by_turn() {
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    let turns = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}\
                 {% if add_generation_prompt %}[assistant]{% endif %}";
    std::fs::write(folder.path().join("model/chat_template.jinja"), turns).unwrap();
    let said = |role: &str, content: String| json!({"role": role, "content": content});
    let conversation = |n: u32| {
        let messages = [
            said("user", format!("{n}?")),
            said("assistant", format!("{n}!")),
            said("user", "more".into()),
            said("assistant", "no".into()),
        ];
        json!({"chat": messages}).to_string()
    };
    let rows: Vec<String> = (0..40).map(conversation).collect();
    std::fs::write(folder.path().join("rows.jsonl"), rows.join("\n")).unwrap();
    let mut recipe = small_run::recipe();
    recipe["data"] = json!({"source": "file", "path": "rows.jsonl", "held_out": 0.3, "max_prompt_length": 64});
    recipe["sft"] = json!({"batch_size": 8, "messages": "chat", "max_length": 96});
    recipe["rewards"] = json!([]);
    recipe["train"]["max_steps"] = json!(15);
    std::fs::write(folder.path().join("run.yaml"), recipe.to_string()).unwrap();
    check_runs(folder.path(), &["sft", "run.yaml"]);
    let losses = losses(folder.path(), "small");
    assert!(losses[1].1 < losses[0].1 - 0.5, "{losses:?}");
    let wrong = ["sft", "run.yaml", "--set", "sft.messages=chats", "--set", "run.name=wrong"];
    check_refused(folder.path(), &wrong, &["sft.messages: column \"chats\""]);
}

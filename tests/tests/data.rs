//! `aha data`, and a whole run whose prompts are of two sources.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use aha_tests::binary::{check_refused, check_runs};
use aha_tests::small_run;
use serde_json::{Value, json};

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A folder with a small run, whose recipe `change` changes.
fn folder(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    let mut recipe = small_run::recipe();
    change(&mut recipe);
    std::fs::write(folder.path().join("run.yaml"), recipe.to_string()).unwrap();
    folder
}

#[test]
fn prompts_and_rows_are_shown_before_a_run() {
    let folder = folder(|_| {});
    let shown = check_runs(folder.path(), &["data", "preview", "run.yaml", "--rows", "2"]);
    assert_eq!(shown.matches(" tokens, rewards: format, equation\n--- {\"nums\":[").count(), 2, "{shown}");
    assert_eq!(shown.matches("\n<think>").count(), 2, "{shown}");
    let arguments =
        ["data", "stats", "run.yaml", "--json", "--set", "data.filter=target > 20", "--set", "data.take=20"];
    let stats = lines(&check_runs(folder.path(), &arguments));
    let number = |key: &str| stats[0][key].as_u64().unwrap();
    assert_eq!((number("read"), number("selected"), number("too_long")), (200, 20, 0));
    assert_eq!(number("train") + number("held_out"), 20);
    assert!(number("filtered") > 20 && stats[0]["prompt_tokens"]["min"].as_u64().unwrap() > 5);
    let table = check_runs(folder.path(), &["data", "stats", "run.yaml"]);
    // Of held-out rows that ask the same, the first is kept.
    for expect in ["  rows read        200\n", "  held out         23\n", "  nums             177 list; 70 distinct; "]
    {
        assert!(table.contains(expect), "no {expect:?} in:\n{table}");
    }
    for (setting, expect) in [
        ("data.filter=targte > 20", "the filter names \"targte\", which no row has"),
        ("data.prompt.template=mini-r2", "did you mean \"mini_r1\"?"),
        ("data.prompt.user='{{ num }}'", "did you mean \"nums\"?"),
        ("data.take=1000", "take asks for 1000 rows, and there are 200"),
    ] {
        check_refused(folder.path(), &["data", "preview", "run.yaml", "--set", setting], &[expect]);
    }
}

/// Rows are written by strangers.
#[test]
fn a_terminal_is_not_commanded_by_rows() {
    let folder = folder(|recipe| {
        recipe["data"]["source"] = json!("file");
        recipe["data"]["path"] = json!("rows.jsonl");
        recipe["data"]["prompt"] = json!({"chat": false, "user": "{{ q }}"});
        recipe["data"]["held_out"] = json!(0.0);
        recipe["eval"]["num_prompts"] = json!(0);
    });
    let row = json!({"q": "\u{1b}[31mred\u{7}\u{9b}2J", "target": 1, "nums": [1], "\u{1b}]0;x\u{7}": 1});
    std::fs::write(folder.path().join("rows.jsonl"), format!("{row}\n")).unwrap();
    for what in ["preview", "stats"] {
        let shown = check_runs(folder.path(), &["data", what, "run.yaml"]);
        assert!(shown.chars().all(|char| !char.is_control() || char == '\n'), "{shown:?}");
        assert!(shown.contains("red") && shown.contains("target"), "{shown:?}");
    }
}

#[test]
fn puzzles_that_are_written_can_be_trained_on() {
    let folder = folder(|_| {});
    let arguments =
        ["data", "countdown", "--size", "12", "--numbers", "2..3", "--max-target", "50", "--out", "p.jsonl"];
    let said = check_runs(folder.path(), &arguments);
    assert_eq!(said, "12 puzzles in p.jsonl\n");
    let rows = lines(&std::fs::read_to_string(folder.path().join("p.jsonl")).unwrap());
    assert_eq!(rows.len(), 12);
    assert_eq!(rows[1]["nums"].as_array().unwrap().len(), 3);
    let columns: Vec<&String> = rows[0].as_object().unwrap().keys().collect();
    assert_eq!(columns, ["nums", "target", "solution"]);
    let settings = ["--set", "data.source=file", "--set", "data.path=p.jsonl", "--json"];
    let shown = check_runs(folder.path(), &[&["data", "preview", "run.yaml"], &settings[..]].concat());
    assert_eq!(lines(&shown).len(), 3);
    check_refused(
        folder.path(),
        &["data", "countdown", "--numbers", "9", "--out", "q.jsonl"],
        &["1 to 8 numbers, got 9"],
    );
}

/// Each source has its own prompts and rewards, through the generators and into the metrics.
#[test]
fn a_run_learns_from_two_sources() {
    let folder = folder(|recipe| {
        let data = &mut recipe["data"];
        let puzzles = json!({"name": "puzzles", "source": "countdown", "countdown": data["countdown"], "weight": 2});
        let chat = json!({"name": "chat", "path": "chat.csv", "rewards": ["format"], "prompt": {"template": "no"}});
        data["sources"] = json!([puzzles, chat]);
        recipe["train"]["max_steps"] = json!(3);
    });
    let questions: String = (0..40).map(|row| format!("question {row}\n")).collect();
    std::fs::write(folder.path().join("chat.csv"), format!("question\n{questions}")).unwrap();
    check_runs(folder.path(), &["launch", "run.yaml"]);
    let run = folder.path().join("runs/small");
    for step in lines(&std::fs::read_to_string(run.join("metrics.jsonl")).unwrap()) {
        for name in ["reward/puzzles/mean", "reward/chat/mean", "rewards/equation/mean", "rewards/format/mean"] {
            assert!(step[name].is_number(), "{name} in {step}");
        }
    }
    let mut of_chat = 0;
    for step in 1..=3 {
        let path = run.join(format!("completions/step_{step:06}.jsonl"));
        for completion in lines(&std::fs::read_to_string(path).unwrap()) {
            let is_chat = completion["prompt"].as_str().unwrap().starts_with("question ");
            let rewards: Vec<&String> = completion["rewards"].as_object().unwrap().keys().collect();
            let expect = if is_chat { vec!["format"] } else { vec!["format", "equation"] };
            assert_eq!(rewards, expect);
            of_chat += usize::from(is_chat);
        }
    }
    // Of three steps of six groups of four, a third.
    assert_eq!(of_chat, 24);
}

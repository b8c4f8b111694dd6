//! `aha eval` and suites during training, with a model whose answers can be told beforehand.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use aha_tests::binary::{check_refused, check_runs};
use aha_tests::golden::workspace;
use aha_tests::markov;
use aha_tests::small_run::{self, MAX_STEPS};
use serde_json::{Value, json};

/// Puzzles of 3 and 4, of which every third asks for a product.
const NUM_PUZZLES: usize = 30;

fn suites() -> Value {
    let prompt = json!({"chat": false, "user": "{{ nums }} {{ target }}\n", "assistant_prefill": "<think>"});
    json!({
        "eval": {
            "suites": {
                "puzzles": {"path": "puzzles.jsonl", "columns": {"nums": "numbers"}, "prompt": prompt,
                    "rewards": [{"function": "equation"}, {"function": "format"}], "max_completion_length": 16},
                "forms": {"countdown": {"size": 5, "numbers": 2}, "prompt": prompt,
                    "rewards": [{"function": "format"}], "max_completion_length": 16},
            }
        },
        "generator": {"kv_cache_mib": 8, "max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 16, "threads": 1}
    })
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    markov::write(&folder.path().join("model"));
    let puzzle = |index: usize| {
        let target = if index.is_multiple_of(3) { 12 } else { 7 };
        format!("{}\n", json!({"numbers": [3, 4], "target": target, "note": index}))
    };
    let puzzles: String = (0..NUM_PUZZLES).map(puzzle).collect();
    std::fs::write(folder.path().join("puzzles.jsonl"), puzzles).unwrap();
    std::fs::write(folder.path().join("suites.yaml"), suites().to_string()).unwrap();
    folder
}

const BASE: [&str; 7] = ["eval", "--model", "model", "--config", "suites.yaml", "--data-dir", "."];

fn eval(folder: &Path, arguments: &[&str]) -> Value {
    let said = check_runs(folder, &[&BASE, arguments, &["--json"]].concat());
    serde_json::from_str(&said).unwrap()
}

/// The lines of a suite in the folder `evals`.
fn items(folder: &Path, suite: &str) -> Vec<Value> {
    lines(&folder.join(format!("evals/{suite}.jsonl")))
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Figures that do not depend on the machine's mood.
fn untimed(mut summary: Value) -> Value {
    summary["suites"].as_object_mut().unwrap().values_mut().for_each(|suite| suite["seconds"] = Value::Null);
    summary
}

#[track_caller]
fn check_close(value: &Value, expect: f64) {
    assert!((value.as_f64().unwrap() - expect).abs() < 1e-9, "{value}, not {expect}");
}

#[test]
fn greedy_answers_are_counted_to_the_last_one() {
    let folder = folder();
    let summary = eval(folder.path(), &["--suite", "puzzles,forms", "--out", "evals"]);
    let puzzles = &summary["suites"]["puzzles"];
    check_close(&puzzles["accuracy"], 2.0 / 3.0);
    assert_eq!((&puzzles["prompts"], &puzzles["num_samples"]), (&json!(NUM_PUZZLES), &json!(1)));
    assert_eq!((&puzzles["mean_length"], &puzzles["truncated"]), (&json!(8.0), &json!(0.0)));
    check_close(&summary["suites"]["forms"]["accuracy"], 1.0);
    check_close(&summary["average"]["accuracy"], 5.0 / 6.0);
    let written = std::fs::read_to_string(folder.path().join("evals/summary.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&written).unwrap(), summary);

    let items = items(folder.path(), "puzzles");
    assert_eq!(items.len(), NUM_PUZZLES);
    for (index, item) in items.iter().enumerate() {
        assert_eq!((&item["prompt_id"], &item["columns"]["note"]), (&json!(index), &json!(index)));
        let completion = &item["completions"][0];
        assert_eq!(completion["text"], "</think>\n<answer>3+4</answer>");
        assert_eq!(completion["token_ids"], json!([261, 198, 262, 18, 10, 19, 263, 256]));
        assert_eq!(
            (&completion["is_right"], &completion["finish_reason"]),
            (&json!(!index.is_multiple_of(3)), &json!("stop"))
        );
        let outcome = if index.is_multiple_of(3) { "wrong" } else { "score" };
        assert_eq!(completion["rewards"][0]["outcome"], outcome);
        assert_eq!(completion["rewards"][1], json!({"function": "format", "score": 1.0, "outcome": "score"}));
    }
    let table = check_runs(folder.path(), &[&BASE[..], &["--num-prompts", "3"]].concat());
    assert!(table.contains("puzzles  3        1  66.7 %    20.8 to 93.9"), "{table}");
    assert!(table.contains("average"), "{table}");
}

/// C(n, k), for small numbers.
fn choose(n: u64, k: u64) -> f64 {
    (0..k).map(|index| (n - index) as f64 / (index + 1) as f64).product()
}

#[test]
fn samples_give_pass_at_k_and_do_not_depend_on_neighbours() {
    let folder = folder();
    let asked = ["--suite", "puzzles", "--n", "6", "--temperature", "1", "--out", "evals"];
    let summary = eval(folder.path(), &asked);
    let (puzzles, items) = (&summary["suites"]["puzzles"], items(folder.path(), "puzzles"));
    let right: Vec<u64> = items.iter().map(|item| item["right"].as_u64().unwrap()).collect();
    let mean = |value: &dyn Fn(u64) -> f64| right.iter().map(|&right| value(right)).sum::<f64>() / NUM_PUZZLES as f64;
    for k in [1, 2, 4, 6] {
        let expect = mean(&|right| 1.0 - if 6 - right < k { 0.0 } else { choose(6 - right, k) / choose(6, k) });
        check_close(&puzzles["pass_at"][k.to_string()], expect);
    }
    let accuracy = mean(&|right| right as f64 / 6.0);
    check_close(&puzzles["accuracy"], accuracy);
    // Nine of ten answer; seven of ten of those add, and two of three puzzles ask for that: 0.51 on average.
    assert!((accuracy - 0.51).abs() < 0.12, "{accuracy}");
    let completions: Vec<&Value> = items.iter().flat_map(|item| item["completions"].as_array().unwrap()).collect();
    let share = |is_counted: &dyn Fn(&Value) -> bool| {
        completions.iter().filter(|completion| is_counted(completion)).count() as f64 / completions.len() as f64
    };
    let truncated = share(&|completion| completion["finish_reason"] == "length");
    assert!(truncated > 0.02 && truncated < 0.25, "{truncated}");
    check_close(&puzzles["truncated"], truncated);
    check_close(&puzzles["unparsable"], share(&|completion| completion["rewards"][0]["outcome"] == "unparsable"));

    let read = || std::fs::read(folder.path().join("evals/puzzles.jsonl")).unwrap();
    let lines = read();
    for other in
        [["generator.max_num_seqs=1", "generator.threads=1"], ["generator.max_num_seqs=64", "generator.threads=2"]]
    {
        let other = other.map(|text| ["--set", text]).concat();
        let again = eval(folder.path(), &[&asked[..], &other].concat());
        assert_eq!(untimed(again), untimed(summary.clone()));
        assert!(read() == lines, "other completions under {other:?}");
    }
    eval(folder.path(), &[&asked[..], &["--seed", "7"]].concat());
    assert!(read() != lines, "another seed, and the same completions");
}

#[test]
fn what_cannot_be_evaluated_says_why() {
    let folder = folder();
    let refused = |arguments: &[&str], expect: &[&str]| {
        check_refused(folder.path(), &[&["eval"], arguments].concat(), expect);
    };
    let model = ["--model", "model", "--data-dir", "."];
    let check = |arguments: &[&str], expect: &[&str]| refused(&[&model, arguments].concat(), expect);
    check(&[], &["name --suite", "built in are countdown, gsm8k, aime"]);
    check(&["--suite", "gms8k"], &["eval.suites.gms8k.path: missing", "built in are countdown, gsm8k"]);
    check(&["--suite", "countdown,countdown"], &["countdown is named twice"]);
    check(&["--suite", "countdown"], &["suite countdown", "chat template", "chat: false"]);
    let format = ["--set", "eval.suites.aime={rewards: [{function: format}]}", "--suite", "aime"];
    check(&format, &["there is no ./evaluation_suite/aime.jsonl", "sail-sg/understand-r1-zero", "--data-dir"]);
    let config = ["--config", "suites.yaml"];
    check(
        &[&config[..], &["--set", "eval.suites.puzzles.pathh=x"]].concat(),
        &["eval.suites.puzzles.pathh: no such key"],
    );
    check(&[&config[..], &["--n", "4"]].concat(), &["4 greedy completions of a prompt are all equal"]);
    check(&[&config[..], &["--suite", "puzzles", "--max-tokens", "120"]].concat(), &["row 0", "longer than the 128"]);
    let mapped = |theirs: &str, expect: &[&str]| {
        let set = format!("eval.suites.puzzles.columns.nums={theirs}");
        check(&[&config[..], &["--set", &set]].concat(), expect);
    };
    mapped("numbrs", &["suite puzzles: ", "puzzles.jsonl:1 has no column \"numbrs\"", "did you mean \"numbers\"?"]);
    mapped(
        "note",
        &["suite puzzles: row 0 (from 0): reward equation: column \"nums\" must be a list of integers, got 0"],
    );
    refused(&["--run", "runs/none", "--best", "--suite", "countdown"], &["best.json", "eval.keep_best"]);
    refused(&["--suite", "countdown"], &["--model"]);
}

/// The text between a fence that begins with `language` and its end, the `index`-th of them.
fn fenced<'a>(page: &'a str, language: &str, index: usize) -> &'a str {
    let fence = format!("```{language}\n");
    let mut blocks = page.split(fence.as_str()).skip(1);
    blocks.nth(index).unwrap().split("```").next().unwrap()
}

#[test]
fn the_example_of_the_docs_prints_what_they_say() {
    let folder = folder();
    let page = std::fs::read_to_string(workspace().join("docs/evaluation.md")).unwrap();
    std::fs::write(folder.path().join("puzzles.jsonl"), fenced(&page, "jsonl", 0)).unwrap();
    std::fs::write(folder.path().join("suites.yaml"), fenced(&page, "yaml", 0)).unwrap();
    let command: Vec<&str> = fenced(&page, "sh", 0).split_whitespace().skip(1).collect();
    let said = check_runs(folder.path(), &command);
    let untimed = |table: &str| {
        let cut = |line: &str| line.rsplit_once(char::is_whitespace).map_or("", |(line, _)| line).trim().to_owned();
        table.lines().map(cut).collect::<Vec<_>>()
    };
    assert_eq!(untimed(&said), untimed(fenced(&page, "text", 0)));
    assert!(folder.path().join("evals/summary.json").is_file());
    assert_eq!(items(folder.path(), "puzzles").len(), 4);
}

#[test]
fn a_run_evaluates_suites_and_keeps_its_best_checkpoint() {
    let folder = folder();
    // The run's model is another one.
    std::fs::rename(folder.path().join("model"), folder.path().join("markov")).unwrap();
    small_run::write(folder.path());
    let mut recipe = small_run::recipe();
    recipe["eval"] = suites()["eval"].clone();
    recipe["eval"]["data_dir"] = json!(".");
    recipe["eval"]["num_prompts"] = json!(8);
    recipe["eval"]["eval_steps"] = json!(3);
    recipe["eval"]["keep_best"] = json!(true);
    recipe["eval"]["metric"] = json!("average");
    recipe["train"]["save_total_limit"] = json!(1);
    std::fs::write(folder.path().join("run.yaml"), recipe.to_string()).unwrap();
    let said = check_runs(folder.path(), &["launch", "run.yaml"]);
    assert!(said.contains("puzzles accuracy after 3 steps"), "{said}");

    let run = folder.path().join("runs/small");
    let evaluations = lines(&run.join("evaluations.jsonl"));
    let steps: Vec<u64> = evaluations.iter().map(|evaluation| evaluation["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [0, 3, 6, 9, MAX_STEPS]);
    for evaluation in &evaluations {
        assert_eq!(evaluation["prompts"], 8);
        let names: Vec<&String> = evaluation["suites"].as_object().unwrap().keys().collect();
        assert_eq!(names, ["forms", "held_out", "puzzles"]);
        let step = evaluation["step"].as_u64().unwrap();
        for (name, num_prompts) in [("puzzles", NUM_PUZZLES), ("forms", 5), ("held_out", 8)] {
            let items = lines(&run.join(format!("evaluations/step_{step:06}_{name}.jsonl")));
            assert_eq!((items.len(), &evaluation["suites"][name]["prompts"]), (num_prompts, &json!(num_prompts)));
        }
    }
    // None is right, so that the first after a step is the best; a run that goes on knows it from its newest checkpoint.
    let best = || std::fs::read_to_string(run.join("checkpoints/best.json")).unwrap();
    let best_value: Value = serde_json::from_str(&best()).unwrap();
    assert_eq!(best_value, json!({"step": 3, "metric": "average", "value": 0.0}));
    let before = best();
    std::fs::remove_file(run.join("checkpoints/best.json")).unwrap();
    check_runs(folder.path(), &["launch", "run.yaml"]);
    assert_eq!(best(), before);
    let names = std::fs::read_dir(run.join("checkpoints")).unwrap();
    let mut names: Vec<String> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["best.json", "step-10", "step-3"]);

    check_runs(folder.path(), &["export", "--run", "runs/small", "--best", "--out", "exported"]);
    let weights = |path: &str| std::fs::read(folder.path().join(path)).unwrap();
    assert!(weights("exported/model.safetensors") == weights("runs/small/checkpoints/step-3/model.safetensors"));
    let arguments = ["eval", "--run", "runs/small", "--best", "--config", "suites.yaml", "--data-dir", ".", "--json"];
    let summary: Value = serde_json::from_str(&check_runs(folder.path(), &arguments)).unwrap();
    assert_eq!(summary["model"], "runs/small/checkpoints/step-3");
    // What the checkpoint answers here is what it answered in the run.
    let there = &evaluations[1]["suites"];
    for name in ["puzzles", "forms"] {
        let figures = |suite: &Value| ["accuracy", "mean_length", "truncated"].map(|figure| suite[figure].clone());
        assert_eq!(figures(&summary["suites"][name]), figures(&there[name]), "{name}");
    }
}

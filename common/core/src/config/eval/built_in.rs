//! Suites that are known by name. Their data is not part of aha; `origin` says where it can be had.

use super::SuiteOptions;
use crate::config::{Countdown, PromptTemplate, RewardSpec};
use crate::prompt::templates::{self, Template};

/// The suites of sail-sg/understand-r1-zero, with its template for Qwen2.5-Math and its 3000 tokens.
const MATH: [&str; 5] = ["aime", "amc", "math500", "minerva", "olympiad_bench"];
const MATH_ORIGIN: &str = "https://github.com/sail-sg/understand-r1-zero has it in datasets/evaluation_suite, which \
                           datasets.load_from_disk reads and to_json writes as JSON lines";
/// The question as verl asks it, in the model's own chat template.
const GSM8K_USER: &str = "{{ question }} Let's think step by step and output the final answer after \"####\".";
const GSM8K_ORIGIN: &str = "https://github.com/openai/grade-school-math has it as grade_school_math/data/test.jsonl";

const NUM_PUZZLES: usize = 500;

/// Every name.
#[must_use]
pub fn names() -> Vec<&'static str> {
    [&["countdown", "gsm8k"], &MATH[..]].concat()
}

/// A suite by its name, and where its data can be had.
pub(super) fn of(name: &str) -> Option<(SuiteOptions, Option<&'static str>)> {
    match name {
        "countdown" => Some((countdown(), None)),
        "gsm8k" => Some((gsm8k(), Some(GSM8K_ORIGIN))),
        _ if MATH.contains(&name) => Some((math(name), Some(MATH_ORIGIN))),
        _ => None,
    }
}

fn countdown() -> SuiteOptions {
    SuiteOptions {
        countdown: Some(Countdown { size: NUM_PUZZLES, ..Countdown::default() }),
        prompt: template("mini_r1"),
        rewards: Some(vec![RewardSpec::of("equation"), RewardSpec::of("format")]),
        max_completion_length: Some(1024),
        ..SuiteOptions::default()
    }
}

fn gsm8k() -> SuiteOptions {
    SuiteOptions {
        path: Some("gsm8k/test.jsonl".into()),
        prompt: Some(PromptTemplate { user: GSM8K_USER.to_owned(), ..PromptTemplate::default() }),
        rewards: Some(vec![RewardSpec::of("gsm8k_answer")]),
        max_completion_length: Some(512),
        ..SuiteOptions::default()
    }
}

fn math(name: &str) -> SuiteOptions {
    SuiteOptions {
        path: Some(format!("evaluation_suite/{name}.jsonl").into()),
        columns: Some([("question".to_owned(), "problem".to_owned())].into()),
        prompt: template("qwen_math"),
        rewards: Some(vec![RewardSpec::of("math_accuracy")]),
        max_completion_length: Some(3000),
        ..SuiteOptions::default()
    }
}

fn template(name: &str) -> Option<PromptTemplate> {
    templates::find(name).ok().map(Template::prompt)
}

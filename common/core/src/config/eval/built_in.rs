//! Suites that are known by name. Their data is not part of aha; `origin` says where it can be had.

use super::SuiteOptions;
use crate::config::{Countdown, PromptTemplate, RewardSpec};

/// The suites of sail-sg/understand-r1-zero, with its template for Qwen2.5-Math and its 3000 tokens.
const MATH: [&str; 5] = ["aime", "amc", "math500", "minerva", "olympiad_bench"];
const MATH_ORIGIN: &str = "https://github.com/sail-sg/understand-r1-zero has it in datasets/evaluation_suite, which \
                           datasets.load_from_disk reads and to_json writes as JSON lines";
const MATH_USER: &str = "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.\
                         <|im_end|>\n<|im_start|>user\n{{ question }}<|im_end|>\n<|im_start|>assistant\n";

/// The question as verl asks it, in the model's own chat template.
const GSM8K_USER: &str = "{{ question }} Let's think step by step and output the final answer after \"####\".";
const GSM8K_ORIGIN: &str = "https://github.com/openai/grade-school-math has it as grade_school_math/data/test.jsonl";

/// As philschmid's mini-R1 asks it.
const COUNTDOWN_SYSTEM: &str = "You are a helpful assistant. You first thinks about the reasoning process in the mind and \
                                then provides the user with the answer.";
const COUNTDOWN_USER: &str = "Using the numbers {{ nums }}, create an equation that equals {{ target }}. You can use basic \
                              arithmetic operations (+, -, *, /) one or multiple times but each number can only be used \
                              once. Show your work in <think> </think> tags. And return the final equation in <answer> \
                              </answer> tags, for example <answer> (1 + 2) / 3 </answer>. Think step by step inside \
                              <think> tags.";
const COUNTDOWN_PREFILL: &str = "Let me solve this step by step.\n<think>";
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
    let prompt = PromptTemplate {
        chat: true,
        system: Some(COUNTDOWN_SYSTEM.to_owned()),
        user: COUNTDOWN_USER.to_owned(),
        assistant_prefill: Some(COUNTDOWN_PREFILL.to_owned()),
    };
    SuiteOptions {
        countdown: Some(Countdown { size: NUM_PUZZLES, ..Countdown::default() }),
        prompt: Some(prompt),
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
    let prompt = PromptTemplate { chat: false, user: MATH_USER.to_owned(), ..PromptTemplate::default() };
    SuiteOptions {
        path: Some(format!("evaluation_suite/{name}.jsonl").into()),
        columns: Some([("question".to_owned(), "problem".to_owned())].into()),
        prompt: Some(prompt),
        rewards: Some(vec![RewardSpec::of("math_accuracy")]),
        max_completion_length: Some(3000),
        ..SuiteOptions::default()
    }
}

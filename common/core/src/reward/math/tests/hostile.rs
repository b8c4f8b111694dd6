//! Texts that mean harm: none is slow, and none panics.

use std::time::{Duration, Instant};

use serde_json::json;

use super::super::clip;
use super::GOLDEN;
use crate::dataset::{Row, SplitMix64};
use crate::reward::{Answer, RewardFunction, RewardSpec};

const NUM_TEXTS: usize = if cfg!(debug_assertions) { 10_000 } else { 100_000 };
/// A millisecond is what a text takes; without optimisation, and beside other work, more.
const LIMIT: Duration = Duration::from_millis(if cfg!(debug_assertions) { 2_000 } else { 5 });

/// Parted by `¦`.
const PIECES: &str = "\
    ¦{¦}¦{{{{{{{{¦}}}}}}}}¦(¦)¦((((((((¦[¦]¦|¦||¦\\frac¦\\frac{¦\\frac{1}{¦\\frac12¦\\sqrt¦\\sqrt[¦\\sqrt{\
    ¦\\sqrt[3]{¦\\boxed¦\\boxed{¦\\fbox{¦\\left(¦\\right)¦\\begin{pmatrix}¦\\end{pmatrix}¦\\\\¦&¦\\text{\
    ¦\\text{ and }¦\\mathrm{e}¦\\pm¦\\cup¦\\in¦\\le¦<¦>¦=¦\\ne¦,¦;¦:¦.¦..¦-¦--------¦+¦*¦**¦/¦1/¦!¦!!!!¦^¦^9\
    ¦9^9^9^9¦^{9^{9^{9^{¦_¦_{¦999999999999999999999¦1000!¦2500!¦1e9999¦1e-9999¦0.0000000001¦1,000¦1 000¦{,}¦\\!\
    ¦%¦\\%¦percent¦$¦$$¦\\(¦\\)¦\\[¦\\]¦<answer>¦</answer>¦</think> <answer>¦####¦answer is¦answer:\
    ¦The final answer is ¦\n¦ ¦\t¦\u{202e}¦\u{200d}¦é¦数¦π¦²¦∞¦√¦\0¦\\¦\\\\\\¦x¦f(¦f(x)¦e¦i¦\\pi¦\\sin¦\\log_\
    ¦\\binom¦\\lfloor¦\\rfloor¦\\sum_{k=1}^{n}¦\\infty¦and¦or¦\\overline{¦'¦\\prime¦\\circ¦A¦(B)¦\\,";

/// Each repeats, to whatever length.
const REPEATED: &str = "\
    ¦\\boxed{¦\\boxed{1}¦\\boxed{1} and ¦\\boxed    ¦\\frac{¦\\frac{1}{¦\\frac1¦{¦(¦[¦|¦$¦$ ¦\\(¦\\[¦$1$, ¦9¦1 \
    ¦1 000 ¦1,000,¦1/¦9^¦^{¦-¦!¦x¦x+¦\\sin ¦\\sqrt¦\\sqrt{¦<answer>¦</answer>¦answer is ¦answer is 1 ¦####\
    ¦#### 1\n¦(A)¦((¦\n¦ ¦π¦数¦\u{202e}¦\\pm 1,¦1,¦(1,2),¦{1,¦\\begin{pmatrix}¦1&¦1\\\\¦a_{¦f(¦2500!+\
    ¦\\frac{1}{7}+¦1=¦1<¦\\text{¦nswer¦-1 ¦1-";

fn functions() -> Vec<RewardFunction> {
    let with = |name: &str, options: serde_json::Value| {
        let options = options.as_object().unwrap().clone();
        RewardFunction::new(&RewardSpec { options, ..RewardSpec::of(name) }).unwrap()
    };
    let mut functions: Vec<_> = ["auto", "boxed", "answer_tag", "latex"]
        .map(|extract| with("math_accuracy", json!({"extract": extract, "column": "gold"})))
        .into();
    functions.push(with("gsm8k_answer", json!({})));
    functions.push(with("gsm8k_answer", json!({"extract": "strict"})));
    functions.push(with("multiple_choice", json!({"column": "letter"})));
    functions
}

/// Texts of which many are one answer of up to 4 KB, and some a completion of 1 MB.
fn text(at: usize, mutable: &[String], random: &mut SplitMix64) -> String {
    let pick = |random: &mut SplitMix64, from: &str| {
        let at = random.below(from.split('¦').count() as u64) as usize;
        from.split('¦').nth(at).unwrap().to_owned()
    };
    let length = match at % 499 {
        0 => 1_000_000,
        _ => 1 << random.below(13),
    };
    let mut text = String::new();
    match at % 4 {
        0 => text = pick(random, REPEATED).repeat(length),
        1 => {
            while text.len() < length {
                text += &pick(random, PIECES);
            }
        }
        2 => {
            // Real LaTeX with a few pieces put in, taken out or doubled.
            text.clone_from(&mutable[random.below(mutable.len() as u64) as usize]);
            for _ in 0..=random.below(6) {
                let place = clip::head(&text, random.below(text.len() as u64 + 1) as usize).len();
                match random.below(3) {
                    0 => text.insert_str(place, &pick(random, PIECES)),
                    1 => text.truncate(place),
                    _ => text.extend(text.clone().get(place..)),
                }
            }
        }
        _ => {
            text = pick(random, PIECES)
                + &pick(random, REPEATED).repeat(length)
                + &pick(random, PIECES).repeat(length % 64)
        }
    }
    text.truncate(clip::head(&text, length.max(4096)).len());
    match random.below(5) {
        0 => format!("\\boxed{{{text}}}"),
        1 => format!("</think> <answer>{text}</answer>"),
        2 => format!("The answer is ${text}$"),
        _ => text,
    }
}

#[test]
fn hostile_texts_are_answered_at_once() {
    let golden: super::Golden = serde_json::from_str(&std::fs::read_to_string(GOLDEN).unwrap()).unwrap();
    let mutable: Vec<String> = golden.cases.into_iter().map(|case| case.pred).collect();
    let gold = json!({"gold": "1,2,\\frac{x}{3},\\sqrt{2},(3,4],x=5", "answer": "#### 12", "letter": "B"});
    let columns: &Row = gold.as_object().unwrap();
    let functions = functions();
    let mut random = SplitMix64::new(11);
    let mut slowest = (Duration::ZERO, String::new());
    for at in 0..NUM_TEXTS {
        let text = text(at, &mutable, &mut random);
        for (function, judge) in functions.iter().enumerate() {
            let time = || {
                let start = Instant::now();
                let score = judge.score(&Answer::of(&text), columns).score();
                assert!((0.0..=1.0).contains(&score));
                start.elapsed()
            };
            // Another process may have had the core for a while: what seems slow is timed again.
            let mut elapsed = time();
            for _ in 0..4 {
                if elapsed > slowest.0 {
                    elapsed = elapsed.min(time());
                }
            }
            if elapsed > slowest.0 {
                slowest =
                    (elapsed, format!("{function} {} {:?}", text.len(), text.chars().take(200).collect::<String>()));
            }
        }
    }
    println!("{NUM_TEXTS} texts, the slowest {:?}: {}", slowest.0, slowest.1);
    assert!(slowest.0 < LIMIT, "{slowest:?}");
}

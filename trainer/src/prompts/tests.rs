//! Order, limits and refusals of prompts, with a tokenizer of one token a character.

mod lengths;
mod sources;

use std::collections::BTreeSet;

use aha_core::config::{DataSource, RewardSpec, Sft};
use aha_core::dataset::question_id;
use serde_json::json;

use super::*;

const CHARACTERS: &str = "abcdefghijklmnopqrstuvwxyz0123456789 =?,[]+-*/().";
const EOS: TokenId = CHARACTERS.len() as TokenId;

/// A model folder, a data set of 20 rows, and the configuration that names them.
struct Fixture {
    folder: tempfile::TempDir,
    config: RunConfig,
    model: ModelConfig,
}

impl Fixture {
    fn new() -> Self {
        let rows: String =
            (0..20).map(|row| format!("{}\n", json!({"target": row, "nums": [row, 1], "x": "a"}))).collect();
        Self::with_rows(&rows)
    }

    fn with_rows(rows: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let vocab: serde_json::Map<_, _> =
            CHARACTERS.chars().enumerate().map(|(index, character)| (character.to_string(), json!(index))).collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": null,
            "added_tokens": [{"id": EOS, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
                              "normalized": false, "special": true}],
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                      "vocab": vocab, "merges": []},
        });
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), json!({"eos_token": "<end>"}).to_string()).unwrap();
        std::fs::write(folder.path().join("rows.jsonl"), rows).unwrap();

        let mut config = RunConfig::default();
        config.model.path = folder.path().to_owned();
        config.data.source = DataSource::File;
        config.data.path = Some(folder.path().join("rows.jsonl"));
        config.data.held_out = 0.3;
        config.data.prompt.chat = false;
        config.data.prompt.user = "{{ nums }} = {{ target }}?".to_owned();
        config.rewards = vec![RewardSpec::of("equation")];
        config.rollout.generation_batch_size = 12;
        config.rollout.num_generations = 4;
        config.rollout.max_completion_length = 16;
        config.sft.completion = "{{ x }}".to_owned();
        config.sft.batch_size = 5;
        let raw = json!({"model_type": "qwen2", "vocab_size": EOS + 1, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64});
        let model = ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap();
        Self { folder, config, model }
    }

    fn load(&self) -> Result<PromptSource, PromptsError> {
        PromptSource::load(&self.config, &self.model)
    }

    /// The message with which loading or checking the run fails.
    fn refusal(&self) -> String {
        self.load().and_then(|source| source.check_run()).unwrap_err().to_string()
    }
}

fn ids(prompts: &[Prompt]) -> Vec<u64> {
    prompts.iter().map(|prompt| prompt.id.0).collect()
}

#[track_caller]
fn check_refused(change: impl FnOnce(&mut Fixture), expect: &[&str]) {
    let mut fixture = Fixture::new();
    change(&mut fixture);
    let message = fixture.refusal();
    for expect in expect {
        assert!(message.contains(expect), "no {expect:?} in: {message}");
    }
}

#[test]
fn a_prompt_is_its_row_rendered_and_tokenised() {
    let source = Fixture::new().load().unwrap();
    let prompt = source.prompt(At { source: 0, row: 7 }).unwrap();
    assert_eq!((prompt.id, prompt.text.as_str()), (PromptId(7), "[7, 1] = 7?"));
    assert_eq!(prompt.token_ids.len(), prompt.text.len());
    assert_eq!(prompt.columns["target"], 7);
}

#[test]
fn an_epoch_asks_every_training_row_once_and_the_next_in_another_order() {
    let source = Fixture::new().load().unwrap();
    let num_train = source.sources[0].train.len();
    let stream: Vec<u64> = (0..30).flat_map(|step| ids(&source.step_prompts(step).unwrap())).collect();
    let epochs: Vec<&[u64]> = stream.chunks_exact(num_train).collect();
    for epoch in &epochs {
        let rows: BTreeSet<_> = epoch.iter().map(|&row| row as usize).collect();
        assert_eq!(rows, source.sources[0].train.iter().copied().collect());
    }
    assert_ne!(epochs[0], epochs[1]);
}

#[test]
fn a_step_is_a_function_of_seed_and_step() {
    let mut fixture = Fixture::new();
    let steps = |fixture: &Fixture| {
        let source = fixture.load().unwrap();
        // Backwards: no state is kept.
        (0..8).rev().map(|step| ids(&source.step_prompts(step).unwrap())).collect::<Vec<_>>()
    };
    let before = steps(&fixture);
    assert_eq!(steps(&fixture), before);
    fixture.config.run.seed += 1;
    assert_ne!(steps(&fixture), before);
}

#[test]
fn held_out_rows_are_never_trained_on_and_keep_their_order() {
    let source = Fixture::new().load().unwrap();
    let there = source.sources[0].held_out.len();
    assert!(there > 1 && there + source.sources[0].train.len() == 20);
    let held_out = ids(&source.held_out(there).unwrap());
    assert!(held_out.is_sorted());
    let trained: BTreeSet<_> = (0..20).flat_map(|step| ids(&source.step_prompts(step).unwrap())).collect();
    assert!(held_out.iter().all(|row| !trained.contains(row)));
    assert_eq!(ids(&source.held_out(2).unwrap()), held_out[..2]);
}

#[test]
fn examples_end_with_the_end_of_sequence_token() {
    let fixture = Fixture::new();
    let source = fixture.load().unwrap();
    let examples = source.supervised(3, &fixture.config.sft).unwrap();
    assert_eq!(examples.len(), 5);
    for (example, at) in examples.iter().zip(source.positions(3, 5)) {
        assert_eq!(example.prompt, source.prompt(at).unwrap().token_ids);
        assert_eq!(example.completion, [0, EOS]);
    }
    let short = Sft { max_length: 8, ..fixture.config.sft.clone() };
    let message = source.supervised(0, &short).unwrap_err().to_string();
    assert!(message.contains("row ") && message.contains("+ 2 tokens are longer than 8"), "{message}");
}

/// A template in which a turn is `[role=content]`.
fn chat(rows: &str, template: &str) -> Fixture {
    let mut fixture = Fixture::with_rows(rows);
    std::fs::write(fixture.folder.path().join("chat_template.jinja"), template).unwrap();
    fixture.config.sft.messages = Some("messages".to_owned());
    fixture.config.rewards.clear();
    fixture.config.data.held_out = 0.0;
    fixture
}

const TURNS: &str = "{% for m in messages %}[{{ m.role }}={{ m.content }}]{% endfor %}\
                     {% if add_generation_prompt %}[assistant={% endif %}";

#[test]
fn every_turn_of_the_assistant_is_learnt_and_nothing_else() {
    let said = |role: &str, content: &str| json!({"role": role, "content": content});
    let messages =
        [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d"), said("user", "e")];
    let fixture = chat(&json!({"messages": messages}).to_string(), TURNS);
    let source = fixture.load().unwrap();
    let sft = Sft { batch_size: 1, ..fixture.config.sft.clone() };
    let example = source.supervised(0, &sft).unwrap().remove(0);
    let text = |tokens: &[TokenId]| {
        tokens.iter().map(|&token| CHARACTERS.chars().nth(token as usize).unwrap()).collect::<String>()
    };
    assert_eq!(text(&example.prompt), "[user=a][assistant=");
    assert_eq!(text(&example.completion), "b][user=c][assistant=d]");
    let learnt: Vec<TokenId> =
        example.completion.iter().zip(&example.is_target).filter(|(_, is)| **is).map(|(&token, _)| token).collect();
    assert_eq!(text(&learnt), "b]d]");
}

#[test]
fn conversations_that_teach_nothing_are_named() {
    let refusal = |messages: serde_json::Value, template: &str| {
        let fixture = chat(&json!({"messages": messages}).to_string(), template);
        fixture.load().unwrap().supervised(0, &fixture.config.sft).unwrap_err().to_string()
    };
    let said = |role: &str| json!([{"role": role, "content": "a"}]);
    let message = refusal(said("user"), TURNS);
    assert!(message.contains("sft.messages: column \"messages\" has no message of the assistant"), "{message}");
    assert!(refusal(json!("a"), TURNS).contains("must be a list of objects"), "not a list");
    assert!(refusal(said("assistant"), "{{ messages[0].content }}").contains("whose first token nothing predicts"));
    // The first turn is shortened once there is another.
    let changing =
        "{% if messages | length > 2 %}[...]{% else %}[{{ messages[0].content }}]{% endif %}{{ messages[-1].content }}";
    let turns = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]);
    assert!(refusal(turns, changing).contains("turn by turn"), "changing");
}

#[test]
fn rows_that_cannot_be_asked_are_named_before_the_run() {
    check_refused(|f| f.config.data.max_prompt_length = 10, &["row ", "has 11 tokens", "data.max_prompt_length 10"]);
    check_refused(
        |f| f.model.max_position_embeddings = 26,
        &["row ", "has 11 tokens", "max_completion_length 16", "26"],
    );
    check_refused(|f| f.config.generator.max_model_len = 20, &["longer than the 20 that model and generator allow"]);
    check_refused(|f| f.model.vocab_size = 30, &["row ", "the model's vocabulary has 30"]);
    check_refused(
        |f| f.config.data.prompt.user = "{{ numbers }}".to_owned(),
        &["data.prompt: ", "\"numbers\"", "\"nums\""],
    );
    check_refused(|f| f.config.data.prompt.user = "{{ '' }}".to_owned(), &["the prompt is empty"]);
    check_refused(|f| f.config.eval.num_prompts = 19, &["eval.num_prompts asks for 19", "data.held_out"]);
    check_refused(|f| f.config.data.held_out = 1.0, &["no rows to train on", "all 20"]);
    check_refused(|f| f.config.data.prompt.chat = true, &["chat template", "data.prompt.chat"]);
    check_refused(|f| f.config.data.path = None, &["data.path: missing"]);
    check_refused(|f| drop(std::fs::remove_file(f.folder.path().join("rows.jsonl"))), &["rows.jsonl", "No such file"]);
}

#[test]
fn missing_columns_are_named_with_their_row_and_reward() {
    let rows = "{\"target\": 1, \"nums\": [1]}\n{\"target\": 2, \"numbers\": [2]}\n";
    let message = Fixture::with_rows(rows).refusal();
    for expect in ["row 1 (from 0)", "reward equation: needs the column \"nums\"", "\"numbers\"", "data.columns"] {
        assert!(message.contains(expect), "no {expect:?} in: {message}");
    }
}

#[test]
fn countdown_puzzles_are_a_source_of_their_own() {
    let mut fixture = Fixture::new();
    fixture.config.data.source = DataSource::Countdown;
    fixture.config.data.countdown.size = 40;
    let source = fixture.load().unwrap();
    source.check_run().unwrap();
    assert_eq!(source.sources[0].train.len() + source.sources[0].held_out.len(), 40);
    // Every held-out puzzle is asked once, in one order of its numbers.
    fixture.config.data.countdown.size = 2000;
    fixture.config.data.countdown.numbers = 2;
    fixture.config.data.countdown.max_number = 5;
    let source = fixture.load().unwrap();
    let rows = &source.sources[0];
    let puzzles: BTreeSet<_> = rows.held_out.iter().map(|&row| question_id(rows.row(row))).collect();
    assert_eq!(rows.held_out.len(), puzzles.len());
    assert!((1..50).contains(&puzzles.len()), "{}", puzzles.len());
    fixture.config.data.countdown.max_target = 0;
    assert!(fixture.refusal().starts_with("data.countdown: found no puzzle"));
}

#[test]
fn replacements_are_new_training_rows_and_the_same_every_time() {
    let source = Fixture::new().load().unwrap();
    let train: BTreeSet<u64> = source.sources[0].train.iter().map(|&row| row as u64).collect();
    let seen: BTreeSet<PromptId> = source.step_prompts(0).unwrap().iter().map(|prompt| prompt.id).collect();
    let drawn = |step, round, count| ids(&source.replacements((step, round), count, &seen).unwrap());
    let all = drawn(3, 1, 1000);
    assert_eq!(all.len(), train.len() - seen.len());
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len(), "no row twice");
    assert!(all.iter().all(|id| train.contains(id) && !seen.contains(&PromptId(*id))));
    assert_eq!(drawn(3, 1, 4), drawn(3, 1, 4));
    assert!(drawn(3, 1, 6) != drawn(3, 2, 6) && drawn(3, 1, 6) != drawn(4, 1, 6));
}

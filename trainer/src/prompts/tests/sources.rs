//! Several sources: shares, epochs, resuming, and what is of one source alone.

use std::collections::BTreeMap;

use aha_core::config::{PromptTemplate, Source};

use super::*;

/// A source of `num_rows` rows in the folder of the fixture.
fn source(fixture: &Fixture, name: &str, num_rows: usize, weight: f64) -> Source {
    let path = fixture.folder.path().join(format!("{name}.jsonl"));
    let row = |row| format!("{}\n", json!({"target": row, "nums": [row, 1], "x": name}));
    std::fs::write(&path, (0..num_rows).map(row).collect::<String>()).unwrap();
    Source { name: name.to_owned(), weight, path: Some(path), ..Source::default() }
}

/// The fixture with such sources alone.
fn with_sources(sources: &[(&str, usize, f64)]) -> Fixture {
    let mut fixture = Fixture::new();
    fixture.config.data.path = None;
    fixture.config.data.sources =
        sources.iter().map(|&(name, num_rows, weight)| source(&fixture, name, num_rows, weight)).collect();
    fixture
}

/// Every source gets its share, every row once an epoch, whatever the sizes and weights and wherever a run goes on.
#[test]
fn any_mixture_keeps_shares_and_epochs_and_needs_no_state() {
    let mut random = SplitMix64::new(11);
    for _ in 0..25 {
        let names = ["a", "b", "c", "d"];
        let num_sources = 1 + random.below(4) as usize;
        let mut shape = |name| (name, 8 + random.below(30) as usize, 0.25 + random.below(12) as f64 / 3.0);
        let shape: Vec<_> = names[..num_sources].iter().map(|&name| shape(name)).collect();
        let mut fixture = with_sources(&shape);
        fixture.config.rollout.generation_batch_size = 4 * (1 + random.below(9) as usize);
        let prompts = fixture.load().unwrap();
        let num_steps = 40;
        let steps: Vec<_> = (0..num_steps).map(|step| prompts.step_prompts(step).unwrap()).collect();

        // Another process, at any step.
        let resumed = fixture.load().unwrap();
        for _ in 0..5 {
            let step = random.below(num_steps);
            assert_eq!(resumed.step_prompts(step).unwrap(), steps[step as usize], "{shape:?}");
        }
        let total: f64 = shape.iter().map(|(_, _, weight)| weight).sum();
        let mut by_source: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        let mut num_asked = 0;
        for prompt in steps.iter().flatten() {
            num_asked += 1;
            by_source.entry(prompt.origin.source.clone()).or_default().push(prompt.id.0);
            for (name, _, weight) in &shape {
                let share = f64::from(num_asked) * weight / total;
                let there = by_source.get(*name).map_or(0, Vec::len) as f64;
                assert!((there - share).abs() <= num_sources as f64, "{shape:?}: {name} after {num_asked}");
            }
        }
        let mut all = BTreeSet::new();
        for (rows, (name, ..)) in prompts.sources.iter().zip(&shape) {
            let train: BTreeSet<u64> = rows.train.iter().map(|&row| rows.id(row).0).collect();
            let stream = by_source.remove(*name).unwrap_or_default();
            for epoch in stream.chunks(train.len()) {
                let asked: BTreeSet<u64> = epoch.iter().copied().collect();
                assert_eq!(asked.len(), epoch.len(), "{shape:?}: a row of {name} twice in an epoch");
                assert!(asked.is_subset(&train), "{shape:?}");
            }
            let num_before = all.len();
            all.extend(rows.all().into_iter().map(|row| rows.id(row)));
            assert_eq!(all.len() - num_before, rows.all().len(), "{shape:?}: ids of {name} are another's");
        }
    }
}

#[test]
fn a_source_has_its_own_prompt_rewards_and_held_out_share() {
    let mut fixture = with_sources(&[("a", 20, 1.0), ("b", 20, 1.0)]);
    fixture.config.rewards.push(RewardSpec::of("format"));
    let other = &mut fixture.config.data.sources[1];
    // No column that `equation` reads.
    let path = fixture.folder.path().join("b.jsonl");
    std::fs::write(path, (0..20).map(|row| format!("{{\"q\": \"q {row}\"}}\n")).collect::<String>()).unwrap();
    other.prompt = Some(PromptTemplate { chat: false, user: "{{ q }}!".to_owned(), ..PromptTemplate::default() });
    other.held_out = Some(0.0);
    let message = fixture.refusal();
    assert!(message.starts_with("source \"b\": row 0 (from 0) of the data set: reward equation: needs"), "{message}");

    fixture.config.data.sources[1].rewards = Some(vec!["format".to_owned()]);
    let prompts = fixture.load().unwrap();
    prompts.check_run().unwrap();
    assert!(prompts.sources[1].held_out.is_empty() && !prompts.sources[0].held_out.is_empty());
    let asked: Vec<Prompt> = (0..10).flat_map(|step| prompts.step_prompts(step).unwrap()).collect();
    for prompt in &asked {
        let is_other = prompt.origin.source == "b";
        assert_eq!(prompt.text.ends_with('!'), is_other);
        assert_eq!((prompt.origin.asks_for("equation"), prompt.origin.asks_for("format")), (!is_other, true));
        assert_eq!(prompt.id.0 >= 20, is_other);
    }
    fixture.config.data.sources[1].prompt.as_mut().unwrap().user = "{{ question }}".to_owned();
    let message = fixture.refusal();
    assert!(message.starts_with("source \"b\": data.prompt: ") && message.contains("\"question\""), "{message}");
    fixture.config.data.sources[1].split = Some("trian".to_owned());
    fixture.config.data.sources[1].path = Some(fixture.folder.path().to_owned());
    let message = fixture.refusal();
    assert!(message.contains("has no split \"trian\"; it has [\"train\"]; did you mean \"train\"?"), "{message}");
}

#[test]
fn sources_take_turns_in_evaluation_where_its_reward_is_theirs() {
    let mut fixture = with_sources(&[("a", 20, 1.0), ("b", 60, 9.0), ("c", 40, 1.0)]);
    fixture.config.rewards.push(RewardSpec::of("format"));
    fixture.config.data.sources[2].rewards = Some(vec!["format".to_owned()]);
    let prompts = fixture.load().unwrap();
    let [few, many] = [0, 1].map(|source| prompts.sources[source].held_out.len());
    assert!(1 < few && few < many);
    let names: Vec<String> =
        prompts.held_out(few + many).unwrap().into_iter().map(|prompt| prompt.origin.source).collect();
    let expect = ["a", "b"].repeat(few).into_iter().chain(std::iter::repeat_n("b", many - few));
    assert!(names.iter().eq(expect), "{names:?}");
    let message = prompts.held_out(few + many + 1).unwrap_err().to_string();
    assert!(message.contains(&format!("there are {}", few + many)), "{message}");
}

#[test]
fn replacements_are_of_sources_by_their_weights_until_these_are_used_up() {
    let prompts = with_sources(&[("a", 400, 1.0), ("b", 40, 3.0)]).load().unwrap();
    let drawn = |step, count| prompts.replacements((step, 1), count, &BTreeSet::new()).unwrap();
    let num_other = (0..50).flat_map(|step| drawn(step, 8)).filter(|prompt| prompt.origin.source == "b").count();
    assert!((270..330).contains(&num_other), "{num_other} of 400");
    let all = drawn(0, 10_000);
    let ids: BTreeSet<_> = all.iter().map(|prompt| prompt.id).collect();
    let there: usize = prompts.sources.iter().map(|rows| rows.train.len()).sum();
    assert_eq!((all.len(), ids.len()), (there, there));
}

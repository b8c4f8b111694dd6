//! Which rows are used, prompts that are too long, and what is told of both.

use aha_core::config::PromptTooLong;

use super::*;

/// Rows of which every fourth has a long prompt, `n` numbers them.
fn uneven() -> Fixture {
    let row = |row: usize| {
        let text = if row % 4 == 3 { "x".repeat(30) } else { format!("{row}") };
        format!("{}\n", json!({"n": row, "q": format!("{text}?"), "target": row, "nums": [row]}))
    };
    let mut fixture = Fixture::with_rows(&(0..40).map(row).collect::<String>());
    fixture.config.data.prompt.user = "{{ q }}".to_owned();
    fixture.config.data.max_prompt_length = 20;
    fixture.config.train.max_steps = 20;
    fixture
}

#[test]
fn too_long_prompts_are_an_error_dropped_or_cut() {
    let mut fixture = uneven();
    let message = fixture.refusal();
    for expect in ["row ", "has 31 tokens", "data.max_prompt_length 20", "data.prompt_too_long"] {
        assert!(message.contains(expect), "no {expect:?} in: {message}");
    }
    fixture.config.data.prompt_too_long = PromptTooLong::Drop;
    let prompts = fixture.load().unwrap();
    prompts.check_run().unwrap();
    assert_eq!(prompts.sources[0].num_too_long, 10);
    let asked: BTreeSet<_> = (0..20).flat_map(|step| ids(&prompts.step_prompts(step).unwrap())).collect();
    let held_out = prompts.sources[0].held_out.len();
    assert_eq!(asked.len() + held_out, 30);
    assert!(asked.iter().all(|row| row % 4 != 3));

    fixture.config.data.prompt_too_long = PromptTooLong::KeepLast;
    let prompts = fixture.load().unwrap();
    prompts.check_run().unwrap();
    let whole = prompts.prompt(At { source: 0, row: 4 }).unwrap();
    assert_eq!((whole.text.as_str(), whole.token_ids.len()), ("4?", 2));
    let cut = prompts.prompt(At { source: 0, row: 3 }).unwrap();
    // This tokenizer's decoder puts a space between tokens.
    assert_eq!(cut.text.replace(' ', ""), format!("{}?", "x".repeat(19)));
    assert_eq!(cut.token_ids.len(), 20);

    fixture.config.data.max_prompt_length = 1;
    fixture.config.data.prompt_too_long = PromptTooLong::Drop;
    let message = fixture.refusal();
    assert!(message.contains("40 of 40 prompts are over data.max_prompt_length 1, and dropped"), "{message}");
}

#[test]
fn filtered_rows_keep_the_numbers_of_what_was_read() {
    let mut fixture = uneven();
    fixture.config.data.filter = Some("n % 4 == 2".to_owned());
    fixture.config.data.shuffle_seed = Some(42);
    fixture.config.data.take = Some(6);
    let prompts = fixture.load().unwrap();
    let expect: Vec<u64> =
        aha_core::dataset::permutation(42, 10)[..6].iter().map(|index| u64::from(index * 4 + 2)).collect();
    let rows = &prompts.sources[0];
    assert_eq!((rows.num_read, rows.num_filtered, rows.len()), (40, 30, 6));
    let there: Vec<u64> = rows.all().into_iter().map(|row| rows.id(row).0).collect();
    assert_eq!(there, expect);
    for (row, id) in rows.all().into_iter().zip(expect) {
        assert_eq!(rows.row(row)["n"], id);
    }
    check_refused(|f| f.config.data.filter = Some("level > 2".to_owned()), &["the filter names \"level\""]);
    check_refused(|f| f.config.data.take = Some(21), &["take asks for 21 rows, and there are 20"]);
}

#[test]
fn previews_are_what_the_run_asks() {
    let fixture = Fixture::new();
    let prompts = fixture.load().unwrap();
    let shown = prompts.preview(None, 4).unwrap();
    let asked: Vec<Prompt> = (0..2).flat_map(|step| prompts.step_prompts(step).unwrap()).take(4).collect();
    for (shown, asked) in shown.iter().zip(&asked) {
        assert_eq!((shown.row as u64, shown.num_tokens), (asked.id.0, asked.token_ids.len()));
        assert_eq!(shown.text.replace(' ', ""), asked.text.replace(' ', ""));
        assert_eq!((&shown.columns, shown.rewards.as_slice()), (&asked.columns, &["equation".to_owned()][..]));
    }
    let message = prompts.preview(Some("math"), 1).unwrap_err().to_string();
    assert_eq!(message, "there is no source \"math\"; there are []");
}

#[test]
fn statistics_count_every_row() {
    let mut fixture = uneven();
    fixture.config.data.filter = Some("n < 38".to_owned());
    let stats = fixture.load().unwrap().stats().unwrap();
    let [stats] = &stats[..] else { panic!("{stats:?}") };
    assert_eq!((stats.read, stats.filtered, stats.selected, stats.too_long), (40, 2, 38, 9));
    assert_eq!((stats.train + stats.held_out, stats.duplicates), (38, 0));
    let lengths = stats.prompt_tokens;
    assert_eq!((lengths.min, lengths.p50, lengths.p90, lengths.max), (2, 3, 31, 31));
    let column = |name: &str| stats.columns.iter().find(|column| column.name == name).unwrap();
    assert_eq!((column("n").distinct, column("n").range), (38, Some([0.0, 18.5, 37.0])));
    assert_eq!(column("nums").types, [("list", 38)].into());
    assert_eq!(column("q").most_frequent, [(format!("\"{}?\"", "x".repeat(30)), 9)]);

    // The same question twice, in another order of its numbers.
    let rows = "{\"target\": 3, \"nums\": [1, 2]}\n{\"target\": 3, \"nums\": [2, 1]}\n".repeat(3);
    let rows = format!("{rows}{{\"target\": 9, \"nums\": [2, 1]}}\n{{\"target\": 8, \"nums\": [2, 1]}}\n");
    let mut fixture = Fixture::with_rows(&rows);
    fixture.config.data.held_out = 0.0;
    fixture.config.data.prompt_too_long = PromptTooLong::Drop;
    let stats = fixture.load().unwrap().stats().unwrap();
    assert_eq!((stats[0].selected, stats[0].duplicates, stats[0].held_out), (8, 5, 0));
}

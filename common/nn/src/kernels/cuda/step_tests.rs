//! Tests of [`super`] on the CPU or a GPU, against the rules in plain Rust.

use aha_core::random::sampling_uniform;

use super::super::testing::{Draws, Memory};
use super::*;

const STRIDE: usize = 300;
const NUM_ROWS: usize = 259;
const MAX_BLOCKS: usize = 4;
const BLOCK_SIZE: usize = 16;
const MAX_STOPS: usize = 3;
const LOG_LEN: usize = 6;

/// One row, by name.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Row([i32; StateField::COUNT]);

impl Row {
    fn get(&self, field: StateField) -> i32 {
        self.0[field as usize]
    }

    fn set(&mut self, field: StateField, value: i32) {
        self.0[field as usize] = value;
    }
}

/// What is sampled in a step, and what belongs to the row.
#[derive(Debug, Clone, Copy)]
struct Input<'a> {
    token: i32,
    status: i32,
    block_table: &'a [i32],
    stops: &'a [i32],
}

/// Takes one row a step on; returns the token that is logged.
fn advance(row: &mut Row, input: Input) -> Option<i32> {
    use StateField::{
        Capacity, ContextLen, MaxTokens, MinTokens, NumGenerated, NumLogged, Position, SampleIndex, SeedHigh, SeedLow,
        Slot, Token, Uniform,
    };
    let context_len = row.get(ContextLen);
    if context_len == 0 {
        return None;
    }
    row.set(ContextLen, 0);
    row.set(Slot, -1);
    let finish = |row: &mut Row, outcome: Outcome| row.set(StateField::Outcome, outcome as i32);
    if input.status != 0 {
        finish(row, if input.status == 1 { Outcome::BadLogit } else { Outcome::NothingAllowed });
        return None;
    }
    let generated = row.get(NumGenerated) + 1;
    row.set(NumGenerated, generated);
    row.set(NumLogged, row.get(NumLogged) + 1);
    if generated > row.get(MinTokens) && input.stops.contains(&input.token) {
        finish(row, Outcome::Stop);
    } else if generated >= row.get(MaxTokens) {
        finish(row, Outcome::Length);
    } else {
        let seed = u64::from(row.get(SeedHigh) as u32) << 32 | u64::from(row.get(SeedLow) as u32);
        let uniform = sampling_uniform(seed, row.get(SampleIndex) as u32, generated as u32);
        row.set(Token, input.token);
        row.set(Position, context_len);
        row.set(Uniform, uniform.to_bits() as i32);
        if context_len >= row.get(Capacity) {
            finish(row, Outcome::NeedsBlocks);
        } else if row.get(NumLogged) == LOG_LEN as i32 {
            finish(row, Outcome::LogFull);
        } else {
            let position = context_len as usize;
            row.set(ContextLen, context_len + 1);
            row.set(
                Slot,
                input.block_table[position / BLOCK_SIZE] * BLOCK_SIZE as i32 + (position % BLOCK_SIZE) as i32,
            );
        }
    }
    Some(input.token)
}

fn random_row(draws: &mut Draws) -> Row {
    let mut row = Row([0; StateField::COUNT]);
    let capacity = (1 + draws.below(MAX_BLOCKS)) * BLOCK_SIZE;
    let context_len = if draws.below(10) == 0 { 0 } else { 1 + draws.below(capacity) };
    for (field, value) in [
        (StateField::Token, draws.below(20)),
        (StateField::Position, context_len.saturating_sub(1)),
        (StateField::ContextLen, context_len),
        (StateField::Slot, draws.below(50)),
        (StateField::MinTokens, draws.below(5)),
        (StateField::MaxTokens, 1 + draws.below(9)),
        (StateField::Capacity, capacity),
        (StateField::SeedLow, draws.below(1 << 32)),
        (StateField::SeedHigh, draws.below(1 << 32)),
        (StateField::SampleIndex, draws.below(8)),
    ] {
        row.set(field, value as u32 as i32);
    }
    row
}

#[test]
fn rows_advance_by_the_rules_until_they_leave() {
    let mut draws = Draws(1);
    let mut rows: Vec<Row> = (0..NUM_ROWS).map(|_| random_row(&mut draws)).collect();
    let block_tables = draws.shuffled(NUM_ROWS * MAX_BLOCKS);
    let stops: Vec<i32> = (0..NUM_ROWS * MAX_STOPS).map(|_| draws.below(20) as i32 - 5).collect();
    let mut logs = vec![Vec::new(); NUM_ROWS];

    let mut memory = Memory::default();
    // Rows past the batch stay as they are.
    let mut state = vec![77; StateField::COUNT * STRIDE];
    for (i, row) in rows.iter().enumerate() {
        row.0.iter().enumerate().for_each(|(field, value)| state[field * STRIDE + i] = *value);
    }
    let state = memory.put(&state);
    let block_tables_ptr = memory.put(&block_tables);
    let stop_tokens = memory.put(&stops);
    let logged_tokens = memory.put(&[-7; NUM_ROWS * LOG_LEN]);
    let logged_log_probs = memory.put(&[f32::NAN; NUM_ROWS * LOG_LEN]);
    for step in 0..LOG_LEN + 1 {
        let tokens: Vec<i32> = (0..NUM_ROWS).map(|_| draws.below(20) as i32).collect();
        let status = |draw| [1, 2].get(draw).copied().unwrap_or(0);
        let statuses: Vec<i32> = (0..NUM_ROWS).map(|_| status(draws.below(60))).collect();
        let log_probs: Vec<f32> = tokens.iter().map(|token| -*token as f32).collect();
        let advance_rows = Advance {
            num_rows: NUM_ROWS,
            stride: STRIDE,
            state,
            tokens: memory.put(&tokens),
            log_probs: memory.put(&log_probs),
            statuses: memory.put(&statuses),
            block_tables: block_tables_ptr,
            max_blocks: MAX_BLOCKS,
            block_size: BLOCK_SIZE,
            stop_tokens,
            max_stops: MAX_STOPS,
            logged_tokens,
            logged_log_probs,
            log_len: LOG_LEN,
        };
        memory.run(&[advance_rows.launch()]);
        for (i, row) in rows.iter_mut().enumerate() {
            let block_table = &block_tables[i * MAX_BLOCKS..][..MAX_BLOCKS];
            let stops = &stops[i * MAX_STOPS..][..MAX_STOPS];
            logs[i].extend(advance(row, Input { token: tokens[i], status: statuses[i], block_table, stops }));
        }
        let state = memory.read::<i32>(state);
        for i in 0..STRIDE {
            let actual = std::array::from_fn(|field| state[field * STRIDE + i]);
            let expect = rows.get(i).map_or([77; StateField::COUNT], |row| row.0);
            assert_eq!(actual, expect, "row {i} after step {step}");
        }
    }
    let (tokens, log_probs) = (memory.read::<i32>(logged_tokens), memory.read::<f32>(logged_log_probs));
    for (i, log) in logs.iter_mut().enumerate() {
        log.resize(LOG_LEN, -7);
        assert_eq!(tokens[i * LOG_LEN..][..LOG_LEN], *log);
        let expect = log.iter().map(|token| if *token < 0 { f32::NAN } else { -*token as f32 });
        assert!(log_probs[i * LOG_LEN..].iter().zip(expect).all(|(a, e)| a.to_bits() == e.to_bits() || *a == e));
    }
    let outcomes: Vec<Outcome> =
        rows.iter().map(|row| Outcome::from_field(row.get(StateField::Outcome)).unwrap()).collect();
    assert!(Outcome::ALL.iter().all(|outcome| outcomes.contains(outcome)), "every outcome must occur");
}

#[test]
fn fields_have_addresses_in_the_state() {
    assert_eq!(StateField::Token.address(DevicePtr(4096), 8), DevicePtr(4096));
    assert_eq!(StateField::Slot.address(DevicePtr(4096), 8), DevicePtr(4096 + 3 * 8 * 4));
    assert_eq!(StateField::COUNT, 14);
}

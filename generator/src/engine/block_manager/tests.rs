use aha_core::ids::{PolicyVersion, TokenId};
use aha_core::random::derive_seed;

use super::*;
use crate::engine::testing::Random;

const BLOCK_SIZE: usize = 4;

fn manager(num_blocks: usize) -> BlockManager {
    BlockManager::new(num_blocks, BLOCK_SIZE)
}

fn table_of(manager: &mut BlockManager, num_tokens: usize) -> BlockTable {
    let mut table = BlockTable::default();
    assert_eq!(manager.grow(&mut table, 0..num_tokens), Ok(None));
    table
}

#[test]
fn a_group_holds_the_full_blocks_of_its_prompt_once() {
    let mut manager = manager(100);
    let leader = table_of(&mut manager, 10);
    let mut siblings: Vec<BlockTable> = (0..7).map(|_| manager.fork(&leader, 10)).collect();
    assert_eq!(manager.num_used(), 3);
    for sibling in &mut siblings {
        let copy = manager.grow(sibling, 10..11).unwrap();
        assert_eq!(copy, Some(BlockCopy { from: leader.ids()[2], to: sibling.ids()[2] }));
        assert_eq!(sibling.ids()[..2], leader.ids()[..2]);
    }
    assert_eq!(manager.num_used(), 2 + 8);
    manager.check_invariants(siblings.iter().chain([&leader])).unwrap();
}

#[test]
fn a_block_that_is_written_from_its_first_slot_is_replaced_without_a_copy() {
    let mut manager = manager(4);
    let leader = table_of(&mut manager, 8);
    let mut sibling = manager.fork(&leader, 8);
    assert_eq!(manager.grow(&mut sibling, 4..8), Ok(None));
    assert_eq!(sibling.ids()[0], leader.ids()[0]);
    assert_ne!(sibling.ids()[1], leader.ids()[1]);
}

#[test]
fn the_last_holder_of_a_block_writes_it_in_place() {
    let mut manager = manager(4);
    let leader = table_of(&mut manager, 6);
    let mut sibling = manager.fork(&leader, 6);
    manager.free(leader);
    assert_eq!(manager.num_to_grow(&sibling, &(6..7)), 0);
    assert_eq!(manager.grow(&mut sibling, 6..7), Ok(None));
}

#[test]
fn growing_beyond_the_free_blocks_changes_nothing() {
    let mut manager = manager(3);
    let mut table = table_of(&mut manager, 8);
    assert_eq!(manager.grow(&mut table, 8..13), Err(OutOfBlocks));
    assert_eq!((table.ids().len(), manager.num_free()), (2, 1));
    manager.check_invariants([&table].into_iter()).unwrap();
}

const VERSION: PolicyVersion = PolicyVersion(3);

/// The prefix of `num_blocks` blocks that begins with `first`, and goes on with the same tokens for all.
fn prefix(first: TokenId, num_blocks: usize) -> Prefix {
    (0..num_blocks as TokenId)
        .fold(Prefix::new(VERSION), |prefix, index| prefix.then(&[if index == 0 { first } else { 0 }, 0, 0, 0]))
}

/// A table of full blocks, registered, for tokens that begin with `first`.
fn registered_table(manager: &mut BlockManager, first: TokenId, num_blocks: usize) -> BlockTable {
    let table = table_of(manager, num_blocks * BLOCK_SIZE);
    (1..=num_blocks).for_each(|len| manager.register(&table, prefix(first, len)));
    table
}

/// Blocks that are found again, from the first on; they are free again afterwards.
fn num_found(manager: &mut BlockManager, first: TokenId) -> usize {
    let mut table = BlockTable::default();
    let num_found = (1..=2).take_while(|&len| manager.append_registered(&mut table, prefix(first, len))).count();
    manager.free(table);
    num_found
}

#[test]
fn what_was_free_longest_is_evicted_first_and_ends_before_starts() {
    let mut manager = manager(6);
    let tables = [1, 2].map(|first| registered_table(&mut manager, first, 2));
    tables.into_iter().for_each(|table| manager.free(table));
    assert_eq!((manager.num_free(), manager.num_cached()), (6, 4));
    let mut table = table_of(&mut manager, 8);
    assert_eq!(manager.num_cached(), 4, "blocks that hold nothing are taken first");
    let mut found = Vec::new();
    for end in [12, 16, 20, 24] {
        manager.grow(&mut table, end - 4..end).unwrap();
        found.push(prefixes_left(&manager));
    }
    assert_eq!(found, [vec![(1, 1), (2, 1), (2, 2)], vec![(2, 1), (2, 2)], vec![(2, 1)], vec![]]);
    manager.check_invariants([&table].into_iter()).unwrap();
}

/// First token and length of all that can be found.
fn prefixes_left(manager: &BlockManager) -> Vec<(TokenId, usize)> {
    let all = [(1, 1), (1, 2), (2, 1), (2, 2)];
    all.into_iter().filter(|&(first, len)| manager.registered.contains_key(&prefix(first, len))).collect()
}

#[test]
fn what_is_found_is_held_and_free_longest_last() {
    let mut manager = manager(4);
    let (old, new) = (registered_table(&mut manager, 1, 2), registered_table(&mut manager, 2, 2));
    manager.free(old);
    manager.free(new);
    assert_eq!(num_found(&mut manager, 1), 2, "the older one has been used last now");
    let table = table_of(&mut manager, 8);
    assert_eq!([num_found(&mut manager, 1), num_found(&mut manager, 2)], [2, 0]);
    let mut found = BlockTable::default();
    assert!(manager.append_registered(&mut found, prefix(1, 1)));
    assert_eq!((manager.num_used(), manager.num_cached()), (3, 1));
    let mut second = BlockTable::default();
    assert!(manager.append_registered(&mut second, prefix(1, 1)), "a held block is found too");
    assert_eq!((second.ids(), manager.num_used()), (found.ids(), 3));
    manager.check_invariants([&table, &found, &second].into_iter()).unwrap();
}

#[test]
fn of_equal_blocks_the_first_one_stays_registered() {
    let mut manager = manager(4);
    let (first, second) = (registered_table(&mut manager, 1, 1), registered_table(&mut manager, 1, 1));
    manager.free(second);
    assert_eq!(manager.num_cached(), 0);
    manager.free(first);
    assert_eq!((manager.num_cached(), num_found(&mut manager, 1)), (1, 1));
}

#[test]
fn a_block_that_is_written_or_forgotten_is_not_found() {
    let mut manager = manager(4);
    let mut table = registered_table(&mut manager, 1, 2);
    assert_eq!(manager.grow(&mut table, 6..7), Ok(None));
    assert_eq!(num_found(&mut manager, 1), 1);
    manager.unregister_all();
    assert_eq!(num_found(&mut manager, 1), 0);
    manager.free(table);
    let table = registered_table(&mut manager, 1, 2);
    manager.free(table);
    manager.unregister_all();
    assert_eq!((num_found(&mut manager, 1), manager.num_cached(), manager.num_free()), (0, 0, 4));
    manager.check_invariants(std::iter::empty()).unwrap();
}

/// What tables hold, and what each slot of the cache holds, as a model beside the manager. A slot's value is a hash
/// of its token, of the version that wrote it, and of the value before it.
#[derive(Debug)]
struct Model {
    manager: BlockManager,
    random: Random,
    tables: Vec<ModelTable>,
    slots: Vec<u64>,
    version: PolicyVersion,
    /// What the block at the end of each prefix held when it was registered.
    contents: HashMap<Prefix, Vec<u64>>,
    num_hits: usize,
    num_evictions: usize,
}

#[derive(Debug, Clone)]
struct Held {
    tokens: Vec<TokenId>,
    values: Vec<u64>,
    /// None if several versions wrote.
    version: Option<PolicyVersion>,
}

type ModelTable = (BlockTable, Held);

impl Model {
    fn new(seed: u64, num_blocks: usize) -> Self {
        Self {
            manager: manager(num_blocks),
            random: Random::new(seed),
            tables: Vec::new(),
            slots: vec![0; num_blocks * BLOCK_SIZE],
            version: PolicyVersion(0),
            contents: HashMap::new(),
            num_hits: 0,
            num_evictions: 0,
        }
    }

    /// Of an alphabet so small that sequences often begin alike.
    fn some_tokens(&mut self, most: usize) -> Vec<TokenId> {
        (0..=self.random.below(most)).map(|_| self.random.below(2) as TokenId).collect()
    }

    /// Writes tokens from a position on; false if there are not enough blocks.
    fn write(&mut self, index: usize, start: usize, tokens: &[TokenId]) -> bool {
        let Self { manager, tables, slots, version, num_evictions, .. } = self;
        let (table, held) = &mut tables[index];
        let positions = start..start + tokens.len();
        let needed = manager.num_to_grow(table, &positions);
        let (free, cached) = (manager.num_free(), manager.num_cached());
        let Ok(copy) = manager.grow(table, positions.clone()) else {
            assert!(needed > free && manager.num_free() == free);
            return false;
        };
        assert_eq!(free - manager.num_free(), needed);
        *num_evictions += cached.saturating_sub(manager.num_cached());
        if let Some(BlockCopy { from, to }) = copy {
            let from = from.0 as usize * BLOCK_SIZE;
            slots.copy_within(from..from + BLOCK_SIZE, to.0 as usize * BLOCK_SIZE);
        }
        held.tokens.truncate(start);
        held.values.truncate(start);
        held.version = held.version.filter(|written| written == version);
        for (position, &token) in positions.zip(tokens) {
            let value = value(held.values.last(), token, *version);
            slots[slot(table, position)] = value;
            held.tokens.push(token);
            held.values.push(value);
        }
        true
    }

    /// A table over what is found of some tokens, as a sequence is admitted.
    fn find(&mut self, tokens: &[TokenId]) -> ModelTable {
        let (mut table, mut prefix) = (BlockTable::default(), Prefix::new(self.version));
        for block in tokens[..tokens.len() - 1].chunks_exact(BLOCK_SIZE) {
            prefix = prefix.then(block);
            if !self.manager.append_registered(&mut table, prefix) {
                break;
            }
        }
        self.num_hits += table.ids().len();
        let tokens = tokens[..table.ids().len() * BLOCK_SIZE].to_vec();
        let mut values = Vec::new();
        tokens.iter().for_each(|&token| values.push(value(values.last(), token, self.version)));
        (table, Held { tokens, values, version: Some(self.version) })
    }

    fn add(&mut self) {
        let tokens = self.some_tokens(20);
        let found = self.find(&tokens);
        let start = found.1.tokens.len();
        self.tables.push(found);
        let youngest = self.tables.len() - 1;
        if !self.write(youngest, start, &tokens[start..]) {
            // It does not fit: it goes, and the youngest of the others is preempted.
            for (table, _) in self.tables.split_off(youngest.saturating_sub(1)) {
                self.manager.free(table);
            }
        }
    }

    fn register(&mut self, index: usize) {
        let (table, held) = &self.tables[index];
        if held.version != Some(self.version) {
            return;
        }
        let mut prefix = Prefix::new(self.version);
        for (tokens, values) in held.tokens.chunks_exact(BLOCK_SIZE).zip(held.values.chunks_exact(BLOCK_SIZE)) {
            prefix = prefix.then(tokens);
            self.manager.register(table, prefix);
            self.contents.insert(prefix, values.to_vec());
        }
    }

    fn check(&self) {
        self.manager.check_invariants(self.tables.iter().map(|(table, _)| table)).unwrap();
        for (table, Held { values, .. }) in &self.tables {
            for (position, &value) in values.iter().enumerate() {
                assert_eq!(self.slots[slot(table, position)], value);
            }
        }
        for (prefix, block) in &self.manager.registered {
            assert_eq!(self.slots[block.0 as usize * BLOCK_SIZE..][..BLOCK_SIZE], self.contents[prefix]);
        }
    }
}

fn value(before: Option<&u64>, token: TokenId, version: PolicyVersion) -> u64 {
    derive_seed(before.copied().unwrap_or(0), &[u64::from(token), version.0])
}

fn slot(table: &BlockTable, position: usize) -> usize {
    table.ids()[position / BLOCK_SIZE].0 as usize * BLOCK_SIZE + position % BLOCK_SIZE
}

#[test]
fn invariants_hold_through_100_000_random_operations() {
    let mut model = Model::new(1, 24);
    let mut counts = [0_u32; 5];
    for number in 0..100_000 {
        let operation = model.random.below(5);
        counts[operation] += 1;
        let index = model.random.below(model.tables.len().max(1));
        match operation {
            0 => model.add(),
            _ if model.tables.is_empty() => {}
            1 => {
                let len = model.tables[index].1.tokens.len();
                let start = len - model.random.below(len.min(3) + 1);
                let tokens = model.some_tokens(6);
                model.write(index, start, &tokens);
            }
            2 => {
                let (table, held) = &model.tables[index];
                let num_tokens = model.random.below(held.tokens.len() + 1);
                let (mut tokens, mut values) = (held.tokens.clone(), held.values.clone());
                tokens.truncate(num_tokens);
                values.truncate(num_tokens);
                let forked = model.manager.fork(table, num_tokens);
                let held = Held { tokens, values, version: held.version };
                model.tables.push((forked, held));
            }
            3 => model.register(index),
            _ => model.manager.free(model.tables.swap_remove(index).0),
        }
        if number % 500 == 499 {
            model.version = model.version.next();
            model.manager.unregister_all();
            assert_eq!(model.manager.num_cached(), 0);
            model.contents.clear();
        }
        model.check();
    }
    assert!(counts.iter().all(|&count| count > 15_000), "{counts:?}");
    assert!(model.num_hits > 2_000 && model.num_evictions > 1_000, "{} {}", model.num_hits, model.num_evictions);
    model.tables.into_iter().for_each(|(table, _)| model.manager.free(table));
    assert_eq!(model.manager.num_free(), 24);
    model.manager.check_invariants(std::iter::empty()).unwrap();
}

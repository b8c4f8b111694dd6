//! Which of a unit's elements a tensor of the state is kept for, seen from an owned range.

use super::super::range::Range;

/// Selected elements, kept one after the other without what lies between them.
#[derive(Debug)]
pub(super) struct Selection {
    /// The owned ones, relative to the start of what is owned, in order.
    ranges: Vec<Range>,
    /// Those of the unit before the owned ones.
    pub(super) offset: i64,
    /// Those of the unit.
    pub(super) whole_len: i64,
}

impl Selection {
    /// `selected` are ranges of the unit in ascending order, without overlap.
    pub(super) fn new(selected: &[Range], owned: Range) -> Self {
        let before = Range { start: 0, len: owned.start };
        let part = |range: &Range| Some(range.intersection(owned)?.relative_to(owned.start));
        Self {
            ranges: selected.iter().filter_map(part).collect(),
            offset: selected.iter().filter_map(|range| Some(range.intersection(before)?.len)).sum(),
            whole_len: selected.iter().map(|range| range.len).sum(),
        }
    }

    /// Owned elements.
    pub(super) fn len(&self) -> i64 {
        self.ranges.iter().map(|range| range.len).sum()
    }

    /// Every range as the owned elements have it, and where the kept tensor has the same elements.
    pub(super) fn pairs(&self) -> impl Iterator<Item = (Range, Range)> {
        self.ranges.iter().scan(0, |start, &range| {
            let kept = Range { start: *start, len: range.len };
            *start += range.len;
            Some((range, kept))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: i64, len: i64) -> Range {
        Range { start, len }
    }

    #[test]
    fn shards_of_a_selection_lie_one_after_the_other() {
        let selected = [range(2, 3), range(7, 1), range(9, 6)];
        let shards: Vec<Selection> = (0..3).map(|rank| Selection::new(&selected, range(5 * rank, 5))).collect();
        let pairs: Vec<Vec<_>> = shards.iter().map(|shard| shard.pairs().collect()).collect();
        assert_eq!(pairs[0], [(range(2, 3), range(0, 3))]);
        assert_eq!(pairs[1], [(range(2, 1), range(0, 1)), (range(4, 1), range(1, 1))]);
        assert_eq!(pairs[2], [(range(0, 5), range(0, 5))]);
        assert_eq!(shards.iter().map(|shard| shard.offset).collect::<Vec<_>>(), [0, 3, 5]);
        assert_eq!(shards.iter().map(Selection::len).collect::<Vec<_>>(), [3, 2, 5]);
        assert!(shards.iter().all(|shard| shard.whole_len == 10));
    }
}
